#!/usr/bin/env bash
# Style and types: ruff and mypy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
setup dev
ruff check .
ruff format --check .
mypy
