"""The tables of scripts/bench_train.py: medians, ratios, Markdown."""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path

OURS, GEMM = "gptcli", "gemm"
NAMES = {
    OURS: "gptcli",
    "nanogpt": "nanoGPT, as its users run it",
    "nanogpt-compiled": "nanoGPT, compiled",
    "nanogpt-fused": "nanoGPT, fused AdamW",
    "nanogpt-compiled-fused": "nanoGPT, compiled, fused AdamW",
    "transformers": "transformers, fused AdamW",
    "transformers-compiled": "transformers, compiled, fused AdamW",
}


@dataclass(frozen=True)
class Spread:
    """The median of some values, the lowest and the highest."""

    median: float
    low: float
    high: float

    def show(self, form: str) -> str:
        """Such as `1.31 (1.28 to 1.35)`, numbers written as `form` says."""
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def spread(values: list[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(above: list[float], below: list[float]) -> Spread:
    """Of the values of the same round, so that a slow minute slows both."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(size: int | None) -> str:
    """Bytes in GiB."""
    return "?" if size is None else f"{size / 2**30:.2f} GiB"


def speed_table(
    rates: dict[str, list[float]],
    peaks: dict[str, int | None],
    flops_per_token: int,
    asked: dict[str, float],
    asked_share: float | None,
) -> str:
    """`rates` are tokens per second by contender and round, and FLOP/s of the GEMM.

    `asked` says by the first word of a contender's name how many times as fast ours is to be.
    """
    rows = []
    for name in [name for name in NAMES if name in rates]:
        share = ratios([rate * flops_per_token for rate in rates[name]], rates[GEMM]).show(".0%")
        cells = [NAMES[name], spread(rates[name]).show(",.0f")]
        if name == OURS:
            wanted = f"; asked at least {asked_share:.0%}" if asked_share else ""
            cells += ["", "", share + wanted]
        else:
            limit = asked.get(name.split("-")[0])
            ratio = ratios(rates[OURS], rates[name]).show(".2f")
            cells += [ratio, f"at least {limit}" if limit else "", share]
        rows.append([*cells, gib(peaks[name])])
    head = ["", "tokens/s", "ours against it", "asked", "of the GEMM peak", "peak memory"]
    return table(head, rows)


def memory_table(peaks: dict[str, int | None], asked: dict[str, float]) -> str:
    """`peaks` are bytes by contender; `asked` is as in `speed_table`."""
    rows, ours = [], peaks[OURS]
    for name, peak in peaks.items():
        limit = asked.get(name.split("-")[0])
        ratio = f"{ours / peak:.2f}" if ours and peak and name != OURS else ""
        rows.append([NAMES[name], gib(peak), ratio, f"at most {limit}" if limit else ""])
    return table(["", "peak memory", "ours against it", "asked"], rows)


def threads_table(rates: dict[tuple[str, int], list[float]], asked: float) -> str:
    """`rates` by contender and number of threads, as in `speed_table`."""
    rows = []
    for name, shown, scale, unit in (
        (OURS, NAMES[OURS], 1.0, "tokens/s"),
        (GEMM, "the GEMM peak", 1e9, "GFLOP/s"),
    ):
        one, two = ([rate / scale for rate in rates[name, n]] for n in (1, 2))
        cells = [f"{spread(one).show(',.0f')} {unit}", f"{spread(two).show(',.0f')} {unit}"]
        limit = f"at least {asked}" if name == OURS else ""
        rows.append([shown, *cells, ratios(two, one).show(".2f"), limit])
    return table(["", "1 thread", "2 threads", "2 against 1", "asked"], rows)


def write(block: str, case: str, path: Path) -> None:
    """Put `block` between the markers of `case` in the file. SystemExit when they are not there."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- bench {case} -->", f"<!-- /bench {case} -->"
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    changed, count = re.subn(pattern, lambda _: f"{begin}\n{block}\n{end}", text, flags=re.S)
    if count != 1:
        raise SystemExit(f"{path}: {begin} and {end} are there {count} times, not once")
    path.write_text(changed, encoding="utf-8")
