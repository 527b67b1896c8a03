"""What a client asks for: the bodies of completions and chat completions, checked field by field.

Nothing is ignored: a field that is not known, or asks for what is not there, is refused by name.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from gptcli.config.section import Fraction, NonNegative, PositiveFloat, PositiveInt, Section
from gptcli.data.chat_template import ChatTemplate
from gptcli.data.messages import Message
from gptcli.errors import GptError
from gptcli.generation.constraint import Constraint
from gptcli.generation.engine import Request
from gptcli.generation.grammar import Matcher
from gptcli.generation.prompt import encode_prompt
from gptcli.generation.sampling import Sampling
from gptcli.runs.load import LoadedModel
from gptcli.serve.constrained import asked_constraint
from gptcli.serve.refusals import RefusedError, wrong

MOST_STOPS, MOST_STOP_LENGTH = 16, 256  # each is looked for in every piece of text
MOST_LOGPROBS = 20
_COMPLETION_TOKENS = 16  # as OpenAI has it, where a completion does not say
# Fields of OpenAI's that ask for what is not here, with the values by which they ask for nothing;
# null, an empty list or object, and false do in all of them.
_UNSUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "completion": {"logit_bias": (), "suffix": ("",)},
    "chat": {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": (),
        "logit_bias": (),
        "modalities": (["text"],),
        "parallel_tool_calls": (True,),
        "prediction": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (),
        "tool_choice": ("none", "auto"),
        "tools": (),
        "verbosity": ("medium",),
        "web_search_options": (),
    },
}
_NOTHING: tuple[Any, ...] = (None, False, [], {})
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Served:
    """The model that is served, and what one request may ask of it. Without a `template` that
    works, no chats; their answers end before one of `answer_stops`."""

    loaded: LoadedModel
    name: str
    template: ChatTemplate | None
    max_tokens: int
    max_n: int
    answer_stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A request that can be decoded. `logprobs` alternatives are to be told of each token, None:
    nothing of them. `held` is the constraint of its texts, kept ready until they begin."""

    requests: list[Request]
    chat: bool
    seed: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    held: tuple[Constraint, Matcher] | None = None
    echo: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each once."""
        return sum(len(request.tokens) for request in self.requests)


class _StreamOptions(Section):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Common(Section):
    """Fields that both kinds have. The last three are OpenAI's labels, which change no text."""

    model: str | None = None
    n: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    temperature: NonNegative | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: PositiveFloat | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: Any = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: Any = None
    choices: list[str] | None = None
    regex: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None


class _Completion(_Common):
    prompt: Any = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None


