"""Normalisation layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.config.model_schema import ModelConfig
from gptcli.model import kernels


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        nn.init.ones_(self.weight)
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if kernels.fits(x):
            return kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


def norm(config: ModelConfig, width: int) -> nn.Module:
    """The kind of norm that `config` names, over the last axis of that width."""
    if config.norm == "rmsnorm":
        return RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps)
