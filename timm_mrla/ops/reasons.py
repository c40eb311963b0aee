"""Decides whether a layer can run in the fused kernels, and says why not.

The plain layer calls its submodules one by one, and hooks, adapters, pruning, sharding and quantizers rely on that. The
kernels skip the submodules. So they run only if nothing relies on those calls; otherwise the plain layer runs.
"""

import importlib.util
import os

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d
from torch import nn

from timm_mrla.layers import Grid, Memory, MrlaBase, MrlaLight, QueryKey
from timm_mrla.layers.folding import is_batch_norm, is_folded
from timm_mrla.layers.layout import is_exporting
from timm_mrla.layers.query_key import Gate, Scores
from timm_mrla.switches import is_on

_enabled = is_on('TIMM_MRLA_FUSED', os.environ.get('TIMM_MRLA_FUSED', 'on'))
_has_triton = importlib.util.find_spec('triton') is not None
_interpreter = os.environ.get('TRITON_INTERPRET', '0') == '1'  # Triton's own variable: kernels run on CPU tensors


def set_fused(enable: bool = True) -> None:
    """Turn the fused kernels of layer attention on or off, for all models of this process.

    They are on by default; the environment variable TIMM_MRLA_FUSED=0 turns them off. Compiled models compile again.
    """
    global _enabled
    _enabled = is_on('enable', enable)


def _device(x: torch.Tensor) -> str:
    """Why the kernels cannot run on the device of x; empty if they can."""
    if not _enabled:
        return 'the kernels are turned off, by TIMM_MRLA_FUSED=0 or timm_mrla.set_fused(False)'
    if not (x.is_cuda or _interpreter):
        return f'the images are on the device {x.device.type}, and the kernels are for cuda'
    if not _has_triton:
        return 'Triton is not installed'
    if x.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return 'the GPU is not one of NVIDIA of compute capability 8.0 or later'
    return ''


def in_dispatch_mode() -> bool:
    """Whether a mode sees each operation; there is no public function for this."""
    return torch._C._len_torch_dispatch_stack() > 0


