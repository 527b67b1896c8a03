#!/usr/bin/env bash
# Everything there is to check on a CUDA box, in one command of about ten minutes: the tests marked
# cuda (parity with the CPU, bf16, compile, no waiting inside a step, memory, resume), a table of
# what they measured, and the speed of GPT-2 124M with its share of the GPU's peak (MFU).
# Arguments go to pytest. GPT_VENV chooses the environment, GPT_RUNS the folder of runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
setup test tables # tables: gpt2's vocabulary without a download
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "torch finds no CUDA GPU here; see 'nvidia-smi' and 'gpt doctor'"

failed=()
python -m pytest -m cuda -n 0 "$@" || failed+=(tests)
run=${GPT_RUNS:-runs}/gpu-check-$(date +%Y%m%d-%H%M%S)
# Two minutes, most of them at full speed: of the first, a part is compiling.
gpt pretrain configs/gpt2-124m.yaml --run-dir "$run" --max-time 2m \
    --set data.train=builtin:web-bible --set training.tokens_per_step=131072 \
    --set training.log_every=1 --set training.eval_every=100000 --set eval.max_tokens=65536 &&
    python scripts/mfu.py "$run" || failed+=(speed)
[ ${#failed[@]} -eq 0 ] || fail "failed: ${failed[*]} (above)"
echo "all checks passed"
