"""What a report says of memorised text, of canaries, and of paired sentences."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gptcli.reports.drawing import INK, LARGE, TRAIN, VAL, svg
from gptcli.reports.section import Plot, Section
from gptcli.reports.table import Table
from gptcli.reports.text import NOTHING, clip, decimals, field, number, percent, visible

_MOST_ROWS = 5  # of single samples and pairs
_MOST_CHARACTERS = 120


def memorization_section(report: dict[str, Any]) -> Section | None:
    """Verbatim continuations of training text, and what samples share with it; None without."""
    found = report.get("memorization")
    if not found:
        return None
    text = [
        f"Looked at: {found['text']}, {field('bytes', found['searched_bytes'])}. The model is given"
        " the tokens before a place in a text and continues greedily; what it writes counts where"
        f" all of the next {found['continuation_tokens']} tokens are the same. Held-out text shows"
        " how much of that is mere predictability."
    ]
    return Section("Memorised text", text, [_rates_plot(found)], _memorization_tables(found))


def canaries_section(report: dict[str, Any]) -> Section | None:
    """Exposure of the canaries by repetitions; None where none were planted."""
    found = report.get("canaries")
    if not found:
        return None
    how = (
        f"ranked among all {number(found['candidates'] + 1)} texts"
        if found["method"] == "rank"
        else f"by a skew-normal distribution fitted to {number(found['candidates'])} others"
    )
    text = [
        f'Numbers planted as "{found["format"]}" in the training text. Exposure: by how many bits'
        f" the model's likelihood narrows the search for the number, {how} (Carlini et al. 2019)."
        f" About 1.4 on average is chance; {decimals(found['most_bits'], 1)} is all."
    ]
    if found.get("epochs") is not None:
        text.append(f"The model had read {decimals(found['epochs'], 2)} passes over the text.")
    return Section("Canaries", text, [_canary_plot(found)], [_canary_table(found)])


def pairs_section(report: dict[str, Any]) -> Section | None:
    """Which of two sentences the model finds likelier, by group; None without pairs."""
    found = report.get("pairs")
    if not found:
        return None
    text = [
        "Above 0, and above 50 %, the model finds sentence a likelier than b; without a preference"
        " the intervals (95 %, over pairs) hold 0 and 50 %."
    ]
    if several := found["differ_in_several_places"]:
        places = ", ".join(found["several_places"])
        text.append(f"{several} pairs differ in more than one place: {places}.")
    return Section("Paired sentences", text, [], _pair_tables(found))


def privacy_tables(report: dict[str, Any]) -> list[Table]:
    """All tables of the three sections, for a terminal."""
    tables = _memorization_tables(report["memorization"]) if "memorization" in report else []
    tables += [_canary_table(report["canaries"])] if "canaries" in report else []
    return tables + (_pair_tables(report["pairs"]) if "pairs" in report else [])


def _memorization_tables(found: dict[str, Any]) -> list[Table]:
    held_out = {rate["prefix_tokens"]: rate for rate in found["held_out_rates"]}
    rows = [
        [
            number(rate["prefix_tokens"]),
            *_share(rate),
            *_share(held_out.get(rate["prefix_tokens"])),
        ]
        for rate in found["rates"]
    ]
    head = ["tokens given", "training text", "95 %", "right tokens"]
    head += ["held-out text", "95 %", "right tokens"]
    counts = [part[0]["passages"] if part else 0 for part in (found["rates"], [*held_out.values()])]
    note = f"{number(counts[0])} passages of the training text, {number(counts[1])} of held-out"
    note += " text; right tokens: the mean number before the first wrong one."
    tables = [Table("Continued verbatim", head, rows, note=note)]
    samples, other = found["sample_runs"], found["held_out_runs"]
    if not samples["texts"]:
        return tables
    runs = [["samples", *map(number, samples.values())]]
    runs += [["held-out text of their length", *map(number, other.values())]] * (other["texts"] > 0)
    head = ["", "texts", f"with {found['least_run_bytes']} bytes or more", "longest"]
    tables.append(Table("Runs of bytes shared with the training text", head, runs))
    nearest = sorted(found["samples"], key=lambda sample: -sample["run_bytes"])[:_MOST_ROWS]
    shown = [
        [number(s["run_bytes"]), _line(s["run"]), str(s["document"])]
        for s in nearest
        if s["run_bytes"]
    ]
    if shown:
        tables.append(Table("Nearest training passages", ["bytes", "shared", "document"], shown))
    return tables


def _share(rate: dict[str, Any] | None) -> list[str]:
    if rate is None:
        return [NOTHING] * 3
    low, high = rate["share_ci95"]
    interval = f"{percent(low)} to {percent(high)}"
    return [percent(rate["share"]), interval, decimals(rate["right_tokens"], 2)]


def _canary_table(found: dict[str, Any]) -> Table:
    rows = [
        [
            number(part["repetitions"]),
            number(part["canaries"]),
            decimals(part["exposure_bits"], 1),
            _interval(part["exposure_bits_ci95"], 1),
            number(part["ranked_first"]),
        ]
        for part in found["by_repetitions"]
    ]
    head = ["copies in a pass", "canaries", "exposure, bits", "95 %", "likelier than all others"]
    return Table("Exposure", head, rows)


def _pair_tables(found: dict[str, Any]) -> list[Table]:
    parts = {**found["groups"], "all": found["all"]}
    rows = [
        [
            name,
            number(part["pairs"]),
            decimals(part["nats"], 3),
            _interval(part["nats_ci95"], 3),
            decimals(part["bits_per_byte"], 4),
            _interval(part["bits_per_byte_ci95"], 4),
            percent(part["prefers_a"]),
            " to ".join(map(percent, part["prefers_a_ci95"])),
        ]
        for name, part in parts.items()
    ]
    head = ["group", "pairs", "ln p(a) - ln p(b)", "95 %", "bits per byte", "95 %"]
    tables = [Table("Differences", [*head, "prefers a", "95 %"], rows)]
    largest = sorted(found["pairs"], key=lambda pair: -abs(pair["nats"]))[:_MOST_ROWS]
    shown = [[decimals(pair["nats"], 2), _line(pair["a"]), _line(pair["b"])] for pair in largest]
    return [*tables, Table("Largest differences", ["ln p(a) - ln p(b)", "a", "b"], shown)]


def _line(text: str) -> str:
    """The text's beginning on one line."""
    return clip(" ".join(visible(text).split()), _MOST_CHARACTERS)


