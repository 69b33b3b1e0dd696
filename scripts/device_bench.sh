#!/usr/bin/env bash
# Measure the package on a GPU that is at hand for minutes; see docs/speed.md.
#
#   scripts/device_bench.sh wheels       where there is a network: fetch into .whl/ what the GPU's machine may lack
#   scripts/device_bench.sh              there: install that aside, and measure for at most eight minutes
#   scripts/device_bench.sh --rehearse   the same on the CPU, with tiny networks
#
# PYTHON is the interpreter, PYTHON_VERSION that of the GPU's machine, WHEELS the folder of what is fetched, OUT that of
# what is written.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
budget=470

if [ "${1:-}" = wheels ]; then
  platforms=(--platform=manylinux_2_28_x86_64 --platform=manylinux_2_24_x86_64 --platform=manylinux_2_17_x86_64 --platform=manylinux2014_x86_64)
  exec "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "$wheels" 'diffusers>=0.37' 'importlib_metadata<9' msgspec torchao
fi

if compgen -G "$wheels/*.whl" > /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -u -m benchmarks.device --out "${OUT:-demo/device_bench}" --seconds $((budget - SECONDS)) "$@"
