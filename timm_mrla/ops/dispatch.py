"""Runs a layer in the fused kernels: collects the layer's tensors and calls its custom op."""

import torch
from torch import nn

from timm_mrla.layers import Grid, Memory, MrlaBase, MrlaLight
from timm_mrla.layers.folding import is_folded
from timm_mrla.ops.base_functions import base, base_folded
from timm_mrla.ops.light_functions import light_folded, light_post, light_pre
from timm_mrla.ops.light_post import MEAN, VAR
from timm_mrla.ops.reasons import drops_paths, is_rms_norm, uses_batch, value_dtype


def _scale(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Scales [B] of stochastic depth, drawn by the layer's DropPath; None if it drops nothing."""
    if drops_paths(layer):
        return layer.drop_path(x.new_ones(x.shape[0], 1, 1, 1, dtype=torch.float32)).flatten()
    return None


@torch.no_grad()
def _update_statistics(norm: nn.Module, channels: torch.Tensor) -> None:
    """Update the running statistics of a batch norm in training mode, as its own forward pass does."""
    if not (norm.training and norm.track_running_stats):
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # cumulative average, as in nn.BatchNorm2d
        momentum = 1.0 / norm.num_batches_tracked
    for running, statistic in ((norm.running_mean, channels[MEAN.value]), (norm.running_var, channels[VAR.value])):
        running.lerp_(statistic.to(running.dtype), momentum)


def _statistics(norm: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The running statistics of a batch norm, or None twice if it uses the statistics of the batch."""
    return (None, None) if uses_batch(norm) else (norm.running_mean, norm.running_var)


def _run_post(layer: MrlaLight, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    norm, heads = layer.norm, layer.attn.num_heads
    args = x, o, layer.attn.qk.weight, layer.v.weight, layer.lam
    if is_folded(norm):
        return light_folded(*args, norm.bias, heads)
    vectors = norm.weight, norm.bias, *_statistics(norm)
    out, _, channels, _, _ = light_post(*args, *vectors, _scale(layer, x), heads, norm.eps)
    _update_statistics(norm, channels)
    return out


def _to_tokens(layer: nn.Module, x: torch.Tensor, feat_size: Grid) -> tuple[torch.Tensor, list[int]]:
    """Return x as tokens [B, P + H * W, C], and their grid [H, W]."""
    if layer.layout == 'NLC':
        return x, [*feat_size]
    if layer.layout == 'NCHW':
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1, 2), [*x.shape[1:3]]


def _from_tokens(layer: nn.Module, x: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """Return tokens in the layout of a layer."""
    if layer.layout == 'NLC':
        return x
    x = x.unflatten(1, grid)
    return x.permute(0, 3, 1, 2) if layer.layout == 'NCHW' else x


def _run_pre(layer: MrlaLight, x: torch.Tensor, o: torch.Tensor, feat_size: Grid) -> torch.Tensor:
    x, grid = _to_tokens(layer, x, feat_size)
    o, _ = _to_tokens(layer, o, feat_size)
    # on a GPU, autocast runs layer norms in float32
    dtype = torch.float32 if x.is_cuda and torch.is_autocast_enabled(x.device.type) else x.dtype
    norm = layer.norm_x
    vectors = [getattr(n, name, None) for n in (norm, layer.norm_o) for name in ('weight', 'bias')]
    args = x, o, grid, layer.attn.qk.weight, layer.v.weight, layer.lam
    kind = layer.attn.num_heads, norm.eps, is_rms_norm(norm), dtype, value_dtype(x)
    return _from_tokens(layer, light_pre(*args, *vectors, _scale(layer, x), *kind)[0], grid)


def _run_base(layer: MrlaBase, x: torch.Tensor, memory: Memory, feat_size: Grid) -> tuple[torch.Tensor, Memory]:
    x, grid = _to_tokens(layer, x, feat_size)
    is_post, heads, dtype = layer.form == 'post', layer.attn.num_heads, x.dtype
    norm = layer.norm if is_post else layer.norm_x
    keys = [key.float().flatten(1).contiguous() for key in memory[::2]]
    args = (x, keys, [*memory[1::2]], grid, layer.attn.qk.weight, layer.v.weight)
    if is_folded(norm):
        out, k, v = base_folded(*args, norm.weight, norm.bias, heads)
    else:
        v_dtype = value_dtype(x)
        if not is_post and x.is_cuda and v_dtype != dtype and x.shape[1] > grid[0] * grid[1]:
            dtype = torch.float32  # under autocast, a layer norm returns the prefix in float32
        vectors = norm.weight, getattr(norm, 'bias', None), *(_statistics(norm) if is_post else (None, None))
        kind = heads, norm.eps, is_post, is_rms_norm(norm), dtype, v_dtype
        out, k, v, _, _, channels = base(*args, *vectors, _scale(layer, x), *kind)
        if is_post:
            _update_statistics(norm, channels)
    return _from_tokens(layer, out, grid), (*memory, k.unflatten(1, (heads, -1)), v)


def run(
    layer: nn.Module, x: torch.Tensor, other: torch.Tensor | Memory, feat_size: Grid = None
) -> torch.Tensor | tuple[torch.Tensor, Memory]:
    """Run a layer in the kernels, which `reason` must have allowed. other: the shortcut (light), the memory (base)."""
    if isinstance(layer, MrlaBase):
        return _run_base(layer, x, other, feat_size)
    if layer.form == 'pre':
        return _run_pre(layer, x, other, feat_size)
    is_nhwc = layer.layout == 'NHWC'
    if is_nhwc:
        x, other = x.permute(0, 3, 1, 2), other.permute(0, 3, 1, 2)
    out = _run_post(layer, x, other)
    return out.permute(0, 2, 3, 1) if is_nhwc else out
