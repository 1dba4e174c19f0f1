#!/usr/bin/env bash
# Run the tests: ./run_tests.sh [--device cuda] [PYTEST ARGUMENTS]      (see docs/tests.md)
# Sets up .venv on first use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
"${PYTHON:-python3}" bootstrap.py test
exec .venv/bin/python -m pytest "$@"
