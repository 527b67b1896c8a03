"""`gpt export`: the folder or file as a whole, its card, and what is refused."""

import importlib.util
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from gptcli import stop
from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ConfigError, ResourceError
from gptcli.export import export
from gptcli.import_model import import_model
from gptcli.interop.hf_export import HF_DTYPES
from gptcli.model.gpt import GPT, initialise
from gptcli.runs import checkpoint
from gptcli.runs.load import load_model
from gptcli.runs.run_dir import update_run_json

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
SCORES = {
    "loss": 1.25,
    "perplexity": 3.490,
    "bits_per_byte": 1.8034,
    "bits_per_byte_ci95": [1.75, 1.85],
    "accuracy": 0.61,
    "tokens": 4100,
    "bytes": 4096,
    "documents": 7,
    "block_size": 16,
    "stride": 16,
}
STATE = {
    "job": "pretrain",
    "train": {"step": 30, "tokens": 1920, "epochs": 0.5, "seconds": 12.0, "evaluated_step": 30},
    "choices": {"precision": "fp32"},
    "scores": SCORES,
}
RUN = {
    "status": "finished",
    "training": {"steps": 30},
    "data": {
        "train": {"documents": 90, "bytes": 3_900_000},
        "val": {"documents": 7, "tokens": 4100, "bytes": 4096},
    },
    "machine": {"hostname": "secret-host", "device_name": "x86_64"},
    "versions": {"python": "3.11.7"},
}

Make = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """(state, run, config keys) -> a run directory with one checkpoint, of step 30."""

    def make(state: dict[str, Any] = STATE, run: dict[str, Any] = RUN, **keys: Any) -> Path:
        model_keys = {**TINY, **keys.pop("model", {})}
        training = {"training": {"tokens_per_step": 64}}
        config = Config.model_validate(
            {"name": "tiny", **training, **keys, "model": ModelConfig(**model_keys)}
        )
        tokenizer = Tokenizer.of_bytes()
        model = GPT(config.model, tokenizer.vocab_size)
        initialise(model, torch.Generator().manual_seed(0))
        run_dir = tmp_path / "runs" / "r"
        run_dir.mkdir(parents=True)
        update_run_json(run_dir, **run)
        weights = model.state_dict()
        contents = checkpoint.Contents(weights, {}, state, dump_config(config), tokenizer)
        checkpoint.publish(run_dir, 30, contents)
        return run_dir

    return make


def card_of(out: Path) -> str:
    return (out / "README.md").read_text(encoding="utf-8")


def front_of(out: Path) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(card_of(out).split("---\n")[1])
    return front


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]


