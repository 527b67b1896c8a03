#!/usr/bin/env bash
#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
# Trains on all GPUs of the job's machines. Before the time is up, or when the job is preempted, the
# run is saved and the job goes back to the queue; there it goes on where it was.
#
#   sbatch --nodes=4 scripts/slurm.sh gpt2-124m --set training.save_minutes=10
#
# Flags of sbatch win over the lines above. RETRIES (default 3): so often in a row a job is queued
# again that lost a rank. RUN (default: runs/slurm- and the job's number) must be on a disk that all
# machines share; JOB, DEVICES, DEVICE: scripts/gpu_run.sh.
set -euo pipefail
# Slurm runs a copy of this file, which lies elsewhere: submit it where the project is.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[ -f scripts/setup.sh ] || { echo "error: submit this job from the project's folder" >&2; exit 2; }
. scripts/setup.sh
. scripts/gpu_run.sh

[ -n "${SLURM_JOB_ID:-}" ] ||
    fail "this is no Slurm job: sbatch scripts/slurm.sh CONFIG; on one box: bash scripts/gpu_box.sh"
RUN=${RUN:-${GPT_RUNS:-runs}/slurm-$SLURM_JOB_ID}
DEVICES=${DEVICES:-${SLURM_GPUS_ON_NODE:-}}
prepare "$@"

# Not by way of srun, which answers a SIGTERM by killing its tasks.
signals=0
trap 'signals=$((signals + 1)); scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1 TERM

# One launcher on each machine; it starts that machine's processes. Where one ends the others do,
# saved: only after --wait they are killed.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=300 \
    "${command[@]}" --devices "$DEVICES" --nodes slurm &
step=$!
while :; do # a signal ends `wait` before the step does
    before=$signals code=0
    wait "$step" || code=$?
    [ "$signals" != "$before" ] || break
done

requeue() {
    # A job that somebody cancelled is no longer running, and stays away.
    if scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
        echo "slurm.sh: back to the queue: $1"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
}
mkdir -p "$(dirname "$RUN")"
lost=$RUN.lost # a line for each time in a row
case $code in
0) rm -f "$lost" ;;
143)
    rm -f "$lost"
    requeue "the run is saved"
    ;;
6 | 137) # a lost rank, a full disk, a killed launcher
    echo "$(date) exit code $code" >>"$lost"
    times=$(wc -l <"$lost")
    if [ "$times" -le "${RETRIES:-3}" ]; then requeue "exit code $code, time $times in a row"; fi
    ;;
esac # anything else would go wrong again
exit "$code"
