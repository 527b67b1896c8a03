"""The job behind `gpt chat`: a conversation that fits the model's block, question by question."""

import itertools
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptcli.config.generate_schema import GenerateConfig
from gptcli.config.schema import ChatConfig
from gptcli.data.chat_template import ChatTemplate, published_template
from gptcli.data.conversations import conversation_bytes, read_conversation
from gptcli.data.json_file import bounded_bytes
from gptcli.data.messages import Message
from gptcli.data.templates import CHAT_TEMPLATES, DEFAULT_CHAT
from gptcli.data.tokenizer import IdsTokenizer
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.generate import sampling_of
from gptcli.generation.engine import Request, decode
from gptcli.generation.kernel_race import Prepared, decode_threads
from gptcli.generation.row import FinishReason, Generated
from gptcli.generation.text import StopScanner
from gptcli.runs.load import LoadedModel
from gptcli.runs.regular import refuse_special
from gptcli.runs.run_dir import write_atomic

log = logging.getLogger("gptcli")

_ANSWERS = 10  # for which the races are held: about a session
_MAX_TEMPLATE_BYTES = 2**20
_DIALOGUE_TASKS = ("chat", "preference")


@dataclass(frozen=True)
class Answer:
    """What the assistant said to `tokens`, and with which seed: `gpt generate --prompt-tokens` goes
    on in the same words. `text` has no blanks at its ends."""

    text: str
    finish_reason: FinishReason
    seed: int
    tokens: list[int]


