"""Layer attention of the form `post` in evaluation mode: the batch norm is folded into vectors of channels.

`timm.utils.model.reparameterize_model` folds them once. Otherwise each call without gradients does, if nothing relies
on the calls of the layer's submodules. Without gradients, sums are in place: only into tensors that were made here and
that nothing else refers to.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from timm_mrla.layers.fast_path import FastPath
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


def _cast(*parameters: torch.Tensor, like: torch.Tensor) -> list[torch.Tensor]:
    """Parameters [C] in the dtype of a map, as [C, 1, 1]."""
    return [p.to(like.dtype)[:, None, None] for p in parameters]


def _in_place(*maps: torch.Tensor) -> bool:
    """Whether sums may be in place. A trace without gradients must equal one with them."""
    return len({t.dtype for t in maps}) == 1 and not (torch.is_grad_enabled() or torch.jit.is_tracing())


def _light(
    layer: nn.Module,
    dim: int,
    value: Callable[[torch.Tensor], torch.Tensor],
    scale: torch.Tensor | None,
    lam: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    o: torch.Tensor,
    feat_size: Grid,
) -> torch.Tensor:
    """`x + scale * g * v + lam * o + bias`; v = value(map) must be a tensor that nothing else refers to.

    dim, the number of channels, is not read from a map: in a trace it would be a tensor, which Core ML cannot convert.
    """
    x, prefix = to_map(x, layer.layout, feat_size)
    o, _ = to_map(o, layer.layout, feat_size)
    v = value(x)
    g = layer.attn.per_channel(layer.attn(x, dim), dim)
    if scale is not None:
        g = g * scale[:, None, None]
    lam, bias = _cast(lam, bias, like=v)
    if _in_place(x, o, v):
        x = torch.addcmul(bias, g.to(v.dtype), v, out=v).addcmul_(lam, o).add_(x)
    else:
        x = x + (g.to(v.dtype) * v + lam * o + bias)
    return from_map(x, layer.layout, prefix)


def infer_light(mrla: nn.Module, x: torch.Tensor, o: torch.Tensor, feat_size: Grid) -> torch.Tensor:
    """The output of a MrlaLight of the form `post` in evaluation mode, its norm folded in this call."""
    scale, bias = _fold(mrla.norm)
    return _light(mrla, mrla.v.out_channels, mrla.v, scale, mrla.lam * scale, bias, x, o, feat_size)


class InferenceLight(FastPath):
    """MRLA-light of the form `post`: `x = mrla(x, o)`."""

    def __init__(self, mrla: nn.Module) -> None:
        super().__init__()
        scale, bias = _fold(mrla.norm)
        self.layout, self.attn, self.dim = mrla.layout, mrla.attn, mrla.v.out_channels
        self.weight = nn.Parameter(mrla.v.weight * scale[:, None, None, None])
        self.bias_v = None if mrla.v.bias is None else nn.Parameter(mrla.v.bias * scale)
        self.lam = nn.Parameter(mrla.lam * scale)
        self.bias = nn.Parameter(bias)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """The scaled value of a map. Not a module, because a hook on it could keep the tensor."""
        return F.conv2d(x, self.weight, self.bias_v, padding=1, groups=self.dim)

    def forward(self, x: torch.Tensor, o: torch.Tensor, feat_size: Grid = None) -> torch.Tensor:
        if self.fast_path and (out := self.fast_path(self, x, o, feat_size)) is not None:
            return out
        return _light(self, self.dim, self.value, None, self.lam, self.bias, x, o, feat_size)


def _base(
    layer: nn.Module, scale: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, memory: Memory, feat_size: Grid
) -> tuple[torch.Tensor, Memory]:
    """`x + relu(sum_t scale * a_t * v_t + bias)` and the memory for the next block."""
    x, prefix = to_map(x, layer.layout, feat_size)
    dim = layer.v.out_channels
    scores, k = layer.attn(x, dim, memory[::2])
    memory = (*memory, k, v := layer.v(x))
    scale, m = _cast(scale, bias, like=v)
    weights = [layer.attn.per_channel(w, dim).to(v.dtype) * scale for w in scores.softmax(-1).unbind(-1)]
    if _in_place(x, v):
        m = torch.addcmul(m, weights[0], memory[1])
        for weight, value in zip(weights[1:], memory[3::2], strict=True):
            m.addcmul_(weight, value)
        x = m.relu_().add_(x)
    else:
        for weight, value in zip(weights, memory[1::2], strict=True):
            m = m + weight * value
        x = x + m.relu()
    return from_map(x, layer.layout, prefix), memory


def infer_base(mrla: nn.Module, x: torch.Tensor, memory: Memory, feat_size: Grid) -> tuple[torch.Tensor, Memory]:
    """Output and memory of a MrlaBase of the form `post` in evaluation mode, its norm folded in this call."""
    return _base(mrla, *_fold(mrla.norm), x, memory, feat_size)


class InferenceBase(FastPath):
    """MRLA-base of the form `post`: `x, memory = mrla(x, memory)`."""

    def __init__(self, mrla: nn.Module) -> None:
        super().__init__()
        scale, bias = _fold(mrla.norm)
        self.layout, self.attn, self.v = mrla.layout, mrla.attn, mrla.v
        self.scale, self.bias = nn.Parameter(scale), nn.Parameter(bias)

    def forward(self, x: torch.Tensor, memory: Memory = (), feat_size: Grid = None) -> tuple[torch.Tensor, Memory]:
        if self.fast_path and (out := self.fast_path(self, x, memory, feat_size)) is not None:
            return out
        return _base(self, self.scale, self.bias, x, memory, feat_size)
