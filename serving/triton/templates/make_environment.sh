#!/usr/bin/env bash
# Usage: make_environment.sh FOLDER [EXTRA]
# Makes the Python environment that the models run in. EXTRA: cpu (default), gpu, tensorrt or tensorrt-rtx.
#   PYTHON   the interpreter; its version must be that of the server's Python backend.  [python3]
#   SOURCE   what to install: a checkout, a wheel, or a requirement.  [@{source}]
#   SERVER=1 puts the tritonserver of the nvidia-pytriton wheel into it as well, for start.sh.
set -euo pipefail
FOLDER=${1:?give the folder of the new environment}
EXTRA=${2:-cpu}
DEFAULT=@{source}
SOURCE=${SOURCE:-$DEFAULT}
PYTHON=${PYTHON:-python3}
case $SOURCE in
*" @ "*) WHAT="${SOURCE%% @ *}[$EXTRA] @ ${SOURCE#* @ }" ;;
*==*) WHAT="${SOURCE%%==*}[$EXTRA]==${SOURCE#*==}" ;;
*/* | *.whl)
  [ -e "$SOURCE" ] || { echo "error: $SOURCE does not exist: give SOURCE, a checkout of Starling or a wheel of it" >&2; exit 2; }
  WHAT="$(cd "$(dirname "$SOURCE")" && pwd)/$(basename "$SOURCE")[$EXTRA]"
  ;;
*) WHAT="$SOURCE[$EXTRA]" ;;
esac
[ ! -e "$FOLDER" ] || { echo "error: $FOLDER exists already: give the folder of a new environment, or remove it" >&2; exit 2; }
READY=0
trap '[ $READY = 1 ] || { rm -rf "$FOLDER"; echo "error: $FOLDER was not made" >&2; }' EXIT
"$PYTHON" -m venv "$FOLDER"
# numpy 2 breaks the Python backend of Triton 24.10: models load and then return corrupt data.
PACKAGES=("$WHAT" "numpy<2")
[ "${SERVER:-0}" = 1 ] && PACKAGES+=("nvidia-pytriton==0.7.0")
"$FOLDER/bin/python" -m pip install --quiet "${PACKAGES[@]}"
READY=1
echo "$FOLDER is ready: $("$FOLDER/bin/python" --version), $("$FOLDER/bin/python" -m pip freeze | grep -i -E '^(starling-llm|numpy|onnxruntime|tensorrt)' | tr '\n' ' ')"
