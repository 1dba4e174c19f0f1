#!/usr/bin/env bash
# A job on several nodes of a SLURM cluster, from the folder of run_train.sh:
#     sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh --job-config my_job.toml
# Options of sbatch come before the script, what follows goes to run_train.sh (docs/howto/several_nodes.md).
#SBATCH --job-name=titan_moe_lb
#SBATCH --output=%x-%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail
if [ ! -x run_train.sh ]; then
    echo "slurm.sh: error: $PWD has no run_train.sh: call sbatch from its folder" >&2
    exit 2
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES=$SLURM_JOB_NUM_NODES
# Of two jobs on the same nodes each has a port and an id of its own.
export RDZV_ENDPOINT=${RDZV_ENDPOINT:-$first:$((29500 + SLURM_JOB_ID % 1000))}
export RDZV_ID=${RDZV_ID:-$SLURM_JOB_ID}
# shellcheck disable=SC2016  # SLURM_NODEID is known on each node alone
exec srun bash -c 'NODE_RANK=$SLURM_NODEID exec ./run_train.sh "$@"' run_train.sh "$@"
