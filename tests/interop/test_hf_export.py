"""Exported folders through transformers' own loaders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gptcli import stop  # noqa: E402
from gptcli.config.model_schema import ModelConfig  # noqa: E402
from gptcli.data.special_tokens import SpecialTokens  # noqa: E402
from gptcli.data.tokenizer import Tokenizer, train_bpe  # noqa: E402
from gptcli.errors import CheckpointError, ConfigError  # noqa: E402
from gptcli.export import export  # noqa: E402
from gptcli.generation.prompt import encode_prompt  # noqa: E402
from gptcli.import_model import import_model  # noqa: E402
from gptcli.interop.hf_export import write_hf  # noqa: E402
from gptcli.interop.hf_folder import open_folder  # noqa: E402
from gptcli.model.gpt import GPT, initialise  # noqa: E402

TEXTS = [
    "Hello, world! I don't know.",
    "床前明月光,疑是地上霜。",
    "👩\u200d👩\u200d👧 🇩🇪 🙂",
    "12345678 3.14 2,000",
    "  a   b \n\n\t c  ",
    "def f(x):\n    return {'a': x + 1}  # ok\n",
    "one<|endoftext|>two",
    "<|endoftext|>",
    "",
]
TINY: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "gpt1": ({"preset": "gpt1"}, "OpenAIGPTLMHeadModel"),
    "gpt2": ({"preset": "gpt2"}, "GPT2LMHeadModel"),
    "gpt2-untied": ({"preset": "gpt2", "tie_embeddings": False}, "GPT2LMHeadModel"),
    "gpt3": ({"preset": "gpt3-small", "window": [0, 8]}, "GPTNeoForCausalLM"),
    "llama": ({"preset": "llama"}, "LlamaForCausalLM"),
    "llama-tied-grouped": (
        {"preset": "llama", "tie_embeddings": True, "n_kv_head": 2},
        "LlamaForCausalLM",
    ),
    "modern": ({"preset": "modern"}, "Qwen3ForCausalLM"),
    "modern-tied-grouped": (
        {"preset": "modern", "tie_embeddings": True, "n_kv_head": 1, "head_dim": 16},
        "Qwen3ForCausalLM",
    ),
    "mistral": ({"preset": "llama", "window": 16}, "MistralForCausalLM"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS * 3, 400, "gpt4", 10**6)


def small_model(vocab_size: int, **keys: Any) -> GPT:
    """Random weights, the projections that start at zero included."""
    model = GPT(ModelConfig(**{**TINY, **keys}), vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_runs_it(family: str, tokenizer: Tokenizer, tmp_path: Path):
    """Other ids, a missing start token, token types or other weights: silently another model."""
    keys, architecture = FAMILIES[family]
    model = small_model(tokenizer.vocab_size + 3, **keys)  # a padded vocabulary
    write_hf(model, tokenizer, tmp_path, torch.float32)
    twin, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(twin).__name__ == architecture
    assert not any(loading.values()), loading  # nothing missing, nothing made up
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text).input_ids == encode_prompt(tokenizer, text)
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot
    inputs = theirs("def f(x):\n    return 12345678", return_tensors="pt")
    with torch.no_grad():
        difference = (twin(**inputs).logits - model(inputs.input_ids)).abs().max().item()
    assert difference < 1e-4
    made = twin.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert made[0, : inputs.input_ids.size(1)].tolist() == inputs.input_ids[0].tolist()
    assert twin.generation_config.eos_token_id == tokenizer.eot


def test_special_text_as_tokens(tokenizer: Tokenizer, tmp_path: Path):
    """The card tells how to write the end of a text as text: it must be true."""
    write_hf(small_model(tokenizer.vocab_size), tokenizer, tmp_path, torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("a<|endoftext|>", split_special_tokens=False).input_ids
    assert ids == encode_prompt(tokenizer, "a<|endoftext|>", allow_special=True)


def test_qwen2_with_the_tokenizer_that_its_card_names(tokenizer: Tokenizer, tmp_path: Path):
    """AutoTokenizer puts Qwen's own splits on every qwen2 model; digits then come out otherwise."""
    model = small_model(tokenizer.vocab_size, preset="llama", qkv_bias=True)
    write_hf(model, tokenizer, tmp_path, torch.float32)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(twin).__name__ == "Qwen2ForCausalLM"
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text).input_ids == encode_prompt(tokenizer, text)


