"""Runs over mixtures, packed and masked documents, tokenised and raw files, with caches."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from interrupting import interrupted, killed, outcome, prose

from gptcli.config.schema import Config
from gptcli.data import packing, shards, stream
from gptcli.data.cache_folder import cache_root
from gptcli.data.corpus import open_corpus
from gptcli.data.pipeline import corpus_tokenizer, ready_tokenizer, training_rows
from gptcli.errors import ConfigError
from gptcli.finetune import finetune
from gptcli.generate import generate_bytes
from gptcli.pretrain import pretrain
from gptcli.runs.load import load_model
from gptcli.runs.run_dir import read_run_json

STEPS = 14


@pytest.fixture(autouse=True)
def _small_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Runs of seconds meet several windows, groups and epochs. Each test has its own cache."""
    monkeypatch.setattr(packing, "GROUP_TOKENS", 256)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 600)
    monkeypatch.setenv("GPT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)


def mixture(folder: Path) -> list[dict[str, Any]]:
    """Three kinds of source with weights."""
    rng = random.Random(5)
    texts = [prose(rng.randrange(10, 120), seed=i) for i in range(40)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(rows)
    table = pa.table({"article": [{"body": prose(50, seed=100 + i)} for i in range(30)]})
    pq.write_table(table, folder / "b.parquet", row_group_size=7)
    lines = "\n".join(prose(40, seed=200 + i).replace("\n", " ") for i in range(30))
    (folder / "c.txt.gz").write_bytes(gzip.compress(lines.encode()))
    return [
        {"path": str(folder / "a.jsonl"), "weight": 1, "filters": {"min_characters": 20}},
        {"path": str(folder / "b.parquet"), "weight": 2, "text_field": "article.body"},
        {"path": str(folder / "c.txt.gz"), "weight": 1, "document": "line"},
    ]


def run_config(train: Any, **data: Any) -> Config:
    return Config.model_validate(
        {
            "tokenizer": {"kind": "bytes"},
            "data": {"train": train, "val_fraction": 0.1, "shuffle_window": 8, **data},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "dropout": 0.1},
            "schedule": {"warmup_steps": 2},
            "training": {
                "max_steps": STEPS,
                "tokens_per_step": 256,
                "log_every": 3,
                "eval_every": 7,
                "save_every": 4,
                "precision": "fp32",
            },
            "samples": {"prompts": ["the"], "n": 1, "max_new_tokens": 4},
        }
    )


@pytest.mark.parametrize("packing_kind", ["concat", "best_fit"])
def test_a_killed_mixture_ends_with_the_same_model(tmp_path: Path, packing_kind: Any):
    """Guards against a mixture whose shares, order or masks shift with each resume, and against a
    token cache that changes what is trained on: half of the resumes go without it."""
    sources = mixture(tmp_path)
    options = {"packing": packing_kind, "document_mask": True}
    config = run_config(sources, cache="on", **options)
    uncached = run_config(sources, cache="off", **options)
    assert pretrain(config, run_dir=tmp_path / "straight").status == "finished"
    run_dir = tmp_path / "cut"
    killed(uncached, run_dir, 6, resume=False)
    killed(config, run_dir, 3, resume=True)
    with interrupted(4):
        assert pretrain(uncached, run_dir=run_dir, resume="resume").status == "stopped"
    killed(config, run_dir, 2, resume=True)
    assert pretrain(config, run_dir=run_dir, resume="resume").status == "finished"
    assert outcome(run_dir) == outcome(tmp_path / "straight")
    seen = read_run_json(run_dir)["mixture"]
    assert seen == read_run_json(tmp_path / "straight")["mixture"]
    shares = [source["tokens"] / sum(s["tokens"] for s in seen) for source in seen]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.08)  # right to within a document


@pytest.mark.parametrize("weighted", [False, True])
def test_the_cache_changes_no_batch(tmp_path: Path, weighted: bool):
    """Guards against results that depend on whether somebody has tokenised the corpus before."""
    sources = mixture(tmp_path)
    for source in sources if not weighted else []:
        del source["weight"]
    taken = []
    for cache in ("off", "on", "on"):
        config = run_config(sources, cache=cache)
        corpus = open_corpus(config.data)
        tokenizer = ready_tokenizer(config.tokenizer)
        assert tokenizer is not None
        rows = training_rows(config, corpus, tokenizer)
        taken.append([rows.take(5) for _ in range(40)])
        states = [rows.state()]
    for batches in taken[1:]:
        for one, other in zip(batches, taken[0], strict=True):
            assert np.array_equal(one.inputs, other.inputs)
            assert np.array_equal(one.targets, other.targets)
    assert all(len(json.dumps(state)) < 20_000 for state in states)


def test_auto_caches_what_is_read_often(tmp_path: Path):
    """Guards against a cache of gigabytes for a run of a few steps, and none for many epochs."""
    (source,) = mixture(tmp_path)[:1]
    del source["weight"]
    few = run_config(source)
    few = few.model_copy(
        update={"training": few.training.model_copy(update={"max_steps": 2, "tokens_per_step": 32})}
    )
    for config, expected in ((few, False), (run_config(source), True)):
        corpus, tokenizer = open_corpus(config.data), ready_tokenizer(config.tokenizer)
        assert tokenizer is not None
        training_rows(config, corpus, tokenizer)
        assert (cache_root() / "tokens").exists() == expected


