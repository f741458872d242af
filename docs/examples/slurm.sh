#!/bin/bash
# Two machines with 8 GPUs each, one launcher on each; the checkout must lie on a file system that both see.
# DVC runs on the login node or in a job of its own: this script trains one run, by the plan that is there.
#   sbatch docs/examples/slurm.sh align@spo
#SBATCH --job-name=attune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120

set -euo pipefail
export DVC_STAGE=$1  # says which run; as an argument torchrun would read it as its own
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PYTHONPATH=src OMP_NUM_THREADS=4
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$head:29500" \
  -m "attune.stages.${DVC_STAGE%@*}"
