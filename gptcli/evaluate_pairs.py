"""Evaluation of a model's fairness on paired sentences."""

import logging
from pathlib import Path

from gptcli.config.schema import Config
from gptcli.device import resolve_device
from gptcli.evaluate import described, eval_directory, eval_precision
from gptcli.evaluation.pairs import pair_report, read_pairs
from gptcli.evaluation.result import Evaluation
from gptcli.reports.report import check_report_directory, write_eval_report
from gptcli.runs.load import load_model

log = logging.getLogger("gptcli")


def evaluate_pairs(
    config: Config,
    path: Path,
    *,
    model: str | None = None,
    run_dir: Path | None = None,
    command: str = "",
) -> Evaluation:
    """Compare how likely MODEL finds the two sentences of each pair in the file of JSON lines.

    The report goes to `run_dir`, else below the model's run. Raises GptError, `stop.Stopped`.
    """
    check_report_directory(run_dir)
    pairs = read_pairs(path)  # before a model is loaded
    device = resolve_device(config.training.device)
    loaded = load_model(model if model is not None else config.eval.model, device.torch)
    precision = eval_precision(config, loaded, device)
    report = described(loaded, f"pairs of {path}", device, precision, command)
    found = pair_report(loaded.model, loaded.tokenizer, pairs, device, precision)
    report["pairs"] = {"file": str(path), **found}
    if several := found["differ_in_several_places"]:
        places = ", ".join(found["several_places"])
        log.warning(
            f"{several} of {len(pairs)} pairs differ in more than one place ({places}): their"
            " difference is not that of a single term"
        )
    whole = str(path.resolve())
    directory = eval_directory(loaded, run_dir, f"pairs {path.name}", config.eval, whole)
    if directory is not None:
        write_eval_report(directory, report)
    return Evaluation(report, directory)
