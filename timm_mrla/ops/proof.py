"""Compares the fused kernels with the plain layer, once for each kind of layer on each device, before they are used.

A wrong result of a compiler, a driver or a GPU raises no error, and gradients that are wrong do not look wrong.
"""

import copy
import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from timm.layers import DropPath, RmsNorm
from torch import nn

from timm_mrla.layers import MrlaBase, MrlaLight
from timm_mrla.layers.folding import is_folded
from timm_mrla.ops.dispatch import run

_logger = logging.getLogger(__name__)

SIZE = (5, 7)  # H and W of the maps: odd, so tiles end outside of them; 35 positions are more than one block
# errors |result - expected| / (|expected| + root mean square of expected) that rounding explains
ALLOWED = {torch.float32: 5e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}

skipped = os.environ.get('TRITON_INTERPRET', '0') == '1'  # the interpreter compiles nothing, and takes seconds


class Captured(RuntimeError):
    """The proof cannot run now, but a later call can repeat it."""


class _Scales(DropPath):
    """Stochastic depth whose scales are fixed, because those that it draws may be zero for both images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.new_tensor([0.5, 2.0]).view(-1, *[1] * (x.ndim - 1))


def _draw_layer(
    light: bool, form: str, rms: bool, bias: bool, train: bool, drops: bool, dim: int, heads: int
) -> nn.Module:
    """A layer with random weights and statistics."""
    is_pre = form == 'pre'
    if is_pre:
        norm, place = RmsNorm if rms else functools.partial(nn.LayerNorm, bias=bias), ('pre', 'NLC')
    else:
        norm, place = functools.partial(nn.BatchNorm2d, affine=bias), ('post', 'NCHW')
    layer = (MrlaLight if light else MrlaBase)(dim, dim // heads, norm, *place).train(train)
    layer.drop_path = _Scales() if drops else nn.Identity()
    for parameter in layer.parameters():
        parameter.normal_()
    layer.v.weight /= 3  # values like those of the memory
    if not is_pre:
        layer.norm.momentum = 1.0  # the running statistics become those of the batch
        layer.norm.running_mean.normal_(std=0.1)
        layer.norm.running_var.uniform_(0.5, 2.0)
        if bias:
            layer.norm.weight.uniform_(0.5, 1.5)
        if not light and bias:  # the ReLU is on in half of the channels: near zero, rounding would change its gradient
            layer.norm.bias.fill_(10.0)[::2] *= -1
    return layer.eval().fuse() if form == 'folded' else layer


def _evaluate(layer: nn.Module, call, inputs: list[torch.Tensor], light: bool, seed: int) -> dict[str, torch.Tensor]:
    """Outputs, all gradients and statistics of `call(x, other, grid)`, by name, in float64 on the CPU."""
    names = ('x', 'o') if light else ('x', *(f'{kind} of block {t}' for t in (1, 2) for kind in ('key', 'value')))
    with torch.set_grad_enabled(not is_folded(layer.norm)):  # the kernels of a folded layer have no gradients
        inputs = [t.clone().requires_grad_(torch.is_grad_enabled()) for t in inputs]
        out = call(inputs[0], inputs[1] if light else tuple(inputs[1:]), SIZE)
        outputs = {'output': out} if light else {'output': out[0], 'key': out[1][-2], 'value': out[1][-1]}
        found = {**outputs, **dict(layer.named_buffers())}
        if torch.is_grad_enabled():
            torch.default_generator.manual_seed(seed)
            d = [torch.randn(t.shape).to(t) for t in outputs.values()]
            torch.autograd.backward([*outputs.values()], d)
            sources = {**dict(zip(names, inputs, strict=True)), **dict(layer.named_parameters())}
            found.update({f'gradient of {name}': t.grad for name, t in sources.items()})
    return {name: t.detach().to('cpu', torch.float64) for name, t in found.items()}


@torch.no_grad()
def errors(
    light: bool,
    form: str,
    rms: bool,
    bias: bool,
    train: bool,
    drops: bool,
    device: torch.device,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    autocast: torch.dtype | None,
    dim: int,
    heads: int,
) -> dict[str, float]:
    """The greatest errors of the kernels against the plain layer in float64, by tensor.

    Args:
        light, form: Kind of the layer; the form 'folded' is for inference.
        rms, bias: Whether its norm is an RMS norm, and has a bias; a batch norm without bias has no weight either.
        train, drops: Whether it uses the statistics of the batch, and drops paths.
        device, dtype, weight_dtype: Of the maps and the weights.
        autocast: Dtype of autocast, None if it is off.
        dim, heads: Numbers of channels and heads.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs, too
        layer = _draw_layer(light, form, rms, bias, train, drops, dim, heads).to(weight_dtype)
        shape = (2, 1 + SIZE[0] * SIZE[1], dim) if form == 'pre' else (2, dim, *SIZE)
        inputs = [torch.randn(shape).to(dtype) for _ in range(2 if light else 1)]
        if not light:
            pairs = ((torch.randn(2, heads, dim // heads), torch.randn(2, dim, *SIZE)) for _ in range(2))
            inputs += [t for key, value in pairs for t in (key, value.to(autocast or dtype))]
        if form == 'post' and not (light or bias):  # maps of mean zero, but far from it, again for the ReLU
            signs = (1 - 2 * (torch.arange(2 * SIZE[0] * SIZE[1]) % 2)).view(2, 1, *SIZE)
            inputs = [signs * (1 + t / 10) if t.ndim == 4 else t for t in inputs]
            layer.v.weight.mul_(0.1)[:, :, 1, 1] += 1
        plain = copy.deepcopy(layer).double()
        plain.fast_path = None
        expected = _evaluate(plain, plain, [t.double() for t in inputs], light, seed=1)
        inputs = [
            t.to(device, memory_format=torch.channels_last if t.ndim == 4 else torch.preserve_format) for t in inputs
        ]
        layer = layer.to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            result = _evaluate(layer, functools.partial(run, layer), inputs, light, seed=1)
    return {
        name: ((result[name] - t).abs() / (t.abs() + t.square().mean().sqrt()).clamp_min(1e-6)).max().item()
        for name, t in expected.items()
    }


@functools.cache
def check(*case) -> str:
    """Why the kernels must not run for a case, the arguments of `errors`; empty if they may.

    The plain layer runs instead, and a warning says so once.

    Raises:
        Captured: A CUDA graph is captured, to which the proof would belong.
    """
    *_, device, dtype, weight_dtype, autocast, _, _ = case
    if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
        raise Captured('a CUDA graph is captured before the layer ran once')
    try:
        # in another thread, where no autocast, no mode and no hook on saved tensors of the caller is active
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(errors, *case).result()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # any error of Triton, its compiler or the driver
        why = f'Triton cannot run the kernels here: {type(e).__name__}: {" ".join(str(e).split())[:300]}'
    else:
        allowed = max(ALLOWED[dtype], ALLOWED[weight_dtype], ALLOWED[autocast or torch.float32])
        wrong = [f'{name} by {error:.2g}' for name, error in found.items() if not error <= allowed]  # NaN is wrong
        if not wrong:
            return ''
        why = f"the kernels' results differ here from the plain layer's, {', '.join(wrong)}; {allowed} is rounding"
    _logger.warning(f'layer attention runs without its fused kernels, {why}')
    return why
