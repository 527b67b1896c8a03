"""What scripts/ablate.py keeps and shows: plans and results in JSONL, verdicts, Markdown tables."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

MOST_TIME_APART = 0.05  # of the base's training seconds; runs of one value differ by less
TITLES = {"ablations": "Ablations at equal time", "ladder": "A ladder of sizes at equal tokens"}
RULE = (
    "Means over the seeds of validation bits per byte (least to most), and of the difference to the"
    " base of the same seed; less is better. A value replaces the default only if it is better with"
    " every seed on every text (by chance with 3 seeds and 2 texts: 1 in 64)."
)


@dataclass(frozen=True)
class Variant:
    """One value of a factor: what is set on top of the base; nothing for the base itself."""

    factor: str
    label: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All runs of one command. `keys[variant][text][seed]` name them among the results.

    The first variant of each factor is the base; a ladder has none.
    """

    kind: str  # ablations | ladder
    command: str
    date: str
    machine: str
    base: str
    limit: str
    texts: list[str]
    seeds: list[int]
    variants: list[Variant]
    keys: list[list[list[str]]]


@dataclass(frozen=True)
class Result:
    """A finished run; the scores of one that diverged are None. `seconds` are of training steps."""

    key: str
    bits_per_byte: float | None
    loss: float | None  # nats per token
    steps: int
    seconds: float
    parameters: int
    choices: str


@dataclass(frozen=True)
class Spread:
    """Mean, least and most of some seeds."""

    mean: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Mean, least and most; of no values NaN."""
    if not values:
        return Spread(math.nan, math.nan, math.nan)
    return Spread(mean(values), min(values), max(values))


def verdict(differences: Sequence[Spread], times: Sequence[float]) -> str:
    """Better or worse with every seed on every text, else no clear difference.

    `differences` (value minus base, paired by seed) and `times` (training seconds, value by base)
    have an entry a text.
    """
    if apart := [t for t in times if abs(t - 1) > MOST_TIME_APART]:
        return f"no verdict: {max(apart, key=lambda t: abs(t - 1)) - 1:+.0%} training time"
    if all(d.high < 0 for d in differences):
        return "better"
    if all(d.low > 0 for d in differences):
        return "worse"
    return "no clear difference"


def judge(plan: Plan, results: dict[str, Result], base: int, value: int) -> tuple[str, float]:
    """Verdict on a variant against that of number `base`, and its mean difference over texts."""
    pairs = [_pairs(plan, results, base, value, text) for text in range(len(plan.texts))]
    if any(run.bits_per_byte is None for text in pairs for pair in text for run in pair):
        return "diverged", math.inf
    if any(run.steps == 0 for text in pairs for pair in text for run in pair):
        return "no verdict: no time to train", math.inf
    if any(len(text) < len(plan.seeds) for text in pairs):
        return "not finished", math.inf
    if len(plan.seeds) < 2:
        return "no verdict: one seed", math.inf
    differences = [_difference(text) for text in pairs]
    times = [mean(v.seconds for _, v in text) / mean(b.seconds for b, _ in text) for text in pairs]
    return verdict(differences, times), mean(d.mean for d in differences)


def factor_table(plan: Plan, results: dict[str, Result], factor: str) -> list[str]:
    """The lines of a factor's Markdown table; of several better values the best one is marked."""
    chosen = [i for i, variant in enumerate(plan.variants) if variant.factor == factor]
    base, judged = chosen[0], {i: judge(plan, results, chosen[0], i) for i in chosen[1:]}
    better = [i for i, (words, _) in judged.items() if words == "better"]
    best = min(better, key=lambda i: judged[i][1], default=None)
    head = [factor, "steps", "training s"]
    for name in plan.texts:
        head += [name, "difference"]
    lines = [_row([*head, "verdict"]), "|---|" + "--:|" * (len(head) - 1) + "---|"]
    for i in chosen:
        cells = [plan.variants[i].label, *_effort(plan, results, i)]
        for text in range(len(plan.texts)):
            scores = [run.bits_per_byte for run in _runs(plan, results, i, text)]
            cells.append(_shown(scores))
            pairs = _pairs(plan, results, base, i, text) if i != base else []
            cells.append(_shown_difference(_difference(pairs)))
        words = "" if i == base else "**replaces the default**" if i == best else judged[i][0]
        lines.append(_row([*cells, words]))
    return lines


