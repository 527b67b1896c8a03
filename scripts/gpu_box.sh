#!/usr/bin/env bash
# Trains on all GPUs of this box; started again after a stop or a crash it goes on where it was.
#
#   bash scripts/gpu_box.sh gpt2-124m --set training.save_minutes=10
#   DEVICE=cpu DEVICES=2 bash scripts/gpu_box.sh tiny    # the same without a GPU, in a minute
#
# With TORCHRUN=1 torchrun starts the processes; JOB, RUN, DEVICES, DEVICE, NODES: scripts/gpu_run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
. scripts/gpu_run.sh

prepare "$@"
if [ -n "${TORCHRUN:-}" ]; then
    [ -z "${NODES:-}" ] || fail "TORCHRUN=1 is for one box; leave out NODES, or TORCHRUN"
    exec torchrun --standalone --nproc-per-node "$DEVICES" -m gptcli "${command[@]:1}"
fi
exec "${command[@]}" --devices "$DEVICES" ${NODES:+--nodes "$NODES"}
