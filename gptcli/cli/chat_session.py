"""The prompt of `gpt chat`: messages and commands in, answers out."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli import stop
from gptcli.chat import Answer, Chat
from gptcli.cli import signals
from gptcli.cli.chat_lines import PipedLines, TypedLines
from gptcli.cli.section_flags import with_flags
from gptcli.cli.terminal import GrowingText, columns, write_error, write_out
from gptcli.config.suggest import for_value
from gptcli.errors import CheckpointError, ConfigError, GptError, ResourceError

if TYPE_CHECKING:
    from gptcli.config.generate_schema import GenerateConfig

log = logging.getLogger("gptcli")

HELP = {
    "/retry": ("", "another answer to the last question"),
    "/undo": ("", "forget the last question and its answer"),
    "/system": ("[TEXT]", "what the assistant is told beforehand; - takes it away"),
    "/temperature": ("[F]", "0 takes the likeliest token"),
    "/seed": ("[N]", "the same seed, question and history give the same answer"),
    "/save": ("FILE", "the conversation as a JSON line; /save! replaces a file"),
    "/load": ("FILE", "go on with a saved conversation"),
    "/help": ("", "this list"),
    "/quit": ("", "leave, as Ctrl-D does"),
}
_LEAVING = "to leave: Ctrl-D, /quit, or Ctrl-C again"


class Session:
    """A conversation at a terminal (`typed`), or of the lines of a pipe.

    At a terminal Ctrl-C ends an answer, and errors are told and forgotten; `exit_code` is that of
    the last line that a pipe could not have answered.
    """

    def __init__(self, chat: Chat, lines: TypedLines | PipedLines, *, raw: bool) -> None:
        self._chat, self._lines, self._raw = chat, lines, raw
        self._typed = isinstance(lines, TypedLines)
        self._commands: dict[str, Callable[[str], None]] = {
            "/retry": self._retry,
            "/undo": self._undo,
            "/system": self._system,
            "/temperature": self._temperature,
            "/seed": self._seed,
            "/save": self._save,
            "/save!": lambda name: self._save(name, replace=True),
            "/load": self._load,
            "/help": self._help,
        }
        self.exit_code = 0

    def run(self) -> None:
        """Until the end of the lines, /quit, or two Ctrl-C. Raises `stop.Stopped`, and errors after
        which no answer can come."""
        interrupted = False
        while True:
            try:
                text = self._lines.message()
            except KeyboardInterrupt:
                write_out("\n")
                typing = isinstance(self._lines, TypedLines) and self._lines.was_typing
                if interrupted and not typing:
                    return
                interrupted = not typing
                if interrupted:
                    write_error(_LEAVING)
                continue
            interrupted = False
            if text is None and self._typed:
                write_out("\n")
            if text is None or text.strip() in ("/quit", "/exit"):
                return
            try:
                self._take(text)
            except (CheckpointError, ResourceError):
                raise  # no answer will come any more
            except GptError as error:
                self._tell(error)

    def _take(self, text: str) -> None:
        """One message or command."""
        if not text.strip():
            return
        if not text.startswith("/"):
            self._answered(lambda on_text: self._chat.ask(text, on_text))
        elif text.startswith("//"):
            self._answered(lambda on_text: self._chat.ask(text[1:], on_text))
        else:
            name, _, argument = text.strip().partition(" ")
            if name not in self._commands:
                raise ConfigError(f"there is no command {name.splitlines()[0]}", _meant(name))
            if argument and name in HELP and not HELP[name][0]:
                raise ConfigError(f"{name} takes nothing after it")
            self._commands[name](argument.strip())

    def _answered(self, answer: Callable[[Callable[[str], None] | None], Answer]) -> None:
        """Show an answer: at a terminal as it grows, in a pipe when it is whole."""
        growing, before = GrowingText(self._write), self._chat.messages
        with self._answering():
            found = answer(growing.add if self._typed else None)
        number = stop.requested()
        if number is not None and not (self._typed and number is signal.SIGINT):
            self._chat.messages = before  # nothing half-said is saved
            raise stop.Stopped
        stop.withdraw(signal.SIGINT)
        if self._typed:
            growing.end()
            self._write("\n" if found.text else "")
        else:
            self._write(found.text + "\n")
        if found.finish_reason == "interrupted":
            write_error("(stopped; what was said stays: /retry asks again, /undo forgets it)")
        elif found.finish_reason == "length":
            limit = self._chat.settings.max_new_tokens
            log.info("(cut at --max-new-tokens, %d)", limit)
        elif not found.text:
            log.info("(nothing was said)")
        if self._typed:
            self._write("\n")

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if isinstance(self._lines, TypedLines):
            with signals.quiet_interrupt(), self._lines.unseen():
                yield
        else:
            yield

    def _retry(self, _: str) -> None:
        self._answered(self._chat.retry)

    def _undo(self, _: str) -> None:
        question = " ".join(self._chat.undo().content.split())
        write_error(f"forgotten: {question[:60]}{'...' if len(question) > 60 else ''}")

    def _system(self, text: str) -> None:
        if text:
            self._chat.set_system(None if text == "-" else text)
        write_error(f"system message: {self._chat.system or '(none)'}")

    def _temperature(self, text: str) -> None:
        if text:
            self._chat.settings = self._with("temperature", _number(float, "/temperature", text))
        write_error(f"temperature {self._chat.settings.temperature:g}")

    def _seed(self, text: str) -> None:
        if text:
            self._chat.settings = self._with("seed", _number(int, "/seed", text))
        last = self._chat.last_seed
        of_last = "" if last is None else f"; that of the last answer: {last}"
        write_error(f"seed {self._chat.seed}{of_last}")

    def _save(self, name: str, *, replace: bool = False) -> None:
        path = _path("/save", name)
        try:
            self._chat.save(path, replace=replace)
        except ConfigError as error:
            if not replace and path.is_file():
                error.hint = f"to replace it: /save! {name}"
            raise
        except ResourceError as error:  # the conversation goes on
            self._tell(error)
            return
        write_error(f"saved: {path}, {len(self._chat.messages)} messages")

    def _load(self, name: str) -> None:
        path = _path("/load", name)
        self._chat.load(path)
        open_question = self._chat.messages[-1].role == "user"
        write_error(
            f"loaded: {path}, {len(self._chat.messages)} messages"
            + ("; the last one has no answer yet: /retry gives one" if open_question else "")
        )

    def _help(self, _: str) -> None:
        rows = [[f"{name} {argument}".strip(), what] for name, (argument, what) in HELP.items()]
        rows.append(["//...", "say a line that begins with a slash"])
        rows.append(["...\\", "a backslash at the end: the message goes on in the next line"])
        rows.append(["Ctrl-C", "stops an answer"])
        write_error(columns(rows).rstrip("\n"))

    def _with(self, key: str, value: float) -> "GenerateConfig":
        try:
            return with_flags(self._chat.settings, {key: value})
        except ConfigError as error:  # which speaks of flags
            raise ConfigError([f"/{text.lstrip('-')}" for text in error.problems]) from None

    def _write(self, text: str) -> None:
        write_out(text, raw=self._raw)

    def _tell(self, error: GptError) -> None:
        for line in error.message.splitlines():
            write_error(f"error: {line}")
        if error.hint is not None:
            write_error(f"hint: {error.hint}")
        self.exit_code = 0 if self._typed else error.exit_code


def _meant(name: str) -> str:
    near = for_value(name, [*HELP, "/save!"])
    meant = f"did you mean {near}? " if near else ""
    return f"{meant}/help lists the commands; // begins a message that starts with a slash"


def _number(kind: type[int] | type[float], name: str, text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is no number") from None


def _path(command: str, name: str) -> Path:
    if not name:
        raise ConfigError(f"{command} needs the name of a file", f"as: {command} talk.jsonl")
    return Path(name).expanduser()
