"""Gradients of the ops of MRLA-light, and their outputs without data, for torch.compile."""

import torch

from timm_mrla.ops.light_post import folded as light_folded
from timm_mrla.ops.light_post import forward as light_post
from timm_mrla.ops.light_post import rows_of
from timm_mrla.ops.light_post_backward import backward as _light_post_backward
from timm_mrla.ops.light_pre import forward as light_pre
from timm_mrla.ops.light_pre_backward import backward as _light_pre_backward
from timm_mrla.ops.operator import second_order


@light_post.register_fake
def _(x, o, qk, w, lam, gamma, beta, mean, var, s, heads, eps):
    B, C, _, _ = x.shape
    rows = x.new_empty(B, rows_of(x), 7, C, dtype=torch.float32)
    channels, y = (x.new_empty(n, C, dtype=torch.float32) for n in (6, B))
    return torch.empty_like(x), rows, channels, y, x.new_empty(B, heads, dtype=torch.float32)


@_light_post_backward.register_fake
def _(d, x, o, qk, w, lam, s, rows, channels, y, g, train):
    vectors = x.new_empty(3, w.shape[0], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(o), qk.new_empty(qk.shape), w.new_empty(w.shape), vectors


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
    return dx, do, dqk, dw, vectors[2].to(dtype), dgamma, dbeta, None, None, None, None, None


light_post.register_autograd(_differentiate_post, _save_post)
_light_post_backward.register_autograd(second_order)


@light_folded.register_fake
def _(x, o, qk, w, lam, bias, heads):
    return torch.empty_like(x)


@light_pre.register_fake
def _(x, o, grid, qk, w, lam, nw, nb, ow, ob, s, heads, eps, rms, dtype, gradient_dtype):
    B, N, C = x.shape
    stats, y, g = (x.new_empty(*shape, dtype=torch.float32) for shape in ((B, 2, 2, N), (B, C), (B, heads)))
    return torch.empty_like(x, dtype=dtype), stats, y, g


@_light_pre_backward.register_fake
def _(d, x, o, grid, qk, w, lam, nw, nb, ow, ob, s, stats, y, g, rms, dtype):
    vectors = x.new_empty(5, w.shape[0], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(o), qk.new_empty(qk.shape), w.new_empty(w.shape), vectors


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
    return dx, do, None, dqk, dw, dlam, *dnorms, None, None, None, None, None, None


light_pre.register_autograd(_differentiate_pre, _save_pre)
_light_pre_backward.register_autograd(second_order)
