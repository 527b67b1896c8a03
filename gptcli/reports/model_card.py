"""The README of an exported model: what it is, what it was made from, how good it is.

Every figure is one that the checkpoint, its run or its config states; what none of them says is not
in the card.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gptcli.config.data_schema import SourceConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import IdsTokenizer
from gptcli.interop.hf_config import ARCHITECTURES, family_of
from gptcli.interop.tokenizer_export import token_name
from gptcli.reports.markdown import line_text
from gptcli.reports.text import compact, duration, finite, number, size, visible
from gptcli.runs.load import LoadedModel
from gptcli.runs.resolve import says_little, telling_name
from gptcli.runs.run_dir import read_run_json

_TEMPLATE = "model_card.md.jinja"
# Of the corpora that we ship, where all is in one language.
_LANGUAGES = {"builtin:web-bible": "en"}
_NAMES = {"builtin:web-bible": "World English Bible"}
_NEW_TOKENS = 50  # of the example, or half a block
_SHAPE = (
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "head_dim",
    "n_inner",
    "block_size",
    "norm",
    "norm_position",
    "norm_eps",
    "position",
    "rope_theta",
    "rope_scaling",
    "activation",
    "gated",
    "bias",
    "qkv_bias",
    "tie_embeddings",
    "qk_norm",
    "window",
)
_VERSIONS = ("gptcli", "torch", "tokenizers", "tiktoken", "python")
_SCORES = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity per token",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy (tokens ranked first)",
}

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class _Card:
    """What the template shows. The text is untrusted, `front` is YAML already."""

    front: str
    name: str
    folder: str
    summary: str
    tokenizer_class: str
    has_tokenizer: bool
    splits: bool
    start: str | None
    start_rule: str
    eot: str | None
    new_tokens: int
    model: Rows
    data: Rows
    scores: Rows
    scores_note: str
    training: Rows
    limits: list[str]


def model_card(loaded: LoadedModel, folder: str, dtype: str) -> str:
    """README.md for the folder named `folder` that holds `loaded` with weights of `dtype`.

    Raises CheckpointError for a model that no model of transformers computes.
    """
    run = read_run_json(loaded.run_dir) if loaded.run_dir is not None else {}
    trained = _trained(loaded)
    tokenizer, family = loaded.tokenizer, family_of(loaded.model.config)
    scores, note = _scores(loaded, run)
    card = _Card(
        front=_front_matter(loaded),
        name=loaded.name,
        folder=folder,
        summary=_summary(loaded),
        # transformers 5 gives qwen2 a tokenizer of its own, whatever tokenizer_config.json names.
        tokenizer_class="PreTrainedTokenizerFast" if family == "qwen2" else "AutoTokenizer",
        has_tokenizer=not isinstance(tokenizer, IdsTokenizer),
        splits=tokenizer.source.get("split_special_tokens", True),
        start=token_name(tokenizer, tokenizer.prompt_start),
        start_rule="as in training" if trained else "as the source does",
        eot=token_name(tokenizer, tokenizer.eot),
        new_tokens=min(_NEW_TOKENS, max(1, loaded.model.config.block_size // 2)),
        model=_model_rows(loaded, dtype),
        data=_data_rows(loaded.config, run) if trained else [],
        scores=scores,
        scores_note=note,
        training=_training_rows(loaded, run) if trained else [],
        limits=_limits(loaded, run),
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # it is no HTML: `_shown` escapes for Markdown
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(_TEMPLATE).render(
        card=card, front=Markup(visible(card.front)), path=Markup(_path_text(folder))
    )


def source_name(reference: str) -> str:
    """A corpus or model as the world may know it: names as they are, of local paths the last part.

    `models--owner--name/snapshots/COMMIT` in the hub's cache is owner/name@COMMIT.
    """
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/(\w+)/?$", reference)
    if cached:
        return f"{cached[1]}/{cached[2]}@{cached[3]}"
    if re.match(r"(hub|builtin):", reference):
        return reference
    path = Path(reference)
    local = path.is_absolute() or path.parts[:1] in ((".",), ("..",)) or says_little(path.name)
    return telling_name(path) if local else reference


def _shown(value: Any) -> Any:
    """Applied by Jinja to every inserted value: text that Markdown shows as it is."""
    return value if isinstance(value, Markup) else visible(line_text(str(value)))


def _path_text(folder: str) -> str:
    """A folder's name inside quotes in a code block."""
    return visible(re.sub(r'[`"\\\n]', "_", folder))


