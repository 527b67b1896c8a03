# Sourced by the other scripts: `setup EXTRA...` makes an environment that has the project with these
# extras, and puts its commands first in PATH. GPT_VENV chooses the environment (default .venv),
# PYTHON the interpreter that makes it. What is already installed is not installed again.

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer found${PYTHON:+ as PYTHON=$PYTHON}; install one or set PYTHON=/path/to/python"
}

# Everything that decides what gets installed: a change of it means installing again.
fingerprint() {
    "$1" -c '
import hashlib, os, sys
digest = hashlib.sha256(os.getcwd().encode())
for path in ("pyproject.toml", "setup.py", "scripts/constraints.txt"):
    if os.path.exists(path):
        digest.update(open(path, "rb").read())
print(digest.hexdigest())'
}

run_pip() {
    local log
    log=$(mktemp)
    if ! "$venv/bin/python" -m pip install -q --disable-pip-version-check \
        -c scripts/constraints.txt "$@" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        fail "pip could not install: $* (above: the end of its output)"
    fi
    rm -f "$log"
}

make_environment() {
    if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        fail "$venv exists and is no Python environment; set GPT_VENV to another directory"
    fi
    local python
    python=$(find_python) || exit 1
    echo "setup: making $venv with $("$python" --version)" >&2
    "$python" -m venv --clear "$venv" >&2 ||
        fail "'$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv"
}

# Prints a line only if it installs. The stamp's first line is a fingerprint, the second the extras.
install() {
    local stamp="$venv/gptcli-setup" print have="" wanted extra
    make_environment
    print=$(fingerprint "$venv/bin/python")
    if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$print" ]; then
        have=$(sed -n 2p "$stamp")
    else
        rm -f "$stamp"
    fi
    wanted=$have
    for extra in "$@"; do
        case " $wanted " in *" $extra "*) ;; *) wanted="${wanted:+$wanted }$extra" ;; esac
    done
    if [ -f "$stamp" ] && [ "$wanted" = "$have" ]; then
        echo "setup: $venv is up to date" >&2
        return
    fi
    echo "setup: installing the project${wanted:+ with $wanted} into $venv (minutes at first)" >&2
    # torch first and alone: where pip is set up with a CPU-only build, it is the one chosen.
    run_pip "$(grep '^torch==' scripts/constraints.txt)"
    run_pip -e ".${wanted:+[${wanted// /,}]}"
    printf '%s\n%s\n' "$print" "$wanted" >"$stamp"
}

setup() {
    venv=${GPT_VENV:-.venv}
    case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
    # One at a time where flock exists: two scripts may be started side by side.
    (
        if command -v flock >/dev/null; then flock 9; fi
        install "$@"
    ) 9<pyproject.toml || exit 1
    PATH=$venv/bin:$PATH
    export PATH
    hash -r
}
