"""What a row of a task asks, and its answers, as text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptcli.config.finetune_schema import LABELLED_TASKS, FinetuneConfig
from gptcli.data.row_fields import label_text, value_at
from gptcli.data.templates import PromptTemplate
from gptcli.errors import DataError

SHOT_END = "\n\n"  # behind an example for other rows; an answer that is generated ends there
_BLANK = re.compile("_+")


@dataclass(frozen=True)
class Question:
    """A prompt with the answers that count as right (the first is learned), the `choices` that are
    compared, and the `label`, where the task has these."""

    prompt: str
    answers: list[str]
    choices: list[str] = field(default_factory=list)
    label: str | None = None

    @property
    def shown(self) -> str:
        """The prompt with its answer, as an example for other rows."""
        return self.prompt + "".join(self.answers[:1])


class Questions:
    """From the rows of a task to questions. `prompt` fills the template, where the task has one;
    `labels` are the known ones."""

    def __init__(
        self, settings: FinetuneConfig, prompt: PromptTemplate | None, labels: Sequence[str]
    ) -> None:
        self._settings, self._prompt, self._labels = settings, prompt, list(labels)

    def values(self, row: dict[str, Any]) -> dict[str, Any]:
        """The task's fields of a row."""
        names = self._settings.names
        values = {name: value_at(row, field, None) for name, field in names.items()}
        if self._settings.task == "instruction":
            values["input"] = values["input"] or ""
        return values

    def of(self, row: dict[str, Any], values: dict[str, Any], where: str) -> Question:
        """What a row with these `values` asks. DataError, with `where`, for an unknown label or
        choice, a cloze without its blank, and a template that cannot be filled."""
        task, choices = self._settings.task, values.get("choices") or []
        right = choice_number(values["label"], choices, where) if choices else 0
        if task == "text":
            return Question("", [values["text"]])
        if task == "last_word":
            return last_word(values["text"])
        if task == "cloze":
            return cloze(values["text"], choices, right, where)
        assert self._prompt is not None
        prompt = self._prompt.render(row, values, where)
        if task == "continuation":
            return continued(prompt, choices, right)
        if choices:
            return Question(prompt, [choices[right]], choices)
        if task in LABELLED_TASKS:
            label = self.label(values["label"], where)
            return Question(prompt, [label], self._labels, label)
        given = values[{"instruction": "output", "preference": "chosen"}.get(task, "response")]
        return Question(prompt, [given] if isinstance(given, str) else given)

    def before(self, rows: Sequence[dict[str, Any]], where: str) -> str:
        """The text of rows with their answers, as examples for the row at `where`."""
        questions = [self.of(row, self.values(row), where) for row in rows]
        return "".join(question.shown + SHOT_END for question in questions)

    def label(self, value: Any, where: str) -> str:
        """A label as text. DataError where it is not one of the known ones, if there are any."""
        label = label_text(value)
        if self._labels and label not in self._labels:
            raise DataError(
                f"{where}: unknown label {label!r} (known: {', '.join(self._labels)})",
                hint="finetune.labels names them; without it they are those of the training rows",
            )
        return label


def continued(prompt: str, choices: list[str], right: int) -> Question:
    """Which of the choices a text goes on with. The blanks between them belong to the choices."""
    text = prompt.rstrip()
    texts = [prompt[len(text) :] + choice if choice.strip() else "" for choice in choices]
    return Question(text, [texts[right]], texts)


def cloze(text: str, choices: list[str], right: int, where: str) -> Question:
    """Which of the choices fills the blank of a text, a run of `_` that it has once: what follows
    the text before the blank is a choice with the rest of the text (Trinh and Le 2018).

    DataError, with `where`, for a text without a blank, and for one with several.
    """
    blanks = list(_BLANK.finditer(text))
    if len(blanks) != 1:
        raise DataError(f"{where}: the text has {len(blanks)} blanks (runs of _), not one")
    before, rest = text[: blanks[0].start()], text[blanks[0].end() :]
    filled = [choice + rest if choice.strip() else "" for choice in choices]
    return continued(before, filled, right)


def last_word(text: str) -> Question:
    """The last word of a text from all that is before it (Paperno et al. 2016, LAMBADA): what is
    behind the last white space. No answer where the text has but one word."""
    words = text.rstrip().rsplit(maxsplit=1)
    if len(words) < 2:
        return Question("", [])
    return Question(words[0], [text.rstrip()[len(words[0]) :]])


def choice_number(value: Any, choices: list[str], where: str) -> int:
    """The number of the right choice, which is given by its number or its text."""
    label = label_text(value)
    if isinstance(value, str) and label in choices:
        return choices.index(label)
    if label.isascii() and label.isdigit() and int(label) < len(choices):
        return int(label)
    raise DataError(
        f"{where}: {label!r} is neither one of the {len(choices)} choices nor the number of one,"
        " counted from 0"
    )
