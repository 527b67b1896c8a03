"""The README's table of presets and what makes it; their exact sizes."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from gptcli.config.presets import PRESETS

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]

# Published counts: Radford et al. 2018 and 2019 as released; Touvron et al. 2023, SmolLM2 and Qwen3
# as their files on the hub count them.
PUBLISHED = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-135m": 134_515_008,
    "llama-360m": 361_821_120,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-65b": 65_285_660_672,
    "modern-0.6b": 596_049_920,
    "modern-8b": 8_190_735_360,
}
# Brown et al. 2020, table 2.1.
NAMED = {
    "gpt3-small": 125e6,
    "gpt3-medium": 350e6,
    "gpt3-large": 760e6,
    "gpt3-xl": 1.3e9,
    "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13e9,
    "gpt3-175b": 175e9,
}


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("parity", ROOT / "scripts" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_published_sizes(parity: ModuleType) -> None:
    """A width or a tied matrix that is off by a little trains, but is not the model of its name."""
    assert {preset: parity.parameters(preset) for preset in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("preset", NAMED)
def test_gpt3_sizes(parity: ModuleType, preset: str) -> None:
    """The paper's rows that do not divide were corrected: the size must stay that of the name."""
    assert parity.parameters(preset) == pytest.approx(NAMED[preset], rel=0.03)


def test_the_readme_lists_every_preset(parity: ModuleType) -> None:
    """A table made before a preset was added or changed tells of models that are not there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if parity.START not in text:
        pytest.skip("the README has no such table")
    table = text.split(parity.START)[1].split(parity.END)[0]
    listed = dict(re.findall(r"^\| `(\S+)` \| `\w+` \| ([\d,]+) \|", table, flags=re.M))
    assert listed == {preset: f"{parity.parameters(preset):,}" for preset in PRESETS}
    differences = [float(line.split("|")[-2]) for line in table.strip().splitlines()[2:]]
    assert max(differences) < parity.TOLERANCE


def test_the_table_replaces_the_one_before(
    parity: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run that appends, or that eats the text around the table."""
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{parity.START}\nold\n{parity.END}\nbelow\n")
    line, largest = parity.row("gpt3-small", full=False)
    assert "| `GPTNeoForCausalLM` | 125,198,592 | 50,257 | 2 layers, n_embd 128 |" in line
    assert 0 < largest < parity.TOLERANCE
    for _ in range(2):
        parity.write(line, readme)
        assert readme.read_text() == f"above\n{parity.START}\n{line}\n{parity.END}\nbelow\n"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="0 times"):
        parity.write(line, readme)
