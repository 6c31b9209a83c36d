#!/usr/bin/env bash
# Usage: ENVIRONMENT=FOLDER start.sh [options of tritonserver]
# Starts the tritonserver of the nvidia-pytriton wheel on this repository, on loopback, in the foreground.
#   ENVIRONMENT  made by: SERVER=1 make_environment.sh FOLDER
#   HTTP, GRPC, METRICS  the ports.  [8000, 8001, 8002]
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ENVIRONMENT=$(cd "${ENVIRONMENT:?the environment, made by make_environment.sh with SERVER=1}" && pwd)
read -r PACKAGES VERSION LIBRARIES < <("$ENVIRONMENT/bin/python" -c '
import sys, sysconfig
print(sysconfig.get_paths()["purelib"], "%d.%d" % sys.version_info[:2], sysconfig.get_config_var("LIBDIR"))')
SERVER=$PACKAGES/pytriton/tritonserver
[ -x "$SERVER/bin/tritonserver" ] || { echo "error: $ENVIRONMENT has no nvidia-pytriton: make it with SERVER=1" >&2; exit 2; }
STUB=$SERVER/python_backend_stubs/$VERSION/triton_python_backend_stub
[ -f "$STUB" ] || { echo "error: this tritonserver has no Python backend for Python $VERSION" >&2; exit 2; }
# The Python backend with the stub of this Python. Copies: tritonserver refuses libraries that lead out of the folder.
BACKENDS=$ENVIRONMENT/triton-backends
if [ ! -f "$BACKENDS/python/triton_python_backend_stub" ]; then
  DRAFT=$BACKENDS.$$
  mkdir -p "$DRAFT/python"
  install -m755 "$SERVER/backends/python/libtriton_python.so" "$STUB" "$DRAFT/python/"
  install -m644 "$SERVER/backends/python/triton_python_backend_utils.py" "$DRAFT/python/"
  mv -T "$DRAFT" "$BACKENDS" 2>/dev/null || rm -rf "$DRAFT" # another start was quicker
fi
export PATH=$ENVIRONMENT/bin:$PATH # the stub finds its packages by the first python3
export LD_LIBRARY_PATH=$PACKAGES/nvidia_pytriton.libs:$LIBRARIES${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
GPU_METRICS=true
command -v nvidia-smi >/dev/null || GPU_METRICS=false
# The prefix keeps this server's shared memory apart from what a killed one has left.
exec "$SERVER/bin/tritonserver" --disable-auto-complete-config --model-repository="$REPOSITORY" --backend-directory="$BACKENDS" \
  --http-address=127.0.0.1 --http-port="${HTTP:-8000}" --grpc-address=127.0.0.1 --grpc-port="${GRPC:-8001}" \
  --metrics-address=127.0.0.1 --metrics-port="${METRICS:-8002}" --allow-gpu-metrics=$GPU_METRICS \
  --exit-timeout-secs=10 --backend-config="python,shm-region-prefix-name=starling$$" "$@"
