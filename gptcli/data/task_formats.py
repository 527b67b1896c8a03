"""From the rows of a finetuning task to tokens: what is read by the model, what is learned."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gptcli.config.finetune_schema import CONTINUED_TASKS, FinetuneConfig, Task
from gptcli.data.chat_template import ChatTemplate, ChatTokens
from gptcli.data.continuations import continuation_ids, fitted
from gptcli.data.examples import Example, HeadExample, PreferencePair, RowCounts
from gptcli.data.head_sequences import HeadSequences
from gptcli.data.messages import Message, message_of, messages_of
from gptcli.data.questions import Question, Questions, choice_number
from gptcli.data.row_fields import Kind, RowFields
from gptcli.data.templates import CHAT_TEMPLATES, PromptTemplate, named_template
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError

_KINDS: dict[Task, dict[str, Kind]] = {
    "completion": {"prompt": "text", "response": "answers"},
    "instruction": {"instruction": "text", "input": "optional", "output": "answers"},
    "chat": {"messages": "messages"},
    "classification": {"text": "text", "label": "label"},
    "pairs": {"text1": "text", "text2": "text", "label": "label"},
    "multiple_choice": {"prompt": "text", "choices": "texts", "label": "label"},
    "continuation": {"prompt": "text", "choices": "texts", "label": "label"},
    "cloze": {"text": "text", "choices": "texts", "label": "label"},
    "last_word": {"text": "text"},
    "preference": {"prompt": "answer", "chosen": "answer", "rejected": "answer"},
    "text": {"text": "text"},
}


def row_fields(settings: FinetuneConfig) -> RowFields:
    """The fields that the task's rows have, under their names in the data."""
    names, kinds = settings.names, _KINDS[settings.task]
    return RowFields(tuple((names[name], kind) for name, kind in kinds.items()))


