#!/bin/bash
# sbatch configs/cluster/slurm.sh runs/big --config configs/sft/image.yaml --config configs/strategy/fsdp.yaml
#
# Before the time is up SLURM sends SIGUSR1 to all processes: they write a checkpoint, and the first one puts the job back into the
# queue. Started again, also after a machine has failed, it goes on from the newest whole checkpoint of the run folder, the first
# argument, for which it waits three minutes where a machine that failed still has it: the lease of an NFS server is shorter. Where
# the lock outlives them (NFSv3 keeps it until that machine is back), the job ends with "in use": delete .lock there, and submit it
# again. scancel ends it for good. Lightning finds the processes and the address of the first one by SLURM's variables.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
run=$1
shift
resume=()
if [ -e "$run/config.yaml" ]; then resume=(--ckpt_path last); fi
exec srun --kill-on-bad-exit=1 python train.py fit "$@" --trainer.default_root_dir "$run" \
    --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" "${resume[@]}"
