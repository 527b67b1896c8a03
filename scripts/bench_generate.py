#!/usr/bin/env python3
"""Generation measured against transformers and llama.cpp; one Markdown table a case.

    python scripts/bench_generate.py                                   # all: a quarter of an hour
    python scripts/bench_generate.py --case n5-fp32 --rounds 7
    python scripts/bench_generate.py --case n1-int8 --write docs/measured.md

n1-fp32 n5-fp32 n5-half n1-int8 n5-int8   tokens per second of one prompt, continued n times
batch64   64 prompts in a batch against the same prompts one by one
linear    the time of a step against that of its linear layers alone, the same kernels
start     seconds from the start of the process to the first text, against `import torch` alone

The model has the shape of GPT-2 124M and random weights, the same for everybody (through our
exports); prompts have 4 and 512 tokens, each continued by 100, greedily and with no end of text.
Contenders are processes of their own that take turns (A B C A B C ...) while the others wait;
figures are medians over the rounds, with the lowest and the highest. Tokens per second are new
tokens over the seconds of prefill and decoding; loading and packing are not timed. Peers that are
not installed are left out. `--write FILE` puts each table between <!-- bench CASE --> and
<!-- /bench CASE -->.
"""

import argparse
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_contenders import Contender, Failed, machine, note, running
from bench_generate_worker import Quantize, Work
from bench_train_tables import ratios, spread, table, write

if TYPE_CHECKING:
    from gptcli.config.schema import Config
    from gptcli.data.tokenizer import Tokenizer

OURS = "gptcli"
GPT2: dict[str, Any] = {
    "name": "bench",
    "model": {"preset": "gpt2"},
    "tokenizer": {"kind": "tiktoken"},
}
NEW_TOKENS = 100
PROMPTS = (4, 512)
PACKAGES = {"transformers": "transformers", "llama": "llama_cpp"}
PEERS = {
    "transformers": "transformers, fp32",
    "llama-f32": "llama.cpp, f32",
    "llama-f16": "llama.cpp, f16",
    "llama-q8_0": "llama.cpp, q8_0",
}
START_PAIRS = 7
IMPORT = "import sys, torch; sys.stdout.write('.'); sys.stdout.flush()"


@dataclass(frozen=True)
class Case:
    """One prompt continued `n` times by ours, packed as `quantize` says, and by peers; by the
    peer's name, ours is at least so many times as fast."""

    n: int
    quantize: Quantize
    asked: dict[str, float]


SPEED = {
    "n1-fp32": Case(1, None, {"transformers": 1.4, "llama-f32": 0.85}),
    "n5-fp32": Case(5, None, {"transformers": 2.2, "llama-f32": 1.3}),
    "n5-half": Case(5, "fp16", {"llama-f16": 1.4}),
    "n1-int8": Case(1, "int8", {"llama-q8_0": 1.0}),
    "n5-int8": Case(5, "int8", {"llama-q8_0": 2.2}),
}
BATCH, LINEAR, START = "batch64", "linear", "start"
CASES = (*SPEED, BATCH, LINEAR, START)
BATCH_ASKED, LINEAR_ASKED, START_ASKED = 8.0, 1.25, 0.3


class Models:
    """The files that contenders load, made when first asked for: a checkpoint and exports of it."""

    def __init__(self, folder: Path, config: "Config", tokenizer: "Tokenizer") -> None:
        self._folder, self._config, self._tokenizer = folder, config, tokenizer
        self.vocab_size = tokenizer.vocab_size

    def file_of(self, contender: str) -> Path:
        """What `contender` loads."""
        from gptcli.export import export

        kind, _, dtype = contender.partition("-")
        made = self._folder / contender
        if made.exists() or kind == OURS:
            return made if kind != OURS else self._checkpoint()
        how = ("hf", "f32") if kind == "transformers" else ("gguf", dtype)
        return export(str(self._checkpoint()), made, *how).path

    def _checkpoint(self) -> Path:
        made = self._folder / OURS
        if not made.exists():
            publish(made, self._config, self._tokenizer)
        return made


def publish(run_dir: Path, config: "Config", tokenizer: "Tokenizer") -> int:
    """Write a run with one checkpoint of random weights; returns the number of parameters."""
    from gptcli.config.load import dump_config
    from gptcli.model.gpt import GPT, initialise
    from gptcli.runs import checkpoint
    from gptcli.runs.run_dir import new_run_dir

    model = GPT(config.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    new_run_dir(config.name, run_dir, overwrite=False)
    contents = checkpoint.Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer)
    checkpoint.publish(run_dir, 0, contents)
    return model.parameter_count()


