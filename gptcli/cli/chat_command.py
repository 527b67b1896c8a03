"""`gpt chat`: a conversation. Answers go to stdout, everything else to stderr."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.generate_options import (
    BadWordsOption,
    DeviceOption,
    FrequencyPenaltyOption,
    MaxNewTokensOption,
    MinPOption,
    PresencePenaltyOption,
    QuantizeOption,
    RawOption,
    RepetitionPenaltyOption,
    SeedOption,
    SpeculateOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from gptcli.cli.run_flags import ModelOption
from gptcli.cli.starting import starting
from gptcli.errors import ResourceError

if TYPE_CHECKING:
    from gptcli.chat import Chat
    from gptcli.runs.load import LoadedModel

log = logging.getLogger("gptcli")

ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="CONFIG", help="A YAML whose chat: and generate: sections are used."
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="A message before all others.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="FILE",
        help="A chat template (Jinja), or dialogue or dialogue_zh. [the model's own]",
    ),
]
SaveOption = Annotated[
    Path | None,
    typer.Option("--save", metavar="FILE", help="Write the conversation here at the end."),
]


def chat(
    config: ConfigOption = None,
    model: ModelOption = None,
    system: SystemOption = None,
    template: TemplateOption = None,
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
    seed: SeedOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
    speculate: SpeculateOption = None,
    raw: RawOption = None,
    save: SaveOption = None,
) -> int:
    """Talk with a model.

    /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. From a pipe each line is a
    message, and stdout gets the answers alone.
    """
    flags: dict[str, Any] = dict(locals())  # called as the keys of the section
    for name in ("config", "system", "template", "save"):
        del flags[name]
    with starting():
        from gptcli.cli.section_flags import with_flags
        from gptcli.config.load import load_config

        given = load_config(config).config
        settings = with_flags(given.generate, flags)
        about = with_flags(given.chat, {"system": system, "template": template})
        _check_save(save)
        from gptcli.chat import Chat
        from gptcli.device import resolve_device
        from gptcli.runs.load import load_model

        device_here = resolve_device(settings.device).torch
        loaded = load_model(settings.model, device_here, quantize=settings.quantize)
        talk = Chat(loaded, settings, about)
    return _talk(loaded, talk, settings.raw, save)


def _check_save(path: Path | None) -> None:
    """Before the conversation, which would be lost: ConfigError or ResourceError."""
    if path is None:
        return
    from gptcli.chat import check_new

    check_new(path)
    if not path.parent.is_dir():
        raise ResourceError(f"{path}: cannot be written: there is no directory {path.parent}")


def _talk(loaded: "LoadedModel", talk: "Chat", raw: bool, save: Path | None) -> int:
    from gptcli.cli.chat_lines import PipedLines, TypedLines
    from gptcli.cli.chat_session import HELP, Session

    typed = sys.stdin is not None and sys.stdin.isatty()
    lines = (
        TypedLines(list(HELP))
        if typed
        else PipedLines(0 if sys.stdin is None else sys.stdin.fileno())
    )
    hint = "; /help lists commands" if typed else ""
    log.info(
        "%s, %s, block_size %d; seed %d%s",
        loaded.name,
        talk.template_name,
        loaded.model.config.block_size,
        talk.seed,
        hint,
    )
    if not talk.is_trained_for_dialogue:
        log.info("it was not trained for dialogue, as far as is known: it goes on with texts")
    session = Session(talk, lines, raw=raw)
    try:
        session.run()
    finally:
        if save is not None and any(message.role == "user" for message in talk.messages):
            talk.save(save)
            log.info("saved: %s", save)
    return session.exit_code
