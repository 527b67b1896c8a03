#!/usr/bin/env bash
# Runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
setup test tables clean hf gguf
python -m pytest "$@"
