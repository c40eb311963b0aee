"""Registers the kernels of MRLA-base as PyTorch custom ops, which autograd and torch.compile support.

The ops are functional: they modify no argument. They import the kernels, and so Triton, when they first run.
"""

import torch
from torch import Tensor

from timm_mrla.ops.operator import operator, second_order


def _aligned(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors that are not aligned to 16 bytes, because the kernels assume this alignment of keys and values."""
    return [t.clone() if t.data_ptr() % 16 else t for t in tensors]


@operator('timm_mrla::base')
def base(
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    grid: list[int],
    qk: Tensor,
    w: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    s: Tensor | None,
    heads: int,
    eps: float,
    post: bool,
    rms: bool,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """MRLA-base, `x + s * relu(batch_norm(m))` if post, else `x + s * m`, `m = sum_t a_t * v_t`.

    Args:
        x: Maps or tokens [B, P + H * W, C].
        keys, values: Keys [B, C] in float32 and values [B, C, H, W] in channels_last of earlier blocks.
        grid: H and W.
        qk: Weights [2, K] of the convolutions of query and key.
        w: Weights [9, C] of the convolution of the value.
        weight, bias: Affine parameters [C] of the norm, which is of m if post, else of x; each may be None.
        mean, var: Running statistics [C] of the norm of m; None to use the statistics of the batch.
        s: Scales [B] of stochastic depth, or None.
        heads, eps, rms: Number of heads; epsilon of the norm; whether the norm of x is an RMS norm.
        dtype, value_dtype: Dtypes of the output and of the value.

    Returns:
        The output, the key and the value of this block, and three tensors for backward. If post, the last one is
        [6, C]; its rows 2 and 4 are the mean and the unbiased variance of the batch.
    """
    from timm_mrla.ops import base as kernels

    keys, values = _aligned(keys), _aligned(values)
    with torch.cuda.device_of(x):
        dtypes = (dtype, value_dtype)
        return kernels.forward(x, keys, values, grid, qk, w, weight, bias, mean, var, s, heads, eps, post, rms, dtypes)


def _empty_value(x: Tensor, grid: list[int], dtype: torch.dtype) -> Tensor:
    shape = (x.shape[0], x.shape[2], *grid)
    return x.new_empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@base.register_fake
def _(x, keys, values, grid, qk, w, weight, bias, mean, var, s, heads, eps, post, rms, dtype, value_dtype):
    B, N, C = x.shape
    k, y, a = (x.new_empty(*shape, dtype=torch.float32) for shape in ((B, C), (B, C), (B, heads, len(values) + 1)))
    statistics = x.new_empty(*((6, C) if post else (B, 2, 2, N)), dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), k, _empty_value(x, grid, value_dtype), y, a, statistics


@operator('timm_mrla::base_backward')
def _base_backward(
    d: Tensor,
    dk: Tensor | None,
    later: Tensor | None,
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    grid: list[int],
    qk: Tensor,
    w: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    y: Tensor,
    a: Tensor,
    statistics: Tensor,
    post: bool,
    train: bool,
    rms: bool,
    value_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, earlier keys and values, qk, w (transposed), and of weight and bias in one tensor [C, 2]."""
    from timm_mrla.ops import base_backward as kernels

    keys, values = _aligned(keys), _aligned(values)
    with torch.cuda.device_of(x):
        later = None if later is None else later.contiguous(memory_format=torch.channels_last)
        return kernels.backward(
            *(d.contiguous(), dk, later, x, keys, values, grid, qk, w, weight, bias, s, y, a, statistics),
            *(post, train, rms, value_dtype),
        )


@_base_backward.register_fake
def _(d, dk, later, x, keys, values, grid, qk, w, weight, bias, s, y, a, statistics, post, train, rms, value_dtype):
    (B, _, C), T = x.shape, len(values)
    dkeys = x.new_empty(T, B, C, dtype=torch.float32)
    dvalues = x.new_empty(T, B, *grid, C, dtype=value_dtype)
    vectors = x.new_empty(C, 2, dtype=torch.float32)
    return torch.empty_like(x), dkeys, dvalues, torch.empty_like(qk), w.new_empty(w.shape[::-1]), vectors


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
    dx, dkeys, dvalues, dqk, dw, vectors = _base_backward(
        *(d, dk, dv, x, keys, values, ctx.grid, qk, w, weight, bias, s, y, a, statistics),
        *(ctx.post, ctx.train, ctx.rms, ctx.value_dtype),
    )
    dnorm = [None if p is None else vectors[:, i].to(p.dtype) for i, p in enumerate((weight, bias))]
    before = [*dkeys.unbind()], [*dvalues.permute(0, 1, 4, 2, 3).unbind()]
    return dx, *before, None, dqk, dw.t(), *dnorm, None, None, None, None, None, None, None, None, None


base.register_autograd(_differentiate, _save)
_base_backward.register_autograd(second_order)


@operator('timm_mrla::base_folded')
def base_folded(
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    grid: list[int],
    qk: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """MRLA-base of the form `post` for inference, its norm as scale and bias [C]: output, key and value."""
    from timm_mrla.ops import base as kernels

    keys, values = _aligned(keys), _aligned(values)
    with torch.cuda.device_of(x):
        return kernels.folded(x, keys, values, grid, qk, w, scale, bias, heads)


@base_folded.register_fake
def _(x, keys, values, grid, qk, w, scale, bias, heads):
    k = x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
    return torch.empty_like(x), k, _empty_value(x, grid, x.dtype)
