"""Folders as they are published, and as they should not be."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, DataError
from gptcli.interop.hf_config import hf_config
from gptcli.interop.hf_folder import open_folder
from gptcli.interop.hf_weights import layout, to_theirs
from gptcli.model.gpt import GPT

transformers = pytest.importorskip("transformers")

WEIGHTS, CONFIG = "model.safetensors", "config.json"
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 8, "vocab_size": 23}
LLAMA = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "vocab_size": 23,
    "max_position_embeddings": 8,
}


def save(folder: Path, family: str, **more: Any) -> Any:
    """A random model of transformers in `folder`, without a tokenizer."""
    shard = more.pop("max_shard_size", "1GB")
    sizes = GPT2 if family in ("gpt2", "openai-gpt") else LLAMA
    config = {**sizes, "bos_token_id": None, "eos_token_id": None, **more}
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(family, **config)
    twin = transformers.AutoModelForCausalLM.from_config(made).eval()
    twin.save_pretrained(folder, max_shard_size=shard)
    return twin


def build(folder: Path) -> GPT:
    """Our model with the weights that `open_folder` gives."""
    opened = open_folder(folder)
    model = GPT(opened.config.model, opened.config.vocab_size).eval()
    state = dict(opened.weights(torch.float32))
    assert list(state) == [name for name, _ in model.named_parameters()]
    tied = {"head.weight": state["wte.weight"]} if opened.config.model.tie_embeddings else {}
    model.load_state_dict({**state, **tied})
    return model


def assert_same(folder: Path, twin: Any) -> None:
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        theirs = twin(tokens).logits
        torch.testing.assert_close(build(folder)(tokens), theirs, rtol=0.0, atol=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save(folder, "gpt2")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the weights in place."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def test_shards_are_put_together(tmp_path: Path) -> None:
    """Larger models come in several files, and an index that says which tensor is where."""
    twin = save(tmp_path, "llama", max_shard_size="5KB")
    assert not (tmp_path / WEIGHTS).exists()
    assert len(open_folder(tmp_path).files) > 2
    assert_same(tmp_path, twin)


def test_names_without_prefix_and_masks_beside_the_weights(folder: Path) -> None:
    """The first published gpt2 files: no prefix, causal masks stored, no head."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tensors = load_file(folder / WEIGHTS)
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    plain["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    plain["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(plain, folder / WEIGHTS)
    assert_same(folder, twin)


def test_a_head_beside_tied_embeddings_is_compared(folder: Path) -> None:
    """Old files store both; a head of its own would be dropped without a word."""
    change(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert "head.weight" not in dict(open_folder(folder).weights(torch.float32))
    change(folder, lambda t: t["lm_head.weight"].add_(1.0))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the embedding"):
        dict(open_folder(folder).weights(torch.float32))


def test_a_third_of_the_biases_are_zero(tmp_path: Path) -> None:
    """LLaMA has biases in attention only, where ours has them everywhere or nowhere."""
    twin = save(tmp_path, "llama", attention_bias=True)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    twin.save_pretrained(tmp_path)
    assert_same(tmp_path, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_is_read(folder: Path, dtype: torch.dtype) -> None:
    """Half of the published models are in half precision; ours are widened to fp32."""
    before = dict(open_folder(folder).weights(torch.float32))
    change(folder, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    opened = open_folder(folder)
    assert opened.dtype == (dtype if dtype.itemsize == 2 else torch.float32)
    for name, tensor in opened.weights(torch.float32):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, before[name].to(dtype).float(), rtol=0.0, atol=0.0)


def test_what_we_write_is_what_we_read(tmp_path: Path) -> None:
    """Both directions use one table: a mistake in it would cancel out, so the twin is asked too."""
    twin = save(tmp_path, "qwen3", head_dim=12, num_key_value_heads=1)
    model = build(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    table = layout(model.config, model.vocab_size, "qwen3")
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors |= to_theirs(table[name], parameter)
    save_file(tensors, again / WEIGHTS, metadata={"format": "pt"})
    (again / CONFIG).write_text(json.dumps(hf_config(model.config, model.vocab_size)))
    other = transformers.AutoModelForCausalLM.from_pretrained(again).eval()
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(other(tokens).logits, twin(tokens).logits)
    assert_same(again, twin)


def test_all_misfits_are_listed_at_once(folder: Path) -> None:
    """One error a run, tensor by tensor, makes a long evening."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["transformer.ln_f.bias"]
        tensors["score.weight"] = torch.zeros(2)
        tensors["transformer.wpe.weight"] = torch.zeros(9, 16)
        tensors |= {f"extra_{i:02}": torch.zeros(1) for i in range(12)}

    change(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    message = caught.value.message
    assert "missing: transformer.ln_f.bias;" in message
    assert "unexpected: extra_00, extra_01" in message
    assert "extra_09 and 3 more;" in message
    assert "wrong shape: transformer.wpe.weight [9, 16] instead of [8, 16]" in message


def test_tensors_are_called_as_in_the_file(folder: Path) -> None:
    """Nobody finds `ln_f.bias` in a file that has transformer.ln_f.bias, or the other way round."""

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        del tensors["ln_f.bias"]

    change(folder, strip)
    with pytest.raises(CheckpointError, match=r"; missing: ln_f.bias$"):
        open_folder(folder)
    set_config(folder, n_layer=3)
    with pytest.raises(CheckpointError, match=r"; missing: h.2$"):
        open_folder(folder)


def test_another_number_of_layers_is_told_before_any_work(folder: Path) -> None:
    """Listing the tensors of 65,536 layers takes seconds; of 10^9, all the memory."""
    set_config(folder, n_layer=60000)
    with pytest.raises(
        CheckpointError, match=r"60000 layers, .* have 2; missing: transformer.h.2, transformer.h.3"
    ):
        open_folder(folder)
    set_config(folder, n_layer=1)
    with pytest.raises(CheckpointError, match=r"1 layers, but .* unexpected: transformer.h.1$"):
        open_folder(folder)
    set_config(folder, n_layer=10**9)
    with pytest.raises(CheckpointError, match="n_layer is 1000000000"):
        open_folder(folder)


def test_sizes_are_compared_with_the_header_before_anything_is_made(folder: Path) -> None:
    """A config of petabytes would otherwise be allocated before the file is looked at."""
    set_config(folder, n_embd=2**30, vocab_size=2**30)
    with pytest.raises(CheckpointError, match=r"wrong shape.* and"):
        open_folder(folder)


DAMAGES = [
    "empty",
    "cut",
    "cut in header",
    "length",
    "no json",
    "offsets",
    "shape",
    "negative",
    "dtype",
]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = "transformer.ln_f.bias"
    if how == "empty":
        content = b""
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "cut in header":
        content = content[:50]
    elif how == "length":
        content = (2**62).to_bytes(8, "little") + content[8:]
    elif how == "no json":
        content = content[:8] + b"x" * size + content[8 + size :]
    else:
        if how == "offsets":
            header[name]["data_offsets"] = [0, 10**12]
        elif how == "shape":
            header[name]["shape"] = [10**12]
        elif how == "negative":
            header[name]["shape"] = [-16]
        elif how == "dtype":
            header[name]["dtype"] = "Q7"
        new = json.dumps(header).encode()
        content = len(new).to_bytes(8, "little") + new + content[8 + size :]
    path.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_an_error_for_people(folder: Path, how: str) -> None:
    """A download that broke off is common, and a traceback says nothing about it."""
    damage(folder / WEIGHTS, how)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        open_folder(folder)


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    """Quantised weights have the right shapes and the wrong meaning, floats of 8 bits too."""
    change(
        folder,
        lambda t: t.update({"transformer.ln_f.bias": torch.zeros(16, dtype=torch.int8)}),
    )
    with pytest.raises(CheckpointError, match=r"ln_f.bias holds I8, none of F64, F32, F16, BF16"):
        open_folder(folder)
    change(
        folder,
        lambda t: t.update({"transformer.ln_f.bias": torch.zeros(16, dtype=torch.float8_e4m3fn)}),
    )
    with pytest.raises(CheckpointError, match=r"holds F8_E4M3, none of"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "cannot be read"),
        ('{"x": "' + "y" * 2**24 + '"}', "larger than"),
        ("\xff", "cannot be read"),
    ],
    ids=["cut", "list", "nested", "large", "latin"],
)
def test_a_config_that_is_none(folder: Path, content: str, reason: str) -> None:
    """Whatever stands in the file, the error names it."""
    (folder / CONFIG).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"config.json.*{reason}"):
        open_folder(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"no model folder \(no config.json\)"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../model.safetensors"}, "is not the name of a .safetensors file beside it"),
        ({"a": "/etc/passwd"}, "is not the name"),
        ({"a": "x\\y.safetensors"}, "is not the name"),
        ({"a": ".safetensors"}, "is not the name"),
        ({"a": "pytorch_model.bin"}, "is not the name"),
        ({"a": 3}, "no weight_map"),
        (None, "no weight_map"),
        ({"a": "model-00001-of-00002.safetensors"}, "00001-of-00002.safetensors is missing"),
    ],
)
def test_an_index_cannot_name_files_elsewhere(folder: Path, weight_map: Any, reason: str) -> None:
    """The index comes with the download, and what it names is opened."""
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=reason):
        open_folder(folder)


def test_the_same_tensor_in_two_shards(folder: Path) -> None:
    """Which of the two would be taken is a matter of luck."""
    shutil.copy(folder / WEIGHTS, folder / "a.safetensors")
    (folder / WEIGHTS).rename(folder / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"twice, in a.safetensors .* and in b.safetensors"):
        open_folder(folder)


def test_links_stay_in_the_folder_or_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    """A link in a downloaded folder could point at any file; the hub's cache is made of links."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / name, blobs / f"blob-{name}")
        os.symlink(f"../../blobs/blob-{name}", snapshot / name)
    open_folder(snapshot)
    elsewhere = tmp_path / "elsewhere.safetensors"
    (folder / WEIGHTS).rename(elsewhere)
    for link in (folder / WEIGHTS, snapshot / WEIGHTS):
        link.unlink(missing_ok=True)
        link.symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match="is a link out of its folder"):
            open_folder(link.parent)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_folder(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_folder(folder)


BESIDE = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
]


@pytest.mark.parametrize("name", BESIDE)
def test_small_files_are_bounded_and_inside(tmp_path: Path, name: str) -> None:
    """Gigabytes under the name of a config would fill the memory, a link would read any file."""
    library = bpe()
    save(tmp_path, "gpt2", vocab_size=library.get_vocab_size())
    library.model.save(str(tmp_path))
    path = tmp_path / name
    if not path.exists():
        path.write_text("{}")
    open_folder(tmp_path)
    moved = path.rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    path.symlink_to(moved)
    with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder"):
        open_folder(tmp_path)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(2**30)  # a hole: no disk is used
    with pytest.raises(DataError, match=f"{name}.* larger than"):
        open_folder(tmp_path)


def test_an_end_that_config_names_is_no_end_without_a_tokenizer(folder: Path) -> None:
    """Published models of bare ids name an ordinary token there: their texts would break off."""
    set_config(folder, eos_token_id=0)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    assert open_folder(folder).tokenizer.ends == frozenset()


def test_pickles_are_read_only_when_allowed(folder: Path) -> None:
    """Unpickling runs what the file says; with the flag, only tensors are taken out of it."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    (folder / WEIGHTS).unlink()
    path = folder / "pytorch_model.bin"
    torch.save(twin.state_dict(), path)
    with pytest.raises(CheckpointError, match="is a pickle file") as caught:
        open_folder(folder)
    assert "--allow-pickle" in str(caught.value.hint)
    opened = open_folder(folder, allow_pickle=True)
    weights = dict(opened.weights(torch.float32))
    assert torch.equal(weights["wte.weight"], twin.transformer.wte.weight)
    torch.save(twin.state_dict(), path, _use_new_zipfile_serialization=False)  # before torch 1.6
    assert open_folder(folder, allow_pickle=True).stored.keys() == opened.stored.keys()


class Harmful:
    """Whatever it would do, it is not done."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def test_a_pickle_with_code_is_refused_even_when_allowed(folder: Path) -> None:
    """--allow-pickle is for old weights, not for programs."""
    (folder / WEIGHTS).unlink()
    path = folder / "pytorch_model.bin"
    for content in ({"x": Harmful()}, [torch.zeros(1)], {"x": 1}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
            open_folder(folder, allow_pickle=True)
    path.write_bytes(b"\x80\x04 damaged")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        open_folder(folder, allow_pickle=True)
    path.rename(folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated.00.pth is a pickle"):
        open_folder(folder, allow_pickle=True)


def test_no_weights_at_all(folder: Path) -> None:
    """An interrupted download has the small files first."""
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_folder(folder)


def bpe() -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(["the cat sat on the mat, the hat that the cat had"] * 9, trainer)
    return library


def test_a_tokenizer_larger_than_the_model(folder: Path) -> None:
    """Its ids would index past the embedding."""
    bpe().save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer has \d{3} tokens, the model only 23"):
        open_folder(folder)


def test_vocab_and_merges_of_old_uploads(tmp_path: Path) -> None:
    """The first gpt2 uploads have no tokenizer.json; the same merges make the same ids."""
    library = bpe()
    save(tmp_path, "gpt2", vocab_size=library.get_vocab_size(), eos_token_id=0)
    library.model.save(str(tmp_path))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    tokenizer = open_folder(tmp_path).tokenizer
    text = "that cat had a hat; 3 élans\n"
    assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.eot == library.token_to_id("<|endoftext|>") == 0
    (tmp_path / "merges.txt").write_text("#version: 0.2\nq\n")
    with pytest.raises(DataError, match=r"vocab.json and merges.txt"):
        open_folder(tmp_path)


def test_other_tokenizers_without_json_are_refused(folder: Path) -> None:
    """Taking them for a model of plain ids would hide that they have a tokenizer."""
    assert open_folder(folder).tokenizer.identity == Tokenizer.of_ids(23).identity
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(DataError, match=r"only tokenizer.model") as caught:
        open_folder(folder)
    assert "save_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_that_was_forgotten_is_told(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy without tokenizer.json would ask for ids, and nobody knew why."""
    open_folder(folder)
    assert not caplog.records
    (folder / name).write_text("{}")
    assert open_folder(folder).tokenizer.kind == "ids"
    assert (
        f"tokenizer.json is missing, though there is a {name}: texts are token ids" in caplog.text
    )


def with_tokenizer(folder: Path, **config: Any) -> Path:
    library = bpe()
    save(folder, "gpt2", vocab_size=library.get_vocab_size() + 5)
    library.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    set_config(folder, **config)
    return folder


def test_ends_that_are_no_tokens_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A text that never ends, because its end was misspelt, looks like a bad model."""
    folder = with_tokenizer(tmp_path, eos_token_id=[0, 99999, -1, True])
    opened = open_folder(folder)
    assert opened.tokenizer.ends == {0}
    size = opened.config.vocab_size
    assert (
        f"{CONFIG}: eos_token_id 99999, -1, True: no token of the vocabulary of {size};"
        in caplog.text
    )
    caplog.clear()
    set_config(folder, eos_token_id=0, bos_token_id=7)
    open_folder(folder)
    assert not caplog.records  # nothing is put before a text: nothing to differ from


def test_another_start_than_the_tokenizers_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of the two is wrong, and only the publisher knows which."""
    folder = with_tokenizer(tmp_path, eos_token_id=0, bos_token_id=0)
    settings = {"add_bos_token": True, "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_folder(folder).tokenizer.bos == 0
    assert not caplog.records
    set_config(folder, bos_token_id=7)
    open_folder(folder)
    assert f"{CONFIG}: bos_token_id is 7, but the tokenizer begins texts with 0" in caplog.text
