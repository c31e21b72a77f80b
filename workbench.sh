#!/bin/sh
# From a fresh clone to a running `workbench`, with nothing but Python 3.11 or newer: the environment lives in .venv
# beside this file and is renewed when pyproject.toml or constraints.txt change.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
venv="$here/.venv"

usage() {
    cat <<'EOF'
./workbench.sh quickstart [OPTIONS]   run studies/quickstart.yaml; results go to ./runs
./workbench.sh test [PYTEST OPTIONS]  run the tests
./workbench.sh setup                  only install, with the tools for tests and style
./workbench.sh COMMAND ...            any command of workbench, e.g. dashboard, schema, --help

PYTHON=/path/to/python chooses the Python that .venv is made with.
EOF
}

make_venv() {
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        found=$("$python" --version 2>&1) || found="not to be found"
        echo "workbench needs Python 3.11 or newer; \`$python\` is: $found." >&2
        echo "Name another one: PYTHON=/path/to/python3.11 ./workbench.sh ..." >&2
        exit 1
    fi
    "$python" -m venv --clear "$venv"
}

# Install the package with its extra $1 ("" or "[test]"), unless that was done for these very files in this very place.
install() {
    state=$(cd "$here" && pwd && cksum pyproject.toml constraints.txt)
    [ "$(cat "$venv/installed$1" 2>/dev/null)" != "$state" ] || return 0

    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    echo "Installing workbench$1 into $venv ..." >&2
    # pip fetches torch, since only pip knows which build (CPU, CUDA) this machine is configured for; uv, which is many
    # times faster, keeps that one and does the rest. Where uv cannot reach the packages, pip does it all.
    (
        cd "$here"
        .venv/bin/python -m pip install --no-deps --no-compile -c constraints.txt torch uv
        .venv/bin/uv pip install -p .venv/bin/python -c constraints.txt -e ".$1" ||
            .venv/bin/python -m pip install -c constraints.txt -e ".$1"
    ) >&2
    echo "$state" >"$venv/installed"
    echo "$state" >"$venv/installed$1"
}

case "${1-}" in
"" | help | -h) usage ;;
setup) install "[test]" ;;
test)
    shift
    install "[test]"
    cd "$here"
    # as many processes as tests/conftest.py says, one thread a process: quicker, and the same results on every machine
    OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n auto "$@"
    ;;
quickstart)
    shift
    install ""
    WORKBENCH_COMMAND=./workbench.sh exec "$venv/bin/workbench" sweep "$here/studies/quickstart.yaml" "$@"
    ;;
*)
    install ""
    WORKBENCH_COMMAND=./workbench.sh exec "$venv/bin/workbench" "$@"
    ;;
esac