def _state(loaded: LoadedModel, key: str) -> dict[str, Any]:
    found = (loaded.state or {}).get(key)
    return found if isinstance(found, dict) else {}


def _trained(loaded: LoadedModel) -> bool:
    """Whether training here made these weights."""
    return (loaded.state or {}).get("job") in ("pretrain", "finetune")


def _front_matter(loaded: LoadedModel) -> str:
    """The YAML that the hub reads."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    sources = loaded.config.data.train if _trained(loaded) else []
    if languages := _languages(sources):
        front["language"] = languages
    names = (re.match(r"hub:([\w.-]+/[\w.-]+)", source.path) for source in sources)
    if datasets := [match[1] for match in names if match]:
        front["datasets"] = datasets
    if base := re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(@\w+)?", _origin(loaded) or ""):
        front["base_model"] = base[1]
    front["tags"] = ["gptcli"]
    text: str = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return text


def _languages(sources: list[SourceConfig]) -> list[str]:
    """The languages of the text where each source's are known, else none."""
    known = [s.filters.languages or [_LANGUAGES.get(s.path, "")] for s in sources]
    flat = {language for languages in known for language in languages}
    return [] if "" in flat else sorted(flat)


def _origin(loaded: LoadedModel) -> str | None:
    """The model that this one is or was started from."""
    if _trained(loaded):
        return None if loaded.config.init is None else source_name(loaded.config.init)
    state = loaded.state or {}
    source = source_name(str(state.get("source") or os.path.abspath(loaded.path)))
    commit = state.get("commit")
    return f"{source.partition('@')[0]}@{commit}" if commit else source


def _summary(loaded: LoadedModel) -> str:
    family = family_of(loaded.model.config)
    count = loaded.model.parameter_count()
    what = f"A decoder-only Transformer language model with {compact(count)} parameters"
    form = f"It is stored for transformers as {ARCHITECTURES[family]}."
    origin, job = _origin(loaded), (loaded.state or {}).get("job")
    if not _trained(loaded):
        return f"{what}, converted by gpt from {origin} without any training. {form}"
    if job == "finetune":
        return f"{what}, finetuned with gpt from {origin or 'another model'}. {form}"
    begun = "from random weights" if origin is None else f"from the weights of {origin}"
    return f"{what}, pretrained with gpt {begun}. {form}"


def _model_rows(loaded: LoadedModel, dtype: str) -> Rows:
    model, tokenizer = loaded.model, loaded.tokenizer
    config = model.config.model_dump()
    rows = [
        ("parameters", number(model.parameter_count())),
        ("without embeddings", number(model.parameter_count(embeddings=False))),
        ("weights stored as", dtype),
        ("vocabulary", f"{model.vocab_size:,} tokens"),
    ]
    if not isinstance(tokenizer, IdsTokenizer):
        rows.append(("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"))
    idle = () if config["position"] == "rope" else ("rope_theta",)
    rows += [(key, _value(config[key])) for key in _SHAPE if key not in idle]
    return [(label, value) for label, value in rows if value]


