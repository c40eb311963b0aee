"""Decides whether layer attention runs in the fused kernels, and says why not.

A layer calls its children one by one, so hooks, adapters, pruning, sharding and quantizers see them. The kernels pass
the children by. So they run only where nobody could tell, and the plain layer runs everywhere else.
"""

import functools
import importlib.util
import logging
import os

import torch
from timm.layers import BatchNormAct2d, DropPath, LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d
from torch import nn

from timm_mrla.layers import Grid, MrlaLight, QueryKey
from timm_mrla.layers.inference import InferenceLight
from timm_mrla.layers.weights import LightWeights
from timm_mrla.ops.functions import light_folded, light_post, light_pre

_logger = logging.getLogger(__name__)

_enabled = os.environ.get('TIMM_MRLA_FUSED', '1') != '0'
_has_triton = importlib.util.find_spec('triton') is not None
_interpreter = os.environ.get('TRITON_INTERPRET', '0') == '1'  # Triton's own switch: kernels run on CPU tensors


def set_fused(enable: bool = True) -> None:
    """Turn the fused kernels of layer attention on or off, for all models of this process.

    They are on by default, and off if the environment variable TIMM_MRLA_FUSED is 0. Compiled models compile again.
    """
    global _enabled
    _enabled = enable


def _device(x: torch.Tensor) -> str:
    """Why the kernels cannot run where x is; empty if they can."""
    if not _enabled:
        return 'the kernels are turned off, by TIMM_MRLA_FUSED=0 or timm_mrla.set_fused(False)'
    if not (x.is_cuda or _interpreter):
        return f'the images are on the device {x.device.type}, and the kernels are for cuda'
    if not _has_triton:
        return 'Triton is not installed'
    if x.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return 'the GPU is not one of NVIDIA of compute capability 8.0 or later'
    return ''


def _tracer(x: torch.Tensor) -> str:
    """Which tracer or transform looks at each operation; empty if none does."""
    if torch.compiler.is_exporting():
        return 'the model is exported'
    if torch.compiler.is_compiling():
        return ''
    if torch.jit.is_tracing():
        return 'the model is traced'
    if torch._C._functorch.peek_interpreter_stack() is not None:  # no public way to ask
        return 'a transform of torch.func is active'
    if torch.autograd.forward_ad._current_level >= 0:
        return 'forward-mode differentiation is active'
    if torch._C._len_torch_dispatch_stack():
        return 'a mode that sees each operation is active, such as FlopCounterMode'
    return ''


def _tensors(layer: nn.Module, x: torch.Tensor, o: torch.Tensor, weight: torch.Tensor) -> str:
    """What is wrong with the maps x and o of a layer, whose value has a weight; empty if nothing is."""
    if any(type(p) not in (nn.Parameter, torch.Tensor) for p in layer.parameters()):
        return 'its weights are tensors of another class, such as DTensor'
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'its maps are {x.dtype}'
    if o.dtype != x.dtype or o.shape != x.shape:
        return f'its maps differ: {x.dtype} {[*x.shape]} and {o.dtype} {[*o.shape]}'
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return f'its weights are {weight.dtype} and its maps {x.dtype}, without autocast'
    if x.numel() == 0:
        return 'the batch is empty'
    if x[0].numel() >= 2**31:
        return 'its maps have 2^31 elements or more'
    memory = torch.channels_last if layer.layout == 'NCHW' else torch.contiguous_format
    if not (x.is_contiguous(memory_format=memory) and o.is_contiguous(memory_format=memory)):
        return f'its maps are not contiguous in {"channels_last" if layer.layout == "NCHW" else layer.layout}'
    return ''


def _children(layer: nn.Module) -> str:
    """Which child of a layer somebody has changed or looks at; empty if none."""
    if nn.modules.module._has_any_global_hook():
        return 'a hook on all modules is registered'
    for name, child in layer.named_modules():
        if name and (
            child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
        ):
            return f'a hook is on {name}'
    attn = layer.attn
    if type(attn) is not LightWeights or type(attn.qk) is not QueryKey:
        return f'attn.qk is {type(attn.qk).__name__}'
    return ''


