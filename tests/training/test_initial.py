"""Runs that start from a model: what may change beside `init`, and what is refused."""

import gc
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gptcli.config import recipe
from gptcli.config.load import dump_config, load_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ConfigError, DataError, GptError
from gptcli.finetune import describe as describe_finetuning
from gptcli.finetune import finetune
from gptcli.model.gpt import GPT, initialise
from gptcli.pretrain import describe, pretrain
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.load import LoadedModel, load_model
from gptcli.runs.manifest import write_manifest
from gptcli.runs.run_dir import read_run_json
from gptcli.training.build import RunResult, run_session
from gptcli.training.initial import starting_model, starting_point, with_shape
from gptcli.training.session import Session
from gptcli.training.start import Start
from gptcli.training.state import TrainState

Publish = Callable[..., str]
Log = Callable[[], str]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.INFO, logger="gptcli")
    return lambda: "\n".join(caplog.messages)


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their plots take a second, and nobody looks at them."""
    for job in ("pretrain", "finetune"):
        monkeypatch.setattr(f"gptcli.{job}.write_report", lambda run_dir: None)


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """A tiny published model as a checkpoint directory; keys of its shape may be given."""

    def make(vocab_size: int = 257, tokenizer: Tokenizer | None = None, **shape: Any) -> str:
        tiny = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "dropout": 0.2}
        config = Config(model=ModelConfig.model_validate({**tiny, **shape}))
        model = GPT(config.model, vocab_size)
        initialise(model, torch.Generator().manual_seed(1))
        state: dict[str, Any] = {"train": TrainState().to_json(), "job": "import"}
        tokenizer = tokenizer or Tokenizer.of_bytes()
        contents = Contents(model.state_dict(), {}, state, dump_config(config), tokenizer)
        return str(checkpoint.publish(tmp_path / "published", 0, contents))

    return make


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("the sun and the moon, a river by a tree\n" * 30)
    return path


def run_config(source: Path | str, init: str | None, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "init": init,
        "data": {"train": str(source), "val_fraction": 0.2},
        "schedule": {"warmup_steps": 1},
        "training": {"max_steps": 2, "tokens_per_step": 64, "eval_every": 2, "save_every": 2},
        "samples": {"prompts": []},
        "model": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return Config.model_validate(values)


def fresh(tmp_path: Path) -> Start:
    return Start("pretrain", tmp_path, None, TrainState(), False, 0.0)


def started(tmp_path: Path, config: Config) -> GPT:
    """The model that the run of `config` would begin with."""
    shaped, initial = starting_point(config, fresh(tmp_path))
    assert initial is not None
    return starting_model(shaped, fresh(tmp_path), initial.tokenizer, initial)[0].eval()


POSITIONS = ["learned", "sinusoidal", "rope", "none"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_shorter_block_computes_the_same(
    tmp_path: Path, publish: Publish, log: Log, position: str, tied: bool
) -> None:
    """Short rows of a published model: a position table that is cut at its wrong end, or drawn
    anew, gives other logits than the model itself."""
    source = publish(position=position, tie_embeddings=tied)
    model = started(tmp_path, run_config("x", source, model__block_size=8))
    published = load_model(source, torch.device("cpu")).model
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens), published(tokens))
    assert (model.head.weight is model.wte.weight) is tied
    assert model.config.block_size == 8
    assert model.config.dropout == 0.0  # the run's own, not the published model's
    assert "beside init: model.block_size 32 -> 8" in log()
    kept = "(the first 8 learned positions are kept)" in log()
    assert kept is (position == "learned")


@pytest.mark.parametrize("position", POSITIONS)
def test_a_longer_block(tmp_path: Path, publish: Publish, log: Log, position: str) -> None:
    """Learned positions end with the table: rows beyond it would be noise, silently."""
    config = run_config("x", publish(position=position), model__block_size=64)
    if position == "learned":
        with pytest.raises(ConfigError, match=r"block_size 64 is above 32, where the learned"):
            starting_point(config, fresh(tmp_path))
        return
    model = started(tmp_path, config)
    assert model(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 64, 257)
    assert "beside init: model.block_size 32 -> 64 (positions from 32 on are untrained" in log()
    assert ("model.rope_scaling may help" in log()) is (position == "rope")


def test_long_context_keys(tmp_path: Path, publish: Publish, log: Log) -> None:
    """Each key that may stand beside init must reach the model, and nothing else may change."""
    source = publish()
    path = tmp_path / "c.yaml"
    path.write_text(
        f"init: {source}\nmodel:\n  block_size: 64\n  rope_theta: 5e5\n  window: [0, 16]\n"
        "  rope_scaling: {kind: yarn, factor: 2, original_block_size: 32}\n"
    )
    config = load_config(str(path)).config
    before = load_model(source, torch.device("cpu")).config.model.model_dump()
    after = starting_point(config, fresh(tmp_path))[0].model.model_dump()
    changed = {key: value for key, value in after.items() if before[key] != value}
    assert changed.keys() == {"block_size", "rope_theta", "window", "rope_scaling", "dropout"}
    assert (changed["window"], changed["rope_theta"]) == ([0, 16], 5e5)
    assert changed["rope_scaling"]["kind"] == "yarn"
    for words in ("rope_theta 10000 -> 500000", "window None -> [0, 16]", "None -> yarn"):
        assert words in log()
    assert "may help" not in log()


@pytest.mark.parametrize(
    ("shape", "changes", "problem"),
    [
        (
            {"position": "learned"},
            {"model__rope_theta": 2.0},
            "rope_theta has no effect: the model",
        ),
        (
            {"position": "none"},
            {"model__rope_scaling": {"kind": "linear", "factor": 2.0}},
            "rope_scaling stretches position rope, but the model that init names has position none",
        ),
        ({}, {"model__window": [1, 2, 3]}, "window has 3 entries, but model.n_layer is 2"),
        ({}, {"model__block_size": 32, "eval__stride": 33}, "eval.stride 33 is above"),
        ({}, {"eval__stride": 33}, r"eval.stride 33 is above model.block_size 32"),
        ({}, {"training__tokens_per_step": 48}, "48 is not a multiple of model.block_size 32"),
        (
            {},
            {"model__block_size": 16, "training__micro_batch_size": 3},
            "micro_batch_size 3 does not divide the 4 rows",
        ),
        (
            {},
            {
                "model__rope_scaling": {
                    "kind": "dynamic",
                    "factor": 2.0,
                    "original_block_size": 32,
                }
            },
            "rope_scaling dynamic changes nothing up to original_block_size 32",
        ),
    ],
)
def test_what_does_not_fit_the_init_model(
    shape: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    """Rules between the config and a shape that is known only once the model is read."""
    known = ModelConfig.model_validate({"n_layer": 2, "n_embd": 16, "block_size": 32, **shape})
    with pytest.raises((ConfigError, ValueError), match=problem):
        with_shape(run_config("x", "model", **changes), known)


def test_word_vectors_of_the_init_model_are_its_own(publish: Publish) -> None:
    """A model that once began from word vectors could not be trained further: its config names a
    file that goes with no init."""
    shape = ModelConfig(block_size=32, embedding_file="long/gone.txt")
    assert with_shape(run_config("x", "model"), shape).model.embedding_file is None


def test_tensors_are_taken_over(tmp_path: Path, publish: Publish) -> None:
    """A 7B model that is copied on its way into the run needs twice its memory."""
    config, initial = starting_point(run_config("x", publish()), fresh(tmp_path))
    assert initial is not None
    places = {name: t.data_ptr() for name, t in initial.model.state_dict().items()}
    model, _ = starting_model(config, fresh(tmp_path), initial.tokenizer, initial)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == places
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def alive(kind: type) -> list[Any]:
    gc.collect()
    things = [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]
    # What a compiler traced with, in another test, has no memory to ask for.
    traced = ("FakeTensor", "FunctionalTensor")
    return [thing for thing in things if type(thing).__name__ not in traced]


def test_a_run_holds_its_tensors_once(
    tmp_path: Path, publish: Publish, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run began from, kept for as long as it goes on, doubles its memory: the model that
    init names, the weights and the optimizer state of the checkpoint that it resumes."""
    surplus: list[int] = []

    def watched(session: Session, rows: Any, *rest: Any) -> RunResult:
        own = {**session.model.state_dict(), **session.optimizer.state_dict()}
        known = {t.untyped_storage().data_ptr() for t in [*own.values(), *before]}
        places = {t.untyped_storage().data_ptr(): t.nbytes for t in alive(torch.Tensor)}
        surplus.append(sum(size for place, size in places.items() if place not in known))
        assert len(alive(LoadedModel)) == others
        for contents in alive(Contents):
            assert not contents.model
            assert not contents.optimizer
        return run_session(session, rows, *rest)

    monkeypatch.setattr("gptcli.pretrain.run_session", watched)
    source = publish(position="learned", n_embd=64, block_size=512)
    before, others = alive(torch.Tensor), len(alive(LoadedModel))  # of other tests
    run, shape = tmp_path / "run", {"model__block_size": 16, "optimizer__kind": "muon"}
    pretrain(run_config(book, source, **shape), run_dir=run)
    longer = run_config(book, source, training__max_steps=3, **shape)
    assert pretrain(longer, run_dir=run, resume="resume").step == 3
    assert len(surplus) == 2
    assert max(surplus) < 64 * 2**10  # the positions alone have 128 KiB, a momentum 48