def test_folder_is_whole(make_run: Make, tmp_path: Path):
    """A folder that lacks a file loads nowhere; one that is half written looks whole."""
    result = export(str(make_run()), tmp_path / "new" / "out", "hf", None)
    assert sorted(path.name for path in result.path.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert leftovers(result.path.parent) == []
    assert result.dtype == "f32"
    assert result.bytes == sum(path.stat().st_size for path in result.path.iterdir())
    with safe_open(result.path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_gpt_takes_the_folder(make_run: Make, tmp_path: Path):
    """What we write we must read: the same logits through a whole circle."""
    run = make_run()
    result = export(str(run), tmp_path / "out", "hf", None)
    first = load_model(str(run), torch.device("cpu"))
    second = load_model(str(result.path), torch.device("cpu"))
    ids = torch.tensor([[256, 65, 66, 67]])
    with torch.no_grad():
        torch.testing.assert_close(first.model(ids), second.model(ids), rtol=0, atol=0)
    assert second.tokenizer.start == first.tokenizer.start == 256


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_dtype_as_stored(make_run: Make, tmp_path: Path, dtype: str):
    """Weights that came in bf16 would double in size, and an exact circle would be none."""
    first_time = None if dtype == "f32" else dtype  # a run of our own is stored in f32
    half = export(str(make_run()), tmp_path / "half", "hf", first_time)
    again = export(str(half.path), tmp_path / "again", "hf", None)
    imported = import_model(str(half.path), tmp_path / "imported")
    third = export(str(imported.path), tmp_path / "third", "hf", None)
    assert (half.dtype, again.dtype, third.dtype) == (dtype, dtype, dtype)
    name = "model.safetensors"
    first, last = load_file(half.path / name), load_file(third.path / name)
    assert {tensor.dtype for tensor in last.values()} == {HF_DTYPES[dtype]}
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_card_states_the_facts(make_run: Make, tmp_path: Path):
    """A published model without its data, scores and training facts cannot be judged."""
    card = card_of(export(str(make_run()), tmp_path / "out", "hf", None).path)
    for fact in (
        "Qwen3ForCausalLM",
        "1.803 (95 %: 1.75 to 1.85)",
        "4,100 tokens, 4,096 bytes, 7 documents",
        "World English Bible (builtin:web-bible)",
        "90 documents, 3.9 MB",
        "| steps | 30 |",
        "| tokens | 1,920 |",
        "muon, lr 0.02",
        "| seed | 1337 |",
        "python 3.11.7",
        'AutoTokenizer.from_pretrained("out")',
        "gpt generate --model ./out",
    ):
        assert fact in card, card
    assert "secret-host" not in card
    assert front_of(tmp_path / "out") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "tags": ["gptcli"],
    }


def test_card_of_an_imported_model_invents_nothing(make_run: Make, tmp_path: Path):
    """The defaults of our config are no facts about a model that was trained elsewhere."""
    folder = export(str(make_run()), tmp_path / "published", "hf", None).path
    imported = import_model(str(folder), tmp_path / "imported").path
    for source, out in ((imported, "a"), (folder, "b")):
        card = card_of(export(str(source), tmp_path / out, "hf", None).path)
        assert "converted by gpt from published without any training" in card
        for word in ("## Training", "## Data", "## Scores", "muon", "web-bible", "1337", "nan"):
            assert word not in card, card
        assert str(tmp_path) not in card
        assert "language" not in front_of(tmp_path / out)


def test_card_names_hub_sources(make_run: Make, tmp_path: Path):
    """The hub links data sets and base models by their names; paths of this machine are none."""
    sources = ["hub:owner/corpus:en@main", "/home/somebody/private/notes.txt"]
    state = {**STATE, "job": "finetune"}
    run = make_run(state, data={"train": sources}, init="owner/base@abc")
    out = export(str(run), tmp_path / "out", "hf", None).path
    front = front_of(out)
    assert front["datasets"] == ["owner/corpus"]
    assert front["base_model"] == "owner/base"
    assert "language" not in front
    card = card_of(out)
    assert "finetuned with gpt from owner/base@abc" in card
    assert "notes.txt" in card
    assert "somebody" not in card


def test_card_tells_scores_of_another_step(make_run: Make, tmp_path: Path):
    """Scores of other weights than those that are there would be taken for theirs."""
    state = {**STATE, "train": {**STATE["train"], "evaluated_step": 20}}
    run = make_run(state, {**RUN, "training": {"steps": 50}})
    card = card_of(export(str(run), tmp_path / "out", "hf", None).path)
    assert "The scores are those of step 20, the weights of step 30." in card
    assert "step 30 of a run of 50 steps" in card


def test_text_in_the_card_is_text(make_run: Make, tmp_path: Path):
    """A corpus or folder with markup in its name could write the card for the author."""
    run = make_run(data={"train": "x | <script>alert(1)</script>\n# Owned"})
    out = tmp_path / 'a"`b'
    card = card_of(export(str(run), out, "hf", None).path)
    assert "<script>" not in card.replace("\\<script", "")
    assert "\n# Owned" not in card
    assert 'from_pretrained("a__b")' in card


def test_existing_out(make_run: Make, tmp_path: Path):
    """Another export, or somebody's work, must not be lost or mixed with ours."""
    run, out = str(make_run()), tmp_path / "out"
    out.mkdir()
    export(run, out, "hf", None)  # an empty folder holds nothing to lose
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ConfigError, match="exists already"):
        export(run, out, "hf", None)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        export(run, link, "hf", None)
    with pytest.raises(ConfigError, match="so there can be no"):
        export(run, out / "README.md" / "below", "hf", None)


