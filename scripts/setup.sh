# Sourced by quickstart.sh and test.sh: makes .venv with the pinned versions when it is missing or out of date.

ready=.venv/ready
wanted=$(cat pyproject.toml scripts/constraints.txt | sha256sum)
if [ "$(cat $ready 2>/dev/null)" != "$wanted" ]; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: $("$python" --version 2>&1) is too old; diffloop needs Python 3.11 or newer: PYTHON=/path/to/python3.11 $0" >&2
        exit 1
    fi
    echo "Setting up .venv: a few minutes and about 6 GB, once"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable '.[dev]'
    echo "$wanted" > $ready
fi