def _interval(interval: list[float] | None, places: int) -> str:
    return " to ".join(decimals(v, places) for v in interval) if interval else NOTHING


def _rates_plot(found: dict[str, Any]) -> Plot:
    """Shares by prefix length, with their intervals."""

    def draw(axes: Axes) -> None:
        for rates, colour, label, shift in (
            (found["rates"], TRAIN, "training text", -0.05),
            (found["held_out_rates"], VAL, "held-out text", 0.05),
        ):
            if not rates:
                continue
            shares = np.array([rate["share"] for rate in rates])
            ends = np.array([rate["share_ci95"] for rate in rates]).T
            errors = np.abs(ends - shares) * 100
            places = np.arange(len(rates)) + shift
            axes.errorbar(
                places, shares * 100, errors, color=colour, label=label, marker="o", ms=4, capsize=3
            )
        prefixes = [rate["prefix_tokens"] for rate in found["rates"]]
        axes.set_xticks(range(len(prefixes)), map(str, prefixes))
        axes.set_xlabel("tokens given")
        axes.set_ylabel("continued verbatim, %")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.2)  # room for the legend
        axes.legend(frameon=False, loc="upper center", ncols=2)

    description = (
        "Share of passages that are continued verbatim, by the number of tokens given, of training"
        " text and of held-out text; the numbers are in the table."
    )
    drawn = svg("verbatim", LARGE, draw)
    return Plot("verbatim", "Continued verbatim", description, drawn, large=True)


def _canary_plot(found: dict[str, Any]) -> Plot:
    """Exposure of each canary, and the mean, by repetitions."""
    repetitions = [part["repetitions"] for part in found["by_repetitions"]]

    def draw(axes: Axes) -> None:
        for canary in found["canaries"]:
            place = repetitions.index(canary["repetitions"])
            axes.plot([place], [canary["exposure_bits"]], "o", color=TRAIN, ms=4, alpha=0.4)
        means = [part["exposure_bits"] for part in found["by_repetitions"]]
        axes.plot(range(len(means)), means, color=TRAIN, marker="_", ms=14, label="mean")
        axes.axhline(found["most_bits"], color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set_xticks(range(len(repetitions)), map(str, repetitions))
        axes.set_xlabel("copies in a pass over the training text")
        axes.set_ylabel("exposure, bits")
        axes.set_ylim(0, found["most_bits"] * 1.05)

    description = (
        "Exposure of each canary in bits, and its mean, by the number of copies planted; the dotted"
        " line is the most there can be. The means are in the table."
    )
    drawn = svg("exposure", LARGE, draw)
    return Plot("exposure", "Exposure of the canaries", description, drawn, large=True)