class TaskEncoder:
    """Rows -> what the task trains on, of at most `block_size` inputs, but for the task text;
    `counts` tells of them.

    `labels` are the names of the labels in the order of their numbers; without any, labels are
    not looked at (and no head can learn them). ConfigError for a template that cannot be used,
    DataError for a tokenizer without eot.
    """

    def __init__(
        self,
        settings: FinetuneConfig,
        tokenizer: Tokenizer,
        block_size: int,
        labels: Sequence[str] = (),
    ) -> None:
        if tokenizer.eot is None:
            raise DataError("finetuning needs a tokenizer with an end-of-text token")
        self.counts = RowCounts(labels=dict.fromkeys(labels, 0))
        self._settings, self._tokenizer, self._eot = settings, tokenizer, tokenizer.eot
        self._block_size, self._labels = block_size, list(labels)
        self._cuts = settings.too_long == "truncate"
        self._sequences = HeadSequences(tokenizer, block_size, self._cuts)
        self._prompt, self._chat = _templates(settings, tokenizer)
        self._questions = Questions(settings, self._prompt, labels)
        self._label_tokens = {label: tokenizer.encode(label) for label in labels}

    def encode(
        self, row: dict[str, Any], where: str, shots: Sequence[dict[str, Any]] = ()
    ) -> Example | HeadExample | PreferencePair | None:
        """One row, whose fields are as `row_fields` says; None when it is left out, which `counts`
        tells. Before it come the rows `shots` with their answers, as text or turns of the same
        conversation; no task head reads these.

        DataError, with `where`, for an unknown label and a template that cannot be filled.
        """
        self.counts.rows += 1
        task, values = self._settings.task, self._questions.values(row)
        if self._settings.has_head:
            return self._head_example(row, values, where)
        if task == "text" and not shots:
            return self._text(values["text"], where)
        if task == "chat":
            return self._conversation(messages_of(values["messages"]), where, shots)
        if task == "preference":
            return self._preference(row, values, where, shots)
        question = self._questions.of(row, values, where)
        return self._answer(question, where, self._questions.before(shots, where))

    def _answer(self, question: Question, where: str, before: str) -> Example | None:
        """A prompt, behind the examples `before` it, and a response."""
        texts = question.choices or question.answers[:1]
        filled = bool(texts) and all(text.strip() for text in texts)
        body, found = self._tokens(before + question.prompt, texts) if filled else ([], [[]])
        if not all(found):
            self.counts.skipped_empty += 1
            return None
        # Every choice is to fit behind the prompt: their likelihoods are compared.
        prompt = self._fitted_prompt(body, max(map(len, found)))
        if prompt is None:
            return None
        if question.label is not None:
            self._count_label(question.label)
        response = found[texts.index(question.answers[0])]
        example = self._example(prompt, response, question.prompt, question.answers, where)
        if not question.choices:
            return example
        # A choice ends as answers are trained to, but for those that go on, or are as in examples.
        goes_on = self._settings.shots or self._settings.task in CONTINUED_TASKS
        end = [] if goes_on else [self._eot]
        compared = [[*tokens, *end] for tokens in found]
        return replace(example, choices=question.choices, choice_tokens=compared)

    def _tokens(self, prompt: str, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt, and of each of the texts behind it."""
        if self._settings.task in CONTINUED_TASKS:
            return continuation_ids(self._tokenizer, prompt, texts)
        encode = self._tokenizer.encode
        return encode(prompt), [self._label_tokens.get(text) or encode(text) for text in texts]

    def _response(self, answers: Sequence[str]) -> list[int] | None:
        response = self._tokenizer.encode(answers[0]) if answers and answers[0].strip() else []
        if not response:
            self.counts.skipped_empty += 1
            return None
        return response

    def _fitted_prompt(self, body: list[int], response: int) -> list[int] | None:
        """A prompt of the tokens of a text, which loses its beginning where it leaves less room
        than `response` tokens need; None when it may not, or if there is no room at all."""
        room = self._block_size - response  # eot is a target only
        if room < 1:  # for the start, or the last token of a prompt without one
            self.counts.skipped_long += 1
            return None
        prompt = self._tokenizer.begin(body)
        if len(prompt) <= room:
            return prompt
        return fitted(self._tokenizer, body, room) if self._count_cut() else None

    def _count_cut(self) -> bool:
        """Whether a row that is too long may be cut; counts it."""
        self.counts.shortened += self._cuts
        self.counts.skipped_long += not self._cuts
        return self._cuts

    def _example(
        self,
        prompt: list[int],
        response: list[int],
        text: str,
        answers: Sequence[str],
        where: str,
    ) -> Example:
        tokens = [*prompt, *response, self._eot]
        first = 1 if self._settings.loss_on == "all" else len(prompt)
        trained = [i >= first for i in range(len(tokens))]
        return Example(tokens, trained, len(prompt), text, list(answers), where)

    def _text(self, text: str, where: str) -> Example | None:
        """A text that is learned from its first token on. A long one stays whole: `parts_of` makes
        several rows of it."""
        body = self._tokenizer.encode(text) if text.strip() else []
        if not body:
            self.counts.skipped_empty += 1
            return None
        tokens = [*self._tokenizer.begin(body), self._eot]
        if len(tokens) > self._block_size + 1 and not self._cuts:
            self.counts.skipped_long += 1
            return None
        return Example(tokens, [i > 0 for i in range(len(tokens))], 1, "", [text], where)

    def _conversation(
        self, messages: list[Message], where: str, shots: Sequence[dict[str, Any]]
    ) -> Example | None:
        """A conversation up to the assistant's last message."""
        messages = _up_to_answer(messages)
        if not messages or not messages[-1].content.strip():
            self.counts.skipped_empty += 1
            return None
        found = self._fitted([self._behind_shots(messages, shots)], where)
        return None if found is None else self._chat_example(found[0], messages[-1].content, where)

    def _behind_shots(
        self, messages: list[Message], shots: Sequence[dict[str, Any]]
    ) -> list[Message]:
        """A conversation with those of other rows before it, but for what the system says there."""
        turns: list[Message] = []
        for values in map(self._questions.values, shots):
            if self._settings.task == "chat":
                turns += _up_to_answer(messages_of(values["messages"]))
            else:
                answer = Message("assistant", _answer_of(values["chosen"], "chosen", "an example"))
                turns += [*_conversation_before(values, "chosen"), answer]
        own = [message for message in messages if message.role == "system"] if turns else []
        spoken = [message for message in [*turns, *messages] if message.role != "system"]
        return [*own, *spoken] if turns else messages

    def _chat_example(self, chat: ChatTokens, answer: str, where: str) -> Example:
        trained = chat.assistant
        if self._settings.loss_on == "all":
            trained = [True] * len(chat.tokens)
        trained = [False, *trained[1:]]
        return Example(chat.tokens, trained, chat.last, chat.before, [answer], where)

    def _fitted(self, conversations: list[list[Message]], where: str) -> list[ChatTokens] | None:
        """Conversations that differ in their last message, as tokens. Where one is too long, all
        lose their first turns, and in the end the beginning of what is before the answer."""
        chats = [self._chat_tokens(messages, where) for messages in conversations]
        self.counts.imitations += any(chat.imitated for chat in chats)
        most = self._block_size + 1
        if any(len(chat.tokens) - chat.last > self._block_size for chat in chats):
            self.counts.skipped_long += 1
            return None
        if all(len(chat.tokens) <= most for chat in chats):
            return chats
        if not self._count_cut():
            return None
        while any(len(chat.tokens) > most for chat in chats):
            shorter = [_without_first_turn(messages) for messages in conversations]
            if not all(shorter):
                excess = max(len(chat.tokens) for chat in chats) - most
                return [self._cut(chat, excess) for chat in chats]
            conversations = shorter
            chats = [self._chat_tokens(messages, where) for messages in conversations]
        return chats

    def _cut(self, chat: ChatTokens, excess: int) -> ChatTokens:
        """Without the first `excess` tokens, but for the start of a document."""
        kept = chat.tokens[:1] == [self._tokenizer.start] and excess + 1 < chat.last
        low = int(kept)
        tokens = chat.tokens[:low] + chat.tokens[low + excess :]
        assistant = chat.assistant[:low] + chat.assistant[low + excess :]
        return ChatTokens(tokens, assistant, chat.last - excess, chat.before)

    def _chat_tokens(self, messages: list[Message], where: str) -> ChatTokens:
        """The conversation as the template has it up to the end of the last answer, which gets an
        eot where the template has none."""
        assert self._chat is not None
        try:
            chat = self._chat.encode(messages)
        except DataError as error:
            raise DataError(f"{where}: {error.message}", hint=error.hint) from error
        end = max(i for i, trained in enumerate(chat.assistant) if trained) + 1
        tokens, assistant = chat.tokens[:end], chat.assistant[:end]
        if tokens[-1] not in self._tokenizer.ends:
            tokens, assistant = [*tokens, self._eot], [*assistant, True]
        return replace(chat, tokens=tokens, assistant=assistant)

    def _preference(
        self,
        row: dict[str, Any],
        values: dict[str, Any],
        where: str,
        shots: Sequence[dict[str, Any]],
    ) -> PreferencePair | None:
        names = ("chosen", "rejected")
        if all(isinstance(values[name], str) for name in ("prompt", *names)):
            pair = self._preferred_texts(row, values, where, self._questions.before(shots, where))
        else:
            answers = [_answer_of(values[name], name, where) for name in names]
            before = [_conversation_before(values, name) for name in names]
            if before[0] != before[1]:
                self.counts.skipped_unlike += 1
                return None
            asked = self._behind_shots(before[0], shots)
            conversations = [[*asked, Message("assistant", answer)] for answer in answers]
            if not all(answer.strip() for answer in answers):
                self.counts.skipped_empty += 1
                return None
            chats = self._fitted(conversations, where)
            if chats is None:
                return None
            pair = [
                Example(chat.tokens, _behind(chat), chat.last, chat.before, [answer], where)
                for chat, answer in zip(chats, answers, strict=True)
            ]
        if pair is None:
            return None
        digest = hashlib.blake2b(repr([e.tokens for e in pair]).encode(), digest_size=8).digest()
        return PreferencePair(pair[0], pair[1], int.from_bytes(digest, "big") >> 1, where)

    def _preferred_texts(
        self, row: dict[str, Any], values: dict[str, Any], where: str, before: str
    ) -> list[Example] | None:
        assert self._prompt is not None
        text = self._prompt.render(row, values, where)
        answers = [values["chosen"], values["rejected"]]
        chosen = self._response(answers[:1])
        rejected = self._response(answers[1:]) if chosen else None
        if not chosen or not rejected:
            return None
        body = self._tokenizer.encode(before + text)
        prompt = self._fitted_prompt(body, max(len(chosen), len(rejected)))
        if prompt is None:
            return None
        return [
            self._example(prompt, chosen, text, answers[:1], where),
            self._example(prompt, rejected, text, answers[1:], where),
        ]

    def _head_example(
        self, row: dict[str, Any], values: dict[str, Any], where: str
    ) -> HeadExample | None:
        settings, label = self._settings, None
        if settings.task == "multiple_choice":
            number = choice_number(values["label"], values["choices"], where)
        else:
            label = self._questions.label(values["label"], where)
            number = self._labels.index(label)
        if settings.task == "pairs":
            text = f"{values['text1']}\n{values['text2']}"
            both = settings.pair_order == "both"
            made = self._sequences.of_pair(values["text1"], values["text2"], both=both)
        else:
            given = values["text"] if settings.task == "classification" else values["prompt"]
            text = given if self._prompt is None else self._prompt.render(row, values, where)
            choices = values.get("choices")
            made = (
                self._sequences.of_text(text)
                if choices is None
                else self._sequences.of_choices(text, choices)
            )
        if not made.sequences:
            self.counts.skipped_empty += made.empty
            self.counts.skipped_long += not made.empty
            return None
        self.counts.shortened += made.shortened
        if label is not None:
            self._count_label(label)
        scored = self._tokenizer.decode_bytes(made.sequences[0][1:-1])
        return HeadExample(made.sequences, number, text, where, len(scored))

    def _count_label(self, label: str) -> None:
        self.counts.labels[label] = self.counts.labels.get(label, 0) + 1


def _templates(
    settings: FinetuneConfig, tokenizer: Tokenizer
) -> tuple[PromptTemplate | None, ChatTemplate | None]:
    """What makes prompts, and what makes conversations, where the task has these."""
    task, template = settings.task, settings.template
    textless = task in ("text", "cloze", "last_word") or (settings.has_head and task == "pairs")
    if textless and template is not None:
        raise ConfigError(
            f"finetune.template: the task {task} has no prompt here",
            hint="leave it out: texts are read as they are",
        )
    if textless or (settings.has_head and template is None):
        return None, None
    if task == "chat":
        named = None if template is None else named_template(template, CHAT_TEMPLATES)
        return None, ChatTemplate(tokenizer, named)
    return PromptTemplate(settings), ChatTemplate(tokenizer) if task == "preference" else None


def _up_to_answer(messages: list[Message]) -> list[Message]:
    """Without what comes behind the assistant's last message."""
    said = [i for i, message in enumerate(messages) if message.role == "assistant"]
    return messages[: said[-1] + 1] if said else []


def _without_first_turn(messages: list[Message]) -> list[Message]:
    """Without the first message of the user and what answers it; [] where it is the only one. What
    the system says before it stays."""
    asked = [i for i, message in enumerate(messages) if message.role == "user"]
    return messages[: asked[0]] + messages[asked[1] :] if len(asked) > 1 else []


def _conversation_before(values: dict[str, Any], name: str) -> list[Message]:
    """What was said before the answer `name`, of a preference that is a conversation."""
    given, prompt = values[name], values["prompt"]
    if isinstance(given, list) and len(given) > 1:  # the prompt is in it once more
        return messages_of(given)[:-1]
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    return messages_of(prompt) if isinstance(prompt, list) else [message_of(prompt)]


def _answer_of(value: Any, name: str, where: str) -> str:
    """The answer that a preference is about, its last message. DataError, with `where`, where that
    is not the assistant's."""
    if isinstance(value, str):
        return value
    message = messages_of(value)[-1] if isinstance(value, list) else message_of(value)
    if message.role != "assistant":
        raise DataError(f"{where}: the last message of {name!r} is by {message.role!r}, no answer")
    return message.content


def _behind(chat: ChatTokens) -> list[bool]:
    """Which tokens are compared: the last answer alone, and what ends it."""
    return [i >= chat.last and trained for i, trained in enumerate(chat.assistant)]
