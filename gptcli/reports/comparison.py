"""The comparison of models as tables and sentences; from the `comparison` of a report.json."""

from typing import Any

from gptcli.reports.section import Section
from gptcli.reports.table import Table
from gptcli.reports.text import compact, decimals, duration, field, number, percent


def verdict(pair: dict[str, Any]) -> str:
    """What a paired test says, in a sentence. `pair` is one of the comparison's `pairs`."""
    a, b, change = pair["a"], pair["b"], pair["difference"]
    if pair["winner"] is None:
        return f"no difference can be told between {a} and {b}"
    if pair["seed_alone"]:
        return (
            f"no difference can be told between the recipes of {a} and {b}, which differ in the"
            f" seed alone: that moved the score by {abs(change):.4f} bits per byte"
        )
    winner, loser = (b, a) if pair["winner"] == "b" else (a, b)
    return f"{winner} is better than {loser} by {abs(change):.4f} bits per byte"


def comparison_tables(comparison: dict[str, Any]) -> list[Table]:
    """The models from the best to the worst, the paired tests and the settings that differ."""
    return [_ranking(comparison), _tests(comparison), *_settings(comparison)]


def comparison_section(report: dict[str, Any]) -> Section | None:
    """The comparison of a report that `gpt runs compare` wrote."""
    comparison = report.get("comparison")
    if not isinstance(comparison, dict):
        return None
    sentences = [
        f"{pair['verdict'][:1].upper()}{pair['verdict'][1:]}." for pair in pairs_of(comparison)
    ]
    text = [*sentences, *comparison["notes"]]
    return Section("Comparison", text=text, tables=comparison_tables(comparison))


def pairs_of(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The paired tests."""
    pairs: list[dict[str, Any]] = comparison["pairs"]
    return pairs


def _ranking(comparison: dict[str, Any]) -> Table:
    head = ["model", "bits/byte", "95 % interval", "perplexity", "accuracy", "parameters"]
    head += ["trained on", "trained for", "tokens/s", "scored in"]
    rows = [
        [
            f"{run['name']}, step {run['step']}" if run["step"] else run["name"],
            decimals(run["bits_per_byte"], 4),
            _interval(run["bits_per_byte_ci95"]),
            decimals(run["perplexity"], 2),
            percent(run["accuracy"]),
            compact(run["parameters"]),
            f"{compact(run['trained_tokens'])} tokens" if run["trained_tokens"] else "–",
            duration(run["training_seconds"]),
            compact(run["tokens_per_second"]),
            duration(run["scoring_seconds"]),
        ]
        for run in comparison["runs"]
    ]
    note = f"{number(comparison['units'])} {comparison['unit']} of {comparison['data']},"
    note += f" {number(comparison['bytes'])} bytes. Perplexity compares within one tokenizer only."
    return Table("Models", head, rows, marked=frozenset({0}), note=note)


def _tests(comparison: dict[str, Any]) -> Table:
    pairs = pairs_of(comparison)
    head = ["model", "against", "bits/byte more", "95 % interval"]
    head += [f"{comparison['unit']} better", "sign test p"]
    rows = [
        [
            pair["b"],
            pair["a"],
            f"{pair['difference']:+.4f}",
            _interval(pair["ci95"], "+.4f"),
            f"{pair['better']} of {pair['better'] + pair['worse'] + pair['ties']}"
            f" ({percent(pair['better'] / comparison['units'])})",
            f"{pair['sign_p']:.3g}",
        ]
        for pair in pairs
    ]
    note = ""
    if len(pairs) > 1:
        note = (
            f"The {len(pairs)} intervals hold together, whichever model this text had made the best"
            " (Bonferroni over all pairs of models)."
        )
    return Table("Paired differences", head, rows, note=note)


def _settings(comparison: dict[str, Any]) -> list[Table]:
    differences = comparison["differences"]
    if not differences:
        return []
    rows = [[key, *(field(key, value) for value in values)] for key, values in differences.items()]
    return [Table("Settings that differ", ["setting", *comparison["names"]], rows)]


def _interval(bounds: list[float] | None, form: str = ".4f") -> str:
    return " to ".join(f"{bound:{form}}" for bound in bounds) if bounds else "–"