def _is_batch_norm(norm: nn.Module) -> bool:
    """Whether a norm is a batch norm and nothing else."""
    if type(norm) is BatchNormAct2d:
        return type(norm.act) is nn.Identity and type(norm.drop) is nn.Identity
    return type(norm) is nn.BatchNorm2d


def _is_rms_norm(norm: nn.Module) -> bool:
    return type(norm) in (RmsNorm, RmsNorm2d)


def _norms(layer: MrlaLight, x: torch.Tensor) -> str:
    """Which norm of the form `pre` the kernels do not compute; empty if none."""
    for name, norm in (('norm_x', layer.norm_x), ('norm_o', layer.norm_o)):
        if name == 'norm_o' and type(norm) is nn.Identity:
            continue
        if type(norm) not in (nn.LayerNorm, LayerNorm, LayerNorm2d) and not _is_rms_norm(norm):
            return f'{name} is {type(norm).__name__}'
        if norm.weight is None or norm.weight.shape != layer.lam.shape:
            return f'{name} has no weight for each channel'
        if norm.eps != layer.norm_x.eps or type(norm) is not type(layer.norm_x):
            return f'{name} is another norm than norm_x'
        if getattr(norm, '_fast_norm', False):
            return "timm's fast norm is on"
    if _is_rms_norm(layer.norm_x) and x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        return 'norm_x is an RMS norm of maps in half precision under autocast'
    return ''


def _light(layer: MrlaLight, x: torch.Tensor, o: torch.Tensor) -> str:
    """What of a layer the kernels do not compute; empty if nothing."""
    v, norm = layer.v, layer.norm
    if type(v) is not nn.Conv2d or v.bias is not None or v.padding_mode != 'zeros':
        return f'v is {v}'
    if type(layer.drop_path) not in (nn.Identity, DropPath):
        return f'drop_path is {type(layer.drop_path).__name__}'
    if type(layer.norm_v) is not nn.Identity:
        return f'norm_v is {type(layer.norm_v).__name__}'
    if layer.form == 'pre':
        if type(layer.act_v) is not nn.GELU or layer.act_v.approximate != 'none':
            return f'act_v is {layer.act_v}'
        return _norms(layer, x)
    if type(layer.act_v) is not nn.Identity:
        return f'act_v is {layer.act_v}'
    if not _is_batch_norm(norm):
        return f'norm is {type(norm).__name__}'
    if norm.training and x.numel() == x.shape[1]:
        return 'its batch has one value for each channel, of which there is no variance'
    return ''


def reason(layer: nn.Module, x: torch.Tensor, o: torch.Tensor, feat_size: Grid = None) -> str:
    """Why layer attention on x and o does not run in the kernels, in one sentence; empty if it does."""
    if type(x) is not torch.Tensor:
        return f'its maps are of class {type(x).__name__}'
    if type(layer) not in (MrlaLight, InferenceLight):
        return f'there are no kernels for {type(layer).__name__}'
    if why := _device(x) or _tracer(x):
        return why
    if isinstance(layer, MrlaLight):
        form, weight, why = layer.form, layer.v.weight, _light(layer, x, o)
    else:
        form, weight, why = 'folded', layer.weight, layer.bias_v is not None and 'the norm of its value is folded too'
    why = why or _children(layer) or _tensors(layer, x, o, weight)
    return why or _trial(form, x.device, x.dtype, len(weight), layer.attn.num_heads)


@torch.compiler.assume_constant_result  # dynamo calls it, rather than trace it
def _trial(form: str, device: torch.device, dtype: torch.dtype, dim: int, heads: int) -> str:
    """Why Triton cannot run the kernels here; empty if it can.

    So a kernel that does not compile or launch on a GPU stops nobody's training, and is reported once.
    """
    return _try(form, device, dtype, dim, heads)


