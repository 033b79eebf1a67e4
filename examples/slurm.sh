#!/bin/bash
# A run on two machines of eight GPUs each: sbatch examples/slurm.sh
#
# All machines see the same folders. Slurm sends SIGTERM two minutes before the time is over: the run
# saves itself, and the same command goes on from there.
#SBATCH --job-name=distil
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:29500" \
    -m optima_fast.train --task vqa --data /data/vqa --out /runs/vqa "$@"
