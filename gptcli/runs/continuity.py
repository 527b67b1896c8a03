"""Whether the logs of a run have all that it wrote: no line lost between its start and its newest
checkpoint."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gptcli.config.schema import Config

_MOST_NAMED = 3


@dataclass(frozen=True)
class Rhythm:
    """From `step` on: how many steps lie between two lines and between two evaluations, and how
    many texts an evaluation writes. None where that does not follow from the config."""

    step: int
    log_every: int
    eval_every: int | None
    texts: int | None


def rhythm_facts(config: Config) -> dict[str, Any]:
    """What run.json notes of a start or a resume, for `rhythms` to read."""
    training, samples = config.training, config.samples
    return {
        "log_every": training.log_every,
        # To keep to max_time a run leaves evaluations out.
        "eval_every": None if training.max_time else training.eval_every,
        "texts": len(samples.prompts) * samples.n,
    }


def rhythms(history: Any, configs: Iterable[Config]) -> list[Rhythm]:
    """The rhythms of a run one after the other, from the history in its run.json; where that is
    damaged or of an early version, one that all of its `configs` allow."""
    found: list[Rhythm] = []
    for entry in history if isinstance(history, list) else []:
        if isinstance(entry, dict) and entry.get("event") in ("start", "resume"):
            rhythm = _noted(entry)
            if rhythm is None:
                return [_widest(configs)]
            # A run that went back has done again what lay behind.
            found = [*(old for old in found if old.step < rhythm.step), rhythm]
    return found if found and found[0].step == 0 else [_widest(configs)]


def _noted(entry: dict[str, Any]) -> Rhythm | None:
    """What `rhythm_facts` gave, None where it is damaged or not there."""
    step, log_every, texts = (entry.get(key) for key in ("step", "log_every", "texts"))
    eval_every = entry.get("eval_every")
    if not all(isinstance(value, int) for value in (step, log_every, texts, eval_every or 0)):
        return None
    rhythm = Rhythm(int(step or 0), int(log_every or 0), eval_every, int(texts or 0))
    return rhythm if min(rhythm.step, rhythm.log_every - 1, (eval_every or 1) - 1) >= 0 else None


def _widest(configs: Iterable[Config]) -> Rhythm:
    facts = [rhythm_facts(config) for config in configs]
    evals, texts = ({each[key] for each in facts} for key in ("eval_every", "texts"))
    return Rhythm(
        0,
        max((each["log_every"] for each in facts), default=1),
        evals.pop() if len(evals) == 1 else None,
        texts.pop() if len(texts) == 1 else None,
    )


def _at(step: int, rhythms: list[Rhythm]) -> Rhythm:
    """That of the update from `step` to the next one."""
    return rhythms[max(bisect_right([rhythm.step for rhythm in rhythms], step) - 1, 0)]


def _evaluating(step: int, rhythms: list[Rhythm]) -> list[Rhythm]:
    """That of the evaluation at `step`; where a resume began there, it may have been before it."""
    now, before = _at(step, rhythms), _at(step - 1, rhythms)
    return [now] if now is before else [before, now]


def missing_steps(
    steps: list[int], rhythms: list[Rhythm], newest: int | None
) -> tuple[list[str], int | None]:
    """Gaps between logged steps, as texts; and where the log ends before the `newest` saved step
    although more steps were to be logged, its last step."""

    def due(first: int, last: int) -> bool:
        return any(step % _at(step - 1, rhythms).log_every == 0 for step in range(first, last))

    gaps = [f"{a + 1} to {b - 1}" for a, b in pairwise([0, *steps]) if due(a + 1, b)]
    last = steps[-1] if steps else 0
    ends = newest is not None and due(last + 1, newest + 1)
    return gaps, last if ends else None


def missing_evaluations(
    evaluated: set[int], rhythms: list[Rhythm], newest: int | None, known: Iterable[int]
) -> list[int]:
    """Steps whose evaluation is not in the log: the first and those that were due before the
    `newest` saved one, and those that checkpoints know of."""
    expected = set(known)
    for step in range(newest or 0):
        every = [rhythm.eval_every for rhythm in _evaluating(step, rhythms)]
        if step == 0 or all(n and step % n == 0 for n in every):
            expected.add(step)
    return sorted(expected - evaluated)


def missing_texts(
    samples: list[dict[str, Any]], evaluated: Iterable[int], rhythms: list[Rhythm]
) -> Iterator[str]:
    """Evaluations whose texts are not all there."""
    steps = (record.get("step") for record in samples)
    found = Counter(step for step in steps if isinstance(step, int))
    for step in sorted(evaluated):
        least = min(rhythm.texts or 0 for rhythm in _evaluating(step, rhythms))
        if found[step] < least:
            yield f"step {step} has {found[step]} of {least}"


def some(found: Iterable[object]) -> str:
    """The first few of them, and how many more there are."""
    texts = [str(one) for one in found]
    more = len(texts) - _MOST_NAMED
    return ", ".join(texts[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
