"""What a run will take on many GPUs that are not here: sharding, memory, exchange and time."""

from dataclasses import dataclass, replace

from gptcli.config.schema import Config
from gptcli.data.pipeline import ready_tokenizer
from gptcli.errors import ConfigError
from gptcli.model.empty import empty_model
from gptcli.training.fitting import gib
from gptcli.training.flops import flops_per_token
from gptcli.training.footprint import Footprint, footprint
from gptcli.training.scaling import (
    KINDS,
    USABLE_SHARE,
    DeviceMemory,
    Kind,
    Shape,
    StepTime,
    device_memory,
    sent_bytes,
    step_time,
)

_MOST_DEVICES = 2**17
_MOST_ROWS = 64  # of a micro batch


@dataclass(frozen=True)
class DevicesPlan:
    """A run on `devices` GPUs of a `kind`. `steps` and `device_hours` (least and most) are None
    where the config limits the run neither by steps nor by tokens; `problems` say why it does not
    fit, `advice` what does."""

    name: str
    kind: str
    devices: int
    boxes: int
    precision: str
    vocab_size: int
    parameters: int
    sharding: str
    activation_checkpointing: bool
    micro_batch_size: int
    micro_batches: int
    tokens_per_step: int
    memory: DeviceMemory
    memory_total_bytes: int
    usable_memory_bytes: int
    sent_bytes: int
    time: StepTime
    steps: int | None
    device_hours: tuple[float, float] | None
    problems: list[str]
    advice: list[str]


def plan_devices(
    config: Config, devices: int, kind: str, *, vocab_size: int | None = None
) -> DevicesPlan:
    """What `config` takes on `devices` GPUs of a `kind`, one of KINDS. Reads no text.

    The sharding is the first that fits: DDP, FSDP, FSDP with activations computed again; with the
    largest micro batch that fits. Raises ConfigError for an unknown kind, or where there are more
    devices than rows in a step; that the run does not fit is no error here.
    """
    found = _kind(kind)
    rows = config.training.tokens_per_step // config.model.block_size
    if rows < devices:
        least = devices * config.model.block_size
        raise ConfigError(
            f"a step has {rows:,} rows (training.tokens_per_step / model.block_size), fewer than"
            f" {devices:,} devices",
            hint=f"--set training.tokens_per_step={least}",
        )
    case = _Case(config, found, devices, _vocabulary(config, vocab_size))
    chosen = case.first_that_fits()
    problems, advice = list[str](), list[str]()
    if chosen is None:
        chosen = _Choice("fsdp", True, 1, case.need(1, True))
        held = case.memory(chosen).total_bytes
        problems = [
            f"a device needs {gib(held)} of memory even with FSDP, activations computed again and"
            f" micro batches of one row; usable of {kind} are {gib(case.usable)}"
        ]
        enough = case.enough_devices()
        advice = [
            f"--devices {enough} is enough"
            if enough is not None
            else "activations of one row are too large: set model.block_size or n_embd lower"
        ]
    return case.plan(kind, chosen, problems, advice)


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise ConfigError(f"--device-kind {name!r} is none of: {', '.join(KINDS)}")
    return KINDS[name]


def _vocabulary(config: Config, given: int | None) -> int:
    if given is not None:
        return given
    tokenizer = ready_tokenizer(config.tokenizer)
    return config.tokenizer.vocab_size if tokenizer is None else tokenizer.vocab_size


@dataclass(frozen=True)
class _Choice:
    sharding: str
    recompute: bool
    micro_batch_size: int
    need: Footprint  # of one device with the whole model


