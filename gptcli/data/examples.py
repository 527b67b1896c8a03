"""What a row of a finetuning task becomes: tokens, and which of them are learned."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A text of which the responses are learned.

    `tokens` are document start, prompt, response and eot; `trained` says of each whether it is a
    target with loss, the first never is. An answer is generated from `tokens[:prompt]`, whose text
    is `prompt_text`, and compared with `references`, of which the first is the response that is
    trained on (of a chat the last one). `where` names the row. `choices` are the texts that an
    answer may be, where these are given, and `choice_tokens` what is compared: their tokens behind
    `tokens[:prompt]`. `shots` other rows stand before the prompt.
    """

    tokens: list[int]
    trained: list[bool]
    prompt: int
    prompt_text: str
    references: list[str]
    where: str
    choices: list[str] = field(default_factory=list)
    choice_tokens: list[list[int]] = field(default_factory=list)
    shots: int = 0


@dataclass(frozen=True)
class HeadExample:
    """A text, or several, whose last token a task head reads (Radford et al. 2018, figure 1).

    classification and entailment have one sequence, similarity the two orders of its texts,
    multiple choice one for each choice. `label` is the number of the right label or choice, `bytes`
    the size of what the first sequence has of the text behind its first token, eot aside.
    """

    sequences: list[list[int]]
    label: int
    text: str
    where: str
    bytes: int = 0


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt. `key` is a hash of the row, the same in every run."""

    chosen: Example
    rejected: Example
    key: int
    where: str


@dataclass
class RowCounts:
    """What became of the rows of a task, for logs and reports."""

    rows: int = 0
    skipped_empty: int = 0  # responses, or texts, without a token
    skipped_long: int = 0  # the response alone does not fit the block, or `too_long: skip`
    skipped_unlike: int = 0  # preferences whose answers follow different conversations
    shortened: int = 0  # prompts that lost their beginning
    capped: int = 0  # beyond max_train_rows_per_label
    imitations: int = 0  # conversations with a message that looks like several: see ChatTokens
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def left_out(self) -> int:
        """Rows that were skipped, whatever for."""
        return self.skipped_empty + self.skipped_long + self.skipped_unlike
