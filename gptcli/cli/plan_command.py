"""`gpt plan`: what a run will take, and whether it fits on this machine."""

import json
import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.run_flags import (
    ConfigArgument,
    MaxTimeOption,
    RunDirOption,
    SetOption,
    load_run_config,
)
from gptcli.cli.starting import starting
from gptcli.cli.terminal import columns, write_out
from gptcli.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from gptcli.config.schema import Config
    from gptcli.plan import Plan
    from gptcli.plan_devices import DevicesPlan

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Start from this model, as init: does."),
    ] = None,
    vocab: Annotated[
        int | None,
        typer.Option("--vocab", metavar="N", min=1, help="Vocabulary size."),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option("--price-per-hour", metavar="F", min=0.0, help="Say also what it costs."),
    ] = None,
    max_time: MaxTimeOption = None,
    run_dir: RunDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    devices: Annotated[
        int | None,
        typer.Option("--devices", metavar="N", min=1, help="Plan for N GPUs that are not here."),
    ] = None,
    device_kind: Annotated[
        str | None,
        typer.Option("--device-kind", metavar="KIND", help="Kind of those GPUs, as h100."),
    ] = None,
) -> int:
    """Say beforehand what a run takes: memory, disk, time, cost.

    With --devices and --device-kind on many GPUs: sharding, memory of each, exchange, time. Exit
    code 6 when it does not fit, with what to change.
    """
    began = time.monotonic()
    loaded = load_run_config("plan", config, _with_model(overrides, model), max_time).config
    _check_flags(loaded, vocab, price_per_hour)
    if devices is not None or device_kind is not None:
        return _on_devices(loaded, vocab, devices or 1, device_kind, as_json)
    with starting():
        from gptcli.plan import plan as run

    found = run(
        loaded,
        vocab_size=vocab,
        price_per_hour=price_per_hour,
        run_dir=run_dir,
        began=began,
    )
    if as_json:
        write_out(json.dumps(_as_object(found)) + "\n")
    else:
        write_out(columns(_rows(found), right=frozenset({1})))
    if found.problems:
        raise ResourceError("; ".join(found.problems), "\n".join(found.advice))
    return 0


def _check_flags(config: "Config", vocab: int | None, price_per_hour: float | None) -> None:
    finetunes = config.finetune != type(config.finetune)()  # a run's own config has every section
    if finetunes and config.init is None:
        raise ConfigError(
            "finetuning starts from a model", "add --model MODEL, or init: MODEL in the config"
        )
    if price_per_hour is not None and not math.isfinite(price_per_hour):
        raise ConfigError(f"--price-per-hour: {price_per_hour} is no price")
    if vocab is not None and config.init is not None:
        raise ConfigError("--vocab: the vocabulary comes with the model that init names")


def _on_devices(
    config: "Config", vocab: int | None, devices: int, kind: str | None, as_json: bool
) -> int:
    """Print the plan for GPUs that are not here."""
    from gptcli.plan_devices import plan_devices

    if kind is None:
        raise ConfigError("--devices needs the kind of GPU", "add --device-kind h100")
    found = plan_devices(config, devices, kind, vocab_size=vocab)
    if as_json:
        write_out(json.dumps({**asdict(found), "fits": not found.problems}) + "\n")
    else:
        write_out(columns(_device_rows(found), right=frozenset({1})))
    if found.problems:
        raise ResourceError("; ".join(found.problems), "\n".join(found.advice))
    return 0


def _device_rows(plan: "DevicesPlan") -> list[list[str]]:
    memory, time = plan.memory, plan.time
    again = ", activations computed again" if plan.activation_checkpointing else ""
    each = f"{plan.micro_batches} micro batches of {plan.micro_batch_size}"
    least, most = (f"{share:.0%}" for share in time.mfu)
    rows = [
        ["parameters", f"{plan.parameters:,}", f"vocabulary {plan.vocab_size:,}"],
        ["devices", f"{plan.devices:,}", f"{plan.kind} in {plan.boxes:,} boxes, {plan.precision}"],
        ["sharding", plan.sharding, f"a step on each: {each}{again}"],
        ["memory of each", _size(plan.memory_total_bytes), _usable(plan)],
        ["  weights", _size(memory.weights_bytes), ""],
        ["  gradients", _size(memory.gradients_bytes), ""],
        ["  optimizer", _size(memory.optimizer_bytes), ""],
        ["  gathered", _size(memory.gathered_bytes), "embeddings, head and two blocks as a whole"],
        ["  activations", _size(memory.activations_bytes), "with logits"],
        ["  runtime", _size(memory.other_bytes), ""],
        ["sent by each", _size(plan.sent_bytes), f"a step of {plan.tokens_per_step:,} tokens"],
        ["computation", _duration(time.compute_seconds), "a step, at best"],
        ["exchange", _duration(time.exchange_seconds), "a step"],
        ["step", _duration(time.seconds[0]), f"to {_duration(time.seconds[1])}"],
        ["MFU", most, f"at best, {least} at worst"],
    ]
    if plan.device_hours is not None and plan.steps is not None:
        low, high = (hours * 3600 / plan.devices for hours in plan.device_hours)
        rows += [
            ["time", _duration(low), f"to {_duration(high)}, {plan.steps:,} steps"],
            ["device hours", f"{plan.device_hours[0]:,.0f}", f"to {plan.device_hours[1]:,.0f}"],
        ]
    return rows


