#!/usr/bin/env bash
# Builds wheel and sdist into dist/, installs each into an environment of its own, away from the
# source tree, and does a newcomer's first minutes with it. Nothing is uploaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
root=$PWD
most_bytes=1000000

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(find_python)
"$python" -m venv "$work/build"
venv=$work/build run_pip build
rm -rf dist
"$work/build/bin/python" -m build --outdir dist . >"$work/build.log" 2>&1 ||
    { tail -n 20 "$work/build.log" >&2; fail "the build failed"; }

first_minutes() {
    local artefact=$1 here=$2
    mkdir -p "$here/empty"
    "$python" -m venv "$here/env"
    venv=$here/env run_pip "$(grep '^torch==' scripts/constraints.txt)"
    venv=$here/env run_pip "$artefact"
    (
        cd "$here/empty"
        PATH=$here/env/bin:$PATH
        hash -r
        unset PYTHONPATH
        found=$(python -c 'import gptcli; print(gptcli.__file__)')
        case $found in "$here"/*) ;; *) fail "not the installed package: $found" ;; esac
        gpt --version
        gpt config list
        gpt --help
        gpt config check small
        gpt pretrain tiny --run-dir run
        gpt generate --model run --prompt "Once upon a time" -n 2 --max-new-tokens 20
        gpt eval --model run
        gpt finetune finetune --model run --run-dir tuned --set training.max_steps=5
        gpt export --model run --to hf exported
        for file in run/report.html run/report.md run/report.json exported/README.md; do
            [ -s "$file" ] || fail "$file was not written"
        done
    ) >"$here/log" 2>&1 || { tail -n 30 "$here/log" >&2; fail "$(basename "$artefact") does not work"; }
}

for artefact in dist/*.whl dist/*.tar.gz; do
    bytes=$(wc -c <"$artefact")
    [ "$bytes" -lt "$most_bytes" ] || fail "$artefact has $bytes bytes, $most_bytes are allowed"
    first_minutes "$root/$artefact" "$work/$(basename "$artefact")"
    echo "$(basename "$artefact"): $bytes bytes, installed alone: pretrain, generate, eval, finetune, export"
done
