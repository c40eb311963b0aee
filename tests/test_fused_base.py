"""Tests of the fused kernels of MRLA-base against the plain layer in float64, on a GPU or in Triton's interpreter.

Without a GPU, `test_fused.py` runs this file in a separate process, in the interpreter.
"""

import copy

import pytest
import torch
from compile_kernels import record, resources
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
    recording,
    watched,
)
from memory import saved_bytes
from timm.layers import LayerNorm, RmsNorm
from timm.utils.model import reparameterize_model
from torch import nn

import timm_mrla
from timm_mrla.layers import MrlaBase
from timm_mrla.ops import base_functions as functions
from timm_mrla.ops import reason

slow = pytest.mark.slow
both_modes = pytest.mark.parametrize('train', [True, pytest.param(False, marks=slow)], ids=['train', 'eval'])


def post(dim, heads, dtype=torch.float32, drop_path=0.0, **kwargs):
    return draw(
        MrlaBase(dim, dim // heads, lambda dim, **dd: nn.BatchNorm2d(dim, **kwargs, **dd), drop_path=drop_path), dtype
    )


def pre(dim, heads, norm=LayerNorm, layout='NLC', dtype=torch.float32, **kwargs):
    return draw(MrlaBase(dim, dim // heads, norm, 'pre', layout, **kwargs), dtype)


def memory_of(blocks, B, C, heads, H, W, dtype=torch.float32):
    """Keys and values of a number of earlier blocks."""
    pairs = ((torch.randn(B, heads, C // heads, device=DEVICE), maps(B, C, H, W, dtype=dtype)) for _ in range(blocks))
    return tuple(t for pair in pairs for t in pair)


def compare(layer, x, memory, feat_size=None):
    """Outputs, gradients and running statistics of a layer on x and a memory, fused against plain in float64."""
    assert reason(layer, x, memory, feat_size) == ''
    ratio, exact, keep = ROUNDING[x.dtype], copy.deepcopy(layer).double(), copy.deepcopy(layer.drop_path)
    ours, theirs = [t.clone().requires_grad_() for t in (x, *memory)], [t.double() for t in (x, *memory)]
    theirs = [t.requires_grad_() for t in theirs]
    torch.manual_seed(1)
    with watched():
        y, (*_, k, v) = layer(ours[0], tuple(ours[1:]), feat_size)
        gradients = [torch.randn_like(t) for t in (y, k, v)]
        torch.autograd.backward([y, k, v], gradients)
    torch.manual_seed(1)
    scale = keep(torch.ones(len(x), *[1] * (x.ndim - 1), device=DEVICE)).double()
    m, *key_value = exact.branch(theirs[0], feat_size, *theirs[1:])
    outputs = [(theirs[0] + scale * m, y), *zip(key_value, (k, v), strict=True)]
    layout = CHANNELS_LAST if layer.layout == 'NCHW' else {}
    assert y.dtype == x.dtype and y.is_contiguous(**layout) and v.is_contiguous(**CHANNELS_LAST)
    torch.autograd.backward([a for a, _ in outputs], [d.double() for d in gradients])
    for name, (a, b) in zip(('output', 'key', 'value'), outputs, strict=True):
        assert_close(name, a, b, ratio)
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert_close(f'gradient of x or memory {i}', a.grad, b.grad, ratio)
    for (name, b), a in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert_close(f'gradient of {name}', a.grad, b.grad, 3 * ratio)
    for (name, b), a in zip(layer.named_buffers(), exact.buffers(), strict=True):
        assert_close(name, a, b, ratio)


@kernels
@both_modes
@pytest.mark.parametrize(
    ('B', 'C', 'heads', 'H', 'W', 'before', 'drop_path'),
    [
        (2, 24, 3, 7, 7, 0, 0.0),
        pytest.param(3, 40, 5, 5, 9, 2, 0.5, marks=slow),
        pytest.param(2, 64, 4, 14, 14, 1, 0.0, marks=slow),
        pytest.param(2, 96, 6, 7, 7, 3, 0.0, marks=slow),
        pytest.param(2, 112, 7, 7, 7, 1, 0.5, marks=slow),
        pytest.param(9, 192, 12, 1, 1, 2, 0.0, marks=slow),
        pytest.param(2, 32, 2, 3, 2, 35, 0.0, marks=slow),
    ],
)
def test_post(B, C, heads, H, W, before, drop_path, train):
    torch.manual_seed(0)
    layer = post(C, heads, drop_path=drop_path).train(train)
    compare(layer, maps(B, C, H, W), memory_of(before, B, C, heads, H, W))


@kernels
@pytest.mark.parametrize('dtype', [pytest.param(torch.float16, marks=slow), torch.bfloat16], ids=str)
@both_modes
def test_post_in_half_precision(dtype, train):
    """A large bias keeps the ReLU on: near zero, rounding may turn it on in one and off in the other."""
    torch.manual_seed(0)
    layer = post(48, 3, dtype=dtype).train(train)
    nn.init.constant_(layer.norm.bias, 20)
    compare(layer, maps(2, 48, 4, 5, dtype=dtype), memory_of(2, 2, 48, 3, 4, 5, dtype))


@kernels
@pytest.mark.parametrize(
    'kwargs',
    [
        {'momentum': None, 'affine': False},
        pytest.param({'momentum': 0.3, 'eps': 0.1}, marks=slow),
        pytest.param({'track_running_stats': False}, marks=slow),
    ],
    ids=str,
)
@both_modes
def test_post_with_other_batch_norms(kwargs, train):
    torch.manual_seed(0)
    layer = post(32, 2, **kwargs).train(train)
    for _ in range(2):
        layer.zero_grad()
        compare(layer, maps(2, 32, 3, 4), memory_of(1, 2, 32, 2, 3, 4))


@kernels
@slow
def test_post_of_a_mean_of_thirty_deviations():
    torch.manual_seed(0)
    layer, x = post(64, 4), maps(2, 64, 9, 9, shift=30)
    exact = copy.deepcopy(layer).double()
    assert_close('output', exact(x.double())[0], layer(x)[0], 1e-5)
    for (name, b), a in zip(exact.named_buffers(), layer.buffers(), strict=True):
        assert_close(name, b, a, 1e-6)


@kernels
@pytest.mark.parametrize('dtype', [pytest.param(torch.float32, marks=slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize('size', [(2, 40, 7, 7), pytest.param((1, 96, 14, 5), marks=slow)], ids=str)
def test_folded(size, dtype):
    torch.manual_seed(0)
    B, C, H, W = size
    layer = post(C, C // 8).eval()
    x, memory = maps(*size, dtype=dtype), memory_of(2, B, C, C // 8, H, W, dtype)
    folded = copy.deepcopy(layer).fuse().to(dtype)
    with torch.no_grad():
        assert reason(folded, x, memory) == ''
        m, *key_value = layer.double().branch(x.double(), None, *(t.double() for t in memory))
        with watched():
            y, (*_, k, v) = folded(x, memory)
    assert y.dtype == dtype and y.stride() == x.stride()
    for name, a, b in zip(('output', 'key', 'value'), (m + x.double(), *key_value), (y, k, v), strict=True):
        assert_close(name, a, b, ROUNDING[dtype])


@kernels
@pytest.mark.parametrize('wanted', ['x', 'memory', 'parameters'])
def test_a_folded_layer_has_the_gradients_of_the_plain_one(wanted):
    torch.manual_seed(0)
    folded = post(32, 2).eval().fuse().requires_grad_(wanted == 'parameters')
    x = maps(2, 32, 4, 4).requires_grad_(wanted == 'x')
    memory = [t.requires_grad_(wanted == 'memory') for t in memory_of(1, 2, 32, 2, 4, 4)]
    sources = {'x': [x], 'memory': memory, 'parameters': [*folded.parameters()]}[wanted]
    assert 'a gradient is wanted' in reason(folded, x, memory)
    gradients = torch.autograd.grad(folded(x, memory)[0].square().sum(), sources)
    timm_mrla.set_fused(False)
    expected = torch.autograd.grad(folded(x, memory)[0].square().sum(), sources)
    timm_mrla.set_fused(True)
    assert all(map(torch.equal, gradients, expected))
    with torch.no_grad():
        assert reason(folded, x, memory) == ''


@kernels
@pytest.mark.parametrize(
    ('shape', 'grid', 'heads', 'before', 'kwargs'),
    [
        pytest.param((2, 49, 24), (7, 7), 3, 0, {}, marks=slow),
        pytest.param((3, 46, 40), (5, 9), 5, 2, {'drop_path': 0.5}, marks=slow),
        pytest.param((2, 201, 64), (14, 14), 4, 1, {}, marks=slow),
        pytest.param((3, 6, 192), (1, 1), 12, 3, {}, marks=slow),
        ((2, 13, 48), (3, 4), 3, 1, {'norm': RmsNorm}),
        pytest.param((2, 5, 9, 96), (5, 9), 6, 1, {'layout': 'NHWC'}, marks=slow),
    ],
)
def test_pre(shape, grid, heads, before, kwargs):
    torch.manual_seed(0)
    compare(
        pre(shape[-1], heads, **kwargs),
        torch.randn(shape, device=DEVICE),
        memory_of(before, shape[0], shape[-1], heads, *grid),
        grid,
    )


@kernels
@slow
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_pre_in_half_precision(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 21, 48, device=DEVICE, dtype=dtype)
    compare(pre(48, 3, dtype=dtype), x, memory_of(2, 2, 48, 3, 4, 5, dtype), (4, 5))


def run_stage(stage, x, feat_size=None):
    memory = ()
    for layer in stage:
        x, memory = layer(x, memory, feat_size)
    return x


@kernels
@pytest.mark.parametrize('form', ['post', 'pre'])
def test_a_stage(form):
    """Gradients of a value from later blocks count once; each layer reads the outputs of the layer before."""
    torch.manual_seed(0)
    stage = nn.ModuleList(post(32, 2) if form == 'post' else pre(32, 2) for _ in range(4))
    x = maps(2, 32, 3, 4) if form == 'post' else torch.randn(2, 13, 32, device=DEVICE)
    exact, inputs = copy.deepcopy(stage).double(), [t.requires_grad_() for t in (x, x.double())]
    outputs = [run_stage(layers, t, (3, 4)) for layers, t in zip((stage, exact), inputs, strict=True)]
    d = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(d.to(y.dtype))
    assert_close('output', *reversed(outputs), 1e-5)
    assert_close('gradient of x', inputs[1].grad, inputs[0].grad, 1e-5)
    for (name, b), a in zip(stage.named_parameters(), exact.parameters(), strict=True):
        assert_close(f'gradient of {name}', a.grad, b.grad, 1e-4)


@kernels
@slow
@pytest.mark.parametrize('x_dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('form', ['post', 'pre'])
def test_autocast_gives_the_dtypes_of_the_plain_layer(form, x_dtype):
    """The values are as close to float64 as bfloat16 allows."""
    torch.manual_seed(0)
    layers = nn.ModuleList(post(32, 2) if form == 'post' else pre(32, 2) for _ in range(2))
    for layer in layers:
        if form == 'post':  # keeps the ReLU on, as above
            nn.init.constant_(layer.norm.bias, 20)
    x = maps(2, 32, 5, 6, dtype=x_dtype) if form == 'post' else torch.randn(2, 31, 32, device=DEVICE, dtype=x_dtype)
    results = []
    for mode in ('fused', 'plain', 'exact'):
        timm_mrla.set_fused(mode == 'fused')
        dtypes = (torch.float64, torch.float64) if mode == 'exact' else (torch.float32, x_dtype)
        ours, inputs = copy.deepcopy(layers).to(dtypes[0]), x.to(dtypes[1], copy=True).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mode != 'exact'):
            y, memory = ours[0](inputs, (), (5, 6))
            assert (reason(ours[1], y, memory, (5, 6)) == '') is (mode == 'fused')
            y, (*_, v) = ours[1](y, memory, (5, 6))
        y.to(torch.promote_types(y.dtype, torch.float32)).square().sum().backward()
        results.append([y, v, inputs.grad, *(p.grad for p in ours.parameters())])
    timm_mrla.set_fused(True)
    for fused, plain, exact in zip(*results, strict=True):
        assert fused.dtype == plain.dtype
        if exact.norm() > 1e-6:
            assert_close('tensor', exact, fused, 0.06)


@kernels
@pytest.mark.parametrize('form', [pytest.param('post', marks=slow), 'pre'])
def test_rows_of_several_tiles(form, monkeypatch):
    """As in large maps. Of three tiles, two are one row, and one is another."""
    monkeypatch.setattr('timm_mrla.ops.common.PROGRAMS', 4)
    torch.manual_seed(0)
    layer, x = (post(24, 3), maps(2, 24, 5, 3)) if form == 'post' else (pre(24, 3), torch.randn(2, 16, 24).to(DEVICE))
    compare(layer, x, memory_of(2, 2, 24, 3, 5, 3), (5, 3))


@kernels
@slow
@pytest.mark.parametrize('form', ['post', 'pre'])
def test_two_runs_give_the_same_bits(form):
    """In the interpreter, they run the programs of each launch in different orders."""
    torch.manual_seed(0)
    layer, x = (post(32, 2), maps(2, 32, 5, 5)) if form == 'post' else (pre(32, 2), torch.randn(2, 26, 32).to(DEVICE))
    inputs, runs = [t.requires_grad_() for t in (x, *memory_of(2, 2, 32, 2, 5, 5))], []
    for seed in range(2):
        with watched(seed):
            y, _ = layer(inputs[0], tuple(inputs[1:]), (5, 5))
            runs.append([y, *torch.autograd.grad(y.square().sum(), [*inputs, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@kernels
def test_second_derivatives_are_refused_in_one_sentence():
    layer, x = post(32, 2), maps(2, 32, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'call timm_mrla\.set_fused\(False\)'):
        gradient.sum().backward()


@kernels
@pytest.mark.parametrize('before', [0, 2])
@pytest.mark.parametrize('form', ['post', 'pre', 'folded'])
def test_ops_follow_the_rules_of_torch(form, before):
    learns = form != 'folded'
    x = torch.randn(2, 13 if form == 'pre' else 12, 32, device=DEVICE, requires_grad=learns)
    memory = memory_of(before, 2, 32, 2, 3, 4)
    keys, values = [k.flatten(1) for k in memory[::2]], [*memory[1::2]]
    qk, w, lam = (torch.randn(*shape, device=DEVICE) for shape in ((2, 3), (9, 32), (32,)))
    op, args = functions.base_folded.op, (x, keys, values, [3, 4], qk, w, lam, lam)
    if learns:
        op, rest = functions.base.op, (None, None, None, 2, 1e-5, form == 'post', False, x.dtype, x.dtype)
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    results = torch.library.opcheck(op, (*args, *(rest if learns else (2,))), test_utils=tests)
    assert set(results.values()) == {'SUCCESS'}


@kernels
@slow
@pytest.mark.parametrize('form', ['post', 'pre', 'folded'])
def test_compiled_the_ops_are_nodes_of_one_graph(form):
    torch.manual_seed(0)
    stage = nn.ModuleList(pre(32, 2) if form == 'pre' else post(32, 2) for _ in range(2))
    x = torch.randn(2, 13, 32, device=DEVICE) if form == 'pre' else maps(2, 32, 3, 4)
    if form == 'folded':
        stage = nn.ModuleList(layer.eval().fuse() for layer in stage).requires_grad_(False)
    plain, nodes = copy.deepcopy(stage), []

    torch._dynamo.reset()
    compiled = torch.compile(run_stage, fullgraph=True, backend=recording(nodes))
    inputs = [x.clone().requires_grad_(form != 'folded') for _ in range(2)]
    outputs = [compiled(stage, inputs[0], (3, 4)), run_stage(plain, inputs[1], (3, 4))]
    assert len(nodes) == 2 and all('base' in node for node in nodes)
    assert torch.equal(*outputs)
    if form != 'folded':
        for y in outputs:
            y.square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(stage.parameters(), plain.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(stage.buffers(), plain.buffers(), strict=True))


def hooked(layer):
    layer.attn.register_forward_hook(lambda *args: None)


REASONS = {
    'hook': (hooked, 'a hook is on attn'),
    'group norm': (lambda layer: setattr(layer, 'norm', nn.GroupNorm(1, 32)), 'norm is GroupNorm'),
}


@kernels
@pytest.mark.parametrize('case', REASONS)
def test_what_somebody_changed_runs_plain(case):
    change, expected = REASONS[case]
    layer, x, memory = MrlaBase(32, 16, nn.BatchNorm2d), maps(2, 32, 4, 4), memory_of(1, 2, 32, 2, 4, 4)
    change(layer)
    layer.to(DEVICE).eval()
    assert reason(layer, x, memory).startswith(expected)
    assert torch.equal(layer(x, memory)[0], x + layer.branch(x, None, *memory)[0])


@kernels
def test_memory_that_the_kernels_do_not_read_runs_plain():
    layer, x, (k, v) = post(32, 2), maps(2, 32, 4, 4), memory_of(1, 2, 32, 2, 4, 4)
    assert 'not contiguous in channels_last' in reason(layer, x, (k, v.contiguous()))
    assert 'torch.bfloat16' in reason(layer, x, (k, v.bfloat16()))
    assert 'not contiguous in channels_last' in reason(layer, x.contiguous(), (k, v))
    assert 'class Parameter' in reason(layer, x, (k, nn.Parameter(v)))
    assert not reason(layer, x, (k, v))
    odd = torch.empty(v.numel() + 1, device=DEVICE)[1:].view(2, 4, 4, 32).permute(0, 3, 1, 2).copy_(v)
    assert odd.data_ptr() % 16 and torch.equal(layer.eval()(x, (k, odd))[0], layer(x, (k, v))[0])


MODELS = {
    'resnet18_mrlab': dict(size=(32, 64), layers=(2, 1, 1, 1), channels=(16, 32, 32, 32)),
    'deit_tiny_mrlab': dict(size=(32, 64), depth=5, embed_dim=64, num_heads=2),
    'pvt_v2_b0_mrlab': dict(size=(32, 64), depths=(1, 2, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2)),
}


@kernels
@slow
@pytest.mark.parametrize('name', MODELS)
def test_models_train_as_they_do_plain(name):
    kwargs = dict(MODELS[name])
    size = kwargs.pop('size')
    if 'deit' in name:
        kwargs['img_size'] = size
    assert_trains_as_plain(*model_and_images(name, size, **kwargs))


@kernels
@slow
def test_reparameterized_models_run_in_the_kernels():
    kwargs = dict(MODELS['resnet18_mrlab'])
    model, x = model_and_images('resnet18_mrlab', kwargs.pop('size'), **kwargs)
    with torch.no_grad():
        expected = model.eval()(x)
        model = reparameterize_model(model)
        assert set(timm_mrla.why_not_fused(model, x).values()) == {''}
        assert_close('logits', expected, model(x), 1e-4)


@kernels
@slow
def test_backward_keeps_outputs_and_the_values_that_later_blocks_read():
    """For a stage of three blocks, these are five maps: the three inputs and two values."""
    stage, x = nn.ModuleList(post(32, 2) for _ in range(3)), maps(2, 32, 16, 16).requires_grad_()
    stage.forward = lambda x: run_stage(stage, x)
    assert 5 * x.nbytes < saved_bytes(stage, x) < 5.5 * x.nbytes


def launch(dtype, C, heads):
    """Every kernel of MRLA-base, with and without its optional arguments."""
    from timm_mrla.ops import base, base_backward

    key, value = torch.empty(2, C), torch.empty(2, C, 7, 7, dtype=dtype).contiguous(**CHANNELS_LAST)
    qk, w, p, s = (torch.empty(*shape) for shape in ((2, 1, 1, 5), (C, 1, 3, 3), (C,), (2,)))
    for post, weight, bias, mean, scale, before, rms in (
        (True, p, p, None, s, 0, False),
        (True, None, None, None, None, 1, False),
        (True, p, p, p, None, 2, False),
        (False, p, p, None, s, 0, False),
        (False, p, None, None, None, 1, True),
    ):
        x, d = (torch.empty(2, 49 if post else 54, C, dtype=dtype) for _ in range(2))
        norm = (weight, bias)
        _, k, v, *saved = base.forward(
            *(x, [key] * before, [value] * before, [7, 7], qk, w, *norm, mean, mean, scale, heads, 1e-5, post, rms),
            *(torch.float32, dtype),
        )
        later = (k, v) if before else (None, None)
        memory, train = ([key] * before, [value] * before), post and mean is None
        base_backward.backward(d, *later, x, *memory, [7, 7], qk, w, *norm, scale, *saved, post, train, rms, dtype)
    base.folded(torch.empty(2, 49, C, dtype=dtype), [key], [value], [7, 7], qk, w, p, p, heads)


WIDTHS = [(24, 3), (40, 5), (64, 4), (384, 24), (768, 48), (2048, 128)]


@slow
@pytest.mark.skipif(INTERPRETER, reason='the interpreter compiles nothing')
@pytest.mark.parametrize(
    ('dtype', 'width', 'capability'),
    [
        *((dtype, width, capability) for dtype, capability in COMPILED_FOR for width in WIDTHS),
        (torch.float16, (40, 5), 80),
    ],
)
def test_kernels_compile_for_gpus_and_spill_nothing(dtype, width, capability, monkeypatch):
    spills = {}
    for kernel, *rest in record(monkeypatch, lambda: launch(dtype, *width)):
        spills[kernel.__name__] = resources((kernel, *rest), capability)[1]
    assert len(spills) >= 15 and not any(spills.values()), spills
