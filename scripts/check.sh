#!/usr/bin/env bash
# Style, types and known holes of the dependencies: ruff, mypy, scripts/audit.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
setup dev
ruff check .
ruff format --check .
mypy
# Nothing that the oldest Python or Windows lacks without a stand-in.
mypy --python-version 3.10 --platform win32 --no-warn-unreachable --cache-dir .mypy_cache/win32 gptcli
python scripts/audit.py
