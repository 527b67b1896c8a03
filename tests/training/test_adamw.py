"""AdamW against torch.optim.AdamW, and what it spares the start of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gptcli.training.adamw import AdamW, Group

RATIOS = (0.1, 1.0, 0.7, 0.3)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, 7, generator=generator)) for n in (3, 5, 4)]


def give_gradients(tensors: list[nn.Parameter], step: int) -> None:
    """The last parameter has none in the first step: its count of updates is another."""
    generator = torch.Generator().manual_seed(step)
    for index, tensor in enumerate(tensors):
        drawn = torch.randn(tensor.shape, generator=generator)
        tensor.grad = None if step == 0 and index == 2 else drawn


@pytest.mark.parametrize("fused", [True, False])
def test_the_same_bits_as_torchs(fused: bool) -> None:
    """A run that an older version began goes on as it would have."""
    ours, theirs = parameters(), parameters()
    betas, eps = (0.8, 0.95), 1e-6
    mine = AdamW([Group(ours[:2], 0.02, 0.1), Group(ours[2:], 0.5, 0.0)], betas, eps, fused=fused)
    groups = [
        {"params": theirs[:2], "lr": 0.02, "weight_decay": 0.1},
        {"params": theirs[2:], "lr": 0.5, "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=fused)
    for step, ratio in enumerate(RATIOS):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for group, peak in zip(oracle.param_groups, (0.02, 0.5), strict=True):
            group["lr"] = peak * ratio
        skip = torch.tensor(1.0 if step == 2 else 0.0) if fused else None
        oracle.found_inf = skip
        oracle.step()
        mine.step(ratio, skip)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert mine.state[a].keys() == oracle.state[b].keys()
        for name, value in oracle.state[b].items():
            assert torch.equal(mine.state[a][name], value)
            assert mine.state[a][name].dtype == value.dtype
    updates = len(RATIOS) - fused
    assert [int(mine.state[p]["step"]) for p in ours] == [updates, updates, updates - 1]


HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy")


def imported(folder: Path, script: str, *arguments: str) -> str:
    """The last line of what a process prints that runs `script` and then names those of HEAVY."""
    names = f"; print(code, [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {script}{names}", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_an_update_does_without_torchs_compiler(tmp_path: Path) -> None:
    """Its import took a second and more of every start, and every resume."""
    script = (
        "import torch; from gptcli.config.schema import Config; from gptcli.model.gpt import GPT;"
        "from gptcli.training.optimizers import Optimizer; config = Config.model_validate("
        "{'model': {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'block_size': 8}});"
        "model = GPT(config.model, 16); optimizer = Optimizer(model, config.optimizer);"
        "model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward();"
        "optimizer.step(1.0); code = len(optimizer.state_dict()) > 3"
    )
    assert imported(tmp_path, script) == "True []"


@pytest.mark.slow
def test_a_run_does_without_torchs_compiler(tmp_path: Path) -> None:
    """The same of a whole run, which also saves, samples and evaluates."""
    (tmp_path / "text.txt").write_text("the sun and the moon and the sea\n" * 100)
    settings = ["data.train=text.txt", "tokenizer.kind=bytes", "training.max_steps=2"]
    settings += ["schedule.warmup_steps=0", "model={n_layer: 1, n_head: 2, n_embd: 16}"]
    settings += ["model.block_size=16", "training.tokens_per_step=64", "training.compile=off"]
    (tmp_path / "config.yaml").write_text("name: tiny\n")
    script = "from gptcli.cli.main import main; code = main(sys.argv[1:])"
    flags = [f"--set={setting}" for setting in settings]
    assert imported(tmp_path, script, "pretrain", "config.yaml", "--run-dir=r", *flags) == "0 []"