def started(
    contender: str, models: Models, task: str, n: int, quantize: Quantize = None
) -> Contender:
    """The process of a contender, its model loaded. Failed where its package is missing."""
    kind = contender.partition("-")[0]
    package = PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise Failed(f"{contender}: {package} is not installed")
    path = str(models.file_of(contender))
    threads = torch.get_num_threads()
    work = Work(task, kind, path, quantize, n, NEW_TOKENS, threads, models.vocab_size)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    return Contender(contender, "bench_generate_worker.py", asdict(work), folder)


def bench_speed(case: Case, models: Models, rounds: int, prompts: tuple[int, ...]) -> str:
    """Tokens per second of ours and the peers, by turns, for each length of prompt."""
    contenders: dict[str, Contender] = {}
    about, firsts = [], dict[str, list[int]]()
    with running(contenders):
        for name in (OURS, *case.asked):
            try:
                quantize = case.quantize if name == OURS else None
                contenders[name] = started(name, models, "speed", case.n, quantize)
                for count in prompts:  # the warm-up
                    firsts[name] = contenders[name].ask(count)["tokens"]
            except Failed as failed:
                if name == OURS:
                    raise
                about.append(f"Not run: {failed}.")
                if contender := contenders.pop(name, None):
                    contender.kill()
        rates: dict[tuple[str, int], list[float]] = {}
        for number in range(rounds):
            for count in prompts:
                for name, contender in contenders.items():
                    rates.setdefault((name, count), []).append(contender.run(count))
            shown = [f"{name} {count}: {r[-1]:.1f}" for (name, count), r in rates.items()]
            note(f"round {number + 1} of {rounds}: {', '.join(shown)}")
    for name in contenders:
        if name != OURS:
            about.append(f"{PEERS[name]}: {agreement(firsts[OURS], firsts[name])}.")
    packed = f", {case.quantize}" if case.quantize else ", fp32"
    return "\n".join([speed_table(rates, case.asked, OURS + packed), "", *about])


