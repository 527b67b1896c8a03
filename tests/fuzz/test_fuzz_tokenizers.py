"""Any mutation of a tokenizer.json and of the files beside it."""

import json
from pathlib import Path

import pytest
import tokenizers
from guard import Gpt, came_to, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st
from mutations import changed_bytes, changed_json
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

BESIDE = {
    "tokenizer_config.json": {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"},
    "special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>"}},
}


def byte_level(text: str) -> str:
    """As GPT-2's."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=280,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    library.train_from_iterator([text], trainer)
    return library.to_str()


def sentencepiece() -> str:
    """As Llama 2's."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": b + 3 for b in range(256)}
    for token in ("▁", "d", "a", "y", "s", "▁d", "ay", "▁day"):
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "d"), ("a", "y"), ("▁d", "ay")]
    library = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
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
    return library.to_str()


def unigram() -> str:
    """As T5's."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁day", -3.0), ("a", -4.0), ("s", -4.5)]
    library = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    return library.to_str()


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[str]:
    """Whole ones."""
    return [byte_level((folder / "text.txt").read_text()), sentencepiece(), unigram()]


@fuzzed
@given(
    kind=st.integers(0, 2),
    how=st.sampled_from(["inside", "inside", "inside", "bytes", "beside"]),
    times=st.integers(1, 3),
    text=st.text(max_size=20),
    choice=st.data(),
)
def test_tokenizers(
    kind: int, how: str, times: int, text: str, choice: st.DataObject, whole: list[str], gpt: Gpt
) -> None:
    """A tokenizer encodes, or what is wrong with it is named."""
    content, beside = whole[kind], json.loads(json.dumps(BESIDE))
    for _ in range(times):
        if how == "inside":
            content = json.dumps(changed_json(choice.draw, json.loads(content)))
        elif how == "beside":
            name = choice.draw(st.sampled_from(sorted(beside)))
            beside[name] = changed_json(choice.draw, beside[name])
    place = Path("tokens")
    place.mkdir(exist_ok=True)
    data = content.encode("utf-8", "surrogatepass")
    (place / "tokenizer.json").write_bytes(
        changed_bytes(choice.draw, data) if how == "bytes" else data
    )
    for name, tree in beside.items():
        (place / name).write_text(json.dumps(tree))
    (place / "some.txt").write_text(text + " day 3 was", errors="replace")
    with case("tokenizers"):
        file = f"--file={place}/some.txt"
        well(gpt, ["tokenizer", "show", str(place / "tokenizer.json"), file], {0, 2, 3, 4})
        keys = f"--set=tokenizer={{kind: file, path: {place}}}"
        code, _, _ = well(gpt, ["pretrain", "tiny.yaml", "--dry-run", keys], {0, 2, 3, 4})
        came_to("tokenizers", "refused" if code else "used")
