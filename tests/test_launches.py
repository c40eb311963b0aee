"""Tests of calls between layers and launches: the decision for the kernels follows each change between two calls."""

import copy

import pytest
import torch
from fused import INTERPRETER, maps, recording
from timm.layers import LayerNorm
from torch import nn

import timm_mrla
from timm_mrla.layers import MrlaBase, MrlaLight

pytest.importorskip('triton')

from launches import LAYERS, measure
from triton.runtime.jit import JITFunction

from timm_mrla.ops import proof, reason, reasons


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    """Layers on the CPU run in the kernels, and launches do nothing. The benchmark does the same."""
    if INTERPRETER:
        pytest.skip('the interpreter has other launches')
    monkeypatch.setattr(JITFunction, 'run', lambda *args, **kwargs: None)
    monkeypatch.setattr(reasons, '_interpreter', True)
    monkeypatch.setattr(proof, 'skipped', True)


def hook(layer):
    return layer.v.register_forward_hook(lambda *args: None).remove


def nested_hook(layer):
    return layer.attn.qk.register_forward_pre_hook(lambda *args: None).remove


def backward_hook(layer):
    return layer.norm.register_full_backward_hook(lambda *args: None).remove


def adapter(layer):
    stock, layer.attn.qk = layer.attn.qk, nn.Sequential(layer.attn.qk)
    return lambda: setattr(layer.attn, 'qk', stock)


def parametrization(layer):
    nn.utils.parametrize.register_parametrization(layer.v, 'weight', nn.Identity())
    return lambda: nn.utils.parametrize.remove_parametrizations(layer.v, 'weight')


def dtype(layer):
    layer.to(torch.bfloat16)
    return layer.float


def switch(layer):
    timm_mrla.set_fused(False)
    return timm_mrla.set_fused


def weight_class(layer):
    stock, layer.v.weight = layer.v.weight, type('Sharded', (nn.Parameter,), {})(layer.v.weight.detach())
    return lambda: setattr(layer.v, 'weight', stock)


CHANGES = {
    hook: 'a hook is on v',
    nested_hook: 'a hook is on attn.qk',
    backward_hook: 'a hook is on norm',
    adapter: 'attn.qk is Sequential',
    parametrization: 'v is Parametrized',
    dtype: 'its weights are torch.bfloat16 and its maps torch.float32',
    switch: 'the kernels are turned off',
    weight_class: 'its weights are tensors of another class',
}


@pytest.mark.parametrize('kind', [MrlaLight, MrlaBase])
@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
def test_no_decision_is_stale(change, kind):
    layer, x = kind(4, 2, nn.BatchNorm2d), maps(2, 4, 2, 3).cpu()
    other = x if kind is MrlaLight else ()
    assert reason(layer, x, other) == ''
    undo = change(layer)
    assert reason(layer, x, other).startswith(CHANGES[change])
    assert reason(copy.deepcopy(layer), x, other) == reason(layer, x, other)
    undo()
    assert reason(layer, x, other) == ''


def test_a_hook_between_two_calls_sees_the_second():
    layer, x, seen = MrlaLight(4, 2, nn.BatchNorm2d), maps(2, 4, 2, 3).cpu(), []
    with torch.no_grad():
        layer(x, x)
        layer.norm.reset_running_stats()  # launches that do nothing left what was in the memory
        layer.v.register_forward_hook(lambda module, args, out: seen.append(out))
        assert torch.equal(layer.eval()(x, x), x + layer.branch(x, x, None))
    assert len(seen) == 2


@pytest.mark.parametrize('kind', [MrlaLight, MrlaBase])
def test_a_layer_that_the_kernels_refuse_is_examined_once_in_a_call(kind, monkeypatch):
    """Before its norm is folded in that call."""
    layer, x, examined, children = kind(4, 2, nn.BatchNorm2d).eval(), torch.randn(2, 4, 2, 3), [], reasons._children
    monkeypatch.setattr(reasons, '_children', lambda layer: examined.append(layer) or children(layer))
    other = x if kind is MrlaLight else ()
    assert 'not contiguous in channels_last' in reason(layer, x, other)
    examined.clear()
    with torch.no_grad():
        layer(x, other)
    assert examined == [layer]


@pytest.mark.parametrize('name', LAYERS)
def test_the_benchmark_runs_without_a_gpu(name):
    row = measure(name, rounds=1)
    assert len(row) == 6 and all(value > 0 for value in list(row.values())[1:])


def gradients(call, layer, x, other):
    """Gradients of x, the shortcut or the memory, and all parameters."""
    out = call(x, other, (2, 3))
    out = out if isinstance(out, torch.Tensor) else out[0] + sum(t.sum() for t in out[1][-2:])
    sources = [x, *(other if isinstance(other, tuple) else [other]), *layer.parameters()]
    return [(t.shape, t.dtype) for t in torch.autograd.grad(out.sum(), sources)]


KINDS = [(kind, form) for kind in (MrlaLight, MrlaBase) for form in ('post', 'pre')]


def setting(kind, form):
    norm, layout = (nn.BatchNorm2d, 'NCHW') if form == 'post' else (LayerNorm, 'NLC')
    layer, value = kind(4, 2, norm, form, layout), maps(2, 4, 2, 3).cpu().requires_grad_()
    x = value if form == 'post' else torch.randn(2, 7, 4, requires_grad=True)
    memory = (torch.randn(2, 2, 2, requires_grad=True), value.detach().clone().requires_grad_())
    return layer, x, x.detach().clone().requires_grad_() if kind is MrlaLight else memory


@pytest.mark.parametrize(('kind', 'form'), KINDS)
def test_compiled_and_eager_calls_have_gradients_of_the_same_shapes(kind, form):
    """Compiled, a layer is one node of one graph; eager mode does not call the op."""
    (layer, x, other), nodes = setting(kind, form), []

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=recording(nodes))
    assert reason(layer, x, other, (2, 3)) == ''
    assert gradients(compiled, layer, x, other) == gradients(layer, layer, x, other)
    assert len(nodes) == 1


@pytest.mark.parametrize(('kind', 'form'), KINDS)
def test_second_derivatives_are_refused(kind, form):
    layer, x, other = setting(kind, form)
    out = layer(x, other, (2, 3))
    out = out if kind is MrlaLight else out[0]
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'call timm_mrla\.set_fused\(False\)'):
        gradient.sum().backward()
