"""The fields of rows that stay whole, and what each of them must hold."""

from dataclasses import dataclass
from typing import Any, Literal

from gptcli.data.messages import kind_of, message_of, messages_of

# text; optional: text, null, or no such field; answers: text or a list of texts; texts: a list of
# texts; label: text, a whole number, true or false; messages: a conversation; answer: text, a
# message or a conversation.
Kind = Literal["text", "optional", "answers", "texts", "label", "messages", "answer"]


@dataclass(frozen=True)
class RowFields:
    """Pairs of a field's name in the rows and what it holds. A name with dots is a path into the
    row, unless a field is called just that."""

    kinds: tuple[tuple[str, Kind], ...]

    @classmethod
    def texts(cls, *names: str) -> "RowFields":
        """Fields that all hold text."""
        return cls(tuple((name, "text") for name in names))

    def problem(self, row: dict[str, Any]) -> str | None:
        """What is wrong with a row, None where each field holds what it must."""
        for name, kind in self.kinds:
            try:
                value = value_at(row, name)
            except KeyError:
                if kind == "optional":
                    continue
                fields = ", ".join(map(str, row)) or "none"
                return f"no field {name!r} (has: {fields})"
            found = _problem(value, kind)
            if found is not None:
                return f"field {name!r} {found} (has: {', '.join(map(str, row))})"
        return None

    def text_of(self, row: dict[str, Any]) -> str:
        """The values of a row, one below the other; those of a list too."""
        return "\n".join(_text(value_at(row, name, "")) for name, _ in self.kinds)


def value_at(row: dict[str, Any], name: str, default: Any = KeyError) -> Any:
    """The value of a field. Where there is none `default`, by default a KeyError."""
    if name in row:
        return row[name]
    value: Any = row
    for step in name.split("."):
        if not isinstance(value, dict) or step not in value:
            if default is KeyError:
                raise KeyError(name)
            return default
        value = value[step]
    return value


def label_text(value: Any) -> str:
    """A label as text: true and 1 are "true" and "1", a whole float is a whole number."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) else str(value)


def _problem(value: Any, kind: Kind) -> str | None:
    if kind == "text" or (kind == "optional" and value is not None):
        return None if isinstance(value, str) else f"is not text but {kind_of(value)}"
    if kind == "label":
        whole = isinstance(value, float) and value.is_integer()
        good = whole or (isinstance(value, str | int) and value != "")
        return None if good else f"is no label but {_shown(value)}"
    if kind == "answers" and isinstance(value, str):
        return None
    if kind in ("answers", "texts"):
        texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
        if texts and (value or kind == "answers"):
            return None
        wanted = "a list of texts" if kind == "texts" else "text"
        return f"is not {wanted} but {kind_of(value)}"
    try:
        if kind == "messages" or isinstance(value, list):
            messages_of(value)
        elif kind == "answer" and not isinstance(value, str):
            message_of(value)
    except ValueError as error:
        return f"is no conversation: {error}"
    return None


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, float | str) else kind_of(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    if isinstance(value, dict):
        return "\n".join(map(_text, value.values()))
    return "" if value is None else str(value)
