"""Plans for GPUs that are not here: the arithmetic against hand-made figures, and the command."""

import json
import runpy
from pathlib import Path

import pytest

from gptcli.cli.main import main
from gptcli.config.load import load_config
from gptcli.errors import ConfigError
from gptcli.plan_devices import plan_devices
from gptcli.training.footprint import Footprint
from gptcli.training.scaling import (
    KINDS,
    LINK_SHARE,
    Shape,
    device_memory,
    ring_bytes,
    sent_bytes,
    step_time,
)

ROOT = Path(__file__).parents[1]
SHAPE = Shape(parameters=1000, blocks=800, one_block=100, matrices=600, product_bytes=2)
NEED = Footprint(4000, 4000, 8000, 3000, 1000, 500, 20500)
SMALL = ["model.preset=gpt3-small", "training.tokens_per_step=524288", "training.max_steps=100"]
FLAGS = ["--vocab", "50257", "--device-kind", "h100", "--devices"]


def test_what_is_sent() -> None:
    """Guards the volumes of rings: 2 (n-1)/n x gradients for DDP; for FSDP and each micro batch all
    weights gathered once, blocks twice, gradients scattered; Muon's matrices there and back."""
    assert sent_bytes(SHAPE, 4, "ddp", 3) == 2 * 3 / 4 * 4000 + 3 / 4 * 2400
    assert sent_bytes(SHAPE, 4, "fsdp", 1) == 3 / 4 * (2 * 1800 + 4000) + 2 * 3 / 4 * 600
    more = sent_bytes(SHAPE, 4, "fsdp", 3) - sent_bytes(SHAPE, 4, "fsdp", 1)
    assert more == 2 * 3 / 4 * (2 * 1800 + 4000)
    for sharding in ("ddp", "fsdp"):
        assert sent_bytes(SHAPE, 1, sharding, 5) == 0


def test_memory_of_each() -> None:
    """Guards that DDP keeps all on each device, and FSDP a share with what it gathers."""
    whole = device_memory(NEED, SHAPE, 8, "ddp")
    assert (whole.weights_bytes, whole.gathered_bytes, whole.other_bytes) == (4000, 0, 500)
    share = device_memory(NEED, SHAPE, 8, "fsdp")
    assert (share.weights_bytes, share.gradients_bytes, share.optimizer_bytes) == (500, 500, 1000)
    assert share.gathered_bytes == 2 * (200 + 200) + 4 * 100
    assert share.activations_bytes == 4000 - 2 * 1000  # less the copies of whole weights


def test_time_of_a_step() -> None:
    """Guards the range: at best the longer of computing and sending, at worst both after each
    other; between boxes all of a box's adapters carry a ring; again computed, a third more."""
    h100 = KINDS["h100"]
    assert ring_bytes(h100, 8) == 450e9
    assert ring_bytes(h100, 16) == 400e9
    assert ring_bytes(KINDS["a100"], 64) == 200e9
    flops = 8 * 989.4e12
    time = step_time(h100, 8, flops, int(LINK_SHARE * 450e9), "bf16", recompute=False)
    assert time.exchange_seconds == pytest.approx(1.0)
    assert time.compute_seconds == pytest.approx(1 / 0.55)
    assert time.seconds == pytest.approx((1 / 0.55, 1 / 0.35 + 1))
    assert time.mfu == pytest.approx((1 / (1 / 0.35 + 1), 0.55))
    again = step_time(h100, 8, flops, 0, "bf16", recompute=True)
    assert again.seconds[0] == pytest.approx(4 / 3 / 0.55)


def test_the_sharding_to_use() -> None:
    """Guards the choice: DDP where all fits on each device, FSDP beyond, and where even that does
    not, the least number of devices on which it does."""
    small = load_config(None, SMALL).config
    assert plan_devices(small, 8, "h100", vocab_size=50257).sharding == "ddp"
    asked = load_config(None, [*SMALL, "distributed.strategy=fsdp"]).config
    assert plan_devices(asked, 8, "h100", vocab_size=50257).sharding == "fsdp"
    large = load_config(None, [*SMALL, "model.preset=gpt3-13b"]).config
    found = plan_devices(large, 64, "h100", vocab_size=50257)
    assert found.sharding == "fsdp"
    assert not found.problems
    assert found.memory_total_bytes <= found.usable_memory_bytes
    cramped = plan_devices(large, 1, "rtx4090", vocab_size=50257)
    assert cramped.problems
    count = int(cramped.advice[0].split()[1])
    assert not plan_devices(large, count, "rtx4090", vocab_size=50257).problems
    assert plan_devices(large, count // 2, "rtx4090", vocab_size=50257).problems


def test_more_devices_than_rows() -> None:
    """Guards devices that would have nothing to do; the hint's setting works."""
    config = load_config(None, SMALL).config
    with pytest.raises(ConfigError, match="fewer than 1,024 devices") as caught:
        plan_devices(config, 1024, "h100", vocab_size=50257)
    assert caught.value.hint is not None
    fixed = load_config(None, [*SMALL, caught.value.hint.removeprefix("--set ")]).config
    assert plan_devices(fixed, 1024, "h100", vocab_size=50257).micro_batches == 1


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards what is printed, as a table and as JSON, and wrong flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "data: {train: none.txt}\ntokenizer: {kind: bytes}\n"
        "model: {preset: gpt3-small}\n"
        "training: {max_steps: 100, tokens_per_step: 524288}\n"
    )
    assert main(["plan", "c.yaml", *FLAGS, "8"]) == 0
    out = capsys.readouterr().out
    for name in ("sharding", "memory of each", "sent by each", "MFU", "device hours"):
        assert name in out
    assert main(["plan", "c.yaml", *FLAGS, "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sharding"] == "ddp"
    assert found["fits"] is True
    assert found["memory_total_bytes"] == sum(found["memory"].values())
    for arguments, message in (
        (["--devices", "8"], "--devices needs the kind of GPU"),
        (["--devices", "8", "--device-kind", "tpu"], "'tpu' is none of: a100, h100"),
    ):
        assert main(["plan", "c.yaml", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_page_is_up_to_date() -> None:
    """Guards docs/scale.md against figures of another formula: two of its rows, made again."""
    script = runpy.run_path(str(ROOT / "scripts" / "scale_table.py"))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert page.startswith(script["HEAD"])
    for preset, devices in (("gpt3-small", 8), ("gpt3-13b", 64)):
        assert script["row"](preset, devices) in page.splitlines()
