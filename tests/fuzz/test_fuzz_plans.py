"""`gpt plan` over any config."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from any_config import CONFIGS, changed_values
from guard import Gpt, came_to, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st
from small import TINY

from gptcli import plan
from gptcli.device import Device
from gptcli.training import duration, probe

FLAGS = ("--json", "--vocab=300", "--vocab=9223372036854775807", "--price-per-hour=2.5")
MORE = ("--price-per-hour=inf", "--price-per-hour=nan", "--max-time=1h")


measure = probe.median_seconds


def shortly(work: Callable[[], object], device: Device, budget: float, least: int) -> float:
    return measure(work, device, 0.0, least)


@pytest.fixture(scope="module", autouse=True)
def _short_probes() -> Iterator[None]:
    """What is measured is measured as few times as may be, and only of tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan._MOST_PROBED_FLOPS, "cpu", 1e8)
        for module in (probe, duration):
            patch.setattr(module, "median_seconds", shortly)
        yield


@st.composite
def configs(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A config, and what to change in it: the data that it has by default take seconds to read."""
    if draw(st.integers(0, 3)) > 0:
        return draw(changed_values(TINY)), []
    return draw(CONFIGS), ["--set=data.train=text.txt"]


@fuzzed
@given(config=configs(), flags=st.sets(st.sampled_from([*FLAGS, *MORE]), max_size=3))
def test_plans(config: tuple[bytes, list[str]], flags: set[str], gpt: Gpt, folder: Path) -> None:
    """A plan is made, or it is said what is wrong with the config or does not fit here."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(config[0])
    with case("plans"):
        given = ["plan", str(path), *sorted(flags), *config[1]]
        code, out, _ = well(gpt, given, {0, 2, 3, 4, 6})
        came_to("plans", {0: "planned", 6: "too large"}.get(code, "refused"))
        if "--json" in flags and out:
            json.loads(out, parse_constant=lambda name: 1 / 0)
