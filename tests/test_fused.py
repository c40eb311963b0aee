"""Tests of the fused kernels against the plain layer in float64, on a GPU or in Triton's interpreter.

Triton's interpreter must be chosen before Triton is imported, so these tests then run in a separate process.
"""

import copy
import importlib.util

import pytest
import timm
import torch
from entries import backbone
from fused import (
    CHANNELS_LAST,
    COMPILED_FOR,
    DEVICE,
    INTERPRETER,
    ROUNDING,
    assert_close,
    assert_trains_as_plain,
    draw,
    kernels,
    maps,
    model_and_images,
    on_gpu,
    recording,
    run_in_interpreter,
    watched,
)
from memory import saved_bytes
from timm.layers import BatchNormAct2d, LayerNorm, LayerNorm2d, RmsNorm
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import timm_mrla
from timm_mrla.layers import MrlaLight, layer_attentions
from timm_mrla.ops import reason

pytest.importorskip('triton')

from timm_mrla.ops import light_functions as functions

slow = pytest.mark.slow


@pytest.mark.skipif(INTERPRETER or DEVICE == 'cuda', reason='this process runs the kernels itself')
@pytest.mark.parametrize(
    ('files', 'marked'),
    [
        (['test_fused.py', 'test_fused_base.py', 'test_watched.py'], 'not slow'),
        *(pytest.param([f'test_{name}.py'], 'slow', marks=slow) for name in ('fused', 'fused_base')),
    ],
    ids=str,
)
def test_in_the_interpreter(files, marked):
    assert run_in_interpreter(files, marked) > 20 * len(files)


def compare(layer, x, o, feat_size=None):
    """Outputs, gradients and running statistics of a layer on x and o, fused against plain in float64."""
    assert reason(layer, x, o, feat_size) == ''
    ratio, expected = ROUNDING[x.dtype], copy.deepcopy(layer).double()
    d, keep = torch.randn_like(x), copy.deepcopy(layer.drop_path)
    inputs = [[t.clone().requires_grad_() for t in (x.to(dtype), o.to(dtype))] for dtype in (x.dtype, torch.float64)]
    torch.manual_seed(1)
    with watched():
        y = layer(*inputs[0], feat_size)
        y.backward(d)
    torch.manual_seed(1)
    scale = keep(torch.ones(len(x), *[1] * (x.ndim - 1), device=DEVICE)).double()
    expected.drop_path = nn.Identity()
    z = inputs[1][0] + scale * expected.branch(*inputs[1], feat_size)
    z.backward(d.double())
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert_close('output', z, y, ratio)
    for name, b, a in zip('xo', inputs[1], inputs[0], strict=True):
        assert_close(f'gradient of {name}', b.grad, a.grad, ratio)
    for (name, a), b in zip(layer.named_parameters(), expected.parameters(), strict=True):
        assert a.grad.dtype == a.dtype
        assert_close(f'gradient of {name}', b.grad, a.grad, 3 * ratio)
    for (name, a), b in zip(layer.named_buffers(), expected.buffers(), strict=True):
        assert_close(name, b, a, ratio)


