"""Tests of evaluation mode without gradients: batch norms are folded at each call, and sums are in place."""

import copy

import pytest
import torch
from slow import slow_except
from test_reparameterize import CASES, setting, stage
from timm.layers import LayerNorm2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_mrla.layers import MrlaBase, MrlaLight
from timm_mrla.ops.reasons import path

every_layer = pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])
LAYOUTS = {name: case for name, case in CASES.items() if case.get('layout') != 'NLC'}
every_case = pytest.mark.parametrize('case', LAYOUTS.values(), ids=LAYOUTS)
PRE = {
    name: {**case, 'form': 'pre', 'norm_layer': nn.LayerNorm if case.get('layout') else LayerNorm2d}
    for name, case in CASES.items()
}
every_pre = pytest.mark.parametrize('case', PRE.values(), ids=PRE)


@pytest.fixture
def calls(monkeypatch):
    """The number of batch norms that ran: none if all were folded."""
    calls, forward = [], nn.BatchNorm2d.forward

    def count(norm, x):
        calls.append(norm)
        return forward(norm, x)

    monkeypatch.setattr(nn.BatchNorm2d, 'forward', count)
    return calls


def without_gradients(blocks, inputs):
    with torch.no_grad():
        return stage(blocks, inputs)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@every_case
@every_layer
def test_results_are_those_of_the_plain_layer(layer, case, dtype, tolerance, calls):
    blocks, _, inputs = setting(layer, dtype=dtype, **case)
    expected = [y.detach() for y in stage(blocks, inputs)]
    held = [x.clone() for x in inputs]
    assert len(calls) == 3
    outputs = without_gradients(blocks, inputs)
    assert len(calls) == 3
    for y, z in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance * z.std().item())
        assert y.stride() == z.stride()
    assert all(map(torch.equal, inputs, held))


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@every_pre
@every_layer
def test_results_of_the_form_pre_are_those_of_the_plain_layer(layer, case, dtype, tolerance):
    blocks, _, inputs = setting(layer, dtype=dtype, **case)
    expected, held = [y.detach() for y in stage(blocks, inputs)], [x.clone() for x in inputs]
    outputs = without_gradients(blocks, inputs)
    other = inputs[1] if layer is MrlaLight else ()
    with torch.no_grad():
        assert path(blocks[0], inputs[0], other) == 'in place'
        with torch.autocast('cpu', torch.bfloat16):
            assert path(blocks[0], inputs[0], other) == 'plain'
    for y, z in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance * z.std().item())
        assert y.stride() == z.stride()
    assert all(map(torch.equal, inputs, held))


@every_pre
@every_layer
def test_zero_output_scales_of_the_form_pre_leave_the_bits(layer, case):
    blocks, _, inputs = setting(layer, dtype=torch.float32, **case)
    for block in blocks:
        for scale in block.output_scales():
            nn.init.zeros_(scale)
    assert all(map(torch.equal, without_gradients(blocks, inputs)[:3], inputs[::2]))