class Chat:
    """A conversation with `model`; `messages` is all of it, `settings` how answers are drawn.

    ConfigError for a template that is none, DataError for a system message that the template
    refuses or that fills the block, and for a model without a tokenizer.
    """

    def __init__(self, model: LoadedModel, settings: GenerateConfig, chat: ChatConfig) -> None:
        if model.tokenizer.kind == IdsTokenizer.KIND:
            raise DataError(f"{model.path} comes without a tokenizer: it knows no words to chat in")
        seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
        self.messages: list[Message] = []
        self.settings = settings.model_copy(update={"seed": seed, "logprobs": 0})
        self._model = model
        text, self.template_name = _template_of(model, chat.template)
        self._template = ChatTemplate(model.tokenizer, text)
        end = self._template.answer_end()
        self._stops = end.texts
        self._tokenizer = model.tokenizer.ending_at(end.tokens)
        self._prepared: Prepared | None = None
        self.last_seed: int | None = None  # of the last answer
        self._tried = set[int]()  # the seeds of answers to the last question
        self._left_out = 0  # exchanges
        if chat.system:
            self.set_system(chat.system)

    @property
    def is_trained_for_dialogue(self) -> bool:
        """Whether the model came with a chat template, or was finetuned here to answer."""
        finetuned = self._model.config.finetune.task in _DIALOGUE_TASKS
        return finetuned or published_template(self._model.tokenizer) is not None

    @property
    def system(self) -> str | None:
        """The system message."""
        return self.messages[0].content if _is_system(self.messages[:1]) else None

    @property
    def seed(self) -> int:
        """The seed of the next answer."""
        assert self.settings.seed is not None
        return self.settings.seed

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Say `question`, and the answer to it, which `on_text` gets as it grows; both are kept.

        After a stop request the answer is what came so far. DataError, and nothing is kept, for a
        message that does not fit the block or that the template refuses.
        """
        messages = [*self.messages, Message("user", question)]
        tokens, left_out = self._fitting(messages)
        self._tried.clear()
        return self._answer(messages, tokens, left_out, on_text)

    def retry(self, on_text: Callable[[str], None] | None = None) -> Answer:
        """Another answer to the last question, with the next seed, in place of the one there is."""
        asked = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise ConfigError("nothing was asked yet")
        if self.settings.temperature == 0 and self._tried:
            log.warning("temperature 0 takes the likeliest tokens: the answer stays the same")
        messages = self.messages[: asked[-1] + 1]
        return self._answer(messages, *self._fitting(messages), on_text)

    def undo(self) -> Message:
        """Forget the last question and what came after it; returns the question."""
        asked = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise ConfigError("nothing was asked yet")
        question = self.messages[asked[-1]]
        self.messages = self.messages[: asked[-1]]
        self._tried.clear()
        return question

    def set_system(self, text: str | None) -> None:
        """Let the conversation begin with another system message, or with None without one."""
        spoken = self.messages[1:] if self.system is not None else self.messages
        system = [] if text is None else [Message("system", text)]
        self._fitting([*system, Message("user", "?")])
        self.messages = [*system, *spoken]

    def load(self, path: Path) -> None:
        """Go on with the conversation of a file. DataError, and nothing changes, when it has none
        that the template takes."""
        messages = read_conversation(path)
        try:
            self._template.encode(messages)
        except DataError as error:
            raise DataError(f"{path}: {error.message}") from error
        self.messages, self._left_out = messages, 0
        self._tried.clear()

    def save(self, path: Path, *, replace: bool = False) -> None:
        """Write the conversation as one JSON line. ConfigError where there is none yet, and for a
        file that exists unless `replace`; ResourceError."""
        if not self.messages:
            raise ConfigError("nothing was said yet")
        check_new(path, replace=replace)
        write_atomic(path, conversation_bytes(self.messages))

    def _answer(
        self,
        messages: list[Message],
        tokens: list[int],
        left_out: int,
        on_text: Callable[[str], None] | None,
    ) -> Answer:
        self._tell_left_out(left_out)
        seed = next(n for n in itertools.count(self.seed) if n not in self._tried)
        spoken = _Spoken(self._stops, on_text)
        sample = self._decoded(tokens, seed, spoken)
        text, reason = spoken.end(), sample.finish_reason if sample else "interrupted"
        answer = Answer(text, "stop" if spoken.stopped else reason, seed, tokens)
        self._tried.add(seed)
        self.last_seed = seed
        self.messages = [*messages, Message("assistant", text)]
        return answer

    def _decoded(self, tokens: list[int], seed: int, spoken: "_Spoken") -> Generated | None:
        """The continuation, by the path of `gpt generate`; None where a stop came before it."""
        model, settings = self._model, self.settings
        stops = [*settings.stop, *self._stops]
        sampling = sampling_of(settings.model_copy(update={"stop": stops, "seed": seed}), seed)
        if self._prepared is None:
            self._prepared = Prepared.of(model.model, 1, _ANSWERS * settings.max_new_tokens)
        decoded = decode(
            model.model,
            self._tokenizer,
            [Request("", tokens, sampling)],
            on_text=lambda request, sample, piece: spoken.add(piece),
            speculate=settings.speculate is not None,
            decoder=self._prepared.decoder,
        )
        try:
            with decode_threads(self._prepared.threads):
                for _, samples in decoded:
                    return samples[0]
        except CheckpointError as error:
            raise CheckpointError(f"{model.path}: {error.message}", error.hint) from error
        return None

    def _fitting(self, messages: list[Message]) -> tuple[list[int], int]:
        """The tokens of the conversation, up to where the assistant speaks, without as many of the
        oldest exchanges as the block has no room for; and how many these are."""
        config = self._model.model.config

        def encoded(some: Sequence[Message]) -> list[int]:
            return self._template.encode(some, add_generation_prompt=True).tokens

        if config.rolls:
            return encoded(messages), 0
        most = most_prompt_tokens(config.block_size, self.settings.max_new_tokens)
        count = exchanges_to_leave_out(messages, lambda some: len(encoded(some)), most)
        tokens = encoded(without_oldest(messages, count))
        if len(tokens) > most:
            what = "message, with the system message," if _is_system(messages[:1]) else "message"
            raise DataError(
                f"the {what} takes {len(tokens)} tokens; there is room for {most}, as the model's"
                f" block_size is {config.block_size}",
                "say it in fewer words, or leave less room for the answer: --max-new-tokens",
            )
        return tokens, count

    def _tell_left_out(self, count: int) -> None:
        if count > self._left_out:
            first = (
                "the conversation outgrew the model's block: it no longer sees its beginning; "
                if not self._left_out
                else ""
            )
            log.info("%soldest exchanges left out: %d", first, count)
        self._left_out = count


def check_new(path: Path, *, replace: bool = False) -> None:
    """ConfigError where `path` is no place for a file, or, unless `replace`, exists."""
    refuse_special(path)
    if os.path.lexists(path) and not replace:
        raise ConfigError(f"{path} exists already")


def most_prompt_tokens(block_size: int, max_new_tokens: int) -> int:
    """How much of the block a prompt may take: an answer keeps its room, at most half of it."""
    return max(1, block_size - min(max_new_tokens, block_size // 2))


def exchanges_to_leave_out(
    messages: Sequence[Message], size: Callable[[Sequence[Message]], int], most: int
) -> int:
    """How many of the oldest exchanges must go for the `size` of the rest to be at most `most`.

    All but the last may go. An exchange is a question and what follows it.
    """
    low, high = 0, max(0, len(_exchanges(messages)[1]) - 1)
    while low < high:  # a conversation without more of them is not longer
        middle = (low + high) // 2
        if size(without_oldest(messages, middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return low


def without_oldest(messages: Sequence[Message], count: int) -> list[Message]:
    """`messages` without the first `count` exchanges; the system message stays."""
    system, exchanges = _exchanges(messages)
    return [*system, *itertools.chain.from_iterable(exchanges[count:])]


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system message, if there is one, and the exchanges; what comes before the first question
    is one too."""
    system = list(messages[:1]) if _is_system(messages[:1]) else []
    exchanges: list[list[Message]] = []
    for message in messages[len(system) :]:
        if message.role == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return system, exchanges


