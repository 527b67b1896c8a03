#!/usr/bin/env python3
"""LoRA finetuning measured against peft + transformers and against full finetuning.

    python scripts/bench_finetune.py --model FOLDER                       # a Hugging Face folder
    python scripts/bench_finetune.py --model FOLDER --prompt 192 --rounds 5 --write docs/measured.md

Contenders are processes of their own that take turns of a step while the others wait; figures are
medians over the rounds, with the lowest and the highest. All train the same rows (4 of 256 random
tokens, of which the first --prompt ones of each row carry no loss, as in finetuning) in fp32 with
AdamW and clipping; the adapters are alike: rank 8 on all linear layers of the blocks. Ours takes
the step of `gpt finetune` with its automatic choices. Memory is the peak of the process above what
it was after the imports. `--write FILE` puts the table between <!-- bench finetune --> and
<!-- /bench finetune -->.
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench_contenders import Contender, Failed, machine, note, running, take_turns
from bench_finetune_worker import Work
from bench_train_tables import gib, ratios, spread, table, write

LORA, FULL, PEFT = "gptcli-lora", "gptcli-full", "peft"
NAMES = {LORA: "gptcli, LoRA", FULL: "gptcli, full", PEFT: "peft + transformers, LoRA"}
ASKED_SPEED, ASKED_MEMORY = 1.3, 0.45  # against peft, against full finetuning


def start_all(given: argparse.Namespace, folder: Path, contenders: dict[str, Contender]) -> None:
    """Start and warm up all, one after the other, into `contenders`; peft may be missing."""
    for name in NAMES:
        place = folder / name
        place.mkdir()
        work = Work(name, given.model, given.rows, given.length, given.prompt)
        try:
            contenders[name] = Contender(name, "bench_finetune_worker.py", asdict(work), place)
            contenders[name].run(1)
            note(f"{name} is ready")
        except Failed as failed:
            if name != PEFT:
                raise
            note(f"not run: {failed}")
            if contender := contenders.pop(name, None):
                contender.kill()


def results(rates: dict[str, list[float]], peaks: dict[str, int | None]) -> str:
    """The table, with what was asked and whether it holds."""
    rows = []
    for name, values in rates.items():
        speed = ratios(rates[LORA], values).show(".2f") if name != LORA else ""
        memory = peaks[LORA], peaks[name]
        share = f"{memory[0] / memory[1]:.2f}" if name != LORA and memory[0] and memory[1] else ""
        rows.append([NAMES[name], spread(values).show(",.0f"), speed, gib(peaks[name]), share])
    head = ["", "tokens/s", "LoRA here is faster by", "peak memory", "LoRA here takes"]
    return table(head, rows) + "\n\n" + "\n".join(verdicts(rates, peaks))


def verdicts(rates: dict[str, list[float]], peaks: dict[str, int | None]) -> list[str]:
    """What was asked, each with whether it holds."""
    lines, mine, full = [], peaks[LORA], peaks[FULL]
    if PEFT in rates:
        speed = ratios(rates[LORA], rates[PEFT]).median
        kept = "holds" if speed >= ASKED_SPEED else "does not hold"
        lines.append(f"- Asked: {ASKED_SPEED} x the tokens/s of peft: {kept} ({speed:.2f}).")
        theirs = peaks[PEFT]
        if mine and theirs:
            kept = "holds" if mine < theirs else "does not hold"
            lines.append(f"- Asked: peak memory below that of peft: {kept}.")
    if mine and full:
        kept = "holds" if mine <= ASKED_MEMORY * full else "does not hold"
        share = f"{mine / full:.2f}"
        lines.append(f"- Asked: {ASKED_MEMORY} x the memory of full finetuning: {kept} ({share}).")
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a row without loss")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="a file with markers for the table")
    return parser.parse_args()


def main() -> None:
    given, contenders = arguments(), dict[str, Contender]()
    with tempfile.TemporaryDirectory() as folder, running(contenders):
        start_all(given, Path(folder), contenders)
        rates = take_turns(contenders, 1, given.rounds)
        peaks = {name: c.finish()["peak_bytes"] for name, c in contenders.items()}
    learned = f"{given.prompt} tokens of each without loss" if given.prompt else "all with loss"
    about = f"{given.rows} rows of {given.length} tokens, {learned}. "
    block = f"{about}{machine('peft', 'transformers')}\n\n{results(rates, peaks)}"
    print(block)
    if given.write is not None:
        write(block, "finetune", given.write)


if __name__ == "__main__":
    main()