def test_a_trained_tokenizer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against minutes of BPE training at each start of the same recipe, and against the
    tokenizer of another corpus or of other settings."""
    (source,) = mixture(tmp_path)[:1]
    del source["weight"]
    trained = []
    real = corpus_tokenizer.__globals__["build_tokenizer"]

    def build(settings: Any, texts: Any) -> Any:
        trained.append(settings.vocab_size)
        return real(settings, texts)

    monkeypatch.setattr("gptcli.data.pipeline.build_tokenizer", build)

    def tokenizer(vocab_size: int, cache: str = "auto") -> str:
        config = run_config(source, cache=cache)
        settings = {"kind": "bpe", "vocab_size": vocab_size}
        config = Config.model_validate({**config.model_dump(by_alias=True), "tokenizer": settings})
        return corpus_tokenizer(config, open_corpus(config.data)).identity

    first = tokenizer(280)
    assert tokenizer(280) == first
    assert trained == [280]
    assert tokenizer(280, cache="off") == first
    assert tokenizer(270) != first
    other = "".join(f'{{"text": "other text altogether, {i} times again"}}\n' for i in range(120))
    Path(source["path"]).write_text(other)
    assert tokenizer(280) != first
    assert trained == [280, 280, 270, 280]
    for place in (cache_root() / "tokenizers").iterdir():
        (place / "ranks.tiktoken").write_bytes(b"damaged")
    assert tokenizer(280)
    assert len(trained) == 5


def test_tokenised_files_train_as_their_text_does(tmp_path: Path):
    """Guards against separators doubled or lost where a corpus holds token ids already."""
    texts = [prose(30 + 7 * i, seed=i) for i in range(12)]
    ids = [token for text in texts for token in [256, *text.encode()]]
    np.save(tmp_path / "ids.npy", np.array(ids, dtype=np.uint16))
    config = run_config(str(tmp_path / "ids.npy"), shuffle_window=0)
    result = pretrain(config, run_dir=tmp_path / "run")
    assert result.status == "finished"
    (seen,) = read_run_json(tmp_path / "run")["mixture"]
    assert seen["tokens"] == STEPS * 256
    corpus = open_corpus(config.data, eot=256)
    tokenizer = ready_tokenizer(config.tokenizer)
    assert tokenizer is not None
    rows = training_rows(config, corpus, tokenizer).take(20)
    row = [*rows.inputs[:, 0:].reshape(-1)]
    assert row == ids[: len(row)]


def test_a_tokenised_corpus_needs_its_tokenizer(tmp_path: Path):
    """Guards against BPE trained on nothing, and ids that mean other words."""
    np.save(tmp_path / "ids.npy", np.arange(5000, dtype=np.uint16) % 256)
    config = run_config(str(tmp_path / "ids.npy"))
    values = {**config.model_dump(by_alias=True), "tokenizer": {"kind": "bpe"}}
    with pytest.raises(ConfigError, match="needs the tokenizer that made it"):
        pretrain(Config.model_validate(values), run_dir=tmp_path / "run")


def test_raw_files_come_out_as_raw_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against bytes that were decoded on the way: a model of a file that no text codec
    reads must write it back."""
    monkeypatch.setattr(shards, "PIECE_BYTES", 1000)
    data = bytes([0x89, 0xFF, 0x00, 0x0D, 0x0A, 0xC3, 0x28, 0x80])
    (tmp_path / "raw").mkdir()
    for i in range(120):
        (tmp_path / "raw" / f"{i}.img").write_bytes(data * 3 + bytes([i, i]))
    config = run_config({"path": str(tmp_path / "raw"), "encoding": "binary"})
    training = config.training.model_copy(update={"max_steps": 60, "eval_every": 60})
    config = config.model_copy(update={"training": training})
    result = pretrain(config, run_dir=tmp_path / "run")
    assert result.status == "finished"
    (tmp_path / "prompt").write_bytes(data[:2])
    loaded = load_model(str(tmp_path / "run"), torch.device("cpu"))
    settings = config.generate.model_copy(
        update={
            "prompt_file": str(tmp_path / "prompt"),
            "output_bytes": True,
            "temperature": 0.0,
            "max_new_tokens": 14,
        }
    )
    made = generate_bytes(loaded, settings)
    assert made == data * 2


def test_finetuning_refuses_what_it_does_not_do(tmp_path: Path):
    """Guards against packing or masks that are asked for and silently left out."""
    rows = "".join(json.dumps({"prompt": f"{i}", "response": "x"}) + "\n" for i in range(20))
    (tmp_path / "a.jsonl").write_text(rows)
    path = str(tmp_path / "a.jsonl")
    for source, data in (
        (path, {"packing": "best_fit"}),
        (path, {"document_mask": True}),
    ):
        config = run_config(source, **data).model_copy(update={"init": "x"})
        with pytest.raises(ConfigError, match="is for pretraining"):
            finetune(config, run_dir=tmp_path / "run")
    assert not os.path.exists(tmp_path / "run")
