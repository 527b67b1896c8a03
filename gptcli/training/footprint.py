"""Memory at the peak of one training step: the step's own code, run on tensors without memory."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.config.schema import Config
from gptcli.device import Device, autocast
from gptcli.evaluation.token_scores import MOST_LOGITS, score_tokens
from gptcli.model.empty import empty_model
from gptcli.model.gpt import GPT
from gptcli.model.heads import attach_head, task_head
from gptcli.model.likelihood import log_likelihoods
from gptcli.model.loss import chunk_rows, linear_cross_entropy
from gptcli.training.clipping import clip_gradients
from gptcli.training.optimizers import Optimizer
from gptcli.training.trainable import as_finetuned, sequences_per_row

# Of a process that has imported all that a run does, before its first tensor (VmRSS, torch 2.13 for
# the CPU); on a GPU the CUDA context and cuBLAS's workspace, by PyTorch's documentation.
RUNTIME_BYTES = {"cpu": 480 * 2**20, "cuda": 600 * 2**20, "mps": 480 * 2**20}
# Of what comes and goes in a step, how much more the allocator holds: freed blocks of other sizes.
# So that the plans of scripts/check_plan.py (glibc, torch 2.13) are 0.90 to 1.03 of what runs take;
# PyTorch's own allocator on a GPU rounds blocks too, by how much was not measured.
SLACK = 0.35
# What the memory of a step depends on; simulating one takes a second or more.
_SECTIONS = {"model", "optimizer", "training", "eval", "finetune"}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one training step. Each part at its largest; they are not all there at once.

    `other_bytes` is what the runtime takes and the allocator cannot use again. `total_bytes`, which
    the step needs, is the largest sum at one time, `other_bytes` included.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    other_bytes: int
    total_bytes: int


def footprint(
    config: Config,
    vocab_size: int,
    micro_batch_size: int,
    precision: str,
    *,
    recompute: bool,
    device_kind: str,
) -> Footprint:
    """The peak of one training step with micro batches of `micro_batch_size` rows, of finetuning
    as `config.finetune` says.

    The layers repeat, so a model of two repetitions tells how much each adds, and where layers are
    frozen another one what these add. Takes no memory for any size of model. RuntimeError,
    OverflowError or TypeError for sizes beyond 64 bits.
    """
    model, frozen = config.model, config.finetune.freeze_layers
    period = len(model.window or [0])
    if 2 * period >= model.n_layer:
        at = _sizes(config, vocab_size, micro_batch_size, precision, recompute)
    else:
        one, two, below = (
            _sizes(_with_layers(config, *n), vocab_size, micro_batch_size, precision, recompute)
            for n in ((period, 0), (2 * period, 0), (2 * period, period if frozen else 0))
        )
        at = one.extended(one, two, (model.n_layer - frozen - period) / period)
        at = at.extended(one, below, frozen / period)
    # The step is simulated on the CPU; elsewhere chunks of logits are larger.
    more = _chunk_bytes(config, vocab_size, micro_batch_size, precision, device_kind)
    more -= _chunk_bytes(config, vocab_size, micro_batch_size, precision, "cpu")
    peak = max(at.building, at.loss + more, at.backward + more, at.update, at.evaluation)
    slack = int(SLACK * (peak - at.weights - at.optimizer))
    other = RUNTIME_BYTES[device_kind] + slack
    return Footprint(
        weights_bytes=at.weights,
        gradients_bytes=at.gradients,
        optimizer_bytes=at.optimizer,
        activations_bytes=at.activations,
        logits_bytes=at.logits + more,
        other_bytes=other,
        total_bytes=peak + other,
    )


@dataclass(frozen=True)
class _Sizes:
    """Bytes: of what a step keeps, and the peaks of the phases of a run."""

    building: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    loss: int
    backward: int
    update: int
    evaluation: int

    def extended(self, one: "_Sizes", two: "_Sizes", times: float) -> "_Sizes":
        """What it would be with `times` more of the layers that `two` has more than `one`."""

        def of(name: str) -> int:
            return int(getattr(self, name) + times * (getattr(two, name) - getattr(one, name)))

        return _Sizes(**{name: of(name) for name in self.__dataclass_fields__})


def _chunk_bytes(config: Config, vocab_size: int, rows: int, precision: str, kind: str) -> int:
    """Of the logits that are there at once, fp32, and beside them in the precision of products."""
    held = min(chunk_rows(vocab_size, kind), rows * config.model.block_size)
    return held * vocab_size * (4 if precision == "fp32" else 6)


def _with_layers(config: Config, n_layer: int, frozen: int) -> Config:
    model = config.model.model_copy(update={"n_layer": n_layer})
    finetune = config.finetune.model_copy(update={"freeze_layers": frozen})
    return config.model_copy(update={"model": model, "finetune": finetune})


_CPU = Device("cpu", None, "", 1, True)
_known: dict[tuple[str, int, int, str, bool], _Sizes] = {}


def _sizes(config: Config, vocab_size: int, rows: int, precision: str, recompute: bool) -> _Sizes:
    """Those of `_simulate`, which is asked once for each case in a process."""
    case = (config.model_dump_json(include=_SECTIONS), vocab_size, rows, precision, recompute)
    if case not in _known:
        _known[case] = _simulate(config, vocab_size, rows, precision, recompute)
    return _known[case]


def _simulate(
    config: Config, vocab_size: int, rows: int, precision: str, recompute: bool
) -> _Sizes:
    """A second step of the run, as the loop makes it, with every allocation counted.

    Without segments (data.document_mask): where documents begin is not known.
    """
    model = empty_model(config.model, vocab_size)
    if config.finetune.has_head:
        attach_head(model, 2)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    counted = _Counted()
    with FakeTensorMode(), counted:
        _fill(model, shapes)
        as_finetuned(model, config.finetune)
        model.train()
        model.recompute = recompute
        building, weights = counted.peak, counted.live  # int8 weights are made of fp32 ones
        counted.peak = weights
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        gradients = counted.live - weights
        optimizer = Optimizer(model, config.optimizer)
        optimizer.step(1.0)
        optimizer.zero_grad()
        kept = counted.live
        length, sequences = config.model.block_size, rows * sequences_per_row(config.finetune)
        tokens = torch.empty(sequences, length, dtype=torch.int64)
        passes = _passes(model, config, tokens, counted, precision)
        counted.peak = counted.live
        clip_gradients(model.parameters(), config.training.clip_norm)
        optimizer.step(1.0)
        update = counted.peak
        optimizer.zero_grad()
        counted.peak = counted.live
        _evaluate(model, config, _CPU, precision)
        return _Sizes(
            building=building,
            weights=weights,
            gradients=gradients,
            optimizer=kept - weights,
            update=update,
            evaluation=counted.peak,
            **passes,
        )


def _passes(
    model: GPT, config: Config, tokens: Tensor, counted: "_Counted", precision: str
) -> dict[str, int]:
    """Activations and logits of a micro batch, and the peaks of its loss and its backward pass;
    where a step has several micro batches, of one that adds to the gradients."""
    activations = 0

    def after_hidden(*_: object) -> None:
        nonlocal activations
        activations = counted.live - before
        counted.peak = counted.live

    hook = model.norm.register_forward_hook(after_hidden)
    loss_peak = backward_peak = logits = 0
    several = config.training.tokens_per_step > tokens.numel() // sequences_per_row(config.finetune)
    for _ in range(2 if several else 1):
        before = counted.live
        with autocast(_CPU, precision):
            loss = _loss(model, config.finetune, tokens)
        loss_peak, logits = counted.peak, counted.peak - before - activations
        counted.peak = counted.live
        torch.autograd.backward(loss)
        backward_peak = counted.peak
        del loss
    hook.remove()
    return {
        "activations": activations,
        "logits": logits,
        "loss": loss_peak,
        "backward": backward_peak,
    }


def _loss(model: GPT, settings: FinetuneConfig, tokens: Tensor) -> Tensor:
    """As training/objective.py, whose functions look at values, makes it of all these tokens."""
    if settings.task == "preference":
        return log_likelihoods(model, tokens, tokens).sum()
    if not settings.has_head:
        return model.loss(tokens, tokens)
    if settings.method == "head":  # what it reads is made of one text at a time
        with torch.no_grad():
            read = model.hidden(tokens[:1])[:, -1].expand(len(tokens), -1)
        return task_head(model)(model.drop(read)).sum()
    hidden = model.hidden(tokens)
    loss = task_head(model)(model.drop(hidden[:, -1])).float().sum()
    if settings.lm_weight:
        flat = hidden.flatten(0, 1)
        loss = loss + linear_cross_entropy(flat, model.head.weight, tokens.flatten())
    return loss


def _evaluate(model: GPT, config: Config, device: Device, precision: str) -> None:
    """Score the largest batch of an evaluation."""
    length, wanted = config.model.block_size, config.eval.max_tokens or MOST_LOGITS
    rows = max(1, min(MOST_LOGITS // (length * model.vocab_size), wanted // length))
    tokens = torch.empty(rows, length, dtype=torch.int64)
    score_tokens(model.eval(), tokens, tokens, device, precision)


def _fill(model: GPT, shapes: dict[str, torch.Size]) -> None:
    """Give the empty `model` weights, which the mode around the call makes fake."""
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    model.load_state_dict(tensors, assign=True)
    if model.config.tie_embeddings:
        model.head.weight = model.wte.weight
    model.reset_positions()


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made and freed under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # "is every target scored", "what is the norm": there are no values
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)  # all are
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.logsumexp.default:  # which works on a copy of its own
            self.peak = max(self.peak, self.live + args[0].numel() * args[0].element_size())
        for item in tree_iter(result):
            if isinstance(item, Tensor):
                self._count(item.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
