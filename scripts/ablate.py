#!/usr/bin/env python3
"""Which settings train better in the same time: one factor at a time, on texts and over seeds.

    python scripts/ablate.py --base small --texts a.txt b.txt --seconds 36 \\
        --factor "optimizer.lr=0.01,0.04" \\
        --factor "depth: model.n_layer=3 model.n_embd=224 | model.n_layer=6 model.n_embd=160" \\
        --write configs/ablations.md
    python scripts/ablate.py --base small --texts a.txt --seeds 1 \\
        --ladder 2x64,4x128,6x192 --tokens 300000 --write configs/ablations.md

Every run is `gpt pretrain` in a process of its own that gets --seconds as training.max_time, which
holds start, scoring and report too, as it does for a user. The table shows the seconds left for
training steps; a value that got over 5 % more or less of them than the base has no verdict.
Tokenizers are learned once for each text, outside the runs. Values take turns within each seed, so
that a change of the machine's speed meets all of them.

A value replaces the default only if it is better than the base with every seed on every text.
--ladder trains sizes (layers x width) on equally many tokens instead.

Finished runs are appended to --results: after an interruption the same command goes on from there,
on the same machine; --report-only prints the tables again.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ablation_tables import (
    Plan,
    Result,
    Variant,
    append,
    read_results,
    replace_section,
    report,
)

import gptcli
from gptcli.config.load import load_config
from gptcli.config.schema import Config
from gptcli.errors import ConfigError, DataError, GptError

# Only training and one evaluation at the end; the first run must not pay for a cache of tokens.
QUIET = [
    "samples.prompts=[]",
    "data.cache=off",
    "training.eval_every=1000000000",
    "training.save_every=1000000000",
    "training.save_minutes=null",
]
LIMITS = ("max_steps", "max_tokens", "max_epochs", "max_time")
NON_FINITE = 5  # the exit code of a run that diverged


@dataclass(frozen=True)
class Text:
    """A corpus in one file; its identity is `sha256`, whatever it is called."""

    name: str
    path: str
    sha256: str


def parse_factor(text: str) -> list[Variant]:
    """`KEY=A,B` or `NAME: KEY=A KEY=B | KEY=C KEY=D` to its values. Raises ConfigError."""
    name, colon, rest = text.partition(":")
    if colon and "=" not in name:
        values = [tuple(value.split()) for value in rest.split("|")]
        factor, labels = name.strip(), [" ".join(map(_short, value)) for value in values]
    else:
        factor, _, rest = text.partition("=")
        factor = factor.strip()
        # Commas between the values, not those inside brackets: optimizer.betas=[0.9,0.95]
        labels = [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", rest)]
        values = [(f"{factor}={label}",) if label else () for label in labels]
    if not factor or not all(values) or not all("=" in s for value in values for s in value):
        raise ConfigError(
            f"--factor {text!r}: expected KEY=VALUE,VALUE or NAME: KEY=VALUE KEY=VALUE | KEY=VALUE"
        )
    return [Variant(factor, label, value) for label, value in zip(labels, values, strict=True)]


def parse_ladder(text: str) -> list[Variant]:
    """`2x64,4x128` (layers x width) to sizes. Raises ConfigError."""
    sizes = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"\s*([0-9]+)x([0-9]+)\s*", part)):
            raise ConfigError(f"--ladder {text!r}: expected layers x width, such as 2x64,4x128")
        settings = (f"model.n_layer={match[1]}", f"model.n_embd={match[2]}")
        sizes.append(Variant("size", f"{match[1]} x {match[2]}", settings))
    return sizes


def run_key(config: Config, text: Text, seed: int, machine: str) -> str:
    """The identity of a run: all that its result depends on, the code too, not where files lie."""
    values = config.model_dump(mode="json")
    values["seed"], values["data"]["train"] = seed, text.sha256
    return hashlib.sha256(json.dumps([values, machine, code()]).encode()).hexdigest()[:16]


@cache
def code() -> str:
    """The sha256 of the package's sources."""
    sources = sorted(Path(gptcli.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def in_turns(plan: Plan, results: dict[str, Result]) -> Iterator[tuple[Variant, int, int, str]]:
    """Runs that are still to be made: (variant, text number, seed, key), each key once.

    Seed by seed and text by text all variants; each time another one begins.
    """
    seen, count = set(results), len(plan.variants)
    for turn, seed in enumerate(plan.seeds):
        for number in range(len(plan.texts)):
            for place in range(count):
                variant = (place + turn) % count
                key = plan.keys[variant][number][turn]
                if key not in seen:
                    seen.add(key)
                    yield plan.variants[variant], number, seed, key


def make_plan(options: argparse.Namespace, texts: list[Text]) -> tuple[Plan, list[Config]]:
    """All runs of the command line, and the checked config of each variant. Raises ConfigError."""

    def config_of(variant: Variant) -> Config:
        return load_config(options.base, _settings(options, variant)).config

    variants = parse_ladder(options.ladder) if options.ladder else []
    base = config_of(Variant("", "base", ()))
    for factor in options.factors:
        values = parse_factor(factor)
        if any(variant.factor == values[0].factor for variant in variants):
            raise ConfigError(f"--factor {values[0].factor}: there twice; give its values at once")
        # A value that changes nothing is the base, which has its row already.
        variants += [_base_of(values, base), *(v for v in values if config_of(v) != base)]
    configs = [config_of(variant) for variant in variants]
    here, seeds = machine(), [base.seed + i for i in range(options.seeds)]
    arguments = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    plan = Plan(
        kind="ladder" if options.ladder else "ablations",
        command=shlex.join(["python", "scripts/ablate.py", *arguments]),
        date=date.today().isoformat(),
        machine=here,
        base=" ".join([options.base, *options.settings]),
        limit=f"{options.tokens:,} tokens" if options.ladder else f"{options.seconds:g} s",
        texts=[text.name for text in texts],
        seeds=seeds,
        variants=variants,
        keys=[[[run_key(c, t, s, here) for s in seeds] for t in texts] for c in configs],
    )
    return plan, configs


def make_runs(
    plan: Plan, configs: list[Config], texts: list[Text], options: argparse.Namespace
) -> dict[str, Result]:
    """Make the runs that --results lacks, appending each one there; returns all results."""
    results, _ = read_results(options.results)
    append(options.results, plan)
    todo = list(in_turns(plan, results))
    config_of = dict(zip(plan.variants, configs, strict=True))
    print(f"{len(todo)} runs to make, {plan.limit} each", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="ablate-") as work:
        begun = time.monotonic()
        for made, (variant, number, seed, key) in enumerate(todo, 1):
            config, text = config_of[variant], texts[number]
            settings = [*_settings(options, variant), f"data.train={text.path}", f"seed={seed}"]
            settings += _tokenizer(config, text, Path(work))
            result = train(options.base, settings, key)
            append(options.results, result)
            results[key] = result
            left = (time.monotonic() - begun) / made * (len(todo) - made) / 60
            print(
                f"[{made}/{len(todo)}] {text.name}, seed {seed}, {variant.factor} {variant.label}:"
                f" {result.bits_per_byte or math.nan:.4f} bits/byte, {result.steps} steps in"
                f" {result.seconds:.1f} s; {left:.0f} min left",
                file=sys.stderr,
            )
    return results


def train(base: str, settings: list[str], key: str) -> Result:
    """One run of `gpt pretrain`. SystemExit with its exit code when it fails but by diverging."""
    flags = [part for setting in settings for part in ("--set", setting)]
    with tempfile.TemporaryDirectory(prefix="ablate-run-") as folder:
        run_dir = Path(folder) / "run"
        done = _gpt("pretrain", base, "--run-dir", str(run_dir), *flags, allowed=(0, NON_FINITE))
        run: dict[str, Any] = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    training, choices = run["training"], run["choices"]
    scores = run["scores"] if done == 0 else {}
    return Result(
        key=key,
        bits_per_byte=_finite(scores.get("bits_per_byte")),
        loss=_finite(scores.get("loss")),
        steps=training["steps"],
        seconds=training["seconds"],
        parameters=training["parameters"],
        choices=f"{choices['device']}, {choices['precision']}, {choices['threads']} threads",
    )


def machine() -> str:
    """Processor, cores and torch, for people; results of another one are not mixed in."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        name = match[1]
    return f"{name}, {os.cpu_count()} cores, torch {version('torch')}"


def _settings(options: argparse.Namespace, variant: Variant) -> list[str]:
    """What is set in the runs of a variant, whatever the text and the seed; the limits come last,
    so that no factor changes them."""
    wanted = {"max_time": f"{options.seconds:g}s"}
    if options.ladder:
        wanted = {"max_tokens": str(options.tokens)}
    limits = [f"training.{name}={wanted.get(name, 'null')}" for name in LIMITS]
    return [*QUIET, *options.settings, *variant.settings, *limits]


def _short(setting: str) -> str:
    """`model.n_layer=6` -> `n_layer=6`."""
    key, _, value = setting.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def _base_of(values: list[Variant], base: Config) -> Variant:
    """The base as the first value of a factor, labelled with what it has for the factor's keys."""
    keys = dict.fromkeys(s.partition("=")[0].strip() for value in values for s in value.settings)
    shown = []
    for key in keys:
        found: Any = base
        for part in key.split("."):
            found = getattr(found, part, "?")
        shown.append(str(found) if len(keys) == 1 else _short(f"{key}={found}"))
    return Variant(values[0].factor, f"base: {' '.join(shown)}", ())


def _tokenizer(config: Config, text: Text, work: Path) -> list[str]:
    """The setting of a tokenizer learned from the whole text, if the config asks for one."""
    wanted = config.tokenizer
    if wanted.kind != "bpe":
        return []
    about = f"{text.sha256[:16]}-{wanted.vocab_size}-{wanted.pattern}-{wanted.train_bytes}"
    out = work / f"tokenizer-{about}"
    if not out.exists():
        flags = ["--vocab-size", str(wanted.vocab_size), "--pattern", wanted.pattern]
        flags += ["--max-bytes", wanted.train_bytes, "--out", str(out)]
        _gpt("tokenizer", "train", text.path, *flags)
    return [f"tokenizer={{kind: file, path: {json.dumps(str(out))}}}"]


def _gpt(*arguments: str, allowed: tuple[int, ...] = (0,)) -> int:
    command = [sys.executable, "-m", "gptcli", *arguments, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in allowed:
        sys.stderr.write(f"{shlex.join(command)}\n{done.stderr}")
        raise SystemExit(done.returncode)
    return done.returncode


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", default="small", metavar="CONFIG", help="what all runs share (small)")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    add("--texts", nargs="+", type=Path, default=[], metavar="FILE", help="train on each of these")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each value on each text (3)")
    add("--seconds", type=float, default=45.0, metavar="S", help="training.max_time of a run (45)")
    add("--factor", dest="factors", action="append", default=[], metavar="F", help="see above")
    add("--ladder", metavar="SIZES", help="instead of factors: layers x width, as 2x64,4x128")
    add("--tokens", type=int, default=300_000, metavar="N", help="of each size of the ladder")
    add("--results", type=Path, default=Path("ablations.jsonl"), metavar="JSONL")
    add("--write", type=Path, metavar="FILE", help="put the tables into this Markdown file")
    add("--report-only", action="store_true", help="train nothing, show what --results holds")
    return parser


def _asked(options: argparse.Namespace) -> tuple[dict[str, Plan], dict[str, Result]]:
    """The plans to show, and their results: made now, or with --report-only read."""
    if options.report_only:
        results, plans = read_results(options.results)
        if not plans:
            raise DataError(f"{options.results}: no results", "run without --report-only first")
        return plans, results
    if bool(options.factors) == bool(options.ladder):
        raise ConfigError("give --factor, once or more, or --ladder")
    if not options.texts or min(options.seeds, options.seconds, options.tokens) <= 0:
        raise ConfigError("--texts needs a file; --seeds, --seconds and --tokens numbers above 0")
    for path in (options.results, options.write or options.results):
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no such folder", "make it first")
    texts = []
    for path in options.texts:
        if not path.is_file():
            raise DataError(f"{path}: no such file", "--texts takes plain text files")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        texts.append(Text(path.stem, str(path.resolve()), digest))
    plan, configs = make_plan(options, texts)
    return {plan.kind: plan}, make_runs(plan, configs, texts, options)


def main() -> int:
    options = _arguments().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run under way ends
    try:
        plans, results = _asked(options)
    except GptError as error:
        lines = [f"error: {line}" for line in error.message.splitlines()]
        print("\n".join([*lines, *([f"hint: {error.hint}"] * bool(error.hint))]), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {options.results}", file=sys.stderr)
        return 130
    for kind, plan in plans.items():
        section = report(plan, results)
        print(section, end="\n\n")
        if options.write:
            page = "# What the defaults were chosen by\n\nWritten by scripts/ablate.py.\n"
            if options.write.exists():
                page = options.write.read_text(encoding="utf-8")
            options.write.write_text(replace_section(page, kind, section), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