def post(dim, heads, norm=nn.BatchNorm2d, drop_path=0.0, dtype=torch.float32, **kwargs):
    return draw(MrlaLight(dim, dim // heads, lambda dim, **dd: norm(dim, **kwargs, **dd), drop_path=drop_path), dtype)


both_modes = pytest.mark.parametrize('train', [True, pytest.param(False, marks=slow)], ids=['train', 'eval'])


@kernels
@both_modes
@pytest.mark.parametrize(
    ('B', 'C', 'heads', 'H', 'W', 'drop_path'),
    [
        (2, 24, 8, 7, 7, 0.0),
        pytest.param(3, 40, 8, 5, 9, 0.5, marks=slow),
        pytest.param(2, 64, 2, 14, 14, 0.0, marks=slow),
        pytest.param(2, 96, 3, 7, 7, 0.0, marks=slow),
        pytest.param(2, 112, 8, 7, 7, 0.5, marks=slow),
        pytest.param(9, 192, 6, 1, 1, 0.0, marks=slow),
    ],
)
def test_post(B, C, heads, H, W, drop_path, train):
    torch.manual_seed(0)
    layer = post(C, heads, drop_path=drop_path).train(train)
    compare(layer, maps(B, C, H, W), maps(B, C, H, W))


@kernels
@slow
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_post_in_half_precision(dtype, train):
    torch.manual_seed(0)
    layer = post(48, 3, dtype=dtype).train(train)
    compare(layer, maps(2, 48, 4, 5, dtype=dtype), maps(2, 48, 4, 5, dtype=dtype))


@kernels
@pytest.mark.parametrize(
    'kwargs',
    [
        pytest.param({'momentum': None, 'affine': False}, marks=slow),
        pytest.param({'momentum': 0.3, 'eps': 0.1}, marks=slow),
        pytest.param({'track_running_stats': False}, marks=slow),
        pytest.param({'norm': BatchNormAct2d, 'apply_act': False}, marks=slow),
    ],
    ids=str,
)
@both_modes
def test_post_with_other_batch_norms(kwargs, train):
    torch.manual_seed(0)
    layer = post(32, 2, **kwargs).train(train)
    for _ in range(2):
        layer.zero_grad()
        compare(layer, maps(2, 32, 3, 4), maps(2, 32, 3, 4))


@kernels
@slow
def test_post_of_a_mean_of_thirty_deviations():
    torch.manual_seed(0)
    layer = post(64, 2)
    x, o = maps(2, 64, 9, 9, shift=30), maps(2, 64, 9, 9, shift=30)
    expected = copy.deepcopy(layer).double()
    assert_close('output', expected(x.double(), o.double()), layer(x, o), 1e-5)
    for (name, b), a in zip(expected.named_buffers(), layer.buffers(), strict=True):
        assert_close(name, b, a, 1e-6)


@kernels
@pytest.mark.parametrize('dtype', [pytest.param(torch.float32, marks=slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize('size', [(2, 40, 7, 7), pytest.param((1, 96, 14, 5), marks=slow)], ids=str)
def test_folded(size, dtype):
    torch.manual_seed(0)
    layer = post(size[1], 2).eval()
    x, o = maps(*size, dtype=dtype), maps(*size, dtype=dtype)
    folded = copy.deepcopy(layer).fuse().to(dtype)
    with torch.no_grad():
        assert reason(folded, x, o) == ''
        with watched():
            result = folded(x, o)
        expected = layer.double().branch(x.double(), o.double(), None) + x.double()
    assert result.dtype == dtype and result.stride() == x.stride()
    assert_close('output', expected, result, ROUNDING[dtype])


@kernels
@pytest.mark.parametrize('wanted', ['x', 'o', 'parameters'])
def test_a_folded_layer_has_the_gradients_of_the_plain_one(wanted):
    torch.manual_seed(0)
    folded = post(32, 2).eval().fuse().requires_grad_(wanted == 'parameters')
    x, o = (maps(2, 32, 4, 4).requires_grad_(wanted == name) for name in 'xo')
    sources = {'x': [x], 'o': [o], 'parameters': [*folded.parameters()]}[wanted]
    assert 'a gradient is wanted' in reason(folded, x, o)
    gradients = torch.autograd.grad(folded(x, o).square().sum(), sources)
    timm_mrla.set_fused(False)
    expected = torch.autograd.grad(folded(x, o).square().sum(), sources)
    timm_mrla.set_fused(True)
    assert all(map(torch.equal, gradients, expected))
    with torch.no_grad():
        assert reason(folded, x, o) == ''


@kernels
@pytest.mark.parametrize('fuse', [False, True])
def test_post_in_nhwc(fuse):
    torch.manual_seed(0)
    layer = MrlaLight(32, 16, nn.BatchNorm2d, layout='NHWC').to(DEVICE).eval()
    x, o = torch.randn(2, 2, 5, 6, 32, device=DEVICE)
    expected = x.double() + copy.deepcopy(layer).double().branch(x.double(), o.double(), None)
    layer = layer.fuse() if fuse else layer
    with torch.no_grad():
        assert reason(layer, x, o) == ''
        assert_close('output', expected, layer(x, o), 1e-5)


def pre(dim, heads, norm=LayerNorm, layout='NLC', dtype=torch.float32, norm_o=True, **kwargs):
    layer = MrlaLight(dim, dim // heads, norm, 'pre', layout, **kwargs)
    if not norm_o:
        layer.norm_o = nn.Identity()
    return draw(layer, dtype)


def without_bias(dim, **kwargs):
    return nn.LayerNorm(dim, bias=False, **kwargs)


@kernels
@pytest.mark.parametrize(
    ('shape', 'grid', 'heads', 'kwargs'),
    [
        ((2, 49, 24), (7, 7), 3, {}),
        pytest.param((3, 46, 40), (5, 9), 5, {'drop_path': 0.5}, marks=slow),
        pytest.param((2, 201, 64), (14, 14), 4, {}, marks=slow),
        pytest.param((3, 6, 192), (1, 1), 12, {}, marks=slow),
        pytest.param((2, 13, 48), (3, 4), 3, {'norm': without_bias, 'drop_path': 0.5}, marks=slow),
        pytest.param((2, 13, 48), (3, 4), 3, {'norm': RmsNorm}, marks=slow),
        pytest.param((2, 13, 48), (3, 4), 3, {'norm_o': False}, marks=slow),
        pytest.param((2, 5, 9, 96), None, 6, {'layout': 'NHWC'}, marks=slow),
        pytest.param((2, 40, 5, 6), None, 4, {'layout': 'NCHW', 'norm': LayerNorm2d, 'drop_path': 0.5}, marks=slow),
    ],
)
def test_pre(shape, grid, heads, kwargs):
    torch.manual_seed(0)
    nchw = kwargs.get('layout') == 'NCHW'
    layer = pre(shape[1] if nchw else shape[-1], heads, **kwargs)
    x, o = (maps(*shape) if nchw else torch.randn(shape, device=DEVICE) for _ in range(2))
    compare(layer, x, o, grid)


@kernels
@slow
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_pre_in_half_precision(dtype):
    torch.manual_seed(0)
    x, o = (torch.randn(2, 21, 48, device=DEVICE, dtype=dtype) for _ in range(2))
    compare(pre(48, 3, dtype=dtype), x, o, (4, 5))


@kernels
@slow
@pytest.mark.parametrize('x_dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('form', ['post', 'pre'])
def test_autocast_gives_the_dtype_of_the_plain_layer(form, x_dtype):
    torch.manual_seed(0)
    layer = post(32, 2) if form == 'post' else pre(32, 2)
    x, o = (
        maps(2, 32, 5, 6, dtype=x_dtype) if form == 'post' else torch.randn(2, 31, 32, device=DEVICE, dtype=x_dtype)
        for _ in range(2)
    )
    results = []
    for enable in (True, False):
        timm_mrla.set_fused(enable)
        ours, inputs = copy.deepcopy(layer), [t.clone().requires_grad_() for t in (x, o)]
        with torch.autocast(DEVICE, torch.bfloat16):
            assert (reason(ours, *inputs, (5, 6)) == '') is enable
            y = ours(*inputs, (5, 6))
        y.float().square().sum().backward()
        results.append([y, *(t.grad for t in inputs), *(p.grad for p in ours.parameters())])
    timm_mrla.set_fused(True)
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert_close('tensor', b, a, 0.05)


@kernels
@pytest.mark.parametrize('form', ['post', pytest.param('pre', marks=slow)])
def test_rows_of_several_tiles(form, monkeypatch):
    """As in large maps. Of three tiles, two are one row, and one is another."""
    monkeypatch.setattr('timm_mrla.ops.common.PROGRAMS', 4)
    torch.manual_seed(0)
    x, o = (maps(2, 24, 5, 3) for _ in range(2)) if form == 'post' else torch.randn(2, 2, 16, 24, device=DEVICE)
    compare(post(24, 3) if form == 'post' else pre(24, 3), x, o, (5, 3))


@kernels
@slow
@pytest.mark.parametrize('form', ['post', 'pre'])
def test_two_runs_give_the_same_bits(form):
    """In the interpreter, they run the programs of each launch in different orders."""
    torch.manual_seed(0)
    layer = post(32, 2) if form == 'post' else pre(32, 2)
    inputs = [maps(2, 32, 5, 5) for _ in range(2)] if form == 'post' else [*torch.randn(2, 2, 26, 32, device=DEVICE)]
    inputs, runs = [t.requires_grad_() for t in inputs], []
    for seed in range(2):
        with watched(seed):
            y = layer(*inputs, (5, 5))
            runs.append([y, *torch.autograd.grad(y.square().sum(), [*inputs, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@kernels
@pytest.mark.parametrize('form', ['post', pytest.param('pre', marks=slow)])
def test_second_derivatives_are_refused_in_one_sentence(form):
    layer, x = (post(32, 2), maps(2, 32, 4, 4)) if form == 'post' else (pre(32, 2), torch.randn(2, 16, 32))
    x = x.to(DEVICE).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x, x.detach(), (4, 4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'call timm_mrla\.set_fused\(False\)'):
        gradient.sum().backward()


@kernels
@pytest.mark.parametrize('form', [pytest.param('post', marks=slow), 'pre', 'folded'])
def test_ops_follow_the_rules_of_torch(form):
    x = maps(2, 32, 3, 4).requires_grad_(form != 'folded')
    qk, w, lam = (torch.randn(*shape, device=DEVICE) for shape in ((2, 3), (9, 32), (32,)))
    if form == 'folded':
        op, args = functions.light_folded.op, (x, x.clone(), qk, w, lam, lam, 2)
    elif form == 'post':
        op, args = functions.light_post.op, (x, x.clone(), qk, w, lam, lam, lam, None, None, None, 2, 1e-5)
    else:
        x = torch.randn(2, 13, 32, device=DEVICE, requires_grad=True)
        norms = (lam, None, lam, lam, torch.ones(2, device=DEVICE))
        op, args = functions.light_pre.op, (x, x.clone(), [3, 4], qk, w, lam, *norms, 2, 1e-5, False, x.dtype, x.dtype)
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    assert set(torch.library.opcheck(op, args, test_utils=tests).values()) == {'SUCCESS'}


@kernels
@slow
@pytest.mark.parametrize('form', ['post', 'pre', 'folded'])
def test_compiled_the_op_is_one_node_of_one_graph(form):
    torch.manual_seed(0)
    layer, x = (pre(32, 2), torch.randn(2, 13, 32).to(DEVICE)) if form == 'pre' else (post(32, 2), maps(2, 32, 3, 4))
    if form == 'folded':
        layer = layer.eval().fuse().requires_grad_(False)
    plain, nodes = copy.deepcopy(layer), []

    compiled = torch.compile(layer, fullgraph=True, backend=recording(nodes))
    inputs = [[x.clone().requires_grad_(form != 'folded') for _ in range(2)] for _ in range(2)]
    outputs = [fn(*xs, (3, 4)) for fn, xs in zip((compiled, plain), inputs, strict=True)]
    assert len(nodes) == 1 and f'light_{form}' in nodes[0]
    assert torch.equal(*outputs)
    if form != 'folded':
        for y in outputs:
            y.square().sum().backward()
        for a, b in zip([*inputs[0], *layer.parameters()], [*inputs[1], *plain.parameters()], strict=True):
            assert torch.equal(a if a.grad is None else a.grad, b if b.grad is None else b.grad)
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), plain.buffers(), strict=True))


MODELS = {
    'test_resnet_mrla': (64, 64),
    'mobilenetv3_small_050_mrla': (64, 64),
    'test_convnext_mrla': (32, 32),
    'test_mambaout_mrla': (32, 32),
    'test_vit_mrla': (32, 64),
}


@kernels
@slow
@pytest.mark.parametrize('name', MODELS)
def test_models_train_as_they_do_plain(name):
    assert_trains_as_plain(*model_and_images(name, MODELS[name]))


@kernels
@slow
@pytest.mark.parametrize('name', ['test_resnet_mrla', 'test_vit_mrla'])
def test_an_adapter_trains_as_it_does_plain(name):
    """On a frozen backbone, where x and o of the first block need no gradient."""
    assert_trains_as_plain(*model_and_images(name, (32, 32), mrla_adapter=True))


@kernels
@slow
def test_reparameterized_models_run_in_the_kernels():
    model, x = model_and_images('test_resnet_mrla', MODELS['test_resnet_mrla'])
    with torch.no_grad():
        expected = model.eval()(x)
        model = reparameterize_model(model)
        assert set(timm_mrla.why_not_fused(model, x).values()) == {''}
        assert_close('logits', expected, model(x), 1e-4)


@kernels
@slow
def test_looking_at_a_model_gives_the_same():
    model, x = model_and_images('test_resnet_mrla', MODELS['test_resnet_mrla'])
    looks = []
    for enable in (True, False):
        timm_mrla.set_fused(enable)
        looks.append(timm_mrla.layer_attention(model, x))
    timm_mrla.set_fused(True)
    for stage, weights in looks[1].items():
        assert_close(stage, weights, looks[0][stage], 1e-4)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def hooked(layer):
    layer.v.register_forward_hook(lambda *args: None)


def pruned(layer):
    prune.l1_unstructured(layer.v, 'weight', 0.5)


def parametrized(layer):
    nn.utils.parametrizations.weight_norm(layer.v)


def adapted(layer):
    layer.attn.qk = Wrapped(layer.attn.qk)


REASONS = {
    'hook': (hooked, 'a hook is on v'),
    'prune': (pruned, 'a hook is on v'),
    'parametrization': (parametrized, 'v is Parametrized'),
    'adapter': (adapted, 'attn.qk is Wrapped'),
    'group norm': (lambda layer: setattr(layer, 'norm', nn.GroupNorm(1, 32)), 'norm is GroupNorm'),
    'activation': (lambda layer: setattr(layer, 'norm', BatchNormAct2d(32)), 'norm is BatchNormAct2d'),
    'drop path': (lambda layer: setattr(layer, 'drop_path', nn.Dropout(0.1)), 'drop_path is Dropout'),
    'value norm': (lambda layer: setattr(layer, 'norm_v', nn.BatchNorm2d(32)), 'norm_v is BatchNorm2d'),
    'gelu': (lambda layer: setattr(layer, 'act_v', nn.GELU()), 'act_v is GELU'),
}


@kernels
@pytest.mark.parametrize('case', REASONS)
def test_what_somebody_changed_runs_plain(case):
    change, expected = REASONS[case]
    layer, x = MrlaLight(32, 16, nn.BatchNorm2d), torch.randn(2, 32, 4, 4).contiguous(**CHANNELS_LAST)
    change(layer)
    layer.to(DEVICE)
    x = x.to(DEVICE)
    assert reason(layer, x, x).startswith(expected)
    assert torch.equal(layer.eval()(x, x), x + layer.branch(x, x, None))


@kernels
def test_what_the_kernels_do_not_read_runs_plain():
    layer, x = post(32, 2), maps(2, 32, 4, 4)
    expected = {
        'float64': (x.double(), x.double()),
        'maps differ': (x, x.half()),
        'without autocast': (x.half(), x.half()),
        'the batch is empty': (x[:0], x[:0]),
        'not contiguous in channels_last': (x.contiguous(), x.contiguous()),
        'one value for each channel': (x[:1, :, :1, :1], x[:1, :, :1, :1]),
        'class Parameter': (nn.Parameter(x), x),
    }
    for why, (a, b) in expected.items():
        assert why in reason(layer, a, b)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        layer(x[:1, :, :1, :1], x[:1, :, :1, :1])
    subclass = type('Other', (MrlaLight,), {})(32, 16, nn.BatchNorm2d)
    assert 'no kernels for Other' in reason(subclass, x, x)
    tokens = MrlaLight(32, 16, nn.BatchNorm2d, layout='NLC')
    assert 'the form post on tokens' in reason(
        tokens, x.flatten(2).mT.contiguous(), x.flatten(2).mT.contiguous(), (4, 4)
    )


@kernels
@pytest.mark.parametrize(
    ('norm', 'why'),
    [
        (lambda dim, **dd: nn.LayerNorm(dim, elementwise_affine=False, **dd), 'norm_x has no weight'),
        (lambda dim, **dd: nn.Identity(), 'norm_x is Identity'),
    ],
)
def test_other_norms_of_the_form_pre_run_plain(norm, why):
    x = torch.randn(2, 16, 32, device=DEVICE)
    assert why in reason(MrlaLight(32, 16, norm, 'pre', 'NLC').to(DEVICE), x, x, (4, 4))


@kernels
def test_transforms_and_tracers_run_plain():
    layer, x = post(32, 2).eval().requires_grad_(False), maps(2, 32, 4, 4)
    seen = []

    def run(x):
        seen.append(reason(layer, x, x))
        return layer(x, x)

    expected = run(x)
    torch.func.jvp(run, (x,), (x,))
    torch.func.vmap(run)(x[:, None])
    with FlopCounterMode(display=False):
        run(x)
    traced = torch.jit.trace(run, (x,), check_trace=False)
    assert all(seen[1:]) and not seen[0]
    assert_close('traced', expected, traced(x), 1e-5)
    exported = torch.export.export(layer, (x, x))
    assert not any('timm_mrla' in str(node.target) for node in exported.graph.nodes)
    graph = torch.fx.symbolic_trace(layer)
    assert_close('FX', expected, graph(x, x), 1e-5)


@kernels
def test_compiled_transforms_run_plain():
    """Not jvp, because torch 2.14 sometimes fails to compile it for batch norms, too."""
    layer, x = post(32, 2).eval().requires_grad_(False), maps(2, 32, 4, 4)

    def per_image(x):
        return torch.func.vmap(lambda x: layer(x, x))(x[:, None])

    def gradient(x):
        return torch.func.grad(lambda x: layer(x, x).square().sum())(x)

    for transform in (per_image, gradient):
        torch._dynamo.reset()
        compiled = torch.compile(transform, fullgraph=True, backend='eager')
        assert_close(transform.__name__, transform(x), compiled(x), 1e-5)


@kernels
@slow
def test_kernels_are_turned_off():
    layer, x = post(32, 2), maps(2, 32, 4, 4)
    timm_mrla.set_fused(False)
    off = reason(layer, x, x)
    timm_mrla.set_fused(True)
    assert 'set_fused(False)' in off and not reason(layer, x, x)


def test_the_environment_turns_kernels_off(monkeypatch):
    """Any spelling of no. The file runs again, as at import, but in a module of its own."""
    spec = importlib.util.find_spec('timm_mrla.ops.reasons')
    for value, turned_off in (('0', True), ('off', True), ('False', True), ('', True), ('1', False), ('on', False)):
        monkeypatch.setenv('TIMM_MRLA_FUSED', value)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        layer, x = MrlaLight(32, 16, nn.BatchNorm2d), torch.randn(2, 32, 4, 4)
        assert ('turned off' in module.reason(layer, x, x)) == turned_off
    monkeypatch.setenv('TIMM_MRLA_FUSED', 'maybe')
    with pytest.raises(ValueError, match="TIMM_MRLA_FUSED 'maybe' is neither on nor off"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


BIG = [
    *('resnet50_mrla', 'efficientnet_b0_mrla', 'convnext_tiny_mrla', 'swin_tiny_patch4_window7_224_mrla'),
    *('vit_small_patch16_224_mrla', 'vit_small_patch16_dinov3_mrla'),
    *('resnet50_mrlab', 'deit_small_mrlab', 'pvt_v2_b0_mrlab'),
]


def big(name, batch=16):
    torch.manual_seed(0)
    model = timm.create_model(name, mrla_identity=name.endswith('_mrla')).cuda().to(**CHANNELS_LAST)
    for layer in layer_attentions(model).values():
        for scale in layer.output_scales():
            nn.init.normal_(scale, std=0.1)
    x = torch.randn(batch, *model.pretrained_cfg['input_size'], device='cuda').contiguous(**CHANNELS_LAST)
    return model, x


@on_gpu
@pytest.mark.parametrize('name', BIG)
def test_big_models_train_in_bfloat16_as_they_do_plain(name):
    model, x = big(name)
    with torch.autocast('cuda', torch.bfloat16):
        assert set(timm_mrla.why_not_fused(model, x).values()) == {''}
    gradients = []
    for enable in (True, False):
        timm_mrla.set_fused(enable)
        model.zero_grad()
        with torch.autocast('cuda', torch.bfloat16):
            loss = model.train()(x).float().square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    timm_mrla.set_fused(True)
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


@on_gpu
@pytest.mark.parametrize('name', BIG)
def test_big_models_in_a_cuda_graph(name):
    model, x = big(name)
    model.eval()
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16, cache_enabled=False):
        expected = model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@on_gpu
def test_compiled_models_train_in_bfloat16():
    model, x = big('resnet50_mrla')
    losses = []
    for run in (torch.compile(copy.deepcopy(model).train(), fullgraph=True), model.train()):
        with torch.autocast('cuda', torch.bfloat16):
            loss = run(x).float().square().mean()
        loss.backward()
        losses.append(loss.detach())
    assert_close('loss', losses[1], losses[0], 0.02)


@on_gpu
@pytest.mark.parametrize(('name', 'ratio'), [('resnet50_mrla', 1.36), ('resnet50_mrlab', 1.45)])
def test_backward_needs_little_more_memory_than_the_backbone(name, ratio):
    model, x = big(name, batch=64)
    plain, kwargs = backbone(name)
    plain = timm.create_model(plain, **kwargs).cuda().to(**CHANNELS_LAST)
    with torch.autocast('cuda', torch.bfloat16):
        assert saved_bytes(model.train(), x) < ratio * saved_bytes(plain.train(), x)


@on_gpu
def test_maps_of_more_than_2_to_the_31_elements():
    layer = post(32, 2, dtype=torch.bfloat16).eval()
    x = torch.randn(5, 32, 4096, 4096, device='cuda', dtype=torch.bfloat16).contiguous(**CHANNELS_LAST)
    with torch.no_grad():
        assert reason(layer, x, x) == ''
        assert torch.equal(layer(x, x)[-1:], layer(x[-1:].clone(**CHANNELS_LAST), x[-1:].clone(**CHANNELS_LAST)))


def launch_post(dtype, C, heads):
    """Every kernel of the form `post`, with and without its optional arguments."""
    from timm_mrla.ops import light_post, light_post_backward

    x, o, d = (torch.empty(2, C, 7, 7, dtype=dtype).contiguous(**CHANNELS_LAST) for _ in range(3))
    qk, w, lam, s = (torch.empty(*shape) for shape in ((2, 1, 1, 5), (C, 1, 3, 3), (C,), (2,)))
    for affine, statistics, scale in ((lam, None, s), (None, None, None), (lam, lam, None)):
        norm = (affine, affine, statistics, statistics, scale)
        _, *saved = light_post.forward(x, o, qk, w, lam, *norm, heads, 1e-5)
        light_post_backward.backward(d, x, o, qk, w, lam, scale, *saved, statistics is None)
    light_post.folded(x, o, qk, w, lam, lam, heads)


def launch_pre(dtype, C, heads):
    """Every kernel of the form `pre`, with and without its optional arguments."""
    from timm_mrla.ops import light_pre, light_pre_backward

    x, o, d = (torch.empty(2, 54, C, dtype=dtype) for _ in range(3))
    qk, w, lam, s = (torch.empty(*shape) for shape in ((2, 1, 1, 5), (C, 1, 3, 3), (C,), (2,)))
    for norms, scale, rms in (
        ((lam,) * 4, s, False),
        ((lam, None) * 2, None, True),
        ((lam, lam, None, None), s, False),
    ):
        dtypes = (torch.float32, torch.bfloat16)
        _, *saved = light_pre.forward(x, o, [7, 7], qk, w, lam, *norms, scale, heads, 1e-5, rms, *dtypes)
        light_pre_backward.backward(d, x, o, [7, 7], qk, w, lam, *norms, scale, *saved, rms, torch.bfloat16)


WIDTHS = [(24, 8), (40, 8), (64, 2), (96, 6), (384, 24), (768, 48), (2048, 64), (3072, 192)]


@slow
@pytest.mark.skipif(INTERPRETER, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('launch', [launch_post, launch_pre])
@pytest.mark.parametrize(
    ('dtype', 'width', 'capability'),
    [
        *((dtype, width, capability) for dtype, capability in COMPILED_FOR for width in WIDTHS),
        *((torch.float16, (width, 4), 80) for width in (40, 64)),
    ],
)
def test_kernels_compile_for_gpus_and_spill_nothing(launch, dtype, width, capability, monkeypatch):
    from compile_kernels import record, resources

    launches = record(monkeypatch, lambda: launch(dtype, *width))
    assert len(launches) > 8
    for each in launches:
        registers, spilled = resources(each, capability)
        assert spilled == 0, f'{each[0].__name__} with {registers} registers spills {spilled} bytes'


def test_on_a_cpu_layers_run_plain():
    if INTERPRETER:
        pytest.skip('the interpreter runs kernels on a CPU')
    model = timm.create_model('test_resnet_mrla')
    assert set(timm_mrla.why_not_fused(model, torch.randn(1, 3, 64, 64)).values()) == {
        'the images are on the device cpu, and the kernels are for cuda'
    }
