"""Layer attention of the form `post` for inference: the batch norm is folded; without gradients, sums are in place.

The modules overwrite only tensors that they have made themselves and that nothing else refers to.
"""

import torch
import torch.nn.functional as F
from torch import nn

from timm_mrla.layers.layout import Grid, from_map, to_map
from timm_mrla.layers.weights import Memory


def is_foldable(norm: nn.Module) -> bool:
    """Whether a norm in evaluation mode only multiplies each channel by a scale and adds a bias."""
    is_linear = isinstance(norm, nn.BatchNorm2d) and isinstance(getattr(norm, 'act', nn.Identity()), nn.Identity)
    return is_linear and norm.running_var is not None


def _fold(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the bias [C] that a batch norm in evaluation mode applies."""
    scale = (norm.running_var + norm.eps).rsqrt()
    bias = -norm.running_mean * scale
    return (scale, bias) if norm.weight is None else (scale * norm.weight, bias * norm.weight + norm.bias)


def _cast(*parameters: nn.Parameter, like: torch.Tensor) -> list[torch.Tensor]:
    """Parameters [C] in the dtype of a map, as [C, 1, 1]."""
    return [p.to(like.dtype)[:, None, None] for p in parameters]


class InferenceLight(nn.Module):
    """MRLA-light of the form `post`: `x = mrla(x, o)`."""

    fused = None  # set by timm_mrla.ops, as for MrlaLight

    def __init__(self, mrla: nn.Module) -> None:
        super().__init__()
        scale, bias = _fold(mrla.norm)
        self.layout, self.attn, self.dim = mrla.layout, mrla.attn, mrla.v.out_channels
        self.weight = nn.Parameter(mrla.v.weight * scale[:, None, None, None])
        self.bias_v = None if mrla.v.bias is None else nn.Parameter(mrla.v.bias * scale)
        self.lam = nn.Parameter(mrla.lam * scale)
        self.bias = nn.Parameter(bias)

    def forward(self, x: torch.Tensor, o: torch.Tensor, feat_size: Grid = None) -> torch.Tensor:
        if self.fused and (out := self.fused(self, x, o, feat_size)) is not None:
            return out
        x, prefix = to_map(x, self.layout, feat_size)
        o, _ = to_map(o, self.layout, feat_size)
        g = self.attn.per_channel(self.attn(x, self.dim), self.dim)
        # safe to overwrite below: only this function holds v, because no module with hooks returned it
        v = F.conv2d(x, self.weight, self.bias_v, padding=1, groups=self.dim)
        lam, bias = _cast(self.lam, self.bias, like=v)
        if torch.is_grad_enabled() or not (x.dtype == o.dtype == v.dtype):
            x = x + (g.to(v.dtype) * v + lam * o + bias)
        else:
            x = torch.addcmul(bias, g.to(v.dtype), v, out=v).addcmul_(lam, o).add_(x)
        return from_map(x, self.layout, prefix)


class InferenceBase(nn.Module):
    """MRLA-base of the form `post`: `x, memory = mrla(x, memory)`."""

    fused = None  # set by timm_mrla.ops, as for MrlaBase

    def __init__(self, mrla: nn.Module) -> None:
        super().__init__()
        scale, bias = _fold(mrla.norm)
        self.layout, self.attn, self.v = mrla.layout, mrla.attn, mrla.v
        self.scale, self.bias = nn.Parameter(scale), nn.Parameter(bias)

    def forward(self, x: torch.Tensor, memory: Memory = (), feat_size: Grid = None) -> tuple[torch.Tensor, Memory]:
        if self.fused and (out := self.fused(self, x, memory, feat_size)) is not None:
            return out
        x, prefix = to_map(x, self.layout, feat_size)
        dim = self.v.out_channels
        scores, k = self.attn(x, dim, memory[::2])
        memory = (*memory, k, v := self.v(x))
        scale, m = _cast(self.scale, self.bias, like=v)
        weights = [self.attn.per_channel(w, dim).to(v.dtype) * scale for w in scores.softmax(-1).unbind(-1)]
        if torch.is_grad_enabled() or x.dtype != v.dtype:
            for weight, value in zip(weights, memory[1::2], strict=True):
                m = m + weight * value
            x = x + m.relu()
        else:
            m = torch.addcmul(m, weights[0], memory[1])
            for weight, value in zip(weights[1:], memory[3::2], strict=True):
                m.addcmul_(weight, value)
            x = m.relu_().add_(x)
        return from_map(x, self.layout, prefix), memory
