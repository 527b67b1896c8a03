#!/usr/bin/env bash
# From nothing to a trained model, five texts and a report. GPT_QUICKSTART_STEPS=20 shortens it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
setup

steps=${GPT_QUICKSTART_STEPS:-}
short=()
if [ -n "$steps" ]; then
    case $steps in *[!0-9]* | 0*) fail "GPT_QUICKSTART_STEPS must be a whole number above 0, not '$steps'" ;; esac
    short=(--set "training.max_steps=$steps" --set "schedule.warmup_steps=$((steps / 10))")
fi
began=$SECONDS
name=${GPT_RUNS:-runs}/quickstart-$(date +%Y%m%d-%H%M%S)
run=$name
count=1
while [ -e "$run" ]; do
    count=$((count + 1))
    run=$name-$count
done

gpt pretrain configs/small.yaml --run-dir "$run" ${short[@]+"${short[@]}"}
gpt generate --model "$run" --prompt "Once upon a time" -n 5

bits=$(python -c '
import json, sys
print(round(json.load(open(sys.argv[1], encoding="utf-8"))["scores"]["bits_per_byte"], 4))' "$run/report.json")
echo "report: $run/report.html"
echo "validation bits per byte: $bits"
echo "wall time: $((SECONDS - began)) s (without installing)"
