"""Texts that a run wrote along the way, side by side by step."""

from dataclasses import dataclass
from typing import Any

from gptcli.reports.text import clip, compact, finite, number, spread

MAX_PROMPTS = 8
MAX_STEPS = 4  # side by side on a wide screen
MAX_TEXTS = 3
MAX_CHARACTERS = 1500


@dataclass(frozen=True)
class SampleStep:
    """How the model continued a prompt at one step."""

    title: str
    texts: list[str]


@dataclass(frozen=True)
class SampleStrip:
    """One prompt and its continuations over the run, the latest step first."""

    prompt: str
    steps: list[SampleStep]


def sample_strips(lines: list[dict[str, Any]]) -> tuple[list[SampleStrip], bool]:
    """A strip for each prompt of the lines of samples.jsonl, and whether it has more than that.

    Of many steps the last, the first and some between them; of many texts the first.
    """
    by_prompt: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for line in lines:
        steps = by_prompt.setdefault(str(line.get("prompt") or ""), {})
        steps.setdefault(finite(line.get("step")) or 0, []).append(line)
    strips, shown = [], 0
    for prompt in list(by_prompt)[:MAX_PROMPTS]:
        steps, columns = by_prompt[prompt], []
        for step in reversed(spread(sorted(steps), MAX_STEPS)):
            drawn = steps[step][:MAX_TEXTS]
            shown += len(drawn)
            seen = steps[step][-1].get("tokens")
            title = f"Step {number(step)}" + (f", {compact(seen)} tokens" if finite(seen) else "")
            texts = [clip(str(line.get("text") or ""), MAX_CHARACTERS) for line in drawn]
            columns.append(SampleStep(title, texts))
        strips.append(SampleStrip(clip(prompt, MAX_CHARACTERS), columns))
    return strips, shown < len(lines)