@functools.cache
def _try(form: str, device: torch.device, dtype: torch.dtype, dim: int, heads: int) -> str:
    """A small run, forward and backward."""
    x = torch.ones(1, dim, 2, 2, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    qk, w, lam = (torch.ones(*shape, device=device) for shape in ((2, 3), (9, dim), (dim,)))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x.requires_grad_(form != 'folded')
            if form == 'folded':
                light_folded(x, x, qk, w, lam, lam, heads)
            elif form == 'post':
                light_post(x, x, qk, w, lam, lam, lam, None, None, None, heads, 1e-5)[0].sum().backward()
            else:
                x = x.permute(0, 2, 3, 1).flatten(1, 2)
                norms = (lam, lam, lam, lam, None, heads, 1e-5, False, dtype, dtype)
                light_pre(x, x, (2, 2), qk, w, lam, *norms)[0].sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever Triton, its compiler and the driver raise
        why = f'Triton cannot run the kernels here: {type(e).__name__}: {" ".join(str(e).split())[:300]}'
        _logger.warning(f'layer attention runs without its fused kernels, {why}')
        return why
    return ''


def _qk(layer: nn.Module) -> torch.Tensor:
    return layer.attn.qk.weight.flatten(1)


def _taps(weight: torch.Tensor) -> torch.Tensor:
    """Weights of the value [C, 1, 3, 3] -> [9, C], which the kernels read in one piece."""
    return weight.flatten(1).t().contiguous()


def _scale(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Scales [B] of stochastic depth, drawn by the layer's own module."""
    if layer.drop_path.training and isinstance(layer.drop_path, DropPath):
        return layer.drop_path(x.new_ones(x.shape[0], 1, 1, 1, dtype=torch.float32)).flatten()
    return None


def _update_statistics(norm: nn.Module, mean: torch.Tensor, var: torch.Tensor) -> None:
    """What a batch norm in training mode does to its running statistics."""
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # cumulative average
        momentum = 1.0 / norm.num_batches_tracked
    for running, statistic in ((norm.running_mean, mean), (norm.running_var, var)):
        running.lerp_(statistic.to(running.dtype), momentum)


def _run_post(layer: MrlaLight, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    norm = layer.norm
    uses_batch = norm.training or norm.running_mean is None
    statistics = (None, None) if uses_batch else (norm.running_mean, norm.running_var)
    out, _, channels, _, _ = light_post(
        *(x, o, _qk(layer), _taps(layer.v.weight), layer.lam, norm.weight, norm.bias, *statistics, _scale(layer, x)),
        *(layer.attn.num_heads, norm.eps),
    )
    if norm.training and norm.track_running_stats:
        with torch.no_grad():
            _update_statistics(norm, channels[3], channels[5])
    return out


def _run_pre(layer: MrlaLight, x: torch.Tensor, o: torch.Tensor, feat_size: Grid) -> torch.Tensor:
    if layer.layout == 'NCHW':
        x, o = x.permute(0, 2, 3, 1), o.permute(0, 2, 3, 1)
    grid = feat_size if layer.layout == 'NLC' else x.shape[1:3]
    if layer.layout != 'NLC':
        x, o = x.flatten(1, 2), o.flatten(1, 2)
    dtype = gradient_dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):  # on a GPU, layer norms then give float32
        dtype = torch.float32 if x.is_cuda else x.dtype
        gradient_dtype = torch.get_autocast_dtype(x.device.type)
    norm = layer.norm_x
    vectors = [getattr(n, name, None) for n in (norm, layer.norm_o) for name in ('weight', 'bias')]
    out = light_pre(
        *(x, o, grid, _qk(layer), _taps(layer.v.weight), layer.lam, *vectors, _scale(layer, x)),
        *(layer.attn.num_heads, norm.eps, _is_rms_norm(norm), dtype, gradient_dtype),
    )[0]
    if layer.layout != 'NLC':
        out = out.unflatten(1, grid)
    return out.permute(0, 3, 1, 2) if layer.layout == 'NCHW' else out


def _run_folded(layer: InferenceLight, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    return light_folded(x, o, _qk(layer), _taps(layer.weight), layer.lam, layer.bias, layer.attn.num_heads)


def fused(layer: nn.Module, x: torch.Tensor, o: torch.Tensor, feat_size: Grid = None) -> torch.Tensor | None:
    """Layer attention in the kernels, or None where they may not run."""
    if reason(layer, x, o, feat_size):
        return None
    if isinstance(layer, InferenceLight):
        return _run_folded(layer, x, o)
    return _run_post(layer, x, o) if layer.form == 'post' else _run_pre(layer, x, o, feat_size)