def _is_system(messages: Sequence[Message]) -> bool:
    return any(message.role == "system" for message in messages)


class _Spoken:
    """An answer as it grows: without blanks at its ends, and ending where another turn begins,
    which `stops` tell; they begin in a new line, and so does the answer."""

    def __init__(self, stops: Sequence[str], on_text: Callable[[str], None] | None) -> None:
        self._scanner = StopScanner(stops)
        self._scanner.feed("\n")
        self._on_text = on_text
        self._text = self._blanks = ""

    @property
    def stopped(self) -> bool:
        """Whether one of the stops was found."""
        return self._scanner.stopped

    def add(self, piece: str) -> None:
        """What the model said next."""
        self._show(self._scanner.feed(piece))

    def end(self) -> str:
        """The whole answer."""
        self._show(self._scanner.flush())
        return self._text

    def _show(self, text: str) -> None:
        text = self._blanks + text if self._text else text.lstrip()
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        self._text += shown
        if shown and self._on_text is not None:
            self._on_text(shown)


def _template_of(model: LoadedModel, given: str | None) -> tuple[str | None, str]:
    """The template as `ChatTemplate` takes it, and what to call it."""
    if given in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[given], f"template {given}"
    if given is not None:
        try:
            return bounded_bytes(Path(given), _MAX_TEMPLATE_BYTES).decode(), f"template {given}"
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise ConfigError(
                f"the chat template {given} cannot be read: {reason}",
                f"name a Jinja file, or a shipped one: {', '.join(CHAT_TEMPLATES)}",
            ) from error
    finetuned = model.config.finetune
    if finetuned.task == "chat" and finetuned.template is not None:
        text = CHAT_TEMPLATES.get(finetuned.template, finetuned.template)
        return text, "the template that it was finetuned with"
    if published_template(model.tokenizer) is not None:
        return None, "its own template"
    return None, f"the plain template {DEFAULT_CHAT}"
