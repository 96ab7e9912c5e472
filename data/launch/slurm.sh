#!/bin/bash
# Training over several machines under Slurm (docs/scale.md): sbatch slurm.sh my.yaml [--set KEY=VALUE ...]
# The run directory must be seen by all nodes at the same path. Stages before training use the first node alone: bring a run up to
# them with `congrad run my.yaml --until select` in a job of one node (docs/slurm.md), or use execution.on: ray.
#SBATCH --job-name=congrad
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NNODES
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun itself no longer takes over --cpus-per-task

# One command a node; each starts a process per GPU for training.
exec srun bash -c 'RANK=$SLURM_PROCID exec congrad run "$@"' congrad "$@" \
    --set train.nodes=0 --set train.processes=0 --set execution.peer_minutes=10 --set execution.grace_seconds=90
