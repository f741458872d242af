#!/bin/bash
# Two machines with 8 GPUs each, one launcher on each; the checkout must lie on a file system that both see.
# DVC runs on the login node or in a job of its own, and has run the stages before; this script trains one run.
#   sbatch docs/examples/slurm.sh align spo
#   sbatch docs/examples/slurm.sh train_preference
#SBATCH --job-name=attune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120

set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PYTHONPATH=src OMP_NUM_THREADS=4
export DVC_STAGE="$1${2:+@$2}"   # the run; torchrun would take `--run` for an option of its own
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$head:29500" \
  -m "attune.stages.$1"