@torch.compiler.assume_constant_result  # torch.compile cannot trace this; it compiles again if the transforms change
def _transform() -> str:
    """Which active transform must see each operation; empty if none."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # there is no public function for this
        return 'a transform of torch.func is active'
    return 'forward-mode differentiation is active' if torch.autograd.forward_ad._current_level >= 0 else ''


def _tracer() -> str:
    """Which active tracer, transform or mode must see each operation; empty if none."""
    if is_exporting():
        return 'the model is exported'
    if (why := _transform()) or torch.compiler.is_compiling():
        return why
    if torch.jit.is_tracing():
        return 'the model is traced'
    if in_dispatch_mode():
        return 'a mode that sees each operation is active, such as FlopCounterMode'
    return ''


def _tensors(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why the kernels cannot read the map x; empty if they can. weight: of the value."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'its maps are {x.dtype}'
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return f'its weights are {weight.dtype} and its maps {x.dtype}, without autocast'
    if x.numel() == 0:
        return 'the batch is empty'
    if x.numel() >= 2**31 * len(x):
        return 'its maps have 2^31 elements or more'
    return ''


def _strides(layer: nn.Module, *maps: torch.Tensor) -> str:
    """Why the kernels cannot read maps by the strides that they have; empty if they can."""
    memory = torch.channels_last if layer.layout == 'NCHW' else torch.contiguous_format
    if not all(x.is_contiguous(memory_format=memory) for x in maps):
        return f'its maps are not contiguous in {"channels_last" if layer.layout == "NCHW" else layer.layout}'
    return ''


def _shortcut(layer: nn.Module, x: torch.Tensor, o: torch.Tensor) -> str:
    """Why the kernels cannot read the maps x and o of MRLA-light; empty if they can."""
    if o.dtype != x.dtype or o.shape != x.shape:
        return f'its maps differ: {x.dtype} {[*x.shape]} and {o.dtype} {[*o.shape]}'
    return _strides(layer, x, o)


def value_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a convolution returns a map, which autocast may change."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _memory(layer: nn.Module, x: torch.Tensor, memory: Memory) -> str:
    """Why the kernels cannot read the map x and the memory of MRLA-base; empty if they can."""
    if why := _strides(layer, x):
        return why
    dtype = value_dtype(x)
    for key, value in zip(memory[::2], memory[1::2], strict=True):
        if type(key) is not torch.Tensor or type(value) is not torch.Tensor:
            return f'its memory is of class {type(value).__name__}'
        if value.dtype != dtype or not value.is_contiguous(memory_format=torch.channels_last):
            return f'a value of its memory is {value.dtype} or not contiguous in channels_last'
    return ''


def _submodule(module: nn.Module) -> str:
    """Which part of a module has a hook, or parameters of another class; empty if none."""
    for name, child in module._modules.items():  # named_modules() takes five times as long
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            return f'a hook is on {name}'
        if child._parameters and (why := _parameters(child)):
            return why
        if child._modules and (why := _submodule(child)):
            return why.replace('a hook is on ', f'a hook is on {name}.')
    return ''


def _parameters(module: nn.Module) -> str:
    """Whether a module itself has parameters of another class; empty if not."""
    for p in module._parameters.values():
        if p is not None and type(p) not in (nn.Parameter, torch.Tensor):
            return 'its weights are tensors of another class, such as DTensor'
    return ''


def _children(layer: nn.Module) -> str:
    """Which submodule or parameter of a layer was replaced, or has a hook; empty if none."""
    if nn.modules.module._has_any_global_hook():
        return 'a hook on all modules is registered'
    if why := _submodule(layer) or _parameters(layer):
        return why
    attn = layer.attn
    if type(attn) not in (Gate, Scores) or type(attn.qk) is not QueryKey:
        return f'attn.qk is {type(attn.qk).__name__}'
    return ''


def uses_batch(norm: nn.Module) -> bool:
    """Whether a batch norm uses the statistics of the batch."""
    return norm.training or norm.running_mean is None


def drops_paths(layer: nn.Module) -> bool:
    """Whether a layer draws scales of stochastic depth."""
    return isinstance(layer.drop_path, DropPath) and layer.drop_path.training


def is_rms_norm(norm: nn.Module) -> bool:
    """Whether a norm does not subtract the mean."""
    return type(norm) in (RmsNorm, RmsNorm2d)


def _norms(layer: nn.Module, x: torch.Tensor) -> str:
    """Which norm of the form `pre` the kernels cannot compute; empty if none."""
    norm_x, channels = layer.norm_x, layer.v.out_channels
    norms = {'norm_x': norm_x}
    if isinstance(layer, MrlaLight) and type(layer.norm_o) is not nn.Identity:
        norms['norm_o'] = layer.norm_o
    for name, norm in norms.items():
        if type(norm) not in (nn.LayerNorm, LayerNorm, LayerNorm2d) and not is_rms_norm(norm):
            return f'{name} is {type(norm).__name__}'
        if (weight := norm.weight) is None or weight.shape != (channels,):
            return f'{name} has no weight for each channel'
        if norm.eps != norm_x.eps or type(norm) is not type(norm_x):
            return f'{name} is another norm than norm_x'
        if vars(norm).get('_fast_norm'):
            return "timm's fast norm is on"
    if is_rms_norm(norm_x) and x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        return 'norm_x is an RMS norm of maps in half precision under autocast'
    return ''


def _value(v: nn.Module) -> str:
    """Why the kernels cannot compute the convolution to the value; empty if they can."""
    return '' if type(v) is nn.Conv2d and v.bias is None and v.padding_mode == 'zeros' else f'v is {v}'


def _parts(layer: nn.Module, x: torch.Tensor) -> str:
    """Which part of a layer the kernels cannot compute; empty if none."""
    norm, drop_path = layer.norm, layer.drop_path
    if why := _value(layer.v):
        return why
    if type(drop_path) not in (nn.Identity, DropPath):
        return f'drop_path is {type(drop_path).__name__}'
    if layer.form == 'pre':
        return _norms(layer, x)
    if layer.layout == 'NLC':
        return 'it is of the form post on tokens'
    if is_folded(norm):
        return ''
    if not is_batch_norm(norm):
        return f'norm is {type(norm).__name__}'
    if norm.training and x.numel() == x.shape[1]:
        return 'its batch has one value for each channel, of which there is no variance'
    return ''


def _activations(layer: nn.Module) -> str:
    """Which activation, or norm of the value, the kernels cannot compute; empty if none."""
    if isinstance(layer, MrlaBase):
        return ''
    norm, act = layer.norm_v, layer.act_v
    if type(norm) is not nn.Identity:
        return f'norm_v is {type(norm).__name__}'
    exact = type(act) is nn.GELU and act.approximate == 'none'
    return '' if (exact if layer.form == 'pre' else type(act) is nn.Identity) else f'act_v is {act}'


def _infers(layer: nn.Module, x: torch.Tensor, other: torch.Tensor | Memory) -> bool:
    """Whether a layer is evaluated without gradients, and its sums can be in place."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # compiled, the plain layer is as fast
        return False
    if x.is_meta:  # torch 2.9 cannot tell whether autocast is on there
        return False
    norm = layer.norm
    reads_batch = layer.form == 'post' and not (is_batch_norm(norm) and not uses_batch(norm))
    if not is_folded(norm) and (reads_batch or layer.drop_path.training):
        return False
    if layer.form == 'pre' and torch.is_autocast_enabled(x.device.type):  # it may run norms in float32
        return False
    maps = other[1::2] if isinstance(layer, MrlaBase) else (other,)
    return all(type(t) is torch.Tensor and t.dtype == x.dtype for t in maps) and value_dtype(x) == x.dtype


