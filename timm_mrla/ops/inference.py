"""Layers of the form `post` in evaluation mode without gradients: their norm is folded, and sums are in place.

All maps must have the dtype of the value. The sums are written only to tensors that were made here and that nothing
else refers to.
"""

import torch

from timm_mrla.layers import Grid, Memory, MrlaBase, MrlaLight, from_map, to_map
from timm_mrla.layers.folding import fold


def infer_light(layer: MrlaLight, x: torch.Tensor, o: torch.Tensor, feat_size: Grid) -> torch.Tensor:
    """`x + scale * (g * v + lam * o) + bias`, with the norm's scale and bias."""
    scale, bias = fold(layer.norm)
    lam = layer.lam if scale is None else layer.lam * scale
    x, prefix = to_map(x, layer.layout, feat_size)
    o, _ = to_map(o, layer.layout, feat_size)
    v, dim = layer.v(x), layer.v.out_channels
    g = layer.attn.per_channel(layer.attn(x, dim), dim)
    if scale is not None:
        g = g * scale[:, None, None]
    lam, bias = (p.to(v.dtype)[:, None, None] for p in (lam, bias))
    x = torch.addcmul(bias, g.to(v.dtype), v, out=v).addcmul_(lam, o).add_(x)
    return from_map(x, layer.layout, prefix)


def infer_base(layer: MrlaBase, x: torch.Tensor, memory: Memory, feat_size: Grid) -> tuple[torch.Tensor, Memory]:
    """`x + relu(scale * sum_s a_s * v_s + bias)`, with the norm's scale and bias, and the memory for the next block."""
    x, prefix = to_map(x, layer.layout, feat_size)
    dim = layer.v.out_channels
    scores, k = layer.attn(x, dim, memory[::2])
    memory = (*memory, k, v := layer.v(x))
    scale, m = (p.to(v.dtype)[:, None, None] for p in fold(layer.norm))
    weights = [layer.attn.per_channel(a, dim).to(v.dtype) * scale for a in scores.softmax(-1).unbind(-1)]
    m = torch.addcmul(m, weights[0], memory[1])
    for weight, value in zip(weights[1:], memory[3::2], strict=True):
        m.addcmul_(weight, value)
    return from_map(m.relu_().add_(x), layer.layout, prefix), memory
