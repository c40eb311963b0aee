"""Layers in evaluation mode without gradients: a batch norm is folded, and sums are in place.

All maps must have the dtype of the value. The sums are written only to tensors that were made here and that nothing
else refers to.
"""

import torch

from timm_mrla.layers import Grid, Memory, MrlaBase, MrlaLight, to_map
from timm_mrla.layers.folding import fold


def _add(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """x + m in the memory format of x, because in another one the next convolution may round otherwise."""
    return m.add_(x) if m.stride() == x.stride() else x + m


def infer_light(layer: MrlaLight, x: torch.Tensor, o: torch.Tensor, feat_size: Grid) -> torch.Tensor:
    """`x + scale * (g * v + lam * o) + bias`; the scale and the bias are the norm's in the form `post`."""
    y, prefix = to_map(layer.norm_x(x), layer.layout, feat_size)
    o, _ = to_map(layer.norm_o(o), layer.layout, feat_size)
    v, dim, lam = layer.act_v(layer.v(y)), layer.v.out_channels, layer.lam
    g = layer.attn.per_channel(layer.attn(y, dim), dim)
    if layer.form == 'post':
        scale, bias = fold(layer.norm)
        if scale is not None:
            g, lam = g * scale[:, None, None], lam * scale
        m = torch.addcmul(bias.to(v.dtype)[:, None, None], g.to(v.dtype), v, out=v)
    else:
        m = v.mul_(g.to(v.dtype))
    return _add(x, layer.join(m.addcmul_(lam.to(v.dtype)[:, None, None], o), prefix))


def infer_base(layer: MrlaBase, x: torch.Tensor, memory: Memory, feat_size: Grid) -> tuple[torch.Tensor, Memory]:
    """`x + relu(scale * sum_s a_s * v_s + bias)` in the form `post`, `x + sum_s a_s * v_s` in the form `pre`."""
    y, prefix = to_map(layer.norm_x(x), layer.layout, feat_size)
    dim = layer.v.out_channels
    scores, k = layer.attn(y, dim, memory[::2])
    memory = (*memory, k, v := layer.v(y))
    weights = [layer.attn.per_channel(a, dim).to(v.dtype) for a in scores.softmax(-1).unbind(-1)]
    if layer.form == 'post':
        scale, bias = (p.to(v.dtype)[:, None, None] for p in fold(layer.norm))
        weights = [weight * scale for weight in weights]
        m = torch.addcmul(bias, weights[0], memory[1])
    else:
        m = weights[0] * memory[1]
    for weight, value in zip(weights[1:], memory[3::2], strict=True):
        m.addcmul_(weight, value)
    return _add(x, layer.join(m.relu_() if layer.form == 'post' else m, prefix)), memory