def _gradient(layer: nn.Module, x: torch.Tensor, other: torch.Tensor | Memory) -> str:
    """Why the kernels cannot compute a folded layer with gradients; empty if they need not."""
    if not (torch.is_grad_enabled() and is_folded(layer.norm)):
        return ''
    tensors = (x, *(other if isinstance(layer, MrlaBase) else (other,)), *layer.parameters())
    wanted = any(t.requires_grad for t in tensors)
    return 'a gradient is wanted, and the kernels of a folded layer have none; use torch.no_grad()' if wanted else ''


def _class(layer: nn.Module, x: torch.Tensor) -> str:
    """Why a layer or its maps are of a class that only the plain layer can handle; empty if they are not."""
    if type(x) is not torch.Tensor:
        return f'its maps are of class {type(x).__name__}'
    if type(layer) not in (MrlaLight, MrlaBase):
        return f'there are no kernels for {type(layer).__name__}'
    return ''


def _calls(layer: nn.Module, x: torch.Tensor, other: torch.Tensor | Memory) -> str:
    """Why a layer must call its submodules one by one; empty if nothing relies on these calls."""
    why = _tracer() or _parts(layer, x) or _activations(layer)
    return why or _gradient(layer, x, other) or _children(layer)


def _kernels(layer: nn.Module, x: torch.Tensor, other: torch.Tensor | Memory) -> str:
    """Why the kernels cannot compute a layer on x that need not call its submodules; empty if they can."""
    is_light, weight = isinstance(layer, MrlaLight), layer.v.weight
    if why := _tensors(x, weight) or (_shortcut if is_light else _memory)(layer, x, other):
        return why
    autocast = value_dtype(x) if torch.is_autocast_enabled(x.device.type) else None
    norm = layer.norm_x if layer.form == 'pre' else layer.norm
    form = 'folded' if is_folded(norm) else layer.form
    kind = (
        is_light,
        form,
        is_rms_norm(norm),
        form != 'folded' and getattr(norm, 'bias', None) is not None,
        form == 'post' and uses_batch(norm),
        drops_paths(layer),
    )
    return _proof(*kind, x.device, x.dtype, weight.dtype, autocast, len(weight), layer.attn.num_heads)


def reason(layer: nn.Module, x: torch.Tensor, other: torch.Tensor | Memory = (), feat_size: Grid = None) -> str:
    """Say in one sentence why a layer does not run in the kernels; empty if it does.

    other is the shortcut of MRLA-light, or the memory of MRLA-base.
    """
    return _class(layer, x) or _device(x) or _calls(layer, x, other) or _kernels(layer, x, other)


def path(layer: nn.Module, x: torch.Tensor, other: torch.Tensor | Memory) -> str:
    """How a layer runs: in the 'kernels'; 'in place', without gradients; or 'plain'."""
    if _class(layer, x):
        return 'plain'
    no_kernels, otherwise = _device(x), 'in place' if _infers(layer, x, other) else 'plain'
    if (no_kernels and otherwise == 'plain') or _calls(layer, x, other):
        return 'plain'
    return otherwise if no_kernels or _kernels(layer, x, other) else 'kernels'


@torch.compiler.assume_constant_result  # torch.compile calls this function instead of tracing it
def _proof(*case) -> str:
    """Why the proof of the kernels does not let them run; empty if it does."""
    from timm_mrla.ops import proof  # defines custom ops, only where kernels can run

    if proof.skipped:
        return ''
    try:
        return proof.check(*case)
    except proof.Captured as e:
        return str(e)