def test_a_run_in_short_rows_and_its_resume(
    tmp_path: Path, publish: Publish, book: Path, log: Log
) -> None:
    """config.yaml must repeat the run, and a resume must neither need the published model nor take
    its block size for the run's."""
    source = publish(position="learned", n_embd=8)
    config = run_config(book, source, model__block_size=16, model__window=[8])
    run = tmp_path / "run"
    result = pretrain(config, run_dir=run)
    written = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert written == {"block_size": 16, "dropout": 0.0, "window": [8]}
    again = load_config(str(run / "config.yaml")).config
    assert pretrain(again, run_dir=tmp_path / "again").scores.loss == result.scores.loss  # type: ignore[union-attr]
    assert read_run_json(run)["model"]["block_size"] == 16

    Path(source).rename(tmp_path / "gone")
    longer = {"training__max_steps": 4, "model__block_size": 16, "model__window": [8]}
    resumed = pretrain(run_config(book, source, **longer), run_dir=run, resume="resume")
    assert resumed.step == 4
    assert "model.n_layer" not in log()  # which no config has changed
    loaded = load_model(str(run), torch.device("cpu")).model
    assert (loaded.config.block_size, loaded.config.windows) == (16, [8, 8])
    assert loaded.wpe.weight.shape == (16, 8)


