"""Tests of the proof of the kernels: it finds wrong numbers in each tensor, and the plain layer runs instead."""

import copy
import importlib
import itertools

import pytest
import torch
from fused import DEVICE, GPU, INTERPRETER, draw, kernels, maps, run_in_interpreter
from slow import slow_except
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_mrla
from timm_mrla.layers import MrlaLight

pytest.importorskip('triton')

from timm_mrla.ops import proof, reason

slow = pytest.mark.slow

# kind -> arguments of the proof, module of the kernels, and by tensor: launcher, its result, entries of the result
KINDS = {
    'light post': (
        (True, 'post', False, True, True, True),
        'light_post',
        {
            'output': ('forward', 0, ...),
            'norm.running_mean': ('forward', 2, 2),
            'norm.running_var': ('forward', 2, 4),
            'gradient of x': ('backward', 0, ...),
            'gradient of o': ('backward', 1, ...),
            'gradient of attn.qk.weight': ('backward', 2, ...),
            'gradient of v.weight': ('backward', 3, ...),
            'gradient of norm.weight': ('backward', 4, 0),
            'gradient of norm.bias': ('backward', 4, 1),
            'gradient of lam': ('backward', 4, 2),
        },
    ),
    'light pre': (
        (True, 'pre', False, True, False, True),
        'light_pre',
        {
            'output': ('forward', 0, ...),
            'gradient of x': ('backward', 0, ...),
            'gradient of o': ('backward', 1, ...),
            'gradient of attn.qk.weight': ('backward', 2, ...),
            'gradient of v.weight': ('backward', 3, ...),
            'gradient of norm_x.weight': ('backward', 4, 0),
            'gradient of norm_x.bias': ('backward', 4, 1),
            'gradient of norm_o.weight': ('backward', 4, 2),
            'gradient of norm_o.bias': ('backward', 4, 3),
            'gradient of lam': ('backward', 4, 4),
        },
    ),
    'base post': (
        (False, 'post', False, True, True, True),
        'base',
        {
            'output': ('forward', 0, ...),
            'key': ('forward', 1, ...),
            'value': ('forward', 2, ...),
            'norm.running_mean': ('forward', 5, 2),
            'norm.running_var': ('forward', 5, 4),
            'gradient of x': ('backward', 0, ...),
            'gradient of key of block 1': ('backward', 1, 0),
            'gradient of key of block 2': ('backward', 1, 1),
            'gradient of value of block 1': ('backward', 2, 0),
            'gradient of value of block 2': ('backward', 2, 1),
            'gradient of attn.qk.weight': ('backward', 3, ...),
            'gradient of v.weight': ('backward', 4, ...),
            'gradient of norm.weight': ('backward', 5, (..., 0)),
            'gradient of norm.bias': ('backward', 5, (..., 1)),
        },
    ),
    'base pre': (
        (False, 'pre', False, True, False, True),
        'base',
        {
            'output': ('forward', 0, ...),
            'gradient of x': ('backward', 0, ...),
            'gradient of value of block 1': ('backward', 2, 0),
            'gradient of norm_x.weight': ('backward', 5, (..., 0)),
            'gradient of norm_x.bias': ('backward', 5, (..., 1)),
        },
    ),
    'light post, norm without parameters': (
        (True, 'post', False, False, True, True),
        'light_post',
        {
            'output': ('forward', 0, ...),
            'norm.running_var': ('forward', 2, 4),
            'gradient of x': ('backward', 0, ...),
            'gradient of lam': ('backward', 4, 2),
        },
    ),
    'light pre, norms without bias': (
        (True, 'pre', False, False, False, True),
        'light_pre',
        {
            'output': ('forward', 0, ...),
            'gradient of o': ('backward', 1, ...),
            'gradient of norm_x.weight': ('backward', 4, 0),
            'gradient of norm_o.weight': ('backward', 4, 2),
        },
    ),
    'base post, norm without parameters': (
        (False, 'post', False, False, True, True),
        'base',
        {
            'output': ('forward', 0, ...),
            'norm.running_var': ('forward', 5, 4),
            'gradient of x': ('backward', 0, ...),
            'gradient of value of block 2': ('backward', 2, 1),
            'gradient of v.weight': ('backward', 4, ...),
        },
    ),
    'folded light': ((True, 'folded', False, False, False, False), 'light_post', {'output': ('folded', 0, ...)}),
    'folded base': (
        (False, 'folded', False, False, False, False),
        'base',
        {'output': ('folded', 0, ...), 'key': ('folded', 1, ...), 'value': ('folded', 2, ...)},
    ),
}
ALONE = [(kind, name) for kind, (_, _, broken) in KINDS.items() for name in broken]
WHERE = (torch.device(DEVICE), torch.float32, torch.float32, None, 4, 2)


