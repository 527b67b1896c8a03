"""Any bytes as a file to train on."""

import json
from pathlib import Path

from any_source import files
from guard import Gpt, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st


@fuzzed
@given(file=files(), key=st.sampled_from(["train", "train", "val"]), columns=st.booleans())
def test_sources(file: tuple[str, bytes], key: str, columns: bool, gpt: Gpt, folder: Path) -> None:
    """A file is read, or the file and what is wrong with it are named."""
    ending, content = file
    path = folder / f"source.{ending}".rstrip(".")
    path.write_bytes(content)
    source = json.dumps([{"path": path.name, **({"text_field": "text"} if columns else {})}])
    with case("sources"):
        flags = ["--dry-run", f"--set=data.{key}={source}"]
        well(gpt, ["pretrain", "tiny.yaml", *flags], {0, 2, 3})
    path.unlink()
