"""AdamW, and Muon for the hidden matrices with AdamW for the rest. State is kept by name."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gptcli import world
from gptcli.config.schema import Config, OptimizerConfig
from gptcli.errors import CheckpointError
from gptcli.model.gpt import GPT, Block
from gptcli.runs.tensors import local
from gptcli.training.adamw import AdamW, Group
from gptcli.training.exchange import Exchange
from gptcli.training.parallel import like

_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")
_SCALAR = torch.zeros(())
_FUSED = ("cpu", "cuda")  # kinds of device where AdamW is one kernel, which has `step` there too


def peak_rate(config: Config) -> float:
    """The peak learning rate to show for a run: that of the hidden matrices, or of what learns in
    their place, which with muon has AdamW's."""
    settings = config.optimizer
    adapted = config.finetune.method != "full"
    return settings.adamw_lr if settings.kind == "muon" and adapted else settings.lr


class Optimizer:
    """Updates those of a model's parameters that require gradients. The learning rate comes from
    outside at every step.

    Muon is for the hidden matrices alone: adapters are too narrow to be orthogonalised, and a task
    head is an output layer. Of a sharded model, and of its state, each process has its share.
    """

    def __init__(self, model: GPT, config: OptimizerConfig) -> None:
        # A tied weight appears once.
        self._whole = {name: p for name, p in model.named_parameters() if p.requires_grad}
        named = {name: local(p) for name, p in self._whole.items()}
        matrices = {
            name: p
            for name, p in named.items()
            if p.ndim == 2 and name.startswith("blocks.") and name.endswith("weight")
        }
        self._muon = None
        if config.kind == "muon" and matrices:
            heights = part_heights(model, matrices)
            self._muon = Muon(dict(matrices), heights, config, self._exchange(matrices))
            rest = {name: p for name, p in named.items() if name not in matrices}
            embeddings = {n: p for n, p in rest.items() if n in ("wte.weight", "wpe.weight")}
            others = {n: p for n, p in rest.items() if n not in embeddings}
            groups = [(embeddings, config.embedding_lr), (others, config.adamw_lr)]
        else:
            groups = [(named, config.adamw_lr if config.kind == "muon" else config.lr)]
        self._named = named
        adamw_groups = []
        for parameters, peak in groups:
            # Decay acts on matrices only, never on norms and biases.
            for decays in (True, False):
                chosen = [p for p in parameters.values() if (p.ndim >= 2) == decays]
                decay = config.weight_decay if decays else 0.0
                if chosen:
                    adamw_groups.append(Group(chosen, peak, decay))
        self._fused = next(iter(named.values())).device.type in _FUSED
        betas = (config.betas[0], config.betas[1])
        self._adamw = AdamW(adamw_groups, betas, config.eps, fused=self._fused)

    def step(self, ratio: float, apply: Tensor | None = None) -> None:
        """One update with every learning rate at `ratio` of its peak.

        Where `apply`, a bool scalar on the device, is false, weights and state stay as they are,
        whatever the gradients; the host does not wait to learn which it is.
        """
        for name, parameter in self._whole.items():
            if parameter is not self._named[name] and parameter.grad is not None:
                self._named[name].grad = local(parameter.grad)
                parameter.grad = None
        # The fused kernels leave out an update as they do for a gradient scaler.
        self._adamw.step(ratio, None if apply is None else (~apply).float())
        if self._muon is not None:
            self._muon.step(ratio, apply)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in (*self._named.values(), *self._whole.values()):
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter name>.<state name>` -> tensor."""
        state = {}
        for name, parameter in self._named.items():
            for key, value in self._adamw.state.get(parameter, {}).items():
                state[f"{name}.{key}"] = value
        state |= self._muon.state_dict() if self._muon is not None else {}
        return {
            key: like(value, self._whole[key.rpartition(".")[0]]) for key, value in state.items()
        }

    def _exchange(self, matrices: dict[str, Tensor]) -> Exchange | None:
        """How several processes share the work on whole matrices."""
        here = world.current()
        if here.size == 1:
            return None
        shapes = {name: (self._whole[name].size(0), self._whole[name].size(1)) for name in matrices}
        sharded = any(self._whole[name] is not p for name, p in matrices.items())
        return Exchange(shapes, sharded, here, next(iter(matrices.values())).device)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the tensors that `state_dict` gave out of `state`, without a copy where possible.

        CheckpointError when a name, shape or dtype differs.
        """
        if self._muon is not None:
            self._muon.load_state_dict(state)
        for group in self._adamw.groups:
            for parameter in group.params:
                name = next(n for n, p in self._named.items() if p is parameter)
                if entry := self._taken_entry(state, name, parameter):
                    self._adamw.state[parameter] = entry
        if state:
            raise CheckpointError(f"optimizer state of unknown parameters: {', '.join(state)}")

    def _taken_entry(
        self, state: dict[str, Tensor], name: str, parameter: Tensor
    ) -> dict[str, Tensor]:
        """AdamW's state of one parameter, taken out of `state`: all of it, or none where it has had
        no gradient yet."""
        found = {key: state.pop(f"{name}.{key}", None) for key in _ADAM_STATE}
        if all(value is None for value in found.values()):
            return {}
        entry = {}
        for key, value in found.items():
            if value is not None and key == "step" and value.numel() == 1:
                value = value.reshape(())
            if value is None:
                raise CheckpointError(f"optimizer state {name}.{key} is missing")
            _check_like(f"{name}.{key}", value, _SCALAR if key == "step" else parameter)
            entry[key] = value.to(parameter.device) if self._fused or key != "step" else value
        return entry


def _check_like(name: str, value: Tensor, like: Tensor) -> None:
    """CheckpointError unless the optimizer's `value` has the shape and dtype of `like`."""
    if value.shape != like.shape:
        raise CheckpointError(f"optimizer state {name} has another shape")
    if value.dtype != like.dtype:
        kind = str(value.dtype).removeprefix("torch.")
        raise CheckpointError(f"optimizer state {name} holds {kind}, not float32")


def part_heights(model: GPT, names: Iterable[str]) -> dict[str, list[int]]:
    """For each hidden matrix the heights of the parts that are orthogonalised apart: q, k and v,
    gate and value."""
    heights = {}
    for name in names:
        block = model.blocks[int(name.split(".")[1])]
        assert isinstance(block, Block)
        rows = model.get_parameter(name).size(0)
        if name.endswith("qkv.weight"):
            heights[name] = list(block.attn.widths)
        elif name.endswith("up.weight") and block.mlp.gated:
            heights[name] = [rows // 2] * 2
        else:
            heights[name] = [rows]
    return heights


class Muon:
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), in Nesterov form.

    Parts of one shape are orthogonalised as one batch. The update of an (r, c) part is scaled by
    sqrt(max(1, r / c)). With an `exchange`, each process orthogonalises some of the matrices for
    all: momentum and update are elementwise, so a share of the rows is enough for them.
    """

    def __init__(
        self,
        named: dict[str, Tensor],
        heights: dict[str, list[int]],
        config: OptimizerConfig,
        exchange: Exchange | None = None,
    ) -> None:
        self._named = named
        self._exchanges = exchange.rounds() if exchange is not None else None
        self._peak, self._momentum = config.lr, config.momentum
        self._decay = config.weight_decay
        self._buffers = {name: torch.zeros_like(p) for name, p in named.items()}
        self._shapes: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
        for name, parts in heights.items():
            start = 0
            for height in parts:
                place = (name, start, start + height)
                self._shapes.setdefault((height, named[name].size(-1)), []).append(place)
                start += height

    @torch.no_grad()
    def step(self, ratio: float, apply: Tensor | None = None) -> None:
        """One update with the learning rate at `ratio` of its peak; for `apply` see Optimizer."""
        rate = self._peak * ratio
        if self._exchanges is None:
            self._update(self._named, self._directions(self._named, rate, apply), -rate)
            return
        for exchange in self._exchanges:
            wholes = exchange.whole(self._directions(exchange.shapes, rate, apply))
            if exchange.sharded:  # they have been sent, and memory is short
                for name in exchange.shapes:
                    self._named[name].grad = None
            updates = {name: torch.zeros_like(whole) for name, whole in wholes.items()}
            self._update(updates, wholes, -rate)
            del wholes
            for name, update in exchange.shares(updates).items():
                self._named[name].add_(update)

    def _directions(
        self, names: Iterable[str], rate: float, apply: Tensor | None
    ) -> dict[str, Tensor]:
        """Where each of the matrices that have a gradient is to go, after its weight decay."""
        directions = {}
        for name in names:
            parameter = self._named[name]
            if parameter.grad is None:
                continue
            directions[name] = self._direction(self._buffers[name], parameter.grad, apply)
            if self._decay:
                share = rate * self._decay
                parameter.mul_(1 - share if apply is None else 1 - share * apply)
        return directions

    def _update(self, into: dict[str, Tensor], directions: dict[str, Tensor], rate: float) -> None:
        """Add `rate` times the orthogonalised directions to `into`, both whole matrices."""
        for (rows, columns), places in self._shapes.items():
            places = [place for place in places if place[0] in directions]
            if not places:
                continue
            updates = orthogonalise(torch.stack([directions[n][i:j] for n, i, j in places]))
            scale = rate * max(1.0, rows / columns) ** 0.5
            for (name, i, j), update in zip(places, updates, strict=True):
                into[name][i:j].add_(update, alpha=scale)

    def _direction(self, buffer: Tensor, grad: Tensor, apply: Tensor | None) -> Tensor:
        """Nesterov's momentum, which `buffer` takes in; in the place of `grad`."""
        if apply is None:
            buffer.lerp_(grad, 1 - self._momentum)
            return grad.lerp_(buffer, self._momentum)
        moved = torch.lerp(buffer, grad, 1 - self._momentum)
        direction = torch.lerp(grad, moved, self._momentum)
        torch.where(apply, moved, buffer, out=buffer)
        return torch.where(apply, direction, torch.zeros_like(direction), out=grad)

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter name>.momentum` -> tensor."""
        return {f"{name}.momentum": buffer for name, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take its entries out of `state`. CheckpointError when one is missing or misshapen."""
        for name, buffer in self._buffers.items():
            value = state.pop(f"{name}.momentum", None)
            if value is None or value.shape != buffer.shape:
                raise CheckpointError(f"optimizer state {name}.momentum is missing or misshapen")
            _check_like(f"{name}.momentum", value, buffer)
            self._buffers[name] = value.to(buffer)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearly orthogonal factor of each matrix of (N, r, c), by five Newton-Schulz steps.

    Coefficients of Jordan et al. 2024 (singular values end between about 0.7 and 1.2). Works in
    fp32 on the CPU, where bf16 may be emulated and slow, and in bf16 elsewhere.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
