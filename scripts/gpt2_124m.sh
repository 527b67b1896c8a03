#!/usr/bin/env bash
# Trains GPT-2 124M on 10 billion tokens of FineWeb-Edu, on a box with one GPU; what to expect is in
# configs/gpt2-124m.yaml. Started again after a stop or a crash it goes on where the run was.
# Arguments change the config: bash scripts/gpt2_124m.sh optimizer.lr=0.0018 training.save_every=500
# GPT_VENV chooses the environment, GPT_RUNS the folder of runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
setup

changes=()
for change in "$@"; do
    changes+=(--set "$change")
done
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    echo "note: torch finds no CUDA GPU here; at its full size this run would take months" >&2

run=${GPT_RUNS:-runs}/gpt2-124m
gpt pretrain configs/gpt2-124m.yaml --run-dir "$run" --auto-resume ${changes[@]+"${changes[@]}"}
echo "report: $run/report.html"
echo "expected loss and its source: configs/gpt2-124m.yaml"
