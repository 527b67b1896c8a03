"""What all sections of the YAML's schema have in common."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _device_name(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, got {name[:60]!r}")
    return name


PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
DeviceName = Annotated[
    str, AfterValidator(_device_name), Field(description="auto, cpu, cuda, cuda:N or mps")
]
ModelName = Annotated[
    str | None,
    Field(description="a run, checkpoint, Hugging Face folder or hub name; null: the newest run"),
]
Quantize = Annotated[
    Literal["int8", "fp16", "bf16"] | None,
    Field(description="smaller weights: less memory, and faster where memory bounds the speed"),
]


@dataclass(frozen=True)
class OneOrMore:
    """Marks a list whose only entry may be written without the list around it."""


class Section(BaseModel):
    """Strict and frozen: no coercion, no unknown keys, no nan or infinity."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )
