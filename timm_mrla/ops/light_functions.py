"""Registers the kernels of MRLA-light as PyTorch custom ops, which autograd and torch.compile support.

The ops are functional: they modify no argument. They import the kernels, and so Triton, when they first run.
"""

import torch
from torch import Tensor

from timm_mrla.ops.operator import operator, second_order


@operator('timm_mrla::light_post')
def light_post(
    x: Tensor,
    o: Tensor,
    qk: Tensor,
    w: Tensor,
    lam: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    s: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """MRLA-light of the form `post`, `x + s * batch_norm(g * v + lam * o)`.

    Args:
        x, o: Maps [B, C, H, W] in channels_last.
        qk: Weights [2, K] of the convolutions of query and key.
        w: Weights [9, C] of the convolution of the value.
        lam, gamma, beta: Vectors [C]; gamma and beta are the affine parameters of the norm, or None.
        mean, var: Running statistics [C]; None to use the statistics of the batch.
        s: Scales [B] of stochastic depth, or None.
        heads, eps: Number of heads; epsilon of the norm.

    Returns:
        The output, and four tensors for backward. The second of them is [6, C]; its rows 2 and 4 are the mean and the
        unbiased variance of the batch.
    """
    from timm_mrla.ops import light_post as kernels

    with torch.cuda.device_of(x):
        return kernels.forward(x, o, qk, w, lam, gamma, beta, mean, var, s, heads, eps)


@light_post.register_fake
def _(x, o, qk, w, lam, gamma, beta, mean, var, s, heads, eps):
    from timm_mrla.ops import light_post as kernels

    B, C, _, _ = x.shape
    rows = x.new_empty(B, kernels.rows_of(x), 7, C, dtype=torch.float32)
    channels, y = (x.new_empty(n, C, dtype=torch.float32) for n in (6, B))
    return torch.empty_like(x), rows, channels, y, x.new_empty(B, heads, dtype=torch.float32)


@operator('timm_mrla::light_post_backward')
def _light_post_backward(
    d: Tensor,
    x: Tensor,
    o: Tensor,
    qk: Tensor,
    w: Tensor,
    lam: Tensor,
    s: Tensor | None,
    rows: Tensor,
    channels: Tensor,
    y: Tensor,
    g: Tensor,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, o, qk, w (transposed), and of gamma, beta and lam in one tensor [3, C]."""
    from timm_mrla.ops import light_post_backward as kernels

    with torch.cuda.device_of(x):
        d = d.contiguous(memory_format=torch.channels_last)
        return kernels.backward(d, x, o, qk, w, lam, s, rows, channels, y, g, train)


@_light_post_backward.register_fake
def _(d, x, o, qk, w, lam, s, rows, channels, y, g, train):
    vectors = x.new_empty(3, w.shape[1], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(o), torch.empty_like(qk), w.new_empty(w.shape[::-1]), vectors


def _save_post(ctx, inputs, output) -> None:
    x, o, qk, w, lam, gamma, _, mean, _, s, _, _ = inputs
    ctx.save_for_backward(x, o, qk, w, lam, s, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.train, ctx.dtypes = mean is None, (gamma if gamma is None else gamma.dtype, lam.dtype)


def _differentiate_post(ctx, d, *_):
    dx, do, dqk, dw, vectors = _light_post_backward(d, *ctx.saved_tensors, ctx.train)
    affine, dtype = ctx.dtypes
    dgamma, dbeta = (None, None) if affine is None else (vectors[0].to(affine), vectors[1].to(affine))
    return dx, do, dqk, dw.t(), vectors[2].to(dtype), dgamma, dbeta, None, None, None, None, None


light_post.register_autograd(_differentiate_post, _save_post)
_light_post_backward.register_autograd(second_order)


@operator('timm_mrla::light_folded')
def light_folded(x: Tensor, o: Tensor, qk: Tensor, w: Tensor, lam: Tensor, bias: Tensor, heads: int) -> Tensor:
    """MRLA-light of the form `post` for inference, its norm folded into w [9, C], lam and bias [C]."""
    from timm_mrla.ops import light_post as kernels

    with torch.cuda.device_of(x):
        return kernels.folded(x, o, qk, w, lam, bias, heads)


@light_folded.register_fake
def _(x, o, qk, w, lam, bias, heads):
    return torch.empty_like(x)


@operator('timm_mrla::light_pre')
def light_pre(
    x: Tensor,
    o: Tensor,
    grid: list[int],
    qk: Tensor,
    w: Tensor,
    lam: Tensor,
    nw: Tensor,
    nb: Tensor | None,
    ow: Tensor | None,
    ob: Tensor | None,
    s: Tensor | None,
    heads: int,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MRLA-light of the form `pre`, `x + s * (g * gelu(v) + lam * p)`, where y and p are x and o after their norms.

    Args:
        x, o: Tokens [B, P + H * W, C].
        grid: H and W.
        qk, w, lam, s, heads: As in `light_post`.
        nw, nb, ow, ob: Weights and biases [C] of the norms of x and o; None for a missing bias or a missing norm of o.
        eps, rms: Epsilon of the norms; whether they are RMS norms rather than layer norms.
        dtype, gradient_dtype: Dtypes of the output and of the intermediate maps in backward.

    Returns:
        The output, and three tensors for backward.
    """
    from timm_mrla.ops import light_pre as kernels

    with torch.cuda.device_of(x):
        return kernels.forward(x, o, grid, qk, w, lam, nw, nb, ow, ob, s, heads, eps, rms, dtype)


@light_pre.register_fake
def _(x, o, grid, qk, w, lam, nw, nb, ow, ob, s, heads, eps, rms, dtype, gradient_dtype):
    B, N, C = x.shape
    stats, y, g = (x.new_empty(*shape, dtype=torch.float32) for shape in ((B, 2, 2, N), (B, C), (B, heads)))
    return torch.empty_like(x, dtype=dtype), stats, y, g


@operator('timm_mrla::light_pre_backward')
def _light_pre_backward(
    d: Tensor,
    x: Tensor,
    o: Tensor,
    grid: list[int],
    qk: Tensor,
    w: Tensor,
    lam: Tensor,
    nw: Tensor,
    nb: Tensor | None,
    ow: Tensor | None,
    ob: Tensor | None,
    s: Tensor | None,
    stats: Tensor,
    y: Tensor,
    g: Tensor,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, o, qk, w (transposed), and of nw, nb, ow, ob and lam in one tensor [5, C]."""
    from timm_mrla.ops import light_pre_backward as kernels

    with torch.cuda.device_of(x):
        return kernels.backward(d.contiguous(), x, o, grid, qk, w, lam, nw, nb, ow, ob, s, stats, y, g, rms, dtype)


@_light_pre_backward.register_fake
def _(d, x, o, grid, qk, w, lam, nw, nb, ow, ob, s, stats, y, g, rms, dtype):
    vectors = x.new_empty(5, w.shape[1], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(o), torch.empty_like(qk), w.new_empty(w.shape[::-1]), vectors


def _save_pre(ctx, inputs, output) -> None:
    x, o, ctx.grid, qk, w, lam, nw, nb, ow, ob, s, _, _, ctx.rms, _, ctx.dtype = inputs
    ctx.save_for_backward(x, o, qk, w, lam, nw, nb, ow, ob, s, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_pre(ctx, d, *_):
    x, o, qk, w, lam, *norms, s, stats, y, g = ctx.saved_tensors
    dx, do, dqk, dw, vectors = _light_pre_backward(
        d, x, o, ctx.grid, qk, w, lam, *norms, s, stats, y, g, ctx.rms, ctx.dtype
    )
    dlam = vectors[4].to(lam.dtype)
    dnorms = [None if p is None else dp.to(p.dtype) for p, dp in zip(norms, vectors[:4], strict=True)]
    return dx, do, None, dqk, dw.t(), dlam, *dnorms, None, None, None, None, None, None


light_pre.register_autograd(_differentiate_pre, _save_pre)
_light_pre_backward.register_autograd(second_order)
