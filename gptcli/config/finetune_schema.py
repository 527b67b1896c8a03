"""The YAML's section `finetune`. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gptcli.config.section import NonNegative, PositiveFloat, PositiveInt, Section

Task = Literal[
    "completion",
    "chat",
    "instruction",
    "classification",
    "pairs",
    "multiple_choice",
    "continuation",
    "cloze",
    "last_word",
    "preference",
    "text",
]

# The fields of a task's rows, under the names that templates use; `finetune.fields` says what they
# are called in the data. Those in OPTIONAL_FIELDS may be missing from a row or null.
TASK_FIELDS: dict[Task, tuple[str, ...]] = {
    "completion": ("prompt", "response"),
    "chat": ("messages",),
    "instruction": ("instruction", "input", "output"),
    "classification": ("text", "label"),
    "pairs": ("text1", "text2", "label"),
    "multiple_choice": ("prompt", "choices", "label"),
    "continuation": ("prompt", "choices", "label"),
    "cloze": ("text", "choices", "label"),
    "last_word": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "text": ("text",),
}
OPTIONAL_FIELDS = frozenset({"input"})
LABELLED_TASKS: tuple[Task, ...] = ("classification", "pairs")  # whose labels have names
HEAD_TASKS: tuple[Task, ...] = ("classification", "pairs", "multiple_choice")
# Whose answers go on in the words of a text, and are tokenised with it in one piece.
CONTINUED_TASKS: tuple[Task, ...] = ("continuation", "cloze", "last_word")


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021): W x + (alpha / rank) B A x, of which A and B learn."""

    rank: PositiveInt = Field(default=8, description="columns of A and B: the adapters' size")
    alpha: PositiveFloat = Field(
        default=16.0, description="strength: an adapter's output is multiplied by alpha / rank"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="share of an adapter's inputs that are zeroed in training"
    )
    layers: list[Literal["attn.qkv", "attn.proj", "mlp.up", "mlp.proj"]] = Field(
        default=["attn.qkv", "attn.proj", "mlp.up", "mlp.proj"],
        min_length=1,
        description="matrices of each block that get adapters",
    )
    quantize: Literal["int8"] | None = Field(
        default=None, description="the frozen matrices of the blocks in a quarter of the memory"
    )


class FinetuneConfig(Section):
    """Supervised finetuning: what the rows are, what of the model learns, how it is scored."""

    task: Task = Field(
        default="completion", description="what the rows are, and with it their fields and scores"
    )
    fields: dict[str, str] = Field(
        default={}, description="names in the rows: {prompt: question, response: answer}"
    )
    template: str | None = Field(
        default=None,
        description="Jinja, from the row's fields to the prompt, or the name of a shipped template",
    )
    loss_on: Literal["response", "all"] = Field(
        default="response",
        description="tokens that are learned: those of the answers, or the prompts too",
    )
    packing: bool = Field(default=True, description="several examples in a row of block_size")
    too_long: Literal["truncate", "skip"] = Field(
        default="truncate", description="what becomes of rows whose prompt does not fit the block"
    )
    method: Literal["full", "lora", "head"] = Field(
        default="full", description="what learns: all weights, adapters, or the task head alone"
    )
    lora: LoraConfig = LoraConfig()
    freeze_embeddings: bool = Field(
        default=False, description="token and position embeddings do not learn"
    )
    freeze_layers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="blocks, counted from the embeddings, that do not learn"
    )
    head: bool = Field(
        default=True,
        description="labels by a linear head on the last token, as GPT-1; false: as text",
    )
    lm_weight: NonNegative = Field(
        default=0.5, description="of the language-model loss beside the head's"
    )
    labels: list[str] | None = Field(default=None, description="null: those of the training rows")
    pair_order: Literal["one", "both"] = Field(
        default="one", description="both: a head reads two texts in either order, for similarity"
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none",
        description="balanced: rare labels count as much as frequent ones, with a head",
    )
    max_train_rows_per_label: PositiveInt | None = Field(
        default=None, description="train on at most so many rows of each label; null: on all"
    )
    dpo_beta: PositiveFloat = Field(
        default=0.1,
        description="preference: how strongly the model is held to the one it started from",
    )
    patience: PositiveInt | None = Field(
        default=None, description="evaluations without a better task score that end the run"
    )
    shots: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="gpt eval --task: examples from the training rows before each scored row, as"
        " GPT-3; a generated answer then ends at a blank line",
    )
    score_rows: PositiveInt = Field(default=200, description="held-out rows for the task's scores")
    max_new_tokens: PositiveInt = Field(default=64, description="length limit of a scored answer")
    scores: list[Literal["exact_match", "token_f1", "bleu", "chrf", "rouge", "code_runs"]] = Field(
        default=["exact_match", "token_f1"],
        min_length=1,
        description="of generated answers; the first decides with patience",
    )
    reference: str | None = Field(
        default=None, description="a text on which perplexity is taken before and after"
    )
    reference_tokens: PositiveInt = Field(
        default=20_000, description="tokens of reference that are scored"
    )

    @property
    def names(self) -> dict[str, str]:
        """Every field of the task -> its name in the rows."""
        return {name: self.fields.get(name, name) for name in TASK_FIELDS[self.task]}

    @property
    def has_head(self) -> bool:
        """Whether labels are learned by a task head."""
        return self.head and self.task in HEAD_TASKS

    @property
    def unused(self) -> dict[str, str]:
        """Keys that have no effect -> because of what."""
        task, method = f"task: {self.task}", f"method: {self.method}"
        learns_text = self.has_head and method != "method: head"
        unused = {}
        if self.method != "lora":
            unused["lora"] = method
        if not learns_text:
            unused["lm_weight"] = method if self.has_head else "no task head"
        if self.task != "preference":
            unused["dpo_beta"] = task
        if self.task not in ("completion", "chat", "instruction"):
            unused |= dict.fromkeys(("scores", "max_new_tokens"), task)
        if self.has_head or self.task == "preference":
            unused |= dict.fromkeys(("packing", "score_rows"), task)
        if self.reference is None:
            unused["reference_tokens"] = "no reference"
        return unused

    @model_validator(mode="after")
    def _fit_together(self) -> "FinetuneConfig":
        known = TASK_FIELDS[self.task]
        if unknown := sorted(set(self.fields) - set(known)):
            raise ValueError(
                f"fields of task {self.task} are {', '.join(known)}, not {', '.join(unknown)}"
            )
        if self.method == "head" and not self.has_head:
            raise ValueError(
                f"method head trains a task head alone, which {', '.join(HEAD_TASKS)} have with"
                " head: true"
            )
        if self.method != "full" and (self.freeze_embeddings or self.freeze_layers):
            raise ValueError(f"method {self.method} freezes all weights of the model already")
        return self

    @model_validator(mode="after")
    def _labels_fit(self) -> "FinetuneConfig":
        named = self.task in LABELLED_TASKS
        asked = {
            "labels": (self.labels is not None, named),
            "max_train_rows_per_label": (self.max_train_rows_per_label is not None, named),
            "class_weights": (self.class_weights != "none", named and self.has_head),
            "pair_order: both": (self.pair_order == "both", self.task == "pairs" and self.has_head),
        }
        for name, (given, fits) in asked.items():
            if given and not fits:
                what = "a head of " if name.startswith(("class", "pair")) else ""
                tasks = "pairs" if name.startswith("pair") else " and ".join(LABELLED_TASKS)
                raise ValueError(f"{name} is for {what}{tasks}")
        if self.labels is not None and (len(set(self.labels)) < max(2, len(self.labels))):
            raise ValueError("labels names at least two, each of them once")
        return self
