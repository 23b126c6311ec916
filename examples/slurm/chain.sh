#!/usr/bin/env bash
# Submits a run as a chain of N jobs, each of which waits for the one before: for clusters that do not requeue.
#
#   examples/slurm/chain.sh N [sbatch option ...] SCRIPT [argument ...]
#   examples/slurm/chain.sh 10 examples/slurm/train.sbatch examples/configs/bagel_7b_pt.yaml run.dir=/data/pt
#
# Every job goes on from the newest checkpoint (run.resume=auto). A job that finds the run finished ends at once; a job
# that fails ends the chain.
set -euo pipefail

if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
count=$1
shift
export REQUEUE=0
job=
for ((link = 0; link < count; link++)); do
    job=$(sbatch --parsable ${job:+--dependency=afterok:"$job" --kill-on-invalid-dep=yes} "$@")
    echo "$job"
done
