"""`gpt generate`: continue prompts. Texts go to stdout, everything else to stderr."""

import json
import logging
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer

from gptcli.cli.generate_options import (
    AllowSpecialOption,
    BadWordsOption,
    ChoicesOption,
    ConfigOption,
    DeviceOption,
    FrequencyPenaltyOption,
    JsonOption,
    JsonSchemaOption,
    LogprobsOption,
    MaxNewTokensOption,
    MinPOption,
    NoPromptOption,
    NOption,
    OutputBytesOption,
    PresencePenaltyOption,
    PromptFileOption,
    PromptOption,
    PromptTokensOption,
    QuantizeOption,
    RawOption,
    RegexOption,
    RepetitionPenaltyOption,
    SeedOption,
    SpeculateOption,
    StdinArgument,
    StopOption,
    StreamOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TruncateOption,
)
from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import DevicesOption, ModelOption, launched
from gptcli.cli.starting import starting
from gptcli.cli.terminal import GrowingText, write_bytes, write_error, write_out
from gptcli.errors import ConfigError
from gptcli.stop import raise_if_requested, read_to_end
from gptcli.world import from_environment

if TYPE_CHECKING:
    from gptcli.config.generate_schema import GenerateConfig
    from gptcli.generation.row import Generated
    from gptcli.runs.load import LoadedModel

log = logging.getLogger("gptcli")

_MAX_STDIN_BYTES = 10_000_000  # far above any model's window; a stray `yes |` must not fill memory
_PROMPT_KEYS = ("prompt", "prompt_file", "prompt_tokens")


def generate(
    context: typer.Context,
    stdin: StdinArgument = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    prompt_tokens: PromptTokensOption = None,
    n: NOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    presence_penalty: PresencePenaltyOption = None,
    frequency_penalty: FrequencyPenaltyOption = None,
    stop: StopOption = None,
    bad_words: BadWordsOption = None,
    choices: ChoicesOption = None,
    regex: RegexOption = None,
    json_schema: JsonSchemaOption = None,
    seed: SeedOption = None,
    json_lines: JsonOption = None,
    logprobs: LogprobsOption = None,
    stream: StreamOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
    speculate: SpeculateOption = None,
    no_prompt: NoPromptOption = None,
    truncate: TruncateOption = None,
    allow_special: AllowSpecialOption = None,
    raw: RawOption = None,
    output_bytes: OutputBytesOption = None,
    devices: DevicesOption = None,
) -> int:
    """Continue a prompt.

    Prints the prompt and its continuation; of several texts each is followed by a line '---'.

    A text that outgrows the model's block_size goes on from its last block_size // 2 tokens, again
    each time the block is full; models with windowed attention in every layer go on exactly.
    """
    flags: dict[str, Any] = dict(locals())  # called as the keys of the section
    del flags["context"], flags["stdin"], flags["config"], flags["devices"]
    flags["prompt_tokens"] = _token_ids(prompt_tokens)
    flags["choices"] = _choices(choices)
    with starting():
        settings = _settings(config, flags, stdin)
        if devices is not None or from_environment().size > 1:
            _check_dealt(settings)
            from gptcli.config.schema import Config

            there = Config.model_validate({"training": {"device": settings.device}})
            code = launched(invocation(context).arguments, devices, None, there)
            if code is not None:
                return code
        loaded = _load(settings)
    _run(loaded, settings)
    raise_if_requested()
    return 0


def _settings(
    config: str | None, flags: dict[str, Any], stdin: list[str] | None
) -> "GenerateConfig":
    """The YAML's section and the flags as one; a prompt among the flags replaces the YAML's, as
    does a constraint, which is checked."""
    if stdin not in (None, [], ["-"]):
        text = shlex.quote(" ".join(stdin or []))
        raise ConfigError(f"unexpected argument {text}", f"gpt generate --prompt {text}")
    given = [key for key in _PROMPT_KEYS if flags[key] is not None] + ["-"] * bool(stdin)
    _check_one(given, "prompt")
    from gptcli.cli.section_flags import with_flags
    from gptcli.config.generate_schema import CONSTRAINTS
    from gptcli.config.load import load_config
    from gptcli.generation.constraint import read_constraint, without_constraint

    constraints = [key for key in CONSTRAINTS if flags[key] is not None]
    _check_one(constraints, "constraint")

    base = load_config(config).config.generate
    if given:
        base = base.model_copy(update=dict.fromkeys(_PROMPT_KEYS))
    if constraints:
        base = without_constraint(base)
    settings = with_flags(base, flags)
    if settings.logprobs and not settings.json_lines:
        raise ConfigError("--logprobs needs --json, which has room for them")
    if settings.output_bytes:
        _check_bytes(settings, flags)
    if stdin:
        prompt = read_stdin(settings.output_bytes)
        settings = settings.model_copy(update={"prompt": prompt})
    if settings.prompt_file == "-":
        settings = settings.model_copy(update={"prompt_file": "/dev/stdin"})
    if all(getattr(settings, key) is None for key in _PROMPT_KEYS):
        raise ConfigError(
            "no prompt given",
            "give one of --prompt TEXT, --prompt-file FILE, --prompt-tokens IDS, - (stdin)",
        )
    return read_constraint(settings)


def _check_one(given: list[str], what: str) -> None:
    if len(given) > 1:
        names = " and ".join(k if k == "-" else "--" + k.replace("_", "-") for k in given)
        raise ConfigError(f"{names} exclude each other; give one {what}")