@pytest.mark.skipif(INTERPRETER or GPU, reason='this process runs the kernels itself')
@slow
@pytest.mark.parametrize('marked', ['not slow', 'slow'])
def test_in_the_interpreter(marked):
    assert run_in_interpreter([__file__], marked) > 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(proof, 'skipped', False)
    monkeypatch.setattr(proof, 'SIZE', (2, 3))
    proof.check.cache_clear()
    yield
    proof.check.cache_clear()


def break_launchers(monkeypatch, module, broken):
    """Multiply entries of the results of launchers by 1.5."""
    for launcher in {launcher for launcher, _, _ in broken}:
        owner = importlib.import_module(f'timm_mrla.ops.{module}{"_backward" if launcher == "backward" else ""}')
        operator = getattr(owner, launcher)

        def run(*args, stock=operator.fn, launcher=launcher):
            results = stock(*args)
            for name, i, entries in broken:
                if name == launcher:
                    (results[i] if isinstance(results, tuple) else results)[entries] *= 1.5
            return results

        monkeypatch.setattr(operator, 'fn', run)


def wrong(case):
    return {name for name, error in proof.errors(*case, *WHERE).items() if not error <= proof.ALLOWED[torch.float32]}


@kernels
@slow
@pytest.mark.parametrize('kind', KINDS)
def test_right_numbers_pass(kind):
    assert wrong(KINDS[kind][0]) == set()


@kernels
@pytest.mark.parametrize('kind', slow_except(['light post', 'folded base'], KINDS))
def test_wrong_numbers_are_found_in_each_tensor(kind, monkeypatch):
    case, module, broken = KINDS[kind]
    state = torch.get_rng_state()
    break_launchers(monkeypatch, module, broken.values())
    assert wrong(case) >= {*broken}
    assert torch.equal(torch.get_rng_state(), state)


@kernels
@slow
@pytest.mark.parametrize(('kind', 'name'), ALONE)
def test_one_wrong_tensor_is_found(kind, name, monkeypatch):
    case, module, broken = KINDS[kind]
    break_launchers(monkeypatch, module, [broken[name]])
    assert name in wrong(case)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mrla = draw(MrlaLight(4, 2, nn.BatchNorm2d), torch.float32)

    def forward(self, x):
        return self.mrla(x, x)


@kernels
def test_the_plain_layer_runs_if_numbers_are_wrong(monkeypatch, caplog):
    break_launchers(monkeypatch, 'light_post', [('forward', 0, (0, 0, 1, 2))])  # one element of one map
    model, x = Model().eval(), maps(2, 4, 2, 3)
    (why,) = timm_mrla.why_not_fused(model, x).values()
    assert why.startswith("the kernels' results differ here from the plain layer's, output by 0.")
    assert why.endswith('; 0.0005 is rounding')
    for _ in range(2):
        assert torch.equal(model(x), x + model.mrla.branch(x, x, None))
    assert len(caplog.records) == 1 and why in caplog.text


@kernels
def test_a_kernel_that_cannot_run_is_reported_once(monkeypatch, caplog):
    """Like on a GPU for which Triton cannot compile it. The plain layer runs."""
    from timm_mrla.ops import light_post

    def fail(*args):
        raise RuntimeError('PTXAS error')

    monkeypatch.setattr(light_post.forward, 'fn', fail)
    model, x = Model().eval(), maps(2, 4, 2, 3)
    for _ in range(2):
        assert torch.equal(model(x), x + model.mrla.branch(x, x, None))
    assert 'PTXAS error' in reason(model.mrla, x, x)
    assert len(caplog.records) == 1 and 'without its fused kernels' in caplog.text


@kernels
def test_first_use_under_checkpointing_autocast_and_inference_mode():
    """The proof runs a backward pass of its own, which none of these may see."""
    layer, x = Model().mrla, maps(2, 4, 2, 3).requires_grad_()
    checkpoint(layer, x, x, use_reentrant=False).sum().backward()
    assert x.grad is not None and proof.check.cache_info().currsize == 1
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        assert reason(copy.deepcopy(layer).eval(), x.detach(), x.detach()) == ''


@pytest.mark.parametrize('light', [True, False])
@pytest.mark.parametrize(
    ('form', 'bias'), [('post', True), ('post', False), ('pre', True), ('pre', False), ('folded', False)]
)
def test_rounding_is_no_error(form, bias, light, monkeypatch):
    """The plain layer itself passes in each dtype; it rounds more than the kernels do."""

    def run(layer, *args):
        layer.fast_path = None
        return layer(*args)

    monkeypatch.setattr(proof, 'run', run)
    monkeypatch.setattr(proof, 'SIZE', (5, 7))
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    dtypes = ((f32, f32, None), (bf16, bf16, None), (f16, f16, None), (bf16, f32, bf16), (f32, f32, bf16))
    for dtype, (dim, heads) in itertools.product(dtypes, ((24, 8), (1024, 32))):
        case = (light, form, False, bias, form == 'post', False, torch.device('cpu'), *dtype, dim, heads)
        assert proof.check(*case) == ''
