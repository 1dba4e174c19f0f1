#!/usr/bin/env bash
# Run the tests: ./run_tests.sh [--device cuda] [PYTEST ARGUMENTS]      (see docs/howto/run_the_tests.md)
# Sets up .venv on first use. Without arguments: all, shared out to two processes, because the
# ranks of one test spend half their time waiting for each other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
"${PYTHON:-python3}" bootstrap.py test
[ $# -gt 0 ] || set -- -n 2 --dist worksteal
exec .venv/bin/python -m pytest "$@"
