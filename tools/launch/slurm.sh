#!/bin/bash
# One run on a SLURM cluster, a process a GPU:
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 tools/launch/slurm.sh --config configs/dit_xl2_imagenet256.py --workdir runs/xl
# The workdir lies on a file system that all nodes see. Two minutes before the time limit SLURM sends SIGTERM: the run saves and
# ends, and goes back into the queue, as it does when a node is lost.
#SBATCH --job-name=jdiff
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
# --gpus-per-task would number every process's GPU 0, where JAX takes the one of the process's number on its node
srun --kill-on-bad-exit=0 python launch.py "$@"
code=$?
case $code in
    0 | 1 | 2) ;; # complete, or a mistake that the next start would repeat
    *) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $code
