"""Tests of reparameterized models: folding for inference does not change the outputs."""

import pytest
import timm
import torch
from slow import slow_except
from timm.layers import LayerNorm2d
from timm.utils.model import reparameterize_model
from torch import nn

import timm_mrla  # noqa: F401
from timm_mrla.layers import MrlaBase, MrlaLight, layer_attentions
from timm_mrla.layers.folding import Affine

MODELS = [
    'resnet18_mrla',
    'resnet18_mrlab',
    'efficientnet_b0_mrla',
    'ceit_tiny_mrla',
    'deit_tiny_mrla',
    'pvt_v2_b0_mrlab',
]
DIM, SIZE = 32, (5, 7)

every_layer = pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])


def randomize(module):
    """Batch norms with random weights and statistics."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return module


def create(name, dtype):
    torch.manual_seed(0)
    size = {'img_size': 64} if timm.models.get_pretrained_cfg(name).fixed_input_size else {}
    return randomize(timm.create_model(name, num_classes=7, dtype=dtype, **size)).eval()


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_equal_outputs(name, dtype, tolerance):
    model, x = create(name, dtype), torch.randn(2, 3, 64, 64, dtype=dtype)
    folded = reparameterize_model(model)
    expected = model(x)
    torch.testing.assert_close(folded(x), expected, rtol=tolerance, atol=tolerance * expected.std().item())
    layers = layer_attentions(folded)
    assert layers.keys() == layer_attentions(model).keys()
    norms = [m for layer in layers.values() for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ([layer.norm_v for layer in layers.values()] if name.startswith('ceit') else [])
    kept = name.startswith(('deit', 'pvt', 'ceit'))
    assert all(isinstance(layer.norm, nn.Identity if kept else Affine) for layer in layers.values())


def stage(blocks, inputs):
    """Outputs of all blocks, each with its own x and o; base with the memory of earlier blocks."""
    memory, out = (), []
    for block, x, o in zip(blocks, inputs[::2], inputs[1::2], strict=True):
        if isinstance(block, MrlaBase):
            x, memory = block(x, memory, SIZE)
        else:
            x = block(x, o, SIZE)
        out.append(x)
    return *out, *memory


def setting(
    layer,
    layout='NCHW',
    num_prefix=0,
    batch=2,
    dtype=torch.float64,
    memory_format=torch.contiguous_format,
    norm_layer=nn.BatchNorm2d,
    form='post',
    seed=0,
):
    """Three blocks, the same blocks folded, and their inputs."""
    torch.manual_seed(seed)
    blocks = nn.ModuleList(layer(DIM, 8, norm_layer, form, layout) for _ in range(3))
    blocks = randomize(blocks).to(dtype).to(memory_format=memory_format).eval()
    H, W = SIZE
    shape = {'NCHW': (DIM, H, W), 'NHWC': (H, W, DIM), 'NLC': (num_prefix + H * W, DIM)}[layout]
    inputs = [torch.randn(batch, *shape, dtype=torch.float64).to(dtype) for _ in range(6)]
    inputs = [x.to(memory_format=memory_format) if x.ndim == 4 else x for x in inputs]
    return blocks, reparameterize_model(blocks), inputs


def assert_folded(blocks):
    assert all(isinstance(block.norm, Affine) for block in blocks)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in blocks.modules())


CASES = {
    'NCHW': {},
    'channels_last': {'memory_format': torch.channels_last},
    'one image': {'batch': 1},
    'NHWC': {'layout': 'NHWC'},
    'NHWC, one image': {'layout': 'NHWC', 'batch': 1},
    'tokens': {'layout': 'NLC'},
    'tokens and a prefix': {'layout': 'NLC', 'num_prefix': 1},
    'tokens and a longer prefix': {'layout': 'NLC', 'num_prefix': 3},
    'tokens, one image': {'layout': 'NLC', 'num_prefix': 1, 'batch': 1},
}
every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad, torch.inference_mode])
@every_case
@every_layer
def test_outputs_of_layers(layer, case, mode):
    blocks, folded, inputs = setting(layer, **case)
    assert_folded(folded)
    expected = stage(blocks, inputs)
    with mode():
        outputs = stage(folded, inputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    assert all(a.stride() == b.stride() for a, b in zip(outputs[:3], expected[:3], strict=True))


@pytest.mark.parametrize('backend', slow_except([None], [None, 'aot_eager']), ids=['eager', 'compiled'])
@every_case
@every_layer
def test_gradients_of_layers(layer, case, backend):
    blocks, folded, inputs = setting(layer, **case)
    torch._dynamo.reset()
    compiled = [torch.compile(block, fullgraph=True, backend=backend) for block in folded] if backend else folded

    def gradients(fn):
        xs = [x.clone().requires_grad_() for x in inputs]
        out = fn(xs)
        return torch.autograd.grad(sum(y.square().sum() for y in out[:3]), xs[::2] + xs[1::2] * (layer is MrlaLight))

    def run_compiled(xs):
        memory, out = (), []
        for block, x, o in zip(compiled, xs[::2], xs[1::2], strict=True):
            if layer is MrlaBase:
                x, memory = block(x, memory, SIZE)
            else:
                x = block(x, o, SIZE)
            out.append(x)
        return out

    expected = gradients(lambda xs: stage(blocks, xs))
    torch.testing.assert_close(gradients(run_compiled), expected, rtol=1e-12, atol=1e-12)


@every_layer
def test_parameters_of_folded_layers_have_gradients(layer):
    """Compare with finite differences in a random direction, for users who train a folded model."""
    _, folded, inputs = setting(layer)

    def loss():
        return sum(y.square().sum() for y in stage(folded, inputs)[:3])

    loss().backward()
    parameters = dict(folded.named_parameters())
    for name, p in parameters.items():
        if layer is MrlaBase and name == '0.attn.qk.weight':
            # zero for the first block's query, which has one key to choose from; later blocks read its key
            assert p.grad[0].abs().max() < 1e-10 < p.grad[1].abs().max()
        step = 1e-6 * torch.randn_like(p)
        with torch.no_grad():
            p += step
            up = loss()
            p -= 2 * step
            slope = (up - loss()) / 2
            p += step
        torch.testing.assert_close((p.grad * step).sum(), slope, rtol=1e-5, atol=1e-8, msg=f'gradient of {name}')


@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad, torch.inference_mode])
@every_case
@every_layer
def test_nothing_given_is_written_to(layer, case, mode):
    """This covers x, o, the memory, and the outputs of submodules that hooks hold."""
    _, folded, inputs = setting(layer, **case)
    held = [(x, x.clone()) for x in inputs]
    for module in folded.modules():
        # the ReLU of MRLA-base overwrites the output of its norm
        if not [*module.children()] and not (layer is MrlaBase and isinstance(module, Affine)):
            module.register_forward_hook(lambda m, args, out: held.append((out, out.clone())))
    memory = ()
    with mode():
        for block, x, o in zip(folded, inputs[::2], inputs[1::2], strict=True):
            if layer is MrlaBase:
                y, memory = block(x, memory, SIZE)
                held += [(t, t.clone()) for t in memory]
            else:
                y = block(x, o, SIZE)
            held.append((y, y.clone()))
    assert len(held) > len(inputs) + 3
    for now, then in held:
        assert torch.equal(now, then)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad])
@every_layer
def test_autocast_keeps_the_precision_of_maps(layer, mode, dtype):
    """x and the value may have different dtypes, and then no sum is in place."""
    blocks, folded, inputs = setting(layer, dtype=torch.float32)
    inputs = [x.to(dtype) for x in inputs]
    with mode(), torch.autocast('cpu', torch.bfloat16):
        outputs, plain = stage(folded, inputs)[:3], stage(blocks, inputs)[:3]
    for ours, theirs, x in zip(outputs, plain, inputs[::2], strict=True):
        assert ours.dtype == theirs.dtype == x.dtype
        assert (ours - theirs).norm() < 10 * torch.finfo(torch.bfloat16).eps * theirs.norm()


@every_layer
def test_a_layer_is_not_changed_by_folding_a_copy(layer):
    blocks, _, _ = setting(layer)
    before = {n: t.clone() for n, t in blocks.state_dict().items()}
    reparameterize_model(blocks)
    assert all(torch.equal(t, before[n]) for n, t in blocks.state_dict().items())
    assert before.keys() == blocks.state_dict().keys()


@every_layer
def test_a_norm_without_parameters_is_folded(layer):
    blocks, folded, inputs = setting(layer, norm_layer=lambda dim, **dd: nn.BatchNorm2d(dim, affine=False, **dd))
    assert_folded(folded)
    with torch.no_grad():
        torch.testing.assert_close(stage(folded, inputs), stage(blocks, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    'norm_layer',
    [
        lambda dim, **dd: nn.BatchNorm2d(dim, track_running_stats=False, **dd),
        lambda dim, **dd: nn.GroupNorm(4, dim, **dd),
        LayerNorm2d,
    ],
    ids=['batch norm without statistics', 'group norm', 'layer norm'],
)
@every_layer
def test_a_norm_that_depends_on_the_images_is_left_alone(layer, norm_layer):
    torch.manual_seed(0)
    mrla = layer(DIM, 8, norm_layer, dtype=torch.float64).eval()
    inputs = [torch.randn(2, DIM, *SIZE, dtype=torch.float64) for _ in range(2)]
    expected = stage([mrla], inputs)
    assert mrla.fuse() is mrla
    assert all(torch.equal(a, b) for a, b in zip(stage([mrla], inputs), expected, strict=True))


@every_layer
def test_the_form_pre_folds_nothing(layer):
    torch.manual_seed(0)
    mrla = randomize(layer(DIM, 8, nn.LayerNorm, 'pre', 'NLC', dtype=torch.float64)).eval()
    inputs = [torch.randn(2, 1 + SIZE[0] * SIZE[1], DIM, dtype=torch.float64) for _ in range(2)]
    expected = stage([mrla], inputs)
    assert mrla.fuse() is mrla
    assert all(torch.equal(a, b) for a, b in zip(stage([mrla], inputs), expected, strict=True))


@pytest.mark.parametrize(
    'change',
    [
        lambda mrla: setattr(mrla, 'norm_v', nn.BatchNorm2d(DIM)),
        lambda mrla: setattr(mrla, 'act_v', nn.ReLU()),
        lambda mrla: setattr(mrla, 'v', nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)),
    ],
    ids=['norm', 'activation', 'bias'],
)
def test_a_value_that_is_no_bare_convolution_is_not_scaled(change):
    torch.manual_seed(0)
    mrla = MrlaLight(DIM, 8, nn.BatchNorm2d)
    change(mrla)
    mrla = randomize(mrla).double().eval()
    nn.init.normal_(mrla.norm.weight)
    inputs = [torch.randn(2, DIM, *SIZE, dtype=torch.float64) for _ in range(2)]
    expected = stage([mrla], inputs)
    assert isinstance(mrla.fuse().norm, Affine)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(stage([mrla], inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@every_layer
def test_bfloat16_loses_no_more(layer, memory_format):
    """Folded in bfloat16, a model is as close to float64 as unfolded."""

    def outcome(blocks, inputs):
        xs = [x.clone().requires_grad_() for x in inputs]
        out = stage(blocks, xs)[:3]
        with torch.no_grad():
            outputs = *out, *stage(blocks, inputs)[:3]
        return outputs, torch.cat(torch.autograd.grad(sum(y.square().sum() for y in out), xs[::2]))

    lost = []
    for seed in range(8):
        exact, _, inputs = setting(layer, memory_format=memory_format, seed=seed)
        blocks, folded, rounded = setting(layer, memory_format=memory_format, dtype=torch.bfloat16, seed=seed)
        results = outcome(folded, rounded), outcome(blocks, rounded), outcome(exact, inputs)
        for ours, plain, expected in zip(*(outputs for outputs, _ in results), strict=True):
            assert (ours - expected).norm() < 2 * (plain - expected).norm()
        ours, plain, expected = (gradients for _, gradients in results)
        lost.append([(ours - expected).norm().square(), (plain - expected).norm().square()])
    # in sum, because rounding across a ReLU's zero makes single gradients wrong, folded or not
    ours, plain = torch.tensor(lost).sum(0).sqrt()
    assert ours < 2 * plain


@pytest.mark.parametrize('name', MODELS)
def test_outputs_of_convolutions_stay_as_hooks_saw_them(name):
    """The rest of the forward pass does not overwrite them."""
    model, x, held = reparameterize_model(create(name, torch.float32)), torch.randn(2, 3, 64, 64), {}

    def hold(name):
        return lambda module, args, out: held.update({name: (out, out.clone())})

    for module_name, module in model.named_modules():
        # timm's squeeze-and-excitation overwrites the output of its first convolution
        if isinstance(module, nn.Conv2d) and not module_name.endswith('.se.conv_reduce'):
            module.register_forward_hook(hold(module_name))
    with torch.inference_mode():
        model(x)
    assert any('.mrla.' in module_name for module_name in held)
    for module_name, (now, then) in held.items():
        assert torch.equal(now, then), module_name


@pytest.mark.filterwarnings('ignore:`torch.jit.trace:FutureWarning')
@pytest.mark.parametrize('name', ['test_resnet_mrla', 'resnet18_mrlab'])
def test_a_trace_without_gradients_equals_one_with_them(name):
    """torch.jit.trace compares them, and converters to other formats call it."""
    model, x = reparameterize_model(create(name, torch.float64)), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
