#!/bin/sh
# One run on two hosts of eight GPUs. Send it off with: sbatch examples/slurm.sh run.yaml
#
# The config, the model, run.workdir and COMPRESS_CACHE have to lie on a file system that
# all hosts see. Sent again after a time limit it goes on where it stopped (--resume).
#SBATCH --job-name=compress
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -eu
CONFIG=${1:?usage: sbatch slurm.sh CONFIG}
GPUS=${SLURM_GPUS_ON_NODE:-8}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export COMPRESS_CACHE="${COMPRESS_CACHE:-$PWD/runs/cache}"
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / GPUS))

# --kill-on-bad-exit: a host that fails ends the others.
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST:29500" --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 0 \
    -m compress run "$CONFIG" --resume
