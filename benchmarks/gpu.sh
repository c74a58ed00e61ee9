#!/bin/sh
# Exactness, time and memory on one NVIDIA GPU, without Axolotl: needs Python 3.12 with torch,
# transformers, peft and accelerate. What is missing is installed from the folder `wheels/` next to
# this script, if there is one, into a folder of its own. Options go to gpu.py.
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python3}"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
if ls "$here"/wheels/*.whl >/dev/null 2>&1; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$here"/wheels/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" -c 'import accelerate, peft, torch, transformers'
"$python" "$here/gpu.py" --json "$here/results/gpu.jsonl" "$@"