def agreement(ours: list[int], theirs: list[int]) -> str:
    """How many of the first tokens are the same: a peer with another model would be no peer."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    return f"the first {same} of {len(ours)} tokens are the same as ours"


def speed_table(
    rates: dict[tuple[str, int], list[float]], asked: dict[str, float], ours: str
) -> str:
    """`rates` are tokens per second by contender and length of prompt, one for each round."""
    rows = []
    for (name, count), found in rates.items():
        cells = [ours if name == OURS else PEERS[name], str(count), spread(found).show(".1f")]
        if name != OURS:
            ratio = ratios(rates[OURS, count], found)
            cells += [ratio.show(".2f"), *verdict(ratio.median, at_least=asked[name])]
        rows.append(cells + [""] * (6 - len(cells)))
    rows.sort(key=lambda cells: int(cells[1]))
    return table(["", "prompt", "tokens/s", "ours against it", "asked", "holds"], rows)


def verdict(value: float, *, at_least: float = -math.inf, at_most: float = math.inf) -> list[str]:
    """The limit in words, and whether `value` keeps it."""
    limit = f"at most {at_most:g}" if at_least == -math.inf else f"at least {at_least:g}"
    return [limit, "yes" if at_least <= value <= at_most else "no"]


def bench_batch(models: Models, rounds: int, prompts: int = 64) -> str:
    """Prompts in a batch against one by one, in one process."""
    contenders = {OURS: started(OURS, models, "batch", 1)}
    alone, together = list[float](), list[float]()
    with running(contenders):
        contenders[OURS].ask(1)
        for number in range(rounds):
            alone.append(contenders[OURS].run(1))
            together.append(contenders[OURS].run(prompts))
            note(f"round {number + 1} of {rounds}: {alone[-1]:.1f}, {together[-1]:.1f}")
    ratio = ratios(together, alone)
    cells = [spread(alone).show(".1f"), spread(together).show(".1f"), ratio.show(".2f")]
    head = ["", "one by one, tokens/s", "in a batch, tokens/s", "ratio", "asked", "holds"]
    row = [f"{prompts} prompts of 4 tokens, fp32", *cells]
    return table(head, [row + verdict(ratio.median, at_least=BATCH_ASKED)]) + "\n"


def bench_linear(models: Models, rounds: int) -> str:
    """A step of decoding against its linear layers, in one process each."""
    rows = []
    kinds: tuple[tuple[int, Quantize], ...] = ((1, None), (5, None), (1, "int8"), (5, "int8"))
    for n, quantize in kinds:
        contenders = {OURS: started(OURS, models, "linear", n, quantize)}
        with running(contenders):
            contenders[OURS].ask(4)
            answers = [contenders[OURS].ask(4) for _ in range(rounds)]
        steps, linear = ([answer[key] * 1e3 for answer in answers] for key in ("step", "linear"))
        ratio = ratios(steps, linear)
        name = f"n={n}, {quantize or 'fp32'}, {answers[0]['layers']} layers"
        cells = [name, spread(steps).show(".1f"), spread(linear).show(".1f"), ratio.show(".2f")]
        rows.append(cells + verdict(ratio.median, at_most=LINEAR_ASKED))
        note(" ".join(cells))
    head = ["", "step, ms", "linear layers, ms", "step against them", "asked", "holds"]
    return table(head, rows) + "\n"


def bench_start(folder: Path, rounds: int) -> str:
    """Processes that import torch, and that generate with a small model, by turns."""
    from gptcli.config.load import load_config
    from gptcli.pretrain import read_corpus

    config = load_config("small").config
    _, tokenizer = read_corpus(config, None)
    parameters = publish(folder / "small", config, tokenizer)
    generate = ["-m", "gptcli", "generate", "--model", str(folder / "small"), "--prompt", "Once"]
    generate += ["--no-prompt", "--max-new-tokens", "20", "--seed", "1"]
    # Compiled modules are kept, as where packages are installed, but not beside their sources.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "pycache")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    alone, ours = list[float](), list[float]()
    for number in range(rounds + 1):
        pair = first_byte(["-c", IMPORT], environment), first_byte(generate, environment)
        note(f"pair {number} of {rounds}: {pair[0]:.2f} s, {pair[1]:.2f} s")
        if number:  # the first fills caches
            alone.append(pair[0])
            ours.append(pair[1])
    more = spread([b - a for a, b in zip(alone, ours, strict=True)])
    cells = [spread(values).show(".2f") for values in (alone, ours)] + [more.show(".2f")]
    head = ["", "`import torch`, s", "first text, s", "more, s", "asked", "holds"]
    row = [f"`small`, {parameters:,} parameters", *cells]
    return table(head, [row + verdict(more.median, at_most=START_ASKED)]) + "\n"


def first_byte(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds from the start of a Python process to the first byte on its stdout."""
    command = [sys.executable, *arguments]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - began
        _, log = process.communicate()
    if not byte or process.returncode:
        raise Failed(f"{' '.join(arguments)}: {log.decode('utf-8', 'replace').strip()}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--prompt", type=int, action="append", help="tokens of a prompt (4, 512)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into FILE")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds is at least 1")
    if given.write:
        check_markers(parser, given.write, given.case or CASES)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["GPT_CACHE"] = str(Path(directory) / "cache")
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        try:
            run_cases(given, Path(directory))
        except Failed as failed:
            raise SystemExit(f"bench_generate: {failed}") from None


def check_markers(parser: argparse.ArgumentParser, file: Path, cases: Sequence[str]) -> None:
    """Ends the program where a table would have no place in the file, before it is measured."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--write {file}: {error}")
    for case in cases:
        markers = f"<!-- bench {case} -->", f"<!-- /bench {case} -->"
        if [text.count(marker) for marker in markers] != [1, 1]:
            parser.error(f"--write {file}: {' and '.join(markers)} are not there once each")


def run_cases(given: argparse.Namespace, folder: Path) -> None:
    """Measure and print the wanted cases."""
    from gptcli.config.schema import Config
    from gptcli.data.chosen_tokenizer import build_tokenizer

    wanted = given.case or CASES
    config = Config.model_validate(GPT2)
    models = Models(folder, config, build_tokenizer(config.tokenizer, []))
    for name in wanted:
        note(name)
        if name == BATCH:
            block = bench_batch(models, given.rounds)
        elif name == LINEAR:
            block = bench_linear(models, given.rounds)
        elif name == START:
            block = bench_start(folder, max(given.rounds, START_PAIRS))
        else:
            prompts = tuple(given.prompt or PROMPTS)
            block = bench_speed(SPEED[name], models, given.rounds, prompts)
        block += "\n" + machine("transformers", "llama-cpp-python")
        print(f"### {name}\n\n{block}\n", flush=True)
        if given.write:
            write(block, name, given.write)


if __name__ == "__main__":
    main()