@pytest.mark.parametrize("family", ["gpt1", "gpt2", "gpt3", "llama-tied-grouped", "modern"])
def test_read_back(family: str, tokenizer: Tokenizer, tmp_path: Path):
    """What was exported comes back as the same model with the same tokens."""
    model = small_model(tokenizer.vocab_size, **FAMILIES[family][0])
    write_hf(model, tokenizer, tmp_path, torch.float32)
    folder = open_folder(tmp_path)
    assert folder.dtype == torch.float32
    for text in TEXTS:
        assert encode_prompt(folder.tokenizer, text) == encode_prompt(tokenizer, text)
    assert folder.tokenizer.eot == tokenizer.eot
    weights = model.state_dict()
    for name, tensor in folder.weights(torch.float32):
        # GPT-Neo's queries are scaled and scaled back, a rounding each.
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path):
    """A wrong dtype in the config would widen the weights, or round them twice."""
    model = small_model(tokenizer.vocab_size, preset="llama", n_kv_head=2)
    write_hf(model, tokenizer, tmp_path, dtype)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert twin.dtype == dtype
    torch.testing.assert_close(
        twin.model.embed_tokens.weight, model.wte.weight.to(dtype), rtol=0, atol=0
    )
    rounded = small_model(tokenizer.vocab_size, preset="llama", n_kv_head=2)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(dtype))
    ids = torch.tensor([encode_prompt(tokenizer, TEXTS[0])])
    with torch.no_grad():
        torch.testing.assert_close(twin.float()(ids).logits, rounded(ids), rtol=0, atol=1e-4)


def test_weight_beyond_f16(tokenizer: Tokenizer, tmp_path: Path):
    """f16 ends at 65,504: a larger weight would become infinite, and all logits nan."""
    model = small_model(tokenizer.vocab_size)
    with torch.no_grad():
        model.wte.weight[3, 5] = 1e5
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight holds 1e\+05") as caught:
        write_hf(model, tokenizer, tmp_path, torch.float16)
    assert "bf16" in (caught.value.hint or "")


def test_several_ends(tmp_path: Path):
    """Of several ids that end a text transformers must know all, with eot before the others."""
    ranks = {bytes([b]): b for b in range(256)}
    names = {"<s>": 256, "<a>": 257, "<b>": 258}
    special = SpecialTokens(names, "<b>", "<s>", (), (257,))
    tokenizer = Tokenizer("file", ranks, r"[\s\S]", 258, special)
    model = small_model(259)
    write_hf(model, tokenizer, tmp_path, torch.float32)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert twin.generation_config.eos_token_id == [258, 257]
    assert twin.generation_config.bos_token_id == 256
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "<b>")
    read = open_folder(tmp_path).tokenizer
    assert (read.ends, read.eot, read.start) == (frozenset({257, 258}), 258, 256)