@pytest.mark.parametrize(
    ("to", "dtype", "why"),
    [
        ("hf", "q8_0", "q8_0 is a format of GGUF"),
        ("hf", "fp32", "expected f32, bf16, f16"),
        ("gguf", "bf16", "expected f32, f16, q8_0"),
        ("onnx", None, "expected hf .* or gguf"),
    ],
)
def test_wrong_choices(to: str, dtype: str | None, why: str, tmp_path: Path):
    """They are told before a model of many gigabytes is loaded (here: there is none)."""
    with pytest.raises(ConfigError, match=why):
        export(str(tmp_path / "none"), tmp_path / "out", to, dtype)


def test_refused_model_leaves_nothing(make_run: Make, tmp_path: Path):
    """A model without a twin, found out after the folder was begun."""
    run = make_run(model={"position": "sinusoidal"})
    with pytest.raises(CheckpointError, match="no model of transformers"):
        export(str(run), tmp_path / "out", "hf", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_stop_leaves_nothing(make_run: Make, tmp_path: Path):
    """Ctrl-C in the middle leaves no folder that looks like a model."""
    run = make_run()
    stop.request(2)
    with pytest.raises(stop.Stopped):
        export(str(run), tmp_path / "out", "hf", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_full_disk(make_run: Make, tmp_path: Path):
    """A disk that fills up is an error of its own, and leaves nothing behind."""
    run = make_run()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(ResourceError, match="cannot write"):
            export(str(run), tmp_path / "out", "hf", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_gguf_into_a_folder(make_run: Make, tmp_path: Path):
    """A folder as OUT gets the file inside, under the model's name, once."""
    pytest.importorskip("gguf")
    run = str(make_run())
    result = export(run, tmp_path, "gguf", "f16")
    assert result.path == tmp_path / "tiny.gguf"
    assert result.path.read_bytes()[:4] == b"GGUF"
    with pytest.raises(ConfigError, match="exists already"):
        export(run, tmp_path, "gguf", "f16")
    assert export(run, tmp_path / "new" / "m.gguf", "gguf", None).dtype == "f32"


def test_gguf_dtype_as_stored(make_run: Make, tmp_path: Path):
    """GGUF files get f16 as it is, and bf16 as f32, which holds it exactly."""
    pytest.importorskip("gguf")
    run = str(make_run())
    for dtype, expected in (("f16", "f16"), ("bf16", "f32")):
        stored = export(run, tmp_path / dtype, "hf", dtype).path
        assert export(str(stored), tmp_path / f"{dtype}.gguf", "gguf", None).dtype == expected


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The extra is not installed with gpt: say which one it is, before loading the model."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package gguf") as caught:
        export(str(tmp_path / "none"), tmp_path / "m.gguf", "gguf", None)
    assert caught.value.hint == "pip install 'gptcli[gguf]'"


def test_command(
    gpt: Callable[..., tuple[int, str, str]],
    make_run: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """stdout is the path alone, for scripts; mistakes of use are exit 2 with the reason."""
    run = make_run()
    monkeypatch.setenv("GPT_RUNS", str(run.parent))
    out = str(tmp_path / "out")
    code, printed, err = gpt("export", "--to", "hf", out)  # the newest run
    assert (code, printed) == (0, f"{out}\n")
    assert "parameters, f32" in err
    code, printed, err = gpt("export", "--to", "hf", out)
    assert (code, printed) == (2, "")
    assert "error: " in err
    assert "hint: " in err
    assert gpt("export", out)[0] == 2  # no target
    assert gpt("export", "--to", "hf", "--dtype", "q8_0", f"{out}2")[0] == 2
    code, _, err = gpt("export", "--model", str(tmp_path / "no"), "--to", "hf", f"{out}2")
    assert code == 4
    assert not Path(f"{out}2").exists()


def test_read_by_transformers(make_run: Make, tmp_path: Path):
    """The promise of the command, from a run directory: ids and logits are those of gpt."""
    transformers = pytest.importorskip("transformers")
    run = make_run()
    out = export(str(run), tmp_path / "out", "hf", None).path
    loaded = load_model(str(run), torch.device("cpu"))
    twin = transformers.AutoModelForCausalLM.from_pretrained(out)
    inputs = transformers.AutoTokenizer.from_pretrained(out)("Hello, 世界", return_tensors="pt")
    with torch.no_grad():
        theirs, ours = twin(**inputs).logits, loaded.model(inputs.input_ids)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
