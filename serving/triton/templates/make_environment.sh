#!/usr/bin/env bash
# Usage: make_environment.sh FOLDER [EXTRA]
# Makes the Python environment that the models run in. EXTRA: cpu (default), gpu, tensorrt or tensorrt-rtx.
#   PYTHON   the interpreter; its version must be that of the server's Python backend.  [python3]
#   SOURCE   what to install: a requirement, a wheel, or a checkout.  [starling-llm==@{version}]
#   SERVER=1 puts the tritonserver of the nvidia-pytriton wheel into it as well, for start.sh.
set -euo pipefail
FOLDER=${1:?give the folder of the new environment}
EXTRA=${2:-cpu}
SOURCE=${SOURCE:-starling-llm==@{version}}
PYTHON=${PYTHON:-python3}
case $SOURCE in
*==*) NAME=${SOURCE%%==*} WHAT="$NAME[$EXTRA]==${SOURCE#*==}" ;;
*) WHAT="$SOURCE[$EXTRA]" ;;
esac
"$PYTHON" -m venv "$FOLDER"
# numpy 2 breaks the Python backend of Triton 24.10: models load and then return corrupt data.
PACKAGES=("$WHAT" "numpy<2")
[ "${SERVER:-0}" = 1 ] && PACKAGES+=("nvidia-pytriton==0.7.0")
"$FOLDER/bin/python" -m pip install --quiet "${PACKAGES[@]}"
echo "$FOLDER is ready: $("$FOLDER/bin/python" --version), $("$FOLDER/bin/python" -m pip freeze | grep -i -E '^(starling-llm|numpy|onnxruntime|tensorrt)' | tr '\n' ' ')"
