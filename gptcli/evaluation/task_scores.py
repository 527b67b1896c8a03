"""How well a model does a task on held-out rows: its answers, labels, choices or preferences."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from gptcli import stop
from gptcli.config.finetune_schema import LABELLED_TASKS, FinetuneConfig, Task
from gptcli.data.examples import Example, HeadExample, PreferencePair
from gptcli.data.questions import SHOT_END
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.errors import ConfigError
from gptcli.evaluation.answers import exact_match, token_f1
from gptcli.evaluation.choice_scores import (
    choice_result,
    choice_text_scores,
    label_result,
    last_word_scores,
)
from gptcli.evaluation.code_runs import code_runs
from gptcli.evaluation.labels import label_log_probabilities
from gptcli.evaluation.perplexity import encode_rows, perplexity
from gptcli.evaluation.preferences import pair_log_likelihoods
from gptcli.evaluation.task_result import TaskScores, mean_score, task_scores
from gptcli.evaluation.text_scores import bleu, chrf, rouge
from gptcli.generation.engine import Request, decode
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT

HeldOut = Sequence[Example] | Sequence[HeadExample] | Sequence[PreferencePair]

# Of log-likelihoods, relative: what batches of other sizes, and 16 bits, may change.
_ROUNDING, _ROUNDING_16 = 1e-6, 1e-2
# The packages of the scores; those of the extra `tasks` are imported only where they are used.
_PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score", "labels": "sklearn"}


def check_scores(settings: FinetuneConfig, allow_code: bool) -> None:
    """Refuse, before anything is trained, scores that could not be taken afterwards.

    ConfigError when a package is missing, or programs would run that nobody allowed to.
    """
    asked = _asked(settings)
    for name in sorted(asked & set(_PACKAGES)):
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"the task's scores ({name}) need the package {_PACKAGES[name]}",
                hint="pip install 'gptcli[tasks]'",
            )
    if "code_runs" not in asked:
        return
    if not allow_code:
        raise ConfigError(
            "finetune.scores has code_runs, which runs what the model writes on this machine",
            hint="allow it with --allow-code-execution, or take code_runs out of finetune.scores",
        )
    if sys.platform == "win32":
        raise ConfigError("finetune.scores: code_runs needs the process limits of Linux or macOS")


def _asked(settings: FinetuneConfig) -> set[str]:
    """The scores that the task has, those of labels under one name."""
    if settings.task in LABELLED_TASKS:
        return {"labels"}
    generated = settings.task in ("completion", "instruction", "chat")
    return set(settings.scores) if generated else set()


def scored_rows(held_out: HeldOut, most: int) -> HeldOut:
    """All rows, but of those that are answered by generating, which takes long, `most`: from all
    parts of data that may be sorted."""
    if not isinstance(held_out[0], Example) or len(held_out) <= most:
        return held_out
    rows = cast(Sequence[Example], held_out)
    return [rows[i * len(rows) // most] for i in range(most)]


def score_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    held_out: HeldOut,
    settings: FinetuneConfig,
    labels: Sequence[str],
    device: Device,
    precision: str,
    *,
    allow_code: bool = False,
    reference: Mapping[int, tuple[float, float]] | None = None,
) -> TaskScores:
    """Score `model` on all rows of `held_out` (at least one).

    Answers are generated greedily, up to `settings.max_new_tokens`; labels are the likeliest of
    `labels`, by the task head or without one by the likelihood of their texts, as are choices; a
    last word is right where each of its tokens is the likeliest; a preference is
    right where the chosen answer is the likelier one and, as `reward_accuracy`, where it has gained
    more over the `reference` model. Text without a task has the share of its tokens that rank
    first. Raises ConfigError as `check_scores`, `stop.Stopped` when a stop is asked for.
    """
    check_scores(settings, allow_code)
    if isinstance(held_out[0], PreferencePair):
        pairs = cast(Sequence[PreferencePair], held_out)
        return _preferences(model, pairs, device, precision, reference)
    if isinstance(held_out[0], HeadExample):
        examples = cast(Sequence[HeadExample], held_out)
        choice = task == "multiple_choice"
        found = label_log_probabilities(model, examples, device, precision, choice).exp()
        probabilities = found.double().numpy()
        truth = [example.label for example in examples]
        told = [{"where": example.where, "prompt": example.text} for example in examples]
        if not choice:
            return label_result(truth, probabilities, told, labels)
        sizes = [len(example.sequences) for example in examples]
        return choice_result(truth, probabilities, told, sizes)
    rows = cast(Sequence[Example], held_out)
    if task == "text":
        scores = perplexity(model, encode_rows(rows), device, precision=precision)
        where = [{"where": row.where} for row in rows]
        return TaskScores(
            {"token_accuracy": scores.accuracy}, {}, "token_accuracy", len(rows), where
        )
    if task == "last_word":
        return last_word_scores(model, tokenizer, rows, device, precision)
    if rows[0].choices:
        # Endings of a text differ in length; those of a cloze hardly do.
        headline = "accuracy_per_byte" if task == "continuation" else "accuracy"
        return choice_text_scores(model, rows, labels, headline, device, precision)
    # What comes behind an answer, of a model that answers as in examples, is one more of them.
    ends = (SHOT_END,) if settings.shots and task != "chat" else ()
    answers = greedy_answers(model, tokenizer, rows, settings.max_new_tokens, ends)
    return score_answers(rows, answers, settings.scores)


def greedy_answers(
    model: GPT,
    tokenizer: Tokenizer,
    rows: Sequence[Example],
    max_new_tokens: int,
    ends: tuple[str, ...] = (),
) -> list[str]:
    """What the model answers to each prompt, the likeliest token each time, without blanks around.

    An answer ends at eot, before one of the texts `ends`, or at the limit. Raises
    `stop.Stopped` when a stop is asked for.
    """
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens, stop=ends)
    requests = [Request("", row.tokens[: row.prompt], sampling) for row in rows]
    answers = []
    for _, (answer,) in decode(model, tokenizer, requests):
        stop.raise_if_requested()
        answers.append(answer.text.strip())
    stop.raise_if_requested()  # before the first answer
    return answers


def score_answers(
    rows: Sequence[Example], answers: Sequence[str], names: Sequence[str]
) -> TaskScores:
    """The scores `names` of answers to `rows`, the first of them the headline."""
    references = [row.references for row in rows]
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    own: dict[str, list[float]] = {}  # of each row
    signatures: dict[str, str] = {}
    errors: list[str | None] = [None for _ in rows]
    for name in names:
        if name in ("bleu", "chrf"):
            corpus = (bleu if name == "bleu" else chrf)(answers, references)
            values[name], intervals[name] = corpus.value, corpus.ci95
            own[name], signatures[name] = corpus.of_rows, corpus.signature
            continue
        if name == "rouge":
            found = rouge(answers, references)
        elif name == "code_runs":
            errors = [_error_of(answer) for answer in answers]
            found = {name: [float(error is None) for error in errors]}
        else:
            score = exact_match if name == "exact_match" else token_f1
            found = {name: [score(*row) for row in zip(answers, references, strict=True)]}
        for part, of_rows in found.items():
            values[part], intervals[part] = mean_score(of_rows)
            own[part] = of_rows
    predictions = [
        {
            "where": row.where,
            "prompt": row.prompt_text,
            "references": row.references,
            "answer": answer,
            **{name: of_rows[number] for name, of_rows in own.items()},
            **({"error": errors[number]} if errors[number] is not None else {}),
        }
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    headline = "rouge_l" if names[0] == "rouge" else names[0]
    return task_scores(
        values, intervals, headline, predictions, own[headline], signatures=signatures
    )


def _error_of(answer: str) -> str | None:
    stop.raise_if_requested()
    return code_runs(answer)


def _preferences(
    model: GPT,
    pairs: Sequence[PreferencePair],
    device: Device,
    precision: str,
    reference: Mapping[int, tuple[float, float]] | None,
) -> TaskScores:
    """How often the chosen answer wins; equal ones count half. So do those whose rewards differ by
    no more than rounding: the model may have read them in other batches, and in less precision,
    than the reference did, and before training there is no other difference."""
    nats = pair_log_likelihoods(model, pairs, device, precision).double().numpy()
    margins = {"preference_accuracy": nats[:, 0] - nats[:, 1]}
    if reference is not None and all(pair.key in reference for pair in pairs):
        gained = nats - np.array([reference[pair.key] for pair in pairs])
        margins["reward_accuracy"] = gained[:, 0] - gained[:, 1]
    values, intervals = {}, {}
    rounding = (_ROUNDING if precision == "fp32" else _ROUNDING_16) * np.abs(nats).max(1)
    for name, of_rows in margins.items():
        tied = np.abs(of_rows) <= (rounding if name == "reward_accuracy" else 0.0)
        values[name], intervals[name] = mean_score(np.where(tied, 0.5, of_rows > 0))
    headline = list(margins)[-1]
    predictions = [
        {
            "where": pair.where,
            "prompt": pair.chosen.prompt_text,
            "chosen": pair.chosen.references[0],
            "rejected": pair.rejected.references[0],
            "chosen_nats": -float(nats[number, 0]),
            "rejected_nats": -float(nats[number, 1]),
            "margin_nats": float(margins[headline][number]),
        }
        for number, pair in enumerate(pairs)
    ]
    chance = dict.fromkeys(values, 0.5)
    return task_scores(values, intervals, headline, predictions, margins[headline], baseline=chance)
