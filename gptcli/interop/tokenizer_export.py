"""Our tokenizers as Hugging Face's `tokenizer.json` and the config beside it.

A rank file lists tokens, the library `tokenizers` wants the pairs that merge into them. Whether
both give the same ids is tried on a text before anything is written.
"""

import json
from typing import Any

from tokenizers import Tokenizer as Library

from gptcli import stop
from gptcli.data.probe import probe_text
from gptcli.data.published_files import CHAT_TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_JSON
from gptcli.data.special_tokens import EOT_TEXT
from gptcli.data.tiktoken_tables import GPT2_PATTERN, byte_characters
from gptcli.data.tokenizer import IdsTokenizer, Tokenizer
from gptcli.data.tokenizer_source import NAMES, TOKEN_FLAGS
from gptcli.errors import DataError

_STOP_EVERY_TOKENS = 1000  # between looks at the stop flag


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """Files by name, with which `AutoTokenizer` gives the ids of our prompts; none for kind ids.

    The start of a prompt is put before every text. Special tokens inside a text are ordinary
    characters, or what the published folder said that the tokenizer is from; its chat template is
    given back. DataError when the library would give other ids.
    """
    if isinstance(tokenizer, IdsTokenizer):
        return {}
    content = tokenizer_json(tokenizer)
    config = tokenizer_config(tokenizer, json.loads(content), block_size)
    files = {TOKENIZER_JSON: content, TOKENIZER_CONFIG: json_bytes(config)}
    template = tokenizer.source.get("chat_template")
    return {**files, CHAT_TEMPLATE: template.encode()} if isinstance(template, str) else files


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """tokenizer.json, tried against the tokenizer. DataError when no such file gives its ids."""
    if tokenizer.original_json is not None:
        raw = _with_special_tokens(json.loads(tokenizer.original_json), tokenizer)
    else:
        raw = _byte_level(tokenizer)
    content = json_bytes(raw)
    _check(content, tokenizer)
    return content


def tokenizer_config(tokenizer: Tokenizer, raw: dict[str, Any], block_size: int) -> dict[str, Any]:
    """tokenizer_config.json for the tokenizer whose tokenizer.json is `raw`."""
    unknown, source = raw["model"].get("unk_token"), tokenizer.source
    names = {
        "bos_token": token_name(tokenizer, tokenizer.start),
        "eos_token": token_name(tokenizer, tokenizer.eot),
        "unk_token": unknown if isinstance(unknown, str) else None,
    }
    names |= {key: source[key] for key in NAMES if key in source}
    if tokenizer.prompt_start is not None:
        names["bos_token"] = token_name(tokenizer, tokenizer.prompt_start)
    template = source.get("chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": tokenizer.prompt_start is not None,
        "add_eos_token": False,
        "model_max_length": block_size,
        # Else a token type would be handed to models, and gpt2's adds an embedding for it.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": source.get("clean_up_tokenization_spaces", False),
        # Of tokenizers made here, "<|endoftext|>" inside a text is ordinary text.
        "split_special_tokens": source.get("split_special_tokens", True),
        **({"chat_template": template} if isinstance(template, list) else {}),
    }


def token_name(tokenizer: Tokenizer, token: int | None) -> str | None:
    """The name of a special token."""
    return next((name for name, i in tokenizer.special.ids.items() if i == token), None)


def json_bytes(value: dict[str, Any]) -> bytes:
    """An object as it is written into a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def merges_of(ranks: dict[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The pairs that make each token, in rank order, and whether each token's bytes merge into it.

    The pair of a token is what its bytes have merged to by all the ranks below its own. A token
    that its bytes do not reach in this way comes, as in tiktoken, from any neighbours that make it
    up, or as a whole word. Raises `stop.Stopped`.
    """
    pairs: list[tuple[bytes, bytes]] = []
    reached = True
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        if len(pairs) % _STOP_EVERY_TOKENS == 0:
            stop.raise_if_requested()
        parts = _merged(token, ranks, rank)
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
            continue
        reached = False
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs += [(a, b) for a, b in halves if a in ranks and b in ranks]
    return pairs, reached


def _merged(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The parts that the bytes of `token` merge to by the ranks below `limit`, lowest first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, where = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], limit)
            if rank < best:
                best, where = rank, i
        if where < 0:
            break
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return parts


