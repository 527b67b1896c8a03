"""What the measures of a corpus mean: ok, worth a note, or a warning with what to do about it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from gptcli.config.data_schema import DataConfig
from gptcli.data.survey import NON_LETTERS

Level = Literal["ok", "note", "warning"]
Report = dict[str, Any]

# From which share on a finding is a warning. Below, a corpus learns around it.
_DUPLICATES, _NEAR_DUPLICATES = 0.01, 0.05
_SAME = 0.01  # of the validation documents
_EMPTY, _REPETITIVE = 0.01, 0.05
_OVERLAP_NOTE, _OVERLAP = 0.01, 0.10  # of the validation n-grams
_CONTROLS = 1e-4  # of the characters
_MAIN_SCRIPT = 0.1  # of the letters: a script below is not judged
_FEW_BYTES_PER_TOKEN = 1.5


@dataclass(frozen=True)
class Finding:
    """One judgement: `check` names what was looked at, `text` says what and what to do."""

    level: Level
    check: str
    text: str


def judge(report: Report, data: DataConfig) -> list[Finding]:
    """Findings on a report of `inspect_data.check_data`, warnings first."""
    checks: list[Callable[[Report, DataConfig], Iterator[Finding]]] = [_size, _validation]
    if report["text"]:
        checks += [_duplicates, _empty, _encoding, _controls, _personal, _repetition, _tokenizer]
    if report["no_text"]["documents"]:
        checks.append(_no_text)
    checks += [_short, _left_out]
    found = [finding for check in checks for finding in check(report, data)]
    order = {"warning": 0, "note": 1, "ok": 2}
    return sorted(found, key=lambda finding: order[finding.level])


def _size(report: Report, data: DataConfig) -> Iterator[Finding]:
    train, block = report["train"], report["lengths"]["block_size"]
    if not report["read"]["complete"]:
        yield Finding(
            "note",
            "reading",
            f"only the first {report['read']['bytes']:,} bytes were read; all figures are of these",
        )
    if train["tokens"] <= block:
        yield Finding(
            "warning",
            "size",
            f"{train['tokens']:,} tokens are less than one block of {block} + 1: add text, or lower"
            " model.block_size",
        )


def _validation(report: Report, data: DataConfig) -> Iterator[Finding]:
    held = report["validation"]
    if not held["documents"]:
        yield Finding("warning", "validation", "nothing is held out: add text, or set data.val")
        return
    if not report["text"] or not held["compared"]:
        return
    same = held["exact"] + held["near"]
    if same:
        places = _places(held["places"])
        yield Finding(
            "warning" if same > _SAME * held["documents"] else "note",
            "overlap",
            f"{held['exact']:,} validation documents are training documents too, and"
            f" {held['near']:,} nearly so{places}: scores would be too good; set {_remedy(data)}",
        )
    share = held["ngrams_found"] / max(held["ngrams"], 1)
    level: Level = "warning" if share > _OVERLAP else "note" if share > _OVERLAP_NOTE else "ok"
    remedy = f"; set {_remedy(data)}" if level == "warning" and not same else ""
    yield Finding(
        level,
        "overlap",
        f"{share:.1%} of the {held['ngrams']:,} validation {held['n']}-grams occur in the training"
        f" text{remedy}",
    )


def _remedy(data: DataConfig) -> str:
    if data.val is not None:
        return "data.val to text that is not in data.train"
    return "filters: {near_duplicates: 0.8} on the sources, which looks before it splits"


def _duplicates(report: Report, data: DataConfig) -> Iterator[Finding]:
    for kind, key, limit in (
        ("exact", "exact_duplicates: true", _DUPLICATES),
        ("near", "near_duplicates: 0.8", _NEAR_DUPLICATES),
    ):
        found = report["duplicates"][kind]
        documents = max(found["among"], 1)
        share = found["count"] / documents
        what = "repeat" if kind == "exact" else "nearly repeat"
        first = "the first " if documents < report["train"]["documents"] else ""
        among = f" of {first}{documents:,}" if first else ""
        if not found["count"]:
            yield Finding("ok", "duplicates", f"no document{among} {what}s an earlier one")
            continue
        yield Finding(
            "warning" if share > limit else "note",
            "duplicates",
            f"{found['count']:,} of {first}{documents:,} documents ({share:.1%}) {what} an earlier"
            f" one{_places(found['places'])}: filters: {{{key}}} keeps the first of each",
        )


def _empty(report: Report, data: DataConfig) -> Iterator[Finding]:
    found = report["empty"]
    share = found["count"] / max(report["train"]["documents"], 1)
    if not found["count"]:
        yield Finding("ok", "empty", "no document is empty or of one token")
        return
    yield Finding(
        "warning" if share > _EMPTY else "note",
        "empty",
        f"{found['count']:,} documents ({share:.1%}) have at most one token"
        f"{_places(found['places'])}: filters: {{min_characters: 20}} leaves them out",
    )


def _encoding(report: Report, data: DataConfig) -> Iterator[Finding]:
    invalid, marks = report["problems"]["invalid_utf8"], report["replacement_characters"]
    if invalid:
        count = sum(invalid.values())
        yield Finding(
            "warning",
            "encoding",
            f"{count:,} invalid UTF-8 sequences were read as U+FFFD{_places(list(invalid))}: give"
            " the source its encoding (encoding: latin-1, gb18030, ...), or on_bad_text: error"
            " for the place of the first",
        )
    elif marks["count"]:
        yield Finding(
            "note",
            "encoding",
            f"{marks['count']:,} characters are U+FFFD{_places(marks['places'])}: the text was"
            " damaged before; look for a better copy",
        )
    else:
        yield Finding("ok", "encoding", "all of the text is valid UTF-8")


def _controls(report: Report, data: DataConfig) -> Iterator[Finding]:
    found = report["control_characters"]
    if not found["count"]:
        yield Finding("ok", "control", "no control characters")
        return
    codes = ", ".join(f"{code} {count:,}x" for code, count in list(found["codes"].items())[:4])
    share = found["count"] / max(report["train"]["characters"], 1)
    yield Finding(
        "warning" if share > _CONTROLS else "note",
        "control",
        f"{found['count']:,} control characters ({codes}){_places(found['places'])}: the model"
        " learns them as they are; remove them from the files if they mean nothing",
    )


def _personal(report: Report, data: DataConfig) -> Iterator[Finding]:
    found = report["personal"]
    if not found:
        yield Finding("ok", "personal data", "none was found in the training text")
        return
    kinds = ", ".join(f"{kind} {about['count']:,}" for kind, about in found.items())
    places = [place for about in found.values() for place in about["places"]]
    yield Finding(
        "warning",
        "personal data",
        f"{kinds}{_places(list(dict.fromkeys(places)))}: filters:"
        f" {{redact: [{', '.join(found)}]}} puts placeholders in their place",
    )


def _repetition(report: Report, data: DataConfig) -> Iterator[Finding]:
    found, documents = report["repetitive"], max(report["train"]["documents"], 1)
    lines = report["repeated_lines"]
    share = lines["repeated"] / max(lines["lines"], 1)
    if not found["count"]:
        text = f"{share:.1%} of the lines repeat an earlier one of their document"
        yield Finding("ok", "repeated lines", text)
        return
    yield Finding(
        "warning" if found["count"] > _REPETITIVE * documents and documents >= 20 else "note",
        "repeated lines",
        f"in {found['count']:,} documents more than 30 % of the lines are repeated"
        f"{_places(found['places'])}: filters: {{max_repeated_lines: 0.3}} leaves them out",
    )


def _tokenizer(report: Report, data: DataConfig) -> Iterator[Finding]:
    if report["tokenizer"]["kind"] == "bytes":
        return
    scripts = {k: about for k, about in report["scripts"].items() if k != NON_LETTERS}
    letters = sum(about["letters"] for about in scripts.values())
    for name, about in scripts.items():
        if about["letters"] < _MAIN_SCRIPT * letters:
            continue
        per_token = about["bytes_per_token"]
        if per_token < _FEW_BYTES_PER_TOKEN:
            yield Finding(
                "note",
                "tokenizer",
                f"{per_token:.2f} bytes per token of {name}: a larger tokenizer.vocab_size or, for"
                " Chinese, Japanese and Korean, tokenizer.pattern: cjk makes texts shorter",
            )


def _no_text(report: Report, data: DataConfig) -> Iterator[Finding]:
    """Of token ids and binary data."""
    found, vocab_size = report["no_text"], report["tokenizer"]["vocab_size"]
    outside, same = found["outside_vocabulary"], found["duplicates"]
    if outside["count"]:
        yield Finding(
            "warning",
            "vocabulary",
            f"{outside['count']:,} token ids, up to {found['largest_id']:,}, are outside the"
            f" vocabulary of {vocab_size:,}{_places(outside['places'])}: training stops there; set"
            " tokenizer to the one that made the files",
        )
    else:
        text = f"all token ids are inside the vocabulary of {vocab_size:,}"
        yield Finding("ok", "vocabulary", text)
    share = same["count"] / found["documents"]
    if same["count"]:
        yield Finding(
            "warning" if share > _DUPLICATES else "note",
            "duplicates",
            f"{same['count']:,} of {found['documents']:,} documents ({share:.1%}) have the same"
            f" tokens as an earlier one{_places(same['places'])}: leave them out of the files;"
            " filters are for text",
        )
    else:
        yield Finding("ok", "duplicates", "no document has the same tokens as an earlier one")
    yield Finding(
        "note",
        "no text",
        "near duplicates, overlap with the validation data and what concerns text are not looked"
        f" for in token ids and binary data (documents: {found['documents']:,})",
    )


def _short(report: Report, data: DataConfig) -> Iterator[Finding]:
    lengths, documents = report["lengths"], max(report["train"]["documents"], 1)
    share = lengths["shorter_than_block"] / documents
    if share > 0.5 and documents > 1 and not data.document_mask and report["job"] == "pretrain":
        yield Finding(
            "note",
            "lengths",
            f"{share:.0%} of the documents are shorter than block_size {lengths['block_size']}, so"
            " rows hold several: data.document_mask: true keeps them apart",
        )


def _left_out(report: Report, data: DataConfig) -> Iterator[Finding]:
    if report["text"] and report["not_looked_for"]:
        what = ", ".join(report["not_looked_for"])
        yield Finding(
            "note", "packages", f"not looked for: {what}: pip install 'gptcli[clean]' adds that"
        )
    for key, what in (
        ("skipped_rows", "rows that cannot be used were left out"),
        ("null_rows", "rows whose text is null were left out"),
        ("blank_rows", "rows whose text is blank were left out"),
    ):
        counts = report["problems"][key]
        if counts:
            yield Finding("note", "rows", f"{sum(counts.values()):,} {what}{_places(list(counts))}")


def _places(names: list[str]) -> str:
    """`, as in a, b, ...` for messages."""
    if not names:
        return ""
    more = ", ..." if len(names) > 2 else ""
    return f", as in {', '.join(names[:2])}{more}"