def ladder_table(plan: Plan, results: dict[str, Result]) -> list[str]:
    """The lines of the ladder's Markdown table, and whether the mean loss falls with each size."""
    head = ["layers x width", "parameters", "steps", "training s"]
    for name in plan.texts:
        head += [f"{name}: nats/token", "bits/byte"]
    lines = [_row(head), "|---|" + "--:|" * (len(head) - 1)]
    rises = []
    for i, variant in enumerate(plan.variants):
        runs = [_runs(plan, results, i, text) for text in range(len(plan.texts))]
        parameters = max((run.parameters for text in runs for run in text), default=0)
        cells = [variant.label, f"{parameters:,}", *_effort(plan, results, i)]
        for text, name in enumerate(plan.texts):
            cells.append(_shown([run.loss for run in runs[text]]))
            cells.append(_shown([run.bits_per_byte for run in runs[text]]))
            before = _mean_loss(_runs(plan, results, i - 1, text)) if i else math.inf
            if not _mean_loss(runs[text]) < before:
                rises.append(f"{name} at {variant.label}")
        lines.append(_row(cells))
    falls = "The loss falls with every size."
    if any(key not in results for size in plan.keys for text in size for key in text):
        falls = "Not finished."
    elif rises:
        falls = f"The loss does not fall: {'; '.join(rises)}."
    return [*lines, "", falls]


def report(plan: Plan, results: dict[str, Result]) -> str:
    """A plan's section of the file, in Markdown."""
    keys = {key for variant in plan.keys for text in variant for key in text}
    done = keys & results.keys()
    choices = sorted({results[key].choices for key in done})
    texts = ", ".join(plan.texts)
    lines = [
        f"## {TITLES[plan.kind]}",
        "",
        f"    {plan.command}",
        "",
        f"{plan.date}, {plan.machine}; {'; '.join(choices)}. Base: {plan.base}. {plan.limit} a run;"
        f" seeds {', '.join(map(str, plan.seeds))}; {len(done)} of {len(keys)} runs on {texts}.",
        "",
    ]
    if plan.kind == "ladder":
        return "\n".join([*lines, *ladder_table(plan, results)])
    lines.append(RULE)
    for factor in dict.fromkeys(variant.factor for variant in plan.variants):
        lines += ["", *factor_table(plan, results, factor)]
    return "\n".join(lines)


def replace_section(page: str, name: str, section: str) -> str:
    """`page` with `section` between the markers of `name`, at the end if they are not there."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = f"{start}\n{section}\n{end}"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
    if pattern.search(page):
        return pattern.sub(lambda _: block, page, count=1)
    return f"{page.rstrip()}\n\n{block}\n".lstrip()


def read_results(path: Path) -> tuple[dict[str, Result], dict[str, Plan]]:
    """Results by key, and the last plan of each kind. A line that a crash cut off is left out."""
    results, plans = dict[str, Result](), dict[str, Plan]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "kind" in record:
            variants = [
                Variant(**{**v, "settings": tuple(v["settings"])}) for v in record["variants"]
            ]
            plans[record["kind"]] = Plan(**{**record, "variants": variants})
        else:
            results[record["key"]] = Result(**record)
    return results, plans


def append(path: Path, record: Plan | Result) -> None:
    """Add a line to the results; it starts on a new one whatever was there."""
    with path.open("a+b") as file:
        torn = file.tell() and path.read_bytes()[-1:] != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(asdict(record)).encode() + b"\n")


def _runs(plan: Plan, results: dict[str, Result], variant: int, text: int) -> list[Result]:
    return [results[key] for key in plan.keys[variant][text] if key in results]


def _pairs(
    plan: Plan, results: dict[str, Result], base: int, value: int, text: int
) -> list[tuple[Result, Result]]:
    """(base, value) of every seed that has both."""
    keys = zip(plan.keys[base][text], plan.keys[value][text], strict=True)
    return [(results[a], results[b]) for a, b in keys if a in results and b in results]


def _difference(pairs: list[tuple[Result, Result]]) -> Spread:
    scores = [(base.bits_per_byte, value.bits_per_byte) for base, value in pairs]
    return spread([b - a for a, b in scores if a is not None and b is not None])


def _effort(plan: Plan, results: dict[str, Result], variant: int) -> list[str]:
    """Mean steps and training seconds, text by text."""
    runs = [_runs(plan, results, variant, text) for text in range(len(plan.texts))]
    steps = [f"{mean(r.steps for r in text):.0f}" if text else "-" for text in runs]
    seconds = [f"{mean(r.seconds for r in text):.1f}" if text else "-" for text in runs]
    return [" / ".join(steps), " / ".join(seconds)]


def _mean_loss(runs: list[Result]) -> float:
    return spread([math.inf if run.loss is None else run.loss for run in runs]).mean


def _shown(values: Sequence[float | None]) -> str:
    if not values:
        return "-"
    if any(value is None for value in values):
        return "diverged"
    found = spread([value for value in values if value is not None])
    span = f" ({found.low:.4f} to {found.high:.4f})" if len(values) > 1 else ""
    return f"{found.mean:.4f}{span}"


def _shown_difference(found: Spread) -> str:
    if math.isnan(found.mean):
        return ""
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