def _byte_level(tokenizer: Tokenizer) -> dict[str, Any]:
    special = tokenizer.special
    taken = set(special.ids.values())
    tokens = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in taken}
    ranks = {token: i for i, token in tokens.items() if token}
    pairs, reached = merges_of(ranks)
    characters = {b: c for c, b in byte_characters().items()}

    def written(token: bytes) -> str:
        return "".join(characters[b] for b in token)

    # The special tokens stand in the vocabulary too: that is how they get ids with gaps between.
    vocabulary = {written(token): i for token, i in ranks.items()}
    if doubled := sorted(vocabulary.keys() & special.ids.keys()):
        raise DataError(
            f"the special token {doubled[0]!r} is an ordinary token of the tokenizer too"
        )
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": not reached,
        "vocab": vocabulary | special.ids,
        "merges": [[written(a), written(b)] for a, b in pairs],
    }
    added = sorted(special.ids.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(name, i, name not in special.in_text) | _flags(tokenizer, name)
            for name, i in added
        ],
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": _pre_tokenizer(tokenizer.pattern),
        "post_processor": _post_processor(tokenizer, None),
        "decoder": _byte_level_part(use_regex=True),
        "model": model,
    }


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    if pattern == GPT2_PATTERN:  # the library has it built in, and other programs know it so
        return _byte_level_part(use_regex=True)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    parts = [{**split, "invert": False}, _byte_level_part(use_regex=False)]
    return {"type": "Sequence", "pretokenizers": parts}


def _byte_level_part(use_regex: bool) -> dict[str, Any]:
    part = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {**part, "use_regex": use_regex}


def _added(name: str, token: int, is_special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(TOKEN_FLAGS, False)
    return {"id": token, "content": name, **flags, "special": is_special}


def _flags(tokenizer: Tokenizer, name: str) -> dict[str, bool]:
    """How the source of the tokenizer looks for a special token inside a text."""
    given = tokenizer.source.get("token_flags", {}).get(name, {})
    return {key: True for key in TOKEN_FLAGS if given.get(key) is True}


def _post_processor(tokenizer: Tokenizer, original: Any) -> dict[str, Any] | None:
    """What puts the start token before a text, in place of all that adds tokens in `original`."""
    parts = original["processors"] if (original or {}).get("type") == "Sequence" else [original]
    kept = [part for part in parts if part and part.get("type") == "ByteLevel"]
    name = token_name(tokenizer, tokenizer.prompt_start)
    if name is not None:
        start = {"SpecialToken": {"id": name, "type_id": 0}}
        again = {"SpecialToken": {"id": name, "type_id": 1}}
        first, second = ({"Sequence": {"id": key, "type_id": i}} for i, key in enumerate("AB"))
        template = {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, again, second],
            "special_tokens": {
                name: {"id": name, "ids": [tokenizer.prompt_start], "tokens": [name]}
            },
        }
        kept.append(template)
    if len(kept) < 2:
        return kept[0] if kept else None
    return {"type": "Sequence", "processors": kept}


def _with_special_tokens(raw: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """`raw` with our start before a text, and the special tokens that we added to it."""
    special, vocabulary = tokenizer.special, raw["model"]["vocab"]
    added = list(raw.get("added_tokens") or [])
    listed = {token["content"]: dict(token) for token in added}
    for name, i in special.ids.items():
        if name in listed:
            listed[name]["special"] = name not in special.in_text
            continue
        listed[name] = _added(name, i, name not in special.in_text)
        if isinstance(vocabulary, dict):
            vocabulary = {**vocabulary, name: i}
    return {
        **raw,
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(listed.values(), key=lambda token: token["id"]),
        "post_processor": _post_processor(tokenizer, raw.get("post_processor")),
        "model": {**raw["model"], "vocab": vocabulary},
    }


def _check(content: bytes, tokenizer: Tokenizer) -> None:
    """DataError unless the library gives our ids, document start included."""
    try:
        library = Library.from_str(content.decode())
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"the tokenizer cannot be written as {TOKENIZER_JSON}: {error}") from error
    library.encode_special_tokens = True
    for name, i in tokenizer.special.ids.items():
        if library.token_to_id(name) != i:
            raise DataError(
                f"the tokenizer cannot be written as {TOKENIZER_JSON}: the library tokenizers does"
                f" not give the id {i} to {name!r}"
            )
    for text in _probes(tokenizer):
        stop.raise_if_requested()
        ids = [int(i) for i in tokenizer.encode(text)]
        if tokenizer.prompt_start is not None:
            ids = [tokenizer.prompt_start, *ids]
        found = library.encode(text).ids
        if found != ids:
            place = next((i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), 0)
            near = tokenizer.decode(ids[max(place - 1, 1) : place + 3])
            raise DataError(
                f"the tokenizer cannot be written as {TOKENIZER_JSON}: the library tokenizers gives"
                f" other ids, for the first time at {near!r}",
                hint="export with another tokenizer, or use the model with gpt itself",
            )


def _probes(tokenizer: Tokenizer) -> list[str]:
    """Texts to try both on."""
    names = [EOT_TEXT, *list(tokenizer.special.ids)[:100]]
    literal = " ".join(f"a{name}b {name}\n{name}" for name in names)
    return [probe_text(), literal, *names, " ", ""]