class _Chat(_Common):
    messages: Any = None
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object that a body is. RefusedError for anything else."""
    try:
        body = json.loads(data.decode(), parse_constant=_no_constant)
        if b"\\u" in data:  # halves of characters, which nothing can encode
            json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise RefusedError(400, "the body is not valid JSON: nested too deeply") from None
    except ValueError as error:
        text = str(error) if isinstance(error, json.JSONDecodeError) else _told(error)
        raise RefusedError(
            400, f"the body is not valid JSON: {text}", code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise RefusedError(400, "the body is not a JSON object", code="invalid_json")
    return body


def asked(body: dict[str, Any], chat: bool, served: Served) -> Asked:
    """What a body asks for. RefusedError where it cannot be done."""
    check_model(body.get("model"), served)
    fields = _checked(body, "chat" if chat else "completion")
    if fields.stream_options is not None and not fields.stream:
        raise wrong("stream_options", "only with stream")
    n = fields.n or 1
    if isinstance(fields, _Chat):
        _check_count(n, 1, served)
        prompts = [_chat_prompt(served.template, fields.messages)]
    else:
        given = _several(fields.prompt)
        _check_count(n, len(given), served)
        prompts = [_prompt(served.loaded, one) for one in given]
    seed = secrets.randbelow(2**32) if fields.seed is None else fields.seed
    logprobs = _logprobs(fields)
    held = asked_constraint(fields.response_format, fields.choices, fields.regex, served.loaded)
    stops = (*_stops(fields.stop), *(served.answer_stops if chat else ()))
    requests = [
        Request(
            text,
            ids,
            _sampling(fields, seed, logprobs, held and held[0], stops, _room(served, fields, ids)),
            n,
        )
        for text, ids in prompts
    ]
    options = fields.stream_options
    return Asked(
        requests=requests,
        chat=chat,
        seed=seed,
        stream=bool(fields.stream),
        include_usage=options is not None and bool(options.include_usage),
        logprobs=logprobs,
        held=held,
        echo=isinstance(fields, _Completion) and bool(fields.echo),
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _told(error: ValueError) -> str:
    return "not UTF-8" if isinstance(error, UnicodeError) else str(error).splitlines()[0]


def _checked(body: dict[str, Any], kind: Literal["completion", "chat"]) -> _Completion | _Chat:
    given = dict(body)
    for key, harmless in _UNSUPPORTED[kind].items():
        if given.pop(key, None) not in (*_NOTHING, *harmless):
            raise wrong(key, "not supported by this server", "unsupported_parameter")
    if kind == "completion" and given.pop("best_of", None) not in (None, body.get("n") or 1):
        raise wrong("best_of", "only the same as n is supported", "unsupported_parameter")
    try:
        return (_Chat if kind == "chat" else _Completion).model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))[:80]
        if first["type"] == "extra_forbidden":
            raise wrong(param, "this field is not known", "unknown_parameter") from None
        message = first["msg"]
        raise wrong(param, message[:1].lower() + message[1:]) from None


def _sampling(
    fields: _Common,
    seed: int,
    logprobs: int | None,
    constraint: Constraint | None,
    stops: tuple[str, ...],
    max_new_tokens: int,
) -> Sampling:
    return Sampling(
        temperature=_or(fields.temperature, 1.0),
        top_k=fields.top_k if fields.top_k is not None and fields.top_k > 0 else None,
        top_p=_or(fields.top_p, 1.0),
        min_p=_or(fields.min_p, 0.0),
        repetition_penalty=_or(fields.repetition_penalty, 1.0),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        stop=stops,
        constraint=constraint,
        seed=seed,
        max_new_tokens=max_new_tokens,
        logprobs=0 if logprobs is None else max(1, logprobs),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise wrong("stop", "not a text or list of texts of at least one character")
    if len(texts) > MOST_STOPS or any(len(text) > MOST_STOP_LENGTH for text in texts):
        limit = f"at most {MOST_STOPS} texts of {MOST_STOP_LENGTH} characters"
        raise wrong("stop", f"{limit} are allowed")
    return tuple(texts)


def _room(served: Served, fields: _Common, tokens: list[int]) -> int:
    """How many new tokens there may be; checks that the prompt fits."""
    config, most = served.loaded.model.config, served.max_tokens
    # A model that rolls reads prompts of any length: here no longer ones than it may write.
    context = max(config.block_size, most) if config.rolls else config.block_size
    if len(tokens) > context:
        raise RefusedError(
            400,
            f"the prompt has {len(tokens)} tokens, and the model's context {context}",
            param="messages" if isinstance(fields, _Chat) else "prompt",
            code="context_length_exceeded",
        )
    name, given = "max_tokens", fields.max_tokens
    if isinstance(fields, _Chat) and fields.max_completion_tokens is not None:
        if given not in (None, fields.max_completion_tokens):
            raise wrong("max_tokens", "differs from max_completion_tokens; give one of them")
        name, given = "max_completion_tokens", fields.max_completion_tokens
    if given is None and not isinstance(fields, _Chat):
        given = min(_COMPLETION_TOKENS, most)
    if given is None:  # up to the end of the context
        rest = config.block_size - len(tokens)
        given = most if config.rolls else min(max(1, rest), most)
    if given > most:
        raise wrong(name, f"at most {most} are allowed, not {given}")
    return given


def _check_count(n: int, prompts: int, served: Served) -> None:
    if n * prompts > served.max_n:
        what = f"{n} texts" if prompts == 1 else f"{n} for each of {prompts} prompts"
        raise wrong("n", f"at most {served.max_n} texts in one request are allowed, not {what}")


def _several(value: Any) -> list[Any]:
    """The prompts: one or a list of them, each a text or a list of ids."""
    if value is None:
        raise wrong("prompt", "missing", "missing_required_parameter")
    return value if isinstance(value, list) and value and not _are_ids(value) else [value]


def _prompt(loaded: LoadedModel, value: Any) -> tuple[str, list[int]]:
    tokenizer = loaded.tokenizer
    if isinstance(value, str):
        try:
            return value, encode_prompt(tokenizer, value)
        except GptError as error:
            raise wrong("prompt", error.message) from None
    if not _are_ids(value) or not value:
        raise wrong("prompt", "not a text, a list of token ids, or a list of these")
    limit = min(loaded.model.vocab_size, tokenizer.vocab_size)
    outside = next((token for token in value if not 0 <= token < limit), None)
    if outside is not None:
        raise wrong("prompt", f"{outside} is not one of the token ids 0 to {limit - 1}")
    return tokenizer.decode(value), value


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _logprobs(fields: _Completion | _Chat) -> int | None:
    if isinstance(fields, _Completion):
        if fields.echo and fields.logprobs is not None:
            raise wrong("echo", "not together with logprobs: those of prompts are not computed")
        return fields.logprobs
    if fields.top_logprobs is not None and not fields.logprobs:
        raise wrong("top_logprobs", "only with logprobs")
    return (fields.top_logprobs or 0) if fields.logprobs else None


def _chat_prompt(template: ChatTemplate | None, value: Any) -> tuple[str, list[int]]:
    if template is None:
        raise wrong("messages", "the model's chat template does not work; use /v1/completions")
    if not isinstance(value, list) or not value:
        problem = "missing" if value is None else "not a list of at least one message"
        raise wrong("messages", problem)
    messages = [_message(f"messages[{i}]", message) for i, message in enumerate(value)]
    try:
        tokens = template.encode(messages, add_generation_prompt=True).tokens
    except GptError as error:
        raise wrong("messages", error.message) from None
    return "", tokens


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise wrong(where, "not an object with role and content")
    for key in value:
        if key not in ("role", "content") and value[key] not in _NOTHING:
            param = f"{where}.{key[:40]}"
            raise wrong(param, "not supported by this server", "unsupported_parameter")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", f"not one of {', '.join(_ROLES)}")
    return Message(_ROLES[role], _content(f"{where}.content", value.get("content")))


def _content(where: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong(where, "not a text or a list of parts")
    texts: list[str] = []
    for i, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise wrong(f"{where}[{i}]", "not a part of type text; this server reads nothing else")
        texts.append(text)
    return "".join(texts)


def check_model(name: Any, served: Served) -> None:
    """RefusedError for a model that is not here; None stands for the one that is."""
    if name not in (None, served.name):
        shown = repr(name[:80]) if isinstance(name, str) else f"of type {type(name).__name__}"
        message = f"the model {shown} does not exist (there is: {served.name})"
        raise RefusedError(404, message, param="model", code="model_not_found")