def test_automatic_rates_are_those_of_the_model(
    tmp_path: Path, publish: Publish, book: Path, log: Log
) -> None:
    """The config is checked before the model is read: rates for the default width must not stay,
    not in config.yaml either, and a resume by the same config must find them unchanged."""
    source, run = publish(n_embd=64), tmp_path / "run"
    config = run_config(book, source, optimizer__adamw_lr=0.5)
    pretrain(config, run_dir=run)
    written = yaml.safe_load((run / "config.yaml").read_text())["optimizer"]
    rates = recipe.rates("muon", ModelConfig(n_embd=64), from_init=True)
    assert {key: written[key] for key in rates} == {**rates, "adamw_lr": 0.5}
    longer = run_config(book, source, optimizer__adamw_lr=0.5, training__max_steps=3)
    assert pretrain(longer, run_dir=run, resume="resume").step == 3
    assert "changed since the run began: training.max_steps: 2 -> 3" in log()
    assert "optimizer." not in log()
    assert "the learning rate" not in log()
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"] == written


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__block_size": 8}, "model.block_size: 16 -> 8"),
        ({}, "model.block_size: 16 -> None"),
        (
            {"model__block_size": 16, "model__rope_theta": 5.0},
            r"model.rope_theta: 10000.0 -> 5.0",
        ),
        ({"model__block_size": 16, "model__window": [4]}, r"model.window: None -> \[4\]"),
    ],
)
def test_a_resume_cannot_change_the_shape(
    tmp_path: Path, publish: Publish, book: Path, changes: dict[str, Any], told: str
) -> None:
    """A key given beside init that a resume ignores, or that is no longer given, in silence."""
    run, source = tmp_path / "run", publish()
    pretrain(run_config(book, source, model__block_size=16), run_dir=run)
    config = run_config(book, source, training__max_steps=3, **changes)
    with pytest.raises(CheckpointError, match=told) as error:
        pretrain(config, run_dir=run, resume="resume")
    assert error.value.exit_code == 4
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["block_size"] == 16


def test_rows_of_the_vocabulary_without_a_token(
    tmp_path: Path, publish: Publish, book: Path
) -> None:
    """Published tables are padded to a round number of rows; the run must keep these through
    training, saving and resuming."""
    source, run = publish(vocab_size=320), tmp_path / "run"
    assert f"{load_model(source, torch.device('cpu')).model.parameter_count():,}" in describe(
        run_config(book, source)
    )
    pretrain(run_config(book, source), run_dir=run)
    assert read_run_json(run)["model"]["vocab_size"] == 320
    pretrain(run_config(book, source, training__max_steps=3), run_dir=run, resume="resume")
    assert load_model(str(run), torch.device("cpu")).model.vocab_size == 320


