"""A few steps on a file of any kind."""

import json
import shutil
from functools import partial
from pathlib import Path

from any_source import deep, files
from guard import Gpt, came_to, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st

from gptcli.runs.metrics import read_metrics

KEYS = (
    "--set=tokenizer={kind: bpe, vocab_size: 300}",
    "--set=data.document_mask=true",
    "--set=data.val_fraction=0.5",
    "--set=data.packing=best_fit",
    "--set=data.cache=off",
    "--set=training.max_epochs=1",
)
STEPS = 3


@partial(fuzzed, few=8)
@given(
    file=st.one_of(files(), deep()),
    keys=st.sets(st.sampled_from(KEYS), max_size=3),
    own=st.booleans(),
)
def test_training(
    file: tuple[str, bytes], keys: set[str], own: bool, gpt: Gpt, folder: Path
) -> None:
    """A run trains on what is in the file, or it is said why there is nothing to train on."""
    ending, content = file
    path = folder / f"source.{ending}".rstrip(".")
    path.write_bytes(content)
    shutil.rmtree(folder / "run", ignore_errors=True)
    sources = [{"path": path.name}, *([] if own else [{"path": "text.txt"}])]
    flags = [f"--set=data.train={json.dumps(sources)}", f"--set=training.max_steps={STEPS}"]
    with case("training"):
        given = ["pretrain", "tiny.yaml", "--run-dir=run", *flags, *sorted(keys)]
        code, _, err = well(gpt, given, {0, 2, 3})
        came_to("training", "refused" if code else "trained")
    if code == 0:
        steps = [r["step"] for r in read_metrics(folder / "run") if r["event"] == "train"]
        assert steps == list(range(1, len(steps) + 1)), (steps, err)
        assert steps
    path.unlink()
