"""The YAML's schema: one frozen pydantic model a section. Imports no torch.

Every number has its default here, once; `config/load.py` turns a file into a `Config` and reports
problems with line numbers. Field descriptions feed the JSON schema for editors.
"""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from gptcli.config import recipe
from gptcli.config.data_schema import (
    DataConfig,
    SourceConfig,
    TokenizerConfig,
    Written,
    as_sources,
)
from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.config.generate_schema import GenerateConfig
from gptcli.config.model_schema import ModelConfig
from gptcli.config.section import (
    DeviceName,
    Fraction,
    ModelName,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Quantize,
    Section,
)
from gptcli.config.units import parse_bytes, parse_seconds

_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$"


def _run_name(name: str) -> str:
    # A name becomes a folder's: no separators, no `..`, nothing that reads as a flag.
    if not re.fullmatch(_NAME, name) or name.endswith("\n"):
        raise ValueError(
            "expected at most 100 letters, digits, '.', '_' or '-', starting with a letter,"
            f" digit or '_', got {name[:120]!r}"
        )
    return name


# A number, or `auto`: what the recipe says for the model's size. Every Config has it settled to the
# number, so whoever reads one finds numbers only.
if TYPE_CHECKING:
    AutoRate = float
    AutoDecay = float
    AutoTokens = int
else:
    AutoRate = PositiveFloat | Literal["auto"]
    AutoDecay = NonNegative | Literal["auto"]
    AutoTokens = PositiveInt | Literal["auto"]
AUTO_KEYS = {
    "optimizer": ("lr", "adamw_lr", "embedding_lr", "weight_decay"),
    "training": ("tokens_per_step",),
}


def _auto(description: str) -> Any:
    return Field(default="auto", description=description)


RunName = Annotated[str, AfterValidator(_run_name), Field(json_schema_extra={"pattern": _NAME})]


class OptimizerConfig(Section):
    """muon: `lr` for hidden matrices, AdamW for the rest. adamw: `lr` for all.

    `auto` follows the model's size (`config/recipe.py`). A model that is trained further (`init`,
    and with it every finetuning) gets a tenth of the rates for a new one, by its own size.
    """

    kind: Literal["muon", "adamw"] = Field(
        default="muon",
        description="muon: Muon for hidden matrices, AdamW for the rest; adamw: AdamW for all",
    )
    lr: AutoRate = _auto(
        "peak learning rate (muon: of hidden matrices); auto: by n_embd, a tenth with init"
    )
    adamw_lr: AutoRate = _auto("muon: peak learning rate of norms and head; auto as lr")
    embedding_lr: AutoRate = _auto("muon: peak learning rate of the embeddings; auto as lr")
    weight_decay: AutoDecay = _auto("decoupled, of matrices alone; auto: by kind")
    betas: list[Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        default=[0.9, 0.95],
        min_length=2,
        max_length=2,
        description="AdamW: decay of the means of gradients and of their squares",
    )
    eps: PositiveFloat = Field(
        default=1e-10, description="AdamW: added to the root of the squares' mean"
    )
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.95, description="muon: decay of the mean of gradients"
    )


