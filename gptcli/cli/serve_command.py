"""`gpt serve`: a model behind an HTTP interface that OpenAI's clients know, and a page to try."""

import importlib
import logging
from typing import Annotated, Any

import typer

from gptcli.cli.generate_options import (
    DeviceOption,
    QuantizeOption,
)
from gptcli.cli.run_flags import ModelOption
from gptcli.cli.starting import starting
from gptcli.cli.terminal import write_out
from gptcli.errors import ResourceError
from gptcli.stop import raise_if_requested

log = logging.getLogger("gptcli")

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="CONFIG", help="A YAML whose serve: section is used."),
]
HostOption = Annotated[
    str | None, typer.Option("--host", metavar="HOST", help="Address to listen at. [127.0.0.1]")
]
PortOption = Annotated[
    int | None, typer.Option("--port", metavar="N", help="Its port; 0 takes any free. [8000]")
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        envvar="GPT_SERVE_TOKEN",
        show_envvar=False,
        help="What clients must know. Others see flags in the list of processes: GPT_SERVE_TOKEN,"
        " in the environment, is the better place.",
    ),
]
MaxQueueOption = Annotated[
    int | None,
    typer.Option("--max-queue", metavar="N", help="Texts that may wait for a place. [256]"),
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", help="New tokens of one text. [4096]")
]
MaxNOption = Annotated[
    int | None, typer.Option("--max-n", metavar="N", help="Texts of one request. [16]")
]
MaxBodyOption = Annotated[
    str | None, typer.Option("--max-body", metavar="SIZE", help="Most bytes of a request. [1MB]")
]
GraceOption = Annotated[
    float | None,
    typer.Option("--grace", metavar="SECONDS", help="To let texts finish at a stop. [10]"),
]


def serve(
    config: ConfigOption = None,
    model: ModelOption = None,
    host: HostOption = None,
    port: PortOption = None,
    token: TokenOption = None,
    max_queue: MaxQueueOption = None,
    max_tokens: MaxTokensOption = None,
    max_n: MaxNOption = None,
    max_body: MaxBodyOption = None,
    grace: GraceOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
) -> int:
    """Answer OpenAI's clients, and a page to try prompts.

    Completions and chats, many at a time. The address is printed on stdout when clients may come.
    Ctrl-C and SIGTERM let texts finish; a second one ends them as they are.
    """
    flags: dict[str, Any] = dict(locals())  # called as the keys of the section
    del flags["config"], flags["token"]
    with starting():
        from gptcli.cli.section_flags import with_flags
        from gptcli.config.load import load_config

        settings = with_flags(load_config(config).config.serve, flags)
        server = _server_module()
        bound = server.bind(settings)
        if not server.is_loopback(bound) and token is None:
            log.warning(
                "whoever reaches %s may use the model: no token is set (GPT_SERVE_TOKEN)",
                server.address_of(bound),
            )
        from gptcli.device import computed_aside, resolve_device
        from gptcli.runs.load import load_model

        device_here = resolve_device(settings.device).torch
        loaded = computed_aside(
            lambda: load_model(settings.model, device_here, quantize=settings.quantize)
        )

    def ready() -> None:
        log.info("serving %s; Ctrl-C ends it", loaded.path)
        write_out(server.address_of(bound) + "\n")

    server.serve(loaded, settings, bound, token=token, on_ready=ready)
    raise_if_requested()
    return 0


def _server_module() -> Any:
    for package in ("fastapi", "uvicorn"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ResourceError(
                f"gpt serve needs the package {package} ({error})",
                "pip install 'gptcli[serve]'",
            ) from error
    return importlib.import_module("gptcli.serve.server")
