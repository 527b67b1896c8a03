"""The table of presets in docs/models.md and what makes it; their exact sizes."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from published_sizes import EXACT

from gptcli.config.presets import PRESETS

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


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
    """Counted with another vocabulary than the published one, the table's sizes are of no model."""
    found = {preset: (parity.vocab_size(preset), parity.parameters(preset)) for preset in EXACT}
    assert found == EXACT


def test_the_page_lists_every_preset(parity: ModuleType) -> None:
    """A table made before a preset was added or changed tells of models that are not there."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
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
