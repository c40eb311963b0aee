"""Gradients of the ops of MRLA-base, and their outputs without data, for torch.compile."""

import torch
from torch import Tensor

from timm_mrla.ops.base import folded as base_folded
from timm_mrla.ops.base import forward as base
from timm_mrla.ops.base_backward import backward as _base_backward
from timm_mrla.ops.operator import second_order


def _empty_value(x: Tensor, grid: list[int], dtype: torch.dtype) -> Tensor:
    shape = (x.shape[0], x.shape[2], *grid)
    return x.new_empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@base.register_fake
def _(x, keys, values, grid, qk, w, weight, bias, mean, var, s, heads, eps, post, rms, dtype, value_dtype):
    B, N, C = x.shape
    k, y, a = (x.new_empty(*shape, dtype=torch.float32) for shape in ((B, C), (B, C), (B, heads, len(values) + 1)))
    statistics = x.new_empty(*((6, C) if post else (B, 2, 2, N)), dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), k, _empty_value(x, grid, value_dtype), y, a, statistics


@_base_backward.register_fake
def _(d, dk, later, x, keys, values, grid, qk, w, weight, bias, s, y, a, statistics, post, train, rms, value_dtype):
    (B, _, C), T = x.shape, len(values)
    dkeys = x.new_empty(T, B, C, dtype=torch.float32)
    dvalues = x.new_empty(T, B, *grid, C, dtype=value_dtype)
    vectors = x.new_empty(C, 2, dtype=torch.float32)
    return torch.empty_like(x), dkeys, dvalues, qk.new_empty(qk.shape), w.new_empty(w.shape), vectors


def _save(ctx, inputs, output) -> None:
    x, keys, values, ctx.grid, qk, w, weight, bias, mean, _, s, _, _, ctx.post, ctx.rms, _, ctx.value_dtype = inputs
    ctx.train = ctx.post and mean is None
    ctx.save_for_backward(x, qk, w, weight, bias, s, *output[3:], *keys, *values)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d, dk, dv, *_):
    x, qk, w, weight, bias, s, y, a, statistics, *memory = ctx.saved_tensors
    keys, values = memory[: len(memory) // 2], memory[len(memory) // 2 :]
    d = torch.zeros_like(x) if d is None else d
    saved, kind = (weight, bias, s, y, a, statistics), (ctx.post, ctx.train, ctx.rms, ctx.value_dtype)
    dx, dkeys, dvalues, dqk, dw, vectors = _base_backward(d, dk, dv, x, keys, values, ctx.grid, qk, w, *saved, *kind)
    dnorm = [None if p is None else vectors[:, i].to(p.dtype) for i, p in enumerate((weight, bias))]
    before = [*dkeys.unbind()], [*dvalues.permute(0, 1, 4, 2, 3).unbind()]
    return dx, *before, None, dqk, dw, *dnorm, None, None, None, None, None, None, None, None, None


base.register_autograd(_differentiate, _save)
_base_backward.register_autograd(second_order)


@base_folded.register_fake
def _(x, keys, values, grid, qk, w, scale, bias, heads):
    k = x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
    return torch.empty_like(x), k, _empty_value(x, grid, x.dtype)
