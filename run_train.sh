#!/usr/bin/env bash
# Train: ./run_train.sh --module deepseek_v3        (--help shows what can be set)
# Sets up .venv on first use. NGPU, MODULE, CONFIG, LOG_RANK, COMM_MODE, NNODES, NODE_RANK,
# RDZV_ENDPOINT and RDZV_ID: see titan_moe_lb/run/launch.py.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"${PYTHON:-python3}" "$here/bootstrap.py"
exec "$here/.venv/bin/python" -m titan_moe_lb.cli train "$@"
