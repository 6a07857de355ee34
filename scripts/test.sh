#!/usr/bin/env bash
# Runs the tests in .venv, installing what they need first.
#   scripts/test.sh              the core suite, in two processes
#   scripts/test.sh --slow       everything, in one: slow tests fill the cores by themselves
#   scripts/test.sh --slow-only  only what --slow adds
# Other arguments go to pytest; `-n 0` keeps the core suite in one process, as a debugger needs.
# Real data is read from POSTTRAIN_TEST_DATA, or from ../shared/data if that exists.
source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"

# A file's tests stay together: what one of them trained, launched or built serves the others. Files come in the order
# of their names: by number of tests, as is the default, some of the longest would be the last, one worker idle.
select=(-n 2 --dist loadfile --no-loadscope-reorder -m "not slow")
arguments=()
for argument in "$@"; do
    case "$argument" in
        --slow) select=() ;;
        --slow-only) select=(-m slow) ;;
        *) arguments+=("$argument") ;;
    esac
done

install_posttrain test constraints.txt

compiler="${CXX:-c++}"
command -v "$compiler" >/dev/null ||
    fail "the DeepSpeed tests compile a small extension and found no C++ compiler ($compiler). Install one (Debian: apt-get install g++) or name it in CXX."
command -v ninja >/dev/null || fail "the DeepSpeed tests need ninja, which should be in $VENV/bin; remove $VENV and run again."
include="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
[ -e "$include/Python.h" ] ||
    fail "the DeepSpeed tests compile against Python.h, missing from $include. Install the headers (Debian: apt-get install python3-dev)."

if [ -z "${POSTTRAIN_TEST_DATA:-}" ] && [ -d "$ROOT/../shared/data" ]; then
    POSTTRAIN_TEST_DATA="$(cd "$ROOT/../shared/data" && pwd)"
    export POSTTRAIN_TEST_DATA
fi
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1

cd "$ROOT"
exec "$VENV/bin/python" -m pytest ${select[@]+"${select[@]}"} ${arguments[@]+"${arguments[@]}"}
