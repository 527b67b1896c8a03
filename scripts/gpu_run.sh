# shellcheck shell=bash
# Sourced by gpu_box.sh, slurm.sh and spot.sh. `prepare CONFIG [FLAG...]` installs what is missing
# and leaves in `command` the command that begins the run, or goes on with it.
#
# JOB      pretrain (default) or finetune
# RUN      the run directory (default: runs/ and CONFIG's name; GPT_RUNS is another place for it)
# DEVICES  processes on each machine (default: one for each GPU)
# DEVICE   cpu tries all this out without a GPU; it needs DEVICES
# NODES    what --nodes takes: slurm, or NUMBER@HOST:PORT of the first machine

prepare() {
    [ $# -gt 0 ] || fail "which config? bash $0 CONFIG [flags of gpt ${JOB:-pretrain}]"
    local config=$1 name
    shift
    setup
    name=${config##*/}
    RUN=${RUN:-${GPT_RUNS:-runs}/${name%.y*ml}}
    export RUN # for SYNC and FETCH of spot.sh
    DEVICES=${DEVICES:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    [ "$DEVICES" != 0 ] || fail "torch finds no GPU here; to try it on the CPU: DEVICE=cpu DEVICES=2"
    command=(gpt "${JOB:-pretrain}" "$config" --run-dir "$RUN" --auto-resume)
    if [ -n "${DEVICE:-}" ]; then command+=(--set "training.device=$DEVICE"); fi
    command+=("$@")
}