@pytest.mark.parametrize('batch', [0, 2])
@every_layer
def test_a_norm_without_parameters_and_an_empty_batch(layer, batch, calls):
    blocks, _, inputs = setting(
        layer, batch=batch, norm_layer=lambda dim, **dd: nn.BatchNorm2d(dim, affine=False, **dd)
    )
    outputs = without_gradients(blocks, inputs)
    assert not calls
    torch.testing.assert_close(outputs, tuple(y.detach() for y in stage(blocks, inputs)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@every_layer
def test_zero_norms_leave_the_bits_of_finite_maps(layer, dtype, calls):
    blocks, _, inputs = setting(layer, dtype=dtype)
    for block in blocks:
        nn.init.zeros_(block.norm.weight)
        nn.init.zeros_(block.norm.bias)
    assert all(map(torch.equal, without_gradients(blocks, inputs)[:3], inputs[::2]))
    assert not calls


@pytest.mark.parametrize('weight', [0.0, 1.0])
@pytest.mark.parametrize('value', [float('inf'), float('nan')])
@every_layer
def test_infinite_values_spread_as_in_the_plain_layer(layer, value, weight, calls):
    blocks, _, inputs = setting(layer)
    for block in blocks:
        nn.init.constant_(block.norm.weight, weight)
    inputs[0][0, 3, 2, 2] = inputs[3][1, 5, 0, 0] = inputs[4][1, 7, 4, 6] = value
    expected = [y.detach() for y in stage(blocks, inputs)]
    calls.clear()
    for y, z in zip(without_gradients(blocks, inputs), expected, strict=True):
        assert torch.equal(y.isnan(), z.isnan()) and torch.equal(y.isinf(), z.isinf())
    assert not calls


@every_layer
def test_hooks_on_submodules_see_all_that_they_saw(layer, calls):
    blocks, _, inputs = setting(layer)
    expected = [y.detach() for y in stage(blocks, inputs)]
    for name, _ in blocks[0].named_children():
        ours, held = copy.deepcopy(blocks), []

        def hold(module, args, out, held=held):
            held.extend((t, t.clone()) for t in (args[0], out) if isinstance(t, torch.Tensor))

        hook = ours[0].get_submodule(name).register_forward_hook(hold)
        calls.clear()
        outputs = without_gradients(ours, inputs)
        assert len(calls) == 1 and held
        assert torch.equal(outputs[0], expected[0])
        # the ReLU of MRLA-base overwrites the output of its norm
        assert all(torch.equal(now, then) for now, then in held) or (layer is MrlaBase and name == 'norm')
        hook.remove()
        calls.clear()
        without_gradients(ours, inputs)
        assert not calls


@every_layer
def test_what_somebody_changed_runs_plain(layer, calls):
    def adapt(block):
        block.attn.qk = nn.Sequential(block.attn.qk)

    changes = {
        'adapter': adapt,
        'parametrization': lambda block: nn.utils.parametrizations.weight_norm(block.v),
        'statistics of the batch': lambda block: block.norm.train(),
        'stochastic depth': lambda block: setattr(block, 'drop_path', nn.Dropout(0.5).eval()),
        'hook on all modules': lambda block: nn.modules.module.register_module_forward_hook(lambda *args: None),
    }
    for change in changes.values():
        blocks, _, inputs = setting(layer)
        handle = change(blocks[0])
        calls.clear()
        without_gradients(blocks, inputs)
        assert blocks[0].norm in calls
        if hasattr(handle, 'remove'):
            handle.remove()


@every_layer
def test_compiled_traced_and_transformed_layers_run_plain(layer, calls):
    blocks, _, inputs = setting(layer)
    block, x = blocks[0].requires_grad_(False), inputs[0]
    other = (inputs[1],) if layer is MrlaLight else ()

    def run(x):
        out = block(x, *other)
        return out if layer is MrlaLight else out[0]

    with torch.no_grad():
        expected = run(x)
        assert not calls
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend='eager')(x), expected)
        with FlopCounterMode(display=False):
            torch.testing.assert_close(run(x), expected)
        torch.testing.assert_close(torch.jit.trace(run, (x,), check_trace=False)(x), expected)
        if layer is MrlaLight:
            images = torch.func.vmap(lambda x, o: block(x[None], o[None])[0])(x, *other)
            torch.testing.assert_close(images, expected)
    assert len(calls) > 2


@pytest.mark.parametrize('dtype', slow_except([torch.bfloat16], [torch.float32, torch.bfloat16]))
@every_layer
def test_autocast(layer, dtype):
    blocks, _, inputs = setting(layer, dtype=torch.float32)
    inputs = [x.to(dtype) for x in inputs]
    with torch.autocast('cpu', torch.bfloat16):
        expected, outputs = stage(blocks, inputs)[:3], without_gradients(blocks, inputs)[:3]
    for y, z in zip(outputs, expected, strict=True):
        assert y.dtype == z.dtype
        assert (y - z).norm() < 10 * torch.finfo(torch.bfloat16).eps * z.norm()
