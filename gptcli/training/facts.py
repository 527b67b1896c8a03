"""What a run writes about itself as it goes: run.json and the lines of evaluations."""

from dataclasses import asdict, dataclass
from typing import Any

from gptcli.evaluation.perplexity import Scores
from gptcli.model.gpt import GPT
from gptcli.training.choices import Choices
from gptcli.training.state import TrainState


@dataclass(frozen=True)
class TaskScore:
    """One score of a finetuning task, by its name; higher is better."""

    name: str
    value: float


def run_facts(
    state: TrainState, model: GPT, choices: Choices, scores: Scores | None
) -> dict[str, Any]:
    """Facts for run.json that change from step to step."""
    facts: dict[str, Any] = {
        "training": {
            "steps": state.step,
            "tokens": state.tokens,
            "epochs": state.epochs,
            "seconds": state.seconds,
            "elapsed_seconds": state.elapsed_seconds,
            "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
            "parameters": model.parameter_count(),
            "best_step": state.best_step,
            "skipped_steps": state.skipped_steps,
        },
        "choices": choices.to_json(),
    }
    if state.position is not None and "seen" in state.position:
        facts["mixture"] = state.position["seen"]
    if scores is not None:
        facts["scores"] = scores.to_json()
    return facts


def evaluation_record(state: TrainState, scores: Scores, task: TaskScore | None) -> dict[str, Any]:
    """A line of metrics.jsonl: `scores`, and those of a finetuning task where there is one."""
    return {
        "event": "eval",
        "step": state.step,
        "tokens": state.tokens,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "accuracy": scores.accuracy,
        "seconds": scores.seconds,
        "training_seconds": state.seconds,
        **({"task": asdict(task)} if task is not None else {}),
    }