def _value(value: Any) -> str:
    """A value of the model's config; nothing for the default of None."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(v)}" for key, v in value.items() if v is not None)
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"  # what was stored as fp32 has more digits than anyone gave
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _data_rows(config: Config, run: dict[str, Any]) -> Rows:
    data = run.get("data") or {}
    rows = [("text", _source_text(source)) for source in config.data.train]
    for part, label in (("train", "training"), ("val", "held out")):
        found = data.get(part) or {}
        counts = [
            f"{number(found[key])} {key}"
            for key in ("documents", "tokens")
            if finite(found.get(key)) is not None
        ]
        if finite(found.get("bytes")) is not None:
            counts.append(f"{size(found['bytes'])} of UTF-8")
        if counts:
            rows.append((label, ", ".join(counts)))
    return rows


def _source_text(source: SourceConfig) -> str:
    changed = source.filters.model_dump(exclude_defaults=True)
    more = [f"weight {source.weight:g}"] if source.weight is not None else []
    more += [f"split {source.split}"] if source.split is not None else []
    more += [f"the first {source.limit:,} documents"] if source.limit is not None else []
    more += [f"filters: {', '.join(changed)}"] if changed else []
    name = source_name(source.path)
    if source.path in _NAMES:
        name = f"{_NAMES[source.path]} ({name})"
    return ", ".join([name, *more])


def _scores(loaded: LoadedModel, run: dict[str, Any]) -> tuple[Rows, str]:
    """The scores that the checkpoint carries, and of what they are."""
    scores = _state(loaded, "scores")
    rows = []
    for key, label in _SCORES.items():
        if finite(scores.get(key)) is None:
            continue
        interval = scores.get(f"{key}_ci95") or []
        around = f" (95 %: {number(interval[0])} to {number(interval[1])})" if interval else ""
        rows.append((label, number(scores[key]) + around))
    rows += list(_task_scores(loaded, run))
    if not rows:
        return [], ""
    step = _state(loaded, "train").get("evaluated_step", loaded.step)
    counts = [
        f"{number(scores[key])} {key}"
        for key in ("tokens", "bytes", "documents")
        if finite(scores.get(key)) is not None
    ]
    note = f"On held-out text: {', '.join(counts)}. Intervals are bootstrapped over documents."
    if finite(scores.get("block_size")) is not None:
        note += f" Each token had up to {scores['block_size'] - 1} tokens of context."
    if step != loaded.step:
        note += f" The scores are those of step {step}, the weights of step {loaded.step}."
    return rows, note


def _task_scores(loaded: LoadedModel, run: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A finetuned model's task scores, where they are of these weights."""
    if (run.get("training") or {}).get("steps") != loaded.step:
        return
    for name, found in (run.get("tasks") or {}).items():
        before, after = finite(found.get("before")), finite(found.get("after"))
        if after is not None:
            was = f" (before: {number(before)})" if before is not None else ""
            yield name.replace("_", " "), number(after) + was


def _training_rows(loaded: LoadedModel, run: dict[str, Any]) -> Rows:
    config, train = loaded.config, _state(loaded, "train")
    optimizer, schedule = config.optimizer, config.schedule
    choices = _state(loaded, "choices")
    rates = {"lr": optimizer.lr}
    if optimizer.kind == "muon":
        rates |= {"adamw_lr": optimizer.adamw_lr, "embedding_lr": optimizer.embedding_lr}
    versions = {**(run.get("versions") or {}), **loaded.manifest}
    named = [f"{name} {versions[name]}" for name in _VERSIONS if versions.get(name)]
    rows = [
        ("steps", number(train.get("step", loaded.step))),
        ("tokens", number(train.get("tokens"))),
        ("epochs", number(train.get("epochs"))),
        ("tokens per step", number(config.training.tokens_per_step)),
        ("optimizer", f"{optimizer.kind}, " + ", ".join(f"{k} {v:g}" for k, v in rates.items())),
        ("weight decay", f"{optimizer.weight_decay:g}"),
        ("schedule", f"{schedule.kind}, {schedule.warmup_steps} warmup steps"),
        ("gradient clipping", f"{config.training.clip_norm:g}"),
        ("dropout", f"{loaded.model.config.dropout:g}"),
        ("precision", str(choices.get("precision", ""))),
        ("training time", duration(train.get("seconds"))),
        ("hardware", str((run.get("machine") or {}).get("device_name") or "")),
        ("seed", str(config.seed)),
        ("versions", ", ".join(named)),
    ]
    return [(label, value) for label, value in rows if value not in ("", duration(None))]


def _limits(loaded: LoadedModel, run: dict[str, Any]) -> list[str]:
    config = loaded.model.config
    limits = []
    if not _trained(loaded):
        limits.append("The source's licence is not copied.")
    if _trained(loaded) and (loaded.state or {}).get("job") == "pretrain":
        limits.append("It continues text; it was not trained to follow instructions.")
    if config.rolls:
        limits.append(f"Attention reaches back {max(config.windows):,} tokens in each layer.")
    else:
        limits.append(f"It reads at most {config.block_size:,} tokens at a time.")
    last = (run.get("training") or {}).get("steps")
    if _trained(loaded) and last is not None and last != loaded.step:
        limits.append(f"The weights are those of step {loaded.step:,} of a run of {last:,} steps.")
    skipped = _state(loaded, "train").get("skipped_steps")
    if skipped:
        limits.append(f"{skipped:,} updates, not finite or spikes, were not applied.")
    limits.append("What it writes may be wrong or harmful; no test for either is on record.")
    limits.append("No licence is stated here: that of the text and of the code apply.")
    return limits
