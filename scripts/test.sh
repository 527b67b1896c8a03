#!/usr/bin/env bash
# Runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
setup test tables clean hf gguf tasks serve constrain
# Files side by side: the tests of one share what is slow to make.
python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
