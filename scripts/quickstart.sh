#!/usr/bin/env bash
# From a clean clone to a trained adapter: installs into .venv, then runs `posttrain quickstart` with the given
# arguments (--fast, --help, ...).
source "$(dirname "${BASH_SOURCE[0]}")/_install.sh"

install_posttrain embedded,plots constraints-quickstart.txt
exec "$VENV/bin/posttrain" quickstart "$@"