class ScheduleConfig(Section):
    """Learning-rate schedule: linear warmup by step, then by progress through the run."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = Field(
        default="wsd", description="after the warmup; wsd: constant, then decay; constant: no decay"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=40, description="updates in which the rate rises to its peak"
    )
    decay_ratio: Fraction = Field(default=0.5, description="wsd: share of the run that decays")
    min_lr_ratio: Fraction = Field(default=0.0, description="the last rate, as a share of the peak")


class TrainingConfig(Section):
    """The loop: limits (the first reached ends the run), batch, precision, cadence."""

    max_steps: PositiveInt | None = Field(default=None, description="limit in optimizer updates")
    max_tokens: PositiveInt | None = Field(default=None, description="limit in tokens trained on")
    max_epochs: PositiveFloat | None = Field(
        default=None, description="limit in passes over the training data"
    )
    max_time: str | None = Field(
        default=None, description="limit in time, all resumes together, such as 8h or 10m"
    )
    tokens_per_step: AutoTokens = _auto(
        "of one update, a multiple of block_size; auto: by the model's size"
    )
    micro_batch_size: PositiveInt | Literal["auto"] = Field(
        default="auto", description="rows computed at once; auto: by memory and speed"
    )
    clip_norm: NonNegative = Field(
        default=1.0, description="largest norm of a gradient; 0: no clipping"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="of matrix products; auto: bf16 where that is faster"
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile; auto: for runs that earn its time back"
    )
    activation_checkpointing: Literal["auto", "on", "off"] = Field(
        default="auto", description="compute activations again in the backward pass, to save memory"
    )
    device: DeviceName = "auto"
    log_every: PositiveInt = Field(default=10, description="steps between lines of the log")
    eval_every: PositiveInt = Field(default=100, description="steps between evaluations")
    save_every: PositiveInt = Field(default=100, description="steps between checkpoints")
    save_minutes: PositiveFloat | None = Field(
        default=15.0, description="minutes between checkpoints; null: by steps alone"
    )
    keep_last: Annotated[int, Field(ge=2)] = Field(
        default=2, description="newest checkpoints that are kept, beside the best"
    )
    spike: Literal["off", "warn", "skip", "rollback"] = Field(
        default="warn", description="what to do about a step whose loss or gradient jumps"
    )
    spike_zscore: PositiveFloat = Field(
        default=6.0, description="standard deviations above the recent mean that make a spike"
    )
    max_bad_steps: PositiveInt = Field(
        default=3,
        description="steps in a row that are not applied (not finite, or spikes that are skipped),"
        " or rollbacks, that end a run",
    )

    @field_validator("max_time")
    @classmethod
    def _duration(cls, text: str | None) -> str | None:
        if text is not None:
            parse_seconds(text)
        return text


class DistributedConfig(Section):
    """Training by several processes: torchrun, --devices, Slurm."""

    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="ddp: each device has the whole model; fsdp: its share of it; auto: ddp where"
        " the model fits",
    )
    timeout_seconds: PositiveFloat = Field(
        default=120.0, description="so long silent within a step, a process counts as lost"
    )


class EvalConfig(Section):
    """`gpt eval` and the evaluations during training."""

    model: ModelName = None
    data: list[SourceConfig] | None = Field(
        default=None, description="null: the model's own held-out part"
    )
    max_tokens: PositiveInt | None = Field(default=None, description="scored at most; null: all")
    stride: PositiveInt | None = Field(
        default=None, description="tokens between windows; null: block_size, no overlap"
    )
    quantize: Literal["int8", "fp16", "bf16"] | None = Field(
        default=None, description="gpt eval: score with smaller weights too, and compare"
    )

    _data = field_validator("data", mode="before", json_schema_input_type=Written | None)(
        as_sources
    )


class SamplesConfig(Section):
    """Texts generated along the way."""

    prompts: list[str] = Field(
        default=["Once upon a time"], description="texts that are continued at each evaluation"
    )
    n: PositiveInt = Field(default=2, description="texts for each prompt")
    max_new_tokens: PositiveInt = Field(default=80, description="tokens of a text at most")


class ReportConfig(Section):
    """What a run writes for people to watch, beside its report."""

    tensorboard: bool = Field(
        default=False, description="also write the figures of metrics.jsonl for TensorBoard"
    )


class ServeConfig(Section):
    """The flags of `gpt serve`, but for --token: a config is written into runs, a secret is not."""

    model: ModelName = None
    host: str = Field(default="127.0.0.1", description="address to listen at; 0.0.0.0: all")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="port to listen at; 0: any free"
    )
    max_queue: Annotated[int, Field(ge=0)] = Field(
        default=256, description="texts that may wait for a place beside those that grow"
    )
    max_tokens: PositiveInt = Field(default=4096, description="new tokens of one text")
    max_n: PositiveInt = Field(default=16, description="texts of one request")
    max_body: str = Field(default="1MB", description="size of one request's JSON")
    grace: NonNegative = Field(default=10.0, description="seconds for texts to finish at a stop")
    device: DeviceName = "auto"
    quantize: Quantize = None

    @field_validator("max_body")
    @classmethod
    def _size(cls, text: str) -> str:
        if parse_bytes(text) < 1:
            raise ValueError("a body has at least one byte")
        return text


class ChatConfig(Section):
    """What `gpt chat` has beside the keys of `generate` about model, sampling and device."""

    system: str | None = Field(default=None, description="a message that stands before all others")
    template: str | None = Field(
        default=None,
        description="a Jinja file or the name of a shipped chat template; null: the model's own",
    )


class Config(Section):
    """A whole run."""

    name: RunName = Field(
        default="run", description="of the run, whose directory is NAME-DATE-TIME under runs/"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=1337,
        description="of weights, order of the data and dropout; the same seed repeats a run",
    )
    init: str | None = Field(
        default=None,
        description="a model to go on from: a run, checkpoint, Hugging Face folder or hub name",
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    distributed: DistributedConfig = DistributedConfig()
    eval: EvalConfig = EvalConfig()
    samples: SamplesConfig = SamplesConfig()
    report: ReportConfig = ReportConfig()
    generate: GenerateConfig = GenerateConfig()
    serve: ServeConfig = ServeConfig()
    chat: ChatConfig = ChatConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @model_validator(mode="after")
    def _settle_auto(self) -> "Config":
        for name, section in self._settled(self.model).items():
            object.__setattr__(self, name, section)  # the config is frozen for everybody else
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> "Config":
        # Each problem names its keys with their sections: check.py leaves out those of bad ones.
        t, m = self.training, self.model
        problems = self._shape_problems()
        if t.max_steps and self.schedule.warmup_steps > t.max_steps:
            problems.append(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is above"
                f" training.max_steps {t.max_steps}"
            )
        sources = [*self.data.train, *(self.data.val or [])]
        binary = any(source.encoding == "binary" for source in sources)
        if binary and self.init is None and self.tokenizer.kind != "bytes":
            problems.append(
                f"tokenizer.kind {self.tokenizer.kind} reads text; data.train with encoding binary"
                " needs tokenizer.kind bytes"
            )
        if self.init is not None and m.embedding_file is not None:
            problems.append(
                "model.embedding_file starts the token embeddings of a new model, but those come"
                " with the model that init names; remove one of them"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def settled_for(self, shape: ModelConfig) -> "Config":
        """This config, its automatic numbers those for a model of `shape`, the one that `init`
        names. They are then as if written."""
        return self.model_copy(update=self._settled(shape))

    @property
    def open_keys(self) -> list[tuple[str, str]]:
        """Automatic keys (section, key) whose numbers wait for the shape that `init` will bring."""
        if self.init is None:
            return []
        keys = [(section, key) for section, names in AUTO_KEYS.items() for key in names]
        return [(s, key) for s, key in keys if key not in getattr(self, s).model_fields_set]

    def _settled(self, shape: ModelConfig) -> dict[str, Section]:
        """The sections that have `AUTO_KEYS`, with numbers for a model of `shape`.

        What was automatic counts as not set, so that it is settled again when the model changes;
        with `init`, only until its shape is known.
        """
        micro, from_init = self.training.micro_batch_size, self.init is not None
        unit = shape.block_size * (micro if isinstance(micro, int) else 1)
        tokens = recipe.usual_tokens_per_step(shape, unit, from_init=from_init)
        rates = recipe.rates(self.optimizer.kind, shape, from_init=from_init)
        final = from_init and "n_embd" in shape.model_fields_set
        return {
            "optimizer": _with_numbers(self.optimizer, rates, final),
            "training": _with_numbers(self.training, {"tokens_per_step": tokens}, final),
        }

    def _shape_problems(self) -> list[str]:
        """What does not fit the model's shape.

        With `init`, sizes that are not given are known only once that model is read; then this is
        checked again.
        """
        t, m = self.training, self.model
        problems = []
        if self._knows("n_layer") and m.window is not None and len(m.window) > m.n_layer:
            problems.append(
                f"model.window has {len(m.window)} entries, but model.n_layer is {m.n_layer}"
            )
        if not self._knows("block_size"):
            return problems
        if t.tokens_per_step % m.block_size:
            problems.append(
                f"training.tokens_per_step {t.tokens_per_step} is not a multiple of"
                f" model.block_size {m.block_size}"
            )
        elif isinstance(t.micro_batch_size, int):
            rows = t.tokens_per_step // m.block_size
            if rows % t.micro_batch_size:
                problems.append(
                    f"training.micro_batch_size {t.micro_batch_size} does not divide the"
                    f" {rows} rows of a step (training.tokens_per_step / model.block_size)"
                )
        if self.eval.stride and self.eval.stride > m.block_size:
            problems.append(
                f"eval.stride {self.eval.stride} is above model.block_size {m.block_size}"
            )
        return problems

    def _knows(self, key: str) -> bool:
        """Whether a size of the model is settled: not one that `init` will bring."""
        return self.init is None or key in self.model.model_fields_set


_AnySection = TypeVar("_AnySection", bound=Section)


def _with_numbers(section: _AnySection, numbers: dict[str, Any], final: bool) -> _AnySection:
    """`section` with `numbers` for the keys that are automatic; `final` marks these as set."""
    written = {k for k in section.model_fields_set if getattr(section, k) != "auto"}
    mine = {key: value for key, value in numbers.items() if key not in written}
    fields_set = section.model_fields_set - mine.keys() | (mine.keys() if final else set())
    return section.model_construct(_fields_set=fields_set, **{**dict(section), **mine})
