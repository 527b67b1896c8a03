"""The rows of a finetuning task, looked at once before training: what fits, labels, overlap."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from gptcli import stop
from gptcli.config.finetune_schema import LABELLED_TASKS, FinetuneConfig
from gptcli.config.schema import Config
from gptcli.data.corpus import Corpus
from gptcli.data.example_rows import Encoded, Encoder, ExampleRows, ExampleStream, PackedExamples
from gptcli.data.examples import Example, HeadExample, PreferencePair, RowCounts
from gptcli.data.files import resolve
from gptcli.data.mixture import Mixture
from gptcli.data.pipeline import source_groups
from gptcli.data.readers import read_shards
from gptcli.data.row_fields import RowFields, label_text, value_at
from gptcli.data.rows import RowSource
from gptcli.data.shards import row_place
from gptcli.data.shots import ShotEncoder
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.task_formats import TaskEncoder, row_fields
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError

log = logging.getLogger("gptcli")

MOST_LABELS = 1000  # more are not labels but another field

Held: TypeAlias = list[Example] | list[HeadExample] | list[PreferencePair]


@dataclass
class TaskData:
    """A task's rows: those held out as tokens, those to train on as a source of steps.

    `labels` are the names of a head's (or a classification's) labels by number; none for other
    tasks. `counts` tells of the training rows (nothing for a streamed corpus, which is not read
    before), `held_out_counts` of the others; `overlap` is how many held-out rows are training rows
    too, but for case and blanks. `class_weights` are n / (k n_label), by label.
    """

    labels: list[str]
    held_out: Held
    counts: RowCounts
    held_out_counts: RowCounts
    overlap: int
    class_weights: list[float] | None
    settings: FinetuneConfig
    tokenizer: Tokenizer
    corpus: Corpus
    block_size: int

    def facts(self) -> dict[str, Any]:
        """What run.json keeps of it, JSON-able."""
        return {
            "train": asdict(self.counts),
            "held_out": asdict(self.held_out_counts),
            "overlap": self.overlap,
            "labels": self.labels,
            "class_weights": self.class_weights,
        }

    def rows(
        self, seed: int, shuffle_window: int, position: dict[str, Any] | None = None
    ) -> RowSource:
        """The training rows from `position` (a state of such a source) on, else from the first.

        Examples are packed where `finetune.packing` says so; those of heads, and pairs, never are.
        """
        groups = source_groups(self.corpus)
        states = position["mixture"]["streams"] if position else [None] * len(groups)
        streams = [
            ExampleStream(
                RecordStream(ShardReader(shards), size, seed + i, shuffle_window, states[i]),
                self._encoder(),
                self.block_size,
                states[i],
            )
            for i, (shards, size) in enumerate(groups)
        ]
        saved = position["mixture"] if position else None
        mixture = Mixture(streams, self.corpus.weights, saved)
        if self.settings.packing and isinstance(self.held_out[0], Example):
            return PackedExamples(mixture, self.block_size, seed, shuffle_window > 0, position)
        return ExampleRows(mixture)

    def examples(self) -> Iterator[Encoded]:
        """All training rows in file order, each once."""
        encoder = self._encoder()
        for record in self.corpus.train_records():
            example = encoder.encode(record["row"], record["document"])
            if example is not None:
                yield example

    def _encoder(self) -> TaskEncoder:
        return TaskEncoder(self.settings, self.tokenizer, self.block_size, self.labels)


def finetuning_fields(config: Config) -> RowFields | None:
    """The rows' fields where `config` is one for finetuning: it says how rows become prompts, or
    starts from a model and has rows of which no field is named as the text. None for pretraining.
    """
    if config.finetune == FinetuneConfig():
        if config.init is None or any(
            "text_field" in source.model_fields_set for source in config.data.train
        ):
            return None
        if any(file.kind not in ("rows", "table") for file in resolve(config.data.train)):
            return None
    return row_fields(config.finetune)


def open_task(
    config: Config,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    block_size: int,
    labels: Sequence[str] | None = None,
) -> TaskData:
    """The rows of `corpus` (opened with `row_fields`) as `config.finetune` says.

    Reads all training rows once, but for a streamed corpus. `labels` are those of the run that goes
    on, else `finetune.labels`, else those of the training rows in order. Warns of what is left out,
    of labels that one part lacks and of rows that are in both. DataError for a row that cannot be
    used, with its place, and where no training row or no held-out row fits; ConfigError for what a
    streamed corpus cannot have; `stop.Stopped`.
    """
    settings = config.finetune
    labels = list(labels or settings.labels or [])
    capped = 0
    if settings.task in LABELLED_TASKS:
        corpus, labels, capped = _labelled(settings, corpus, labels)
    encoder = TaskEncoder(settings, tokenizer, block_size, labels)
    scored: Encoder = TaskEncoder(settings, tokenizer, block_size, labels)
    if settings.shots:
        scored = ShotEncoder(settings, tokenizer, block_size, labels, corpus, config.seed)
    held_out, held_out_counts = _encode_held_out(scored, corpus), scored.counts
    overlap = 0
    if not corpus.remote:
        overlap = _look_at_training_rows(encoder, corpus, [_digest(row) for row in held_out])
    encoder.counts.capped = capped
    counts = encoder.counts
    left = counts.rows - counts.left_out
    for what, rows, fitting in (
        ("training", counts, 1 if corpus.remote else left),
        ("held-out", held_out_counts, len(held_out)),
    ):
        if not fitting:
            raise DataError(
                f"no {what} row fits: of {rows.rows}, {rows.skipped_empty} have an empty text or"
                f" response, {rows.skipped_long} are longer than block_size {block_size},"
                f" {rows.skipped_unlike} have answers to different conversations",
                hint="add rows, or data.val" if what == "held-out" else None,
            )
    _warn(counts, held_out_counts, overlap, len(held_out))
    return TaskData(
        labels=labels,
        held_out=held_out,  # type: ignore[arg-type]  # all of one kind, which the task decides
        counts=counts,
        held_out_counts=held_out_counts,
        overlap=overlap,
        class_weights=_class_weights(settings, counts),
        settings=settings,
        tokenizer=tokenizer,
        corpus=corpus,
        block_size=block_size,
    )


@dataclass(frozen=True)
class _LabelledRow:
    """Where a training row is: its shard and number, with what decides whether it is kept."""

    label: str
    digest: int
    shard: int
    number: int
    bytes: int
    source: int


def _labelled(
    settings: FinetuneConfig, corpus: Corpus, labels: list[str]
) -> tuple[Corpus, list[str], int]:
    """The corpus without the rows beyond `max_train_rows_per_label`, the labels, and how many rows
    were left out."""
    most = settings.max_train_rows_per_label
    if corpus.remote:
        if most is not None or not labels:
            raise ConfigError(
                "the labels of a streamed corpus are not known before it is read",
                hint="set finetune.labels, and no max_train_rows_per_label",
            )
        return corpus, labels, 0
    if labels and most is None:
        return corpus, labels, 0
    name = settings.names["label"]
    rows: defaultdict[str, list[_LabelledRow]] = defaultdict(list)
    for i, shard in enumerate(corpus.train):
        for record in read_shards([shard]):
            stop.raise_if_requested()
            label = label_text(value_at(record["row"], name))
            where = (i, record["number"], record["bytes"], record["source"])
            rows[label].append(_LabelledRow(label, record["digest"], *where))
    if not labels:
        labels = sorted(rows, key=_label_order)
    if len(labels) > MOST_LABELS:
        raise DataError(
            f"the training rows have {len(labels)} labels, the first {labels[0]!r}",
            hint=f"finetune.fields: {{label: ...}} names the label's field; it is {name!r} now",
        )
    if len(rows) < 2:
        raise DataError(f"all training rows have the label {labels[0]!r}: nothing can be learned")
    if most is None:
        return corpus, labels, 0
    # By the digest, which is as good as chance and the same in every run.
    order = {
        label: sorted(of, key=lambda r: (r.digest, r.shard, r.number)) for label, of in rows.items()
    }
    dropped = [row for of in order.values() for row in of[most:]]
    return _without(corpus, dropped), labels, len(dropped)


def _without(corpus: Corpus, dropped: list[_LabelledRow]) -> Corpus:
    """The corpus without these training rows."""
    numbers: defaultdict[int, set[int]] = defaultdict(set)
    sizes: Counter[int] = Counter()
    for row in dropped:
        numbers[row.shard].add(row.number)
        sizes[row.source] += row.bytes
    train = [
        replace(shard, dropped=shard.dropped | numbers[i]) for i, shard in enumerate(corpus.train)
    ]
    sources = [
        replace(source, train_bytes=source.train_bytes - sizes[i])
        for i, source in enumerate(corpus.sources)
    ]
    return replace(corpus, train=train, sources=sources)


def _label_order(label: str) -> tuple[int, int, str]:
    """Numbers by size, before all other labels by their text."""
    digits = label.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) < 20:
        return 0, int(label), label
    return 1, 0, label


def _encode_held_out(encoder: Encoder, corpus: Corpus) -> list[Encoded]:
    held_out = []
    for name, row in corpus.val_rows:
        stop.raise_if_requested()
        try:
            example = encoder.encode(row, name)
        except DataError:
            encoder.encode(row, _line_of(corpus, name))
            raise
        if example is not None:
            held_out.append(example)
    return held_out


def _line_of(corpus: Corpus, name: str) -> str:
    """`path:line` of a row named `path, row at byte N`."""
    path, _, number = name.rpartition(", row at byte ")
    files = [file for file in corpus.files if file.path == path]
    return row_place(files[0], int(number)) if files else name


def _look_at_training_rows(encoder: TaskEncoder, corpus: Corpus, held_out: list[bytes]) -> int:
    """Encode all training rows, which the encoder counts; how many of `held_out`, digests, are
    among theirs."""
    wanted, found = set(held_out), set()
    for shard in corpus.train:
        for record in read_shards([shard]):
            stop.raise_if_requested()
            try:
                example = encoder.encode(record["row"], record["document"])
            except DataError:  # only now: to count lines takes long
                encoder.encode(record["row"], row_place(shard.file, record["number"]))
                raise
            if example is not None and (digest := _digest(example)) in wanted:
                found.add(digest)
    return sum(digest in found for digest in held_out)


def _digest(example: Encoded) -> bytes:
    """Of what the model reads and is to answer, without regard to case and blanks. A label is no
    part of it: a text with two labels is still one text."""
    if isinstance(example, HeadExample):
        text = example.text
    else:
        one = example.chosen if isinstance(example, PreferencePair) else example
        text = f"{one.prompt_text}\n{'' if one.choices else one.references[0]}"
    folded = " ".join(text.split()).casefold()
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _class_weights(settings: FinetuneConfig, counts: RowCounts) -> list[float] | None:
    if settings.class_weights == "none" or not counts.labels:
        return None
    if not counts.rows:
        raise ConfigError(
            "finetune.class_weights: the labels of a streamed corpus are not counted before",
            hint="leave out class_weights, or download the rows",
        )
    rows, labels = sum(counts.labels.values()), len(counts.labels)
    return [rows / (labels * n) if n else 0.0 for n in counts.labels.values()]


def _warn(counts: RowCounts, held_out: RowCounts, overlap: int, held_out_rows: int) -> None:
    for name, rows in (("training", counts), ("held-out", held_out)):
        if rows.left_out or rows.shortened:
            unlike = f", {rows.skipped_unlike} whose answers follow different conversations"
            log.warning(
                f"of {rows.rows} {name} rows, {rows.skipped_empty} with an empty text or response"
                f"{unlike if rows.skipped_unlike else ''} and {rows.skipped_long} that do not fit"
                f" are left out; {rows.shortened} are cut"
            )
        if rows.imitations:
            log.warning(
                f"{rows.imitations} of {rows.rows} {name} rows have a message with a line that, in"
                " this plain chat template, reads as another speaker's turn"
            )
    for here, there, name in ((counts, held_out, "held-out"), (held_out, counts, "training")):
        missing = [label for label, n in here.labels.items() if n and not there.labels.get(label)]
        if missing and there.rows:
            log.warning(f"no {name} row has the label {', '.join(map(repr, missing))}")
    if overlap:
        log.warning(
            f"{overlap} of {held_out_rows} held-out rows are training rows too: their scores say"
            " less about new rows"
        )
