"""The large figures at the top of a report."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gptcli.reports.text import compact, decimals, duration, field, finite, number, percent

SHAPE = (("n_layer", "layers"), ("n_embd", "wide"))


@dataclass(frozen=True)
class Headline:
    """One large figure: `note` says how it is to be read."""

    label: str
    value: str
    note: str


def with_task(task: tuple[str, str, str] | None, others: list[Headline]) -> list[Headline]:
    """The task's score first, in place of the share of tokens that ranked first."""
    if task is None:
        return others
    return [Headline(*task), *(shown for shown in others if shown.label != "Accuracy")]


def run_headlines(report: dict[str, Any]) -> list[Headline]:
    """Scores, speed, time and size of a training run."""
    training, model = report["training"], report.get("model") or {}
    shape = [f"{number(model[k])} {w}" for k, w in SHAPE if finite(model.get(k)) is not None]
    done = [
        f"{number(training.get('steps'))} steps" if training.get("steps") is not None else "",
        f"{compact(training['tokens'])} tokens" if training.get("tokens") else "",
    ]
    return [
        *_score_headlines(report),
        Headline("Speed", compact(training.get("tokens_per_second")), "tokens per second"),
        Headline("Training time", duration(training.get("seconds")), _join(done)),
        Headline("Parameters", compact(training.get("parameters")), _join(shape)),
    ]


def _score_headlines(report: dict[str, Any]) -> list[Headline]:
    """Bits per byte, perplexity and accuracy: the final ones, else those of the last evaluation."""
    scores, last = report["scores"], report.get("last_eval")
    final = any(finite(scores.get(key)) is not None for key in ("loss", "bits_per_byte"))
    shown = scores if final or not last else last
    when = "" if shown is scores else f"at step {number(last['step'])}" if last else ""
    interval = scores.get("bits_per_byte_ci95")
    spread = "no interval" if finite(shown.get("bits_per_byte")) is not None else "not evaluated"
    if final and isinstance(interval, list) and len(interval) == 2:
        spread = f"95 % interval {decimals(interval[0], 3)} – {decimals(interval[1], 3)}"
    loss = finite(shown.get("loss"))
    perplexity = finite(shown.get("perplexity"))
    # exp(loss) beyond the range of a float is null in JSON though the loss is known.
    value = "inf" if perplexity is None and loss is not None else shown_perplexity(perplexity)
    nats = f"loss {decimals(loss, 3)} nats per token" if loss is not None else "not evaluated"
    return [
        Headline(
            "Bits per byte" if report["run"].get("job") == "eval" else "Validation bits per byte",
            decimals(shown.get("bits_per_byte"), 3),
            _join([spread, when]),
        ),
        Headline("Perplexity", value, _join([nats, when])),
        Headline("Accuracy", percent(shown.get("accuracy")), "next token ranked first"),
    ]


def eval_headlines(report: dict[str, Any]) -> list[Headline]:
    """Scores of an evaluation of text, what they are of, and the size of the model."""
    if isinstance(report.get("comparison"), dict):
        return _comparison_headlines(report["comparison"])
    scores, model = report["scores"], report.get("model") or {}
    size = Headline("Parameters", compact(model.get("parameters")), str(model.get("preset") or ""))
    if scores.get("tokens") is None:  # rows of a task, pairs, what is known by heart
        return [size]
    return [
        *_score_headlines(report),
        Headline("Text", field("bytes", scores.get("bytes")), _count(scores, "documents")),
        Headline("Tokens scored", compact(scores.get("tokens")), _count(scores, "unscored_tokens")),
        size,
    ]


def _comparison_headlines(comparison: dict[str, Any]) -> list[Headline]:
    """The difference of two models, or the best of several."""
    of = f"{number(comparison['units'])} {comparison['unit']} of {comparison['data']}"
    units = Headline("Text", field("bytes", comparison["bytes"]), of)
    pair, best = comparison["pairs"][0], comparison["runs"][0]
    if len(comparison["runs"]) > 2:
        value = decimals(best["bits_per_byte"], 4)
        return [Headline("Best bits per byte", value, str(best["name"])), units]
    spread = "no interval"
    if pair["ci95"]:
        spread = "95 % interval {:+.4f} to {:+.4f}".format(*pair["ci95"])
    change, note = f"{pair['difference']:+.4f}", f"{pair['b']} less {pair['a']}, {spread}"
    return [Headline("Difference in bits per byte", change, note), units]


def shown_perplexity(value: Any) -> str:
    """exp(loss) with two decimals, of a million and more without."""
    value = finite(value)
    return number(value) if value is None or value >= 1e6 else decimals(value, 2)


def _count(scores: dict[str, Any], key: str) -> str:
    words = key.replace("_tokens", "")
    return f"{number(scores[key])} {words}" if finite(scores.get(key)) is not None else ""


def _join(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)
