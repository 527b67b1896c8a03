"""Any YAML tree as a config, and any text."""

from pathlib import Path

from any_config import CONFIGS
from guard import Gpt, case, fuzzed, well
from hypothesis import given


@fuzzed
@given(content=CONFIGS)
def test_configs(content: bytes, gpt: Gpt, folder: Path) -> None:
    """A config is read, or every problem in it named; what is read can be planned with."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(content)
    with case("configs"):
        code, _, _ = well(gpt, ["config", "check", str(path)], {0, 2})
        if code == 0:
            again = ["pretrain", str(path), "--dry-run", "--set=data.train=text.txt"]
            well(gpt, again, {0, 2, 3, 4, 6})
