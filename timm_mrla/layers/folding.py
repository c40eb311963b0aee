"""Folds a batch norm for inference, into a scale and a bias of channels."""

import torch
from timm.layers import BatchNormAct2d
from torch import nn


class Affine(nn.Module):
    """A folded batch norm: multiplies the channels of a map [B, C, H, W] by a scale, if it has one, and adds a bias."""

    def __init__(self, scale: torch.Tensor | None, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = None if scale is None else nn.Parameter(scale)
        self.bias = nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, bias = (None if p is None else p.to(x.dtype)[:, None, None] for p in (self.weight, self.bias))
        return x + bias if scale is None else x * scale + bias


def is_folded(norm: nn.Module) -> bool:
    """Whether a norm was folded."""
    return isinstance(norm, Affine)


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether a norm is a plain batch norm, without activation or dropout."""
    if type(norm) is BatchNormAct2d:
        return type(norm.act) is nn.Identity and type(norm.drop) is nn.Identity
    return type(norm) is nn.BatchNorm2d


def fold(norm: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The scale and the bias [C] that a batch norm in evaluation mode, or a folded one, applies."""
    if isinstance(norm, Affine):
        return norm.weight, norm.bias
    scale = (norm.running_var + norm.eps).rsqrt()
    bias = -norm.running_mean * scale
    return (scale, bias) if norm.weight is None else (scale * norm.weight, bias * norm.weight + norm.bias)