def _usable(plan: "DevicesPlan") -> str:
    return f"usable: {_size(plan.usable_memory_bytes)}"


def _with_model(overrides: list[str] | None, model: str | None) -> list[str]:
    return [*(overrides or []), *([] if model is None else [f"init={json.dumps(model)}"])]


def _as_object(plan: "Plan") -> dict[str, Any]:
    return {
        **asdict(plan),
        "tokens": plan.tokens,
        "cost": plan.cost,
        "tokens_per_parameter": plan.tokens_per_parameter,
        "seconds": None if plan.duration is None else plan.duration.total_seconds,
        "fits": not plan.problems,
    }


def _rows(plan: "Plan") -> list[list[str]]:
    total = plan.parameters["total"]
    learning, some = plan.learning_parameters, f"vocabulary {plan.vocab_size:,}"
    some += f"; {learning:,} learn" if learning != total else ""
    rows = [["parameters", f"{total:,}", some]]
    for part, count in plan.parameters.items():
        if part != "total":
            share = "shared with the embeddings" if not count else f"{count / total:.1%}"
            rows.append([f"  {part.replace('_', '-')}", f"{count:,}", share])
    return [*rows, *_memory_rows(plan), *_run_rows(plan), *(["note", "", n] for n in plan.notes)]


def _memory_rows(plan: "Plan") -> list[list[str]]:
    memory = plan.memory
    how = f"micro batch of {plan.micro_batch_size}, {plan.precision} on {plan.device}"
    again = ", computed again in the backward pass" if plan.activation_checkpointing else ""
    free = "" if plan.free_memory_bytes is None else f"usable: {_size(plan.free_memory_bytes)}"
    disk = "" if plan.free_disk_bytes is None else f"; free: {_size(plan.free_disk_bytes)}"
    return [
        ["memory at the peak", _size(memory.total_bytes), free],
        ["  weights", _size(memory.weights_bytes), ""],
        ["  gradients", _size(memory.gradients_bytes), ""],
        ["  optimizer", _size(memory.optimizer_bytes), ""],
        ["  activations", _size(memory.activations_bytes), how + again],
        ["  logits and loss", _size(memory.logits_bytes), ""],
        ["  runtime and text", _size(memory.other_bytes), "the parts are not all there at once"],
        ["KV cache", _size(plan.kv_cache_bytes), "to generate one text of block_size tokens"],
        ["checkpoint", _size(plan.checkpoint_bytes), f"kept: {_size(plan.kept_bytes)}{disk}"],
    ]


def _run_rows(plan: "Plan") -> list[list[str]]:
    text = "unknown" if plan.text_tokens is None else f"{plan.text_tokens:,}"
    step, length = plan.paces.step_seconds, plan.duration
    how = "probed" if plan.paces.source == "probe" else "computed"
    rows = [
        ["text", text, "tokens, about"],
        ["FLOPs per token", f"{plan.flops_per_token:.3g}", ""],
        ["step", _duration(step), f"{how}; {plan.tokens_per_step / step:,.0f} tokens/s"],
    ]
    if length is None or plan.tokens is None:
        return rows
    epochs = f", {plan.tokens / plan.text_tokens:.2f} epochs" if plan.text_tokens else ""
    rows += [
        ["run", f"{plan.tokens:,}", f"tokens in {length.steps:,} steps{epochs}"],
        ["tokens per parameter", f"{plan.tokens_per_parameter:.2f}", ""],
        ["time", _duration(length.total_seconds), ""],
        ["  starting", _duration(length.starting_seconds), "reading the text with it"],
        ["  training", _duration(length.training_seconds), ""],
        ["  evaluation", _duration(length.evaluation_seconds), ""],
        ["  samples", _duration(length.sampling_seconds), ""],
        ["  checkpoints", _duration(length.saving_seconds), ""],
    ]
    return rows if plan.cost is None else [*rows, ["cost", f"{plan.cost:,.2f}", ""]]


def _size(count: int) -> str:
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:,.1f} days"
