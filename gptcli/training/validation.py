"""The validation part of a run, scored along the way."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from gptcli.device import Device
from gptcli.evaluation.perplexity import (
    DocumentScores,
    EncodedDocument,
    Scores,
    score_documents,
    total_scores,
)
from gptcli.model.gpt import GPT


@dataclass
class Validation:
    """Scores `documents` with `model` as it is then. `found` is what the last scoring by this
    process found of each document and token, for the report at the end of the run."""

    model: GPT
    documents: Sequence[EncodedDocument]
    device: Device
    stride: int | None
    precision: str
    found: DocumentScores | None = None

    def __call__(self) -> Scores:
        """The scores. Raises `stop.Stopped` when a stop is asked for."""
        began = time.perf_counter()
        self.found = score_documents(
            self.model,
            self.documents,
            self.device,
            stride=self.stride,
            precision=self.precision,
            tokens=True,
        )
        return total_scores(
            self.found,
            self.documents,
            self.model.config.block_size,
            self.stride,
            time.perf_counter() - began,
        )
