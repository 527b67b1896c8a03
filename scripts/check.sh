#!/usr/bin/env bash
# Style, types and known holes of the dependencies: ruff, mypy, scripts/audit.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
setup dev
ruff check .
ruff format --check .
mypy
python scripts/audit.py