@dataclass(frozen=True)
class _Case:
    """A config on so many devices."""

    config: Config
    kind: Kind
    devices: int
    vocab_size: int

    @property
    def precision(self) -> str:
        wanted = self.config.training.precision
        return "bf16" if wanted == "auto" else wanted

    @property
    def usable(self) -> int:
        return int(USABLE_SHARE * self.kind.memory_bytes)

    @property
    def rows(self) -> int:
        """The most rows of a step that one device computes."""
        rows = self.config.training.tokens_per_step // self.config.model.block_size
        return -(-rows // self.devices)

    @property
    def shape(self) -> Shape:
        one = empty_model(self.config.model.model_copy(update={"n_layer": 1}), self.vocab_size)
        block = sum(p.numel() for p in one.blocks[0].parameters())
        matrices = sum(p.numel() for p in one.blocks[0].parameters() if p.ndim == 2)
        layers = self.config.model.n_layer
        return Shape(
            parameters=one.parameter_count() + (layers - 1) * block,
            blocks=layers * block,
            one_block=block,
            matrices=layers * matrices if self.config.optimizer.kind == "muon" else 0,
            product_bytes=4 if self.precision == "fp32" else 2,
        )

    def need(self, rows: int, recompute: bool) -> Footprint:
        """Of a step with micro batches of so many rows on one device."""
        return footprint(
            self.config,
            self.vocab_size,
            rows,
            self.precision,
            recompute=recompute,
            device_kind="cuda",
        )

    def memory(self, choice: _Choice) -> DeviceMemory:
        return device_memory(choice.need, self.shape, self.devices, choice.sharding)

    def first_that_fits(self) -> _Choice | None:
        """The simplest way that fits, with the largest micro batch."""
        given = self.config.training.activation_checkpointing
        ways = [("ddp", given == "on"), ("fsdp", given == "on")]
        if given == "auto":
            ways.append(("fsdp", True))
        strategy = self.config.distributed.strategy
        for sharding, recompute in ways:
            if strategy not in ("auto", sharding):
                continue
            one, two = self.need(1, recompute), self.need(2, recompute)
            for rows in self._sizes():
                choice = _Choice(sharding, recompute, rows, _extended(one, two, rows))
                if self.memory(choice).total_bytes <= self.usable:
                    return choice
        return None

    def _sizes(self) -> list[int]:
        given = self.config.training.micro_batch_size
        if given != "auto":
            return [min(given, self.rows)]
        most = min(self.rows, _MOST_ROWS)
        return [n for n in range(most, 0, -1) if self.rows % n == 0]

    def enough_devices(self) -> int | None:
        """The least power of two of devices on which it fits."""
        choice = _Choice("fsdp", True, 1, self.need(1, True))
        count = 1
        while count <= _MOST_DEVICES:
            held = device_memory(choice.need, self.shape, count, "fsdp").total_bytes
            if held <= self.usable:
                return count
            count *= 2
        return None

    def plan(
        self, kind: str, choice: _Choice, problems: list[str], advice: list[str]
    ) -> DevicesPlan:
        """The figures of a choice."""
        training, memory = self.config.training, self.memory(choice)
        parts = -(-self.rows // choice.micro_batch_size)
        sent = sent_bytes(self.shape, self.devices, choice.sharding, parts)
        flops = flops_per_token(self.config.model, self.vocab_size) * training.tokens_per_step
        time = step_time(
            self.kind, self.devices, flops, sent, self.precision, recompute=choice.recompute
        )
        steps = training.max_steps
        if training.max_tokens:
            by_tokens = -(-training.max_tokens // training.tokens_per_step)
            steps = min(steps or by_tokens, by_tokens)
        low, high = (self.devices * (steps or 0) * seconds / 3600 for seconds in time.seconds)
        return DevicesPlan(
            name=self.config.name,
            kind=kind,
            devices=self.devices,
            boxes=-(-self.devices // self.kind.per_box),
            precision=self.precision,
            vocab_size=self.vocab_size,
            parameters=self.shape.parameters,
            sharding=choice.sharding,
            activation_checkpointing=choice.recompute,
            micro_batch_size=choice.micro_batch_size,
            micro_batches=parts,
            tokens_per_step=training.tokens_per_step,
            memory=memory,
            memory_total_bytes=memory.total_bytes,
            usable_memory_bytes=self.usable,
            sent_bytes=sent,
            time=time,
            steps=steps,
            device_hours=(low, high) if steps else None,
            problems=problems,
            advice=advice,
        )


def _extended(one: Footprint, two: Footprint, rows: int) -> Footprint:
    """Of micro batches of `rows` rows, from those of one and of two: what grows with them does so
    in proportion."""

    def of(name: str) -> int:
        first = int(getattr(one, name))
        return first + (rows - 1) * max(0, int(getattr(two, name)) - first)

    return replace(one, **{name: of(name) for name in one.__dataclass_fields__})