def _check_bytes(settings: "GenerateConfig", flags: dict[str, Any]) -> None:
    """Refuse what does not go with bytes on stdout, before the model is loaded."""
    text_only = {"-n": settings.n > 1, "--json": settings.json_lines, "--stop": settings.stop}
    text_only["--stream"] = flags["stream"]
    for flag, given in text_only.items():
        if given:
            raise ConfigError(
                f"--output-bytes and {flag} exclude each other",
                "it writes the bytes of one continuation and nothing else",
            )
    if sys.stdout.isatty() and not settings.raw:
        raise ConfigError(
            "--output-bytes: bytes could steer the terminal",
            "write them to a file, as: > out.png (or --raw to see them anyway)",
        )


def _load(settings: "GenerateConfig") -> "LoadedModel":
    from gptcli.device import resolve_device
    from gptcli.runs.load import load_model

    device = resolve_device(settings.device).torch
    return load_model(settings.model, device, quantize=settings.quantize)


def _check_dealt(settings: "GenerateConfig") -> None:
    """ConfigError unless there are prompts that several processes can share."""
    if settings.prompt_file in (None, "/dev/stdin") or settings.output_bytes:
        raise ConfigError(
            "several processes share the prompts of a file: --devices goes with --prompt-file FILE",
            "leave out --devices; -n many texts of one prompt are already decoded together",
        )


def _run_dealt(model: "LoadedModel", settings: "GenerateConfig") -> None:
    """Of several processes: continue this one's prompts; rank 0 writes all."""
    from gptcli import world
    from gptcli.config.schema import DistributedConfig
    from gptcli.generate import generate_dealt

    quiet = settings.model_copy(update={"stream": False})
    seconds = DistributedConfig().timeout_seconds
    with world.joined(model.model.device.type, seconds):
        _Output(quiet).finished(generate_dealt(model, quiet))


def _run(model: "LoadedModel", settings: "GenerateConfig") -> None:
    if from_environment().size > 1:
        _run_dealt(model, settings)
        return
    from gptcli.generate import generate as continue_prompts
    from gptcli.generate import generate_bytes

    if settings.output_bytes:
        write_bytes(generate_bytes(model, settings))
        return
    output = _Output(settings)
    batches = continue_prompts(
        model,
        settings,
        on_text=output.piece if output.live else None,
        on_prompt=output.prompt,
        on_sample=output.sample,
    )
    began = time.perf_counter()
    tokens = output.finished(batches)
    seconds = time.perf_counter() - began
    if settings.speculate is not None or (sys.stderr is not None and sys.stderr.isatty()):
        log.info("%d tokens in %.1f s: %.1f tokens/s", tokens, seconds, tokens / seconds)


class _Output:
    """Prints texts in order of prompt and sample; sample 0 of each prompt as it grows."""

    def __init__(self, settings: "GenerateConfig") -> None:
        self.live = settings.stream and not settings.json_lines
        self._settings = settings
        self._several = settings.n > 1 or settings.prompt_file is not None
        self._growing = GrowingText(self._write)
        self._written = 0  # samples of the prompt at hand

    def prompt(self, text: str) -> None:
        """A prompt about to be continued."""
        if self.live and not self._settings.no_prompt:
            self._growing.add(text)

    def piece(self, sample: int, text: str) -> None:
        """Some more text of a sample."""
        if sample == 0:
            self._growing.add(text)

    def finished(self, batches: "Iterable[list[Generated]]") -> int:
        """All samples of all prompts; returns the number of tokens."""
        tokens = 0
        for samples in batches:
            tokens += sum(len(sample.tokens) for sample in samples)
            for sample in samples[self._written :]:
                self.sample(sample)
            self._written = 0
        return tokens

    def sample(self, sample: "Generated") -> None:
        """The next sample of the prompt at hand."""
        self._written += 1
        if self._settings.json_lines:
            self._json(sample)
            return
        if self.live and sample.sample == 0:
            self._growing.end()
        else:
            self._write(("" if self._settings.no_prompt else sample.prompt) + sample.text)
        self._write("\n---\n" if self._several else "\n")

    def _json(self, sample: "Generated") -> None:
        if sample.finish_reason != "interrupted":  # half a text is no result
            # ASCII only: no terminal or locale can misread it.
            self._write(json.dumps(sample.to_json()) + "\n")

    def _write(self, text: str) -> None:
        write_out(text, raw=self._settings.raw)


def _token_ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--prompt-tokens: {text!r} is not a list of ids such as 0,2,1") from None


def _choices(text: str | None) -> list[str] | None:
    """Those of `a,b,c`, or of a JSON list, where a choice has a comma in it."""
    if text is None:
        return None
    with suppress(ValueError, RecursionError):
        listed = json.loads(text)
        if isinstance(listed, list) and all(isinstance(choice, str) for choice in listed):
            return listed
    return text.split(",")


def read_stdin(as_bytes: bool = False) -> str:
    """The prompt on stdin without its last newline. Polls the stop flag while nothing comes.

    With `as_bytes` all of it; what is no UTF-8 comes as surrogates (PEP 383), as in arguments.
    """
    data = b"" if sys.stdin is None else read_to_end(sys.stdin.fileno(), _MAX_STDIN_BYTES)
    if not data:
        raise ConfigError("-: nothing on stdin", "pipe a prompt in, as: echo Once | gpt ... -")
    if len(data) > _MAX_STDIN_BYTES:
        raise ConfigError(
            f"-: more than {_MAX_STDIN_BYTES:,} bytes on stdin",
            "many prompts go into a file: --prompt-file FILE",
        )
    if as_bytes:
        return data.decode("utf-8", "surrogateescape")
    text = data.decode("utf-8", "replace")
    if text.encode() != data:
        write_error("warning: stdin is not valid UTF-8; bad bytes replaced")
    return text.removesuffix("\n")