def test_a_model_without_end_of_text(tmp_path: Path, publish: Publish, book: Path) -> None:
    """Packing would put None between documents."""
    source = publish(vocab_size=50, tokenizer=Tokenizer.of_ids(50))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1 2", "response": "3"}) + "\n")
    jobs: list[Callable[[], Any]] = [
        lambda: pretrain(run_config(book, source), run_dir=tmp_path / "a"),
        lambda: finetune(run_config(rows, source), run_dir=tmp_path / "b"),
        lambda: describe(run_config(book, source)),
    ]
    for job in jobs:
        with pytest.raises(
            CheckpointError, match=r"\(ids, 50 tokens\) has no end-of-text"
        ) as error:
            job()
        assert "tokenizer.json" in str(error.value.hint)


@pytest.mark.parametrize("name", ["ids.bin", "ids.npy"])
def test_ids_of_another_vocabulary(tmp_path: Path, publish: Publish, name: str) -> None:
    """Continuing a 257-token model on GPT-2's ids: both sizes and a way out, before training."""
    path, ids = tmp_path / name, np.arange(4000, dtype=np.uint16) % 300
    if name.endswith(".npy"):
        np.save(path, ids)
    else:
        ids.tofile(path)
    source = publish()
    with pytest.raises(DataError) as error:
        pretrain(run_config(path, source), run_dir=tmp_path / "run")
    assert error.value.message == (
        f"{path}: has token id 299, so it was made with a vocabulary of at least 300 tokens; the"
        f" model that init names ({source}) has 257"
    )
    assert "give the text itself" in str(error.value.hint)


def test_a_tokenizer_that_is_larger_than_the_model(
    tmp_path: Path, publish: Publish, book: Path
) -> None:
    """Ids beyond the embedding end a CPU run with an IndexError, and a CUDA run with a crash."""
    source = publish(vocab_size=200)
    with pytest.raises(GptError, match=r"257.*200") as error:
        pretrain(run_config(book, source), run_dir=tmp_path / "run")
    assert error.value.exit_code == 4


def test_finetuning_in_short_rows(tmp_path: Path, publish: Publish) -> None:
    """The dry run counted rows that fit the published block, the run those that fit its own."""
    path, source = tmp_path / "rows.jsonl", publish()
    rows = [{"prompt": f"a{i}", "response": "b" * (20 if i % 5 == 0 else 1)} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config(
        path, source, model__block_size=16, finetune__score_rows=1, finetune__max_new_tokens=2
    )
    lines = dict(line.split(maxsplit=1) for line in describe_finetuning(config).splitlines())
    assert "(0 to train on do not fit)" not in lines["rows"]
    assert finetune(config, run_dir=tmp_path / "run").status == "finished"
    loaded = load_model(str(tmp_path / "run"), torch.device("cpu"))
    assert loaded.config.model.block_size == loaded.model.config.block_size == 16


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("norm.weight", torch.Tensor.long, "norm.weight holds I64, but runs save F32"),
        ("norm.weight", torch.Tensor.bfloat16, "norm.weight holds BF16, but runs save F32"),
        ("norm.weight", torch.Tensor.double, "norm.weight holds F64, but runs save F32"),
        ("wte.weight", torch.Tensor.sum, "wrong shape: wte.weight [] instead of"),
    ],
)
def test_a_resume_of_weights_of_another_kind(
    tmp_path: Path,
    publish: Publish,
    book: Path,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    told: str,
) -> None:
    """Bug: a run goes on in another precision than it was begun in, or ends in a traceback."""
    config = run_config(book, publish(), schedule__kind="constant")
    directory = pretrain(config, run_dir=tmp_path / "run").run_dir
    saved = checkpoint.list_checkpoints(directory)[-1]
    tensors = load_file(saved / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, saved / "model.safetensors")
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").unlink()
    write_manifest(saved, manifest["step"], manifest["tied"], manifest["tokenizer"])
    longer = config.training.model_copy(update={"max_steps": 100})
    with pytest.raises(CheckpointError, match=re.escape(told)):
        pretrain(config.model_copy(update={"training": longer}), run_dir=directory, resume="resume")
