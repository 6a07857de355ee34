#!/usr/bin/env bash
# Makes an environment with Flower, whose pins are not those of constraints.txt, and prints its Python. It has Flower's
# own packages; all others, torch among them, it finds in the main environment, which is read and never changed.
#   scripts/flower_env.sh [FOLDER]   in .venv-flower at the top, or in FOLDER
# The main environment is .venv, made where it is missing, or that of the Python which POSTTRAIN_MAIN_PYTHON names.
source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"

folder="${1:-$ROOT/.venv-flower}"
lock="$ROOT/constraints-flower.txt"
main="${POSTTRAIN_MAIN_PYTHON:-}"
if [ -z "$main" ]; then
    install_posttrain test constraints.txt >&2
    main="$VENV/bin/python"
fi
# Where the main environment has its packages: of an environment within another, of both.
packages="$("$main" -c 'if True:
    import site, sysconfig
    print("\n".join(dict.fromkeys([sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])))')" ||
    fail "$main is no Python that runs; name another in POSTTRAIN_MAIN_PYTHON."
"$main" -c 'import torch, trl' >/dev/null 2>&1 ||
    fail "$main has no torch and trl; make the main environment first (scripts/test.sh)."

wanted="$({ cat "$lock"; echo "$folder" "$packages" "$ROOT"; } | cksum)"
if [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Making $folder with Flower; that takes half a minute." >&2
    [ ! -e "$folder" ] || [ -e "$folder/pyvenv.cfg" ] || fail "$folder is there and is no environment; name a new one."
    rm -rf "$folder"
    "$main" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
        --requirement "$lock" >&2
    own="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
    printf '%s\n%s\n' "$packages" "$ROOT" >"$own/posttrain-main.pth"
    "$folder/bin/python" -c 'import flwr, torch, trl, posttrain' ||
        fail "$folder does not import Flower beside the main environment's packages."
    echo "$wanted" >"$folder/installed"
fi
echo "$folder/bin/python"