def test_no_tokenizer(tmp_path: Path):
    """A model of bare ids: the defaults of transformers name ids that it does not have."""
    model = small_model(7, preset="gpt2")
    write_hf(model, Tokenizer.of_ids(7), tmp_path, torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (twin.config.bos_token_id, twin.config.eos_token_id) == (None, None)
    made = twin.generate(torch.tensor([[1, 2]]), max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 7)
    assert open_folder(tmp_path).tokenizer.kind == "ids"
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((tmp_path / name).read_text())
        assert raw["eos_token_id"] is None  # said, not left out: the family's default is 50256


def published(folder: Path, architecture: str) -> Path:
    """A model as it is published, whose tokenizer puts no token before a text.

    It cuts digits apart as SmolLM's does (read by the library) or is like gpt2's (by tiktoken).
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    library.pre_tokenizer = digits if architecture == "llama" else bytes_
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS * 3, trainer)
    library.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, unk_token="<|endoftext|>", **names
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = small_model(len(fast), preset=architecture)
    write_hf(model, Tokenizer.of_ids(model.vocab_size), folder, torch.float32)
    fast.save_pretrained(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | ids))
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_published_model_comes_back_as_it_was(architecture: str, tmp_path: Path):
    """Its prompts begin otherwise, its chat template is lost, its special tokens become text."""
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
    source = published(tmp_path / "source", architecture)
    import_model(str(source), tmp_path / "imported")
    export(str(tmp_path / "imported"), tmp_path / "out", "hf", None)
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "out")
    )
    texts = [*TEXTS, "<|im_start|>user\nhi 123<|im_end|>", "a <mask>b<|endoftext|>", "", " "]
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids
        if text:
            kept = open_folder(source).tokenizer
            assert encode_prompt(kept, text) == theirs(text, split_special_tokens=True).input_ids
    for key in ("bos_token", "eos_token", "pad_token", "unk_token", "split_special_tokens"):
        assert getattr(ours, key) == getattr(theirs, key), key
    messages = [{"role": "user", "content": "Who is king?"}]
    prompts = [
        t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for t in (theirs, ours)
    ]
    assert (
        prompts[0]
        == prompts[1]
        == "<|im_start|>user\nWho is king?<|im_end|>\n" + ("<|im_start|>assistant\n")
    )
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((tmp_path / "out" / name).read_text())
        assert [raw[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [1, 2, 2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "begins every text" not in card
    assert "are read as those tokens, as by the source" in card
    again = open_folder(tmp_path / "out").tokenizer
    assert again.prompt_start is None
    assert again.source == open_folder(source).tokenizer.source


@pytest.mark.parametrize(
    "folder", ["hf", "model/final", "0123456789abcdef0123456789abcdef01234567"]
)
def test_card_names_the_model_not_its_kind_of_folder(folder: str, tmp_path: Path):
    """Every second model is in a folder called hf; 1e-05 read from fp32 has 16 digits."""
    model = small_model(300, norm_eps=9.999999747378752e-06)
    place = tmp_path / "stories" / folder
    place.mkdir(parents=True)
    write_hf(model, Tokenizer.of_ids(300), place, torch.float32)
    import_model(str(place), tmp_path / "hf")
    for source, out in ((place, "a"), (tmp_path / "hf", "b")):
        export(str(source), tmp_path / out, "hf", None)
        card = (tmp_path / out / "README.md").read_text()
        assert "\n# stories\n" in card
        assert "converted by gpt from stories without" in card
        assert "| norm_eps | 1e-05 |" in card


def test_an_end_that_is_none_is_not_passed_on(tmp_path: Path):
    """A source of bare ids may name an ordinary one as its end: `generate` would break off there,
    and nobody would know why the copy does not."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_hf(small_model(7, preset="gpt2"), Tokenizer.of_ids(7), source, torch.float32)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "eos_token_id": 0}))
    export(str(source), out, "hf", None)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] is None
    assert "No id ends a text (`eos_token_id` is\nnull)" in (out / "README.md").read_text()


def test_model_without_a_twin(tokenizer: Tokenizer, tmp_path: Path):
    """A model that transformers cannot compute must not be written as one that it can."""
    model = small_model(tokenizer.vocab_size, position="sinusoidal")
    with pytest.raises(CheckpointError, match="position"):
        write_hf(model, tokenizer, tmp_path, torch.float32)
    assert not list(tmp_path.iterdir())


def test_stop_while_writing(tokenizer: Tokenizer, tmp_path: Path):
    """A stop request must not wait for all the tensors of a large model."""
    stop.request(2)
    with pytest.raises(stop.Stopped):
        write_hf(small_model(tokenizer.vocab_size), tokenizer, tmp_path, torch.float32)


def test_settings_of_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path):
    """These keys are read by other programs too, which look for them by name."""
    write_hf(small_model(tokenizer.vocab_size), tokenizer, tmp_path, torch.float32)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 64
    assert config["add_bos_token"] is True
    assert config["clean_up_tokenization_spaces"] is False
