"""Tests of the layers against the equations in plain loops, and of their gradients against finite differences."""

import inspect

import naive
import pytest
import torch
from slow import slow_except
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.utils import prune

from timm_mrla.layers import MrlaBase, MrlaLight
from timm_mrla.layers.query_key import Gate

DIM, HEAD = 32, 8
DD = {'dtype': torch.float64}

every_layer = pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])
every_form = pytest.mark.parametrize('form', ['post', 'pre'])
LAYOUTS = [('NCHW', 0), ('NHWC', 0), ('NLC', 0), ('NLC', 1), ('NLC', 3)]
every_layout = pytest.mark.parametrize(('layout', 'num_prefix'), LAYOUTS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(layer, form, layout='NCHW', dim=DIM, dim_head=HEAD):
    """A layer in float64, with a norm that fits its form and layout."""
    norm = nn.BatchNorm2d if form == 'post' else LayerNorm2d if layout == 'NCHW' else nn.LayerNorm
    return layer(dim, dim_head, norm, form, layout, **DD)


def norm_value(mrla):
    """Norm the value of MRLA-light, too."""
    if isinstance(mrla, MrlaLight):
        mrla.norm_v = nn.BatchNorm2d(mrla.v.out_channels, **DD)
    return mrla


def as_in_ceit(mrla):
    """Norm the value and not the shortcut."""
    mrla.norm_o = nn.Identity()
    return norm_value(mrla)


def tensors(layout, num_prefix=0, size=(3, 5), batch=2, dim=DIM):
    """Random maps in a layout."""
    H, W = size
    shapes = {'NCHW': (dim, H, W), 'NHWC': (H, W, dim), 'NLC': (num_prefix + H * W, dim)}
    return torch.randn(batch, *shapes[layout], dtype=torch.float64, requires_grad=True)


def prefix_and_map(x, layout, size, num_prefix):
    """Split into prefix tokens and the map [B, C, H, W], assembled row by row."""
    if layout == 'NCHW':
        return x[:0], x
    if layout == 'NHWC':
        return x[:0], torch.stack([x[..., c] for c in range(x.shape[-1])], dim=1)
    H, W = size
    rows = [x[:, num_prefix + i * W : num_prefix + (i + 1) * W] for i in range(H)]
    return x[:, :num_prefix], torch.stack(rows, dim=1).movedim(-1, 1)


def run(mrla, x, o, memory, feat_size):
    """Run one block of MRLA-light or MRLA-base."""
    if isinstance(mrla, MrlaBase):
        return mrla(x, memory, feat_size)
    return mrla(x, o, feat_size), memory


def randomize(module):
    """Random weights and statistics, so that no layer is an identity."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5 if name.endswith('var') else torch.randn_like(buffer))
    return module


@pytest.mark.parametrize('size', [(3, 5), (1, 1)])
@every_layout
@every_form
@pytest.mark.parametrize(
    ('layer', 'change'),
    [(MrlaLight, lambda mrla: mrla), (MrlaLight, as_in_ceit), (MrlaBase, lambda mrla: mrla)],
    ids=['light', 'light with a normed value', 'base'],
)
def test_layers_are_the_equations(layer, change, form, layout, num_prefix, size):
    """Patches use the true grid. A prefix token c becomes c + norm_x(c) in the form `pre` and stays in `post`."""
    mrlas, ys, memory = [], [], ()
    for t in range(3):
        mrla = randomize(change(build(layer, form, layout))).eval()
        x, o = (tensors(layout, num_prefix, size) for _ in range(2))
        out, memory = run(mrla, x, o, memory, size)

        prefix, y = prefix_and_map(mrla.norm_x(x), layout, size, num_prefix)
        mrlas, ys = [*mrlas, mrla], [*ys, y]
        if layer is MrlaLight:
            read = o if form == 'post' or change is as_in_ceit else mrla.norm_o(o)
            m = naive.light(mrla, y, prefix_and_map(read, layout, size, num_prefix)[1])
        else:
            m = naive.base(mrlas, ys)
            assert isinstance(memory, tuple) and len(memory) == 2 * (t + 1)
        if form == 'post':
            m, prefix = mrla.norm(m), torch.zeros_like(prefix)
            m = m.relu() if layer is MrlaBase else m
        own_prefix, own_map = prefix_and_map(x, layout, size, num_prefix)
        out_prefix, out_map = prefix_and_map(out, layout, size, num_prefix)
        assert out.shape == x.shape
        torch.testing.assert_close(out_map, own_map + m, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out_prefix, own_prefix + prefix, rtol=1e-12, atol=1e-12)


@every_form
@every_layer
def test_device_and_dtype_by_position(layer, form):
    mrla = layer(DIM, HEAD, LayerNorm2d, form, 'NCHW', 0.0, 'meta', torch.float16)
    assert {(p.device.type, p.dtype) for p in mrla.parameters()} == {('meta', torch.float16)}
    kinds = {p.kind for p in inspect.signature(layer).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def test_the_memory_holds_keys_and_values():
    mrlas = [build(MrlaBase, 'post') for _ in range(3)]
    xs, memory = [tensors('NCHW') for _ in mrlas], ()
    for mrla, x in zip(mrlas, xs, strict=True):
        before = memory
        _, memory = mrla(x, memory)
        assert all(a is b for a, b in zip(before, memory, strict=False))
    for mrla, x, key, value in zip(mrlas, xs, memory[::2], memory[1::2], strict=True):
        for i in range(2):
            expected = [torch.stack(head) for head in naive.key(mrla.attn, x[i])]
            torch.testing.assert_close(key[i], torch.stack(expected), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(value[i], naive.value(mrla.v, x[i]), rtol=1e-12, atol=1e-12)


def test_the_norm_of_the_shortcut_is_one_of_its_own():
    mrla = build(MrlaLight, 'pre')
    assert isinstance(mrla.norm_o, LayerNorm2d) and mrla.norm_o is not mrla.norm_x
    assert isinstance(build(MrlaLight, 'post').norm_o, nn.Identity)


@pytest.mark.parametrize(('layout', 'num_prefix'), slow_except([('NCHW', 0), ('NLC', 1)], LAYOUTS))
@every_form
@every_layer
def test_gradients(layer, form, layout, num_prefix):
    mrlas = [randomize(norm_value(build(layer, form, layout, 8, 4))) for _ in range(2)]

    def stage(*inputs):
        memory, out = (), []
        for mrla, x, o in zip(mrlas, inputs[::2], inputs[1::2], strict=True):
            x, memory = run(mrla, x, o, memory, (2, 3))
            out.append(x)
        return tuple(out)

    assert torch.autograd.gradcheck(stage, tuple(tensors(layout, num_prefix, (2, 3), 1, 8) for _ in range(4)))


@every_form
@every_layer
def test_parameter_gradients(layer, form):
    """Every parameter, against finite differences in a random direction."""
    mrla = build(layer, form, dim=8, dim_head=4)
    x, o, weight = (tensors('NCHW', size=(3, 3), dim=8) for _ in range(3))

    def loss():
        first, memory = run(mrla, x, o, (), None)
        return (run(mrla, first, o, memory, None)[0] * weight).sum()

    loss().backward()
    for name, p in mrla.named_parameters():
        step = 1e-6 * torch.randn_like(p)
        with torch.no_grad():
            p += step
            up = loss()
            p -= 2 * step
            slope = (up - loss()) / 2
            p += step
        torch.testing.assert_close((p.grad * step).sum(), slope, rtol=1e-5, atol=1e-10, msg=f'gradient of {name}')


@pytest.mark.parametrize(
    ('dim', 'kernel_size'), [(16, 3), (24, 3), (64, 3), (128, 5), (192, 5), (256, 5), (768, 5), (2048, 7)]
)
@every_layer
def test_kernel_size_grows_with_the_width(layer, dim, kernel_size):
    """t = int(|(log2 C + 1) / 2|), or t + 1 if t is even."""
    assert layer(dim, 8, nn.BatchNorm2d).attn.qk.weight.shape == (2, 1, 1, kernel_size)


@pytest.mark.parametrize('dim_head', [5, 0, -8, 64])
@every_layer
def test_heads_must_divide_the_width(layer, dim_head):
    with pytest.raises(ValueError, match=f'dim 32 is not divisible by dim_head {dim_head}$'):
        layer(32, dim_head, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'form': 'around'}, "form 'around' is none of post, pre"),
        ({'form': None}, 'form None is none of post, pre'),
        ({'layout': 'NHCW'}, "layout 'NHCW' is none of NCHW, NHWC, NLC"),
    ],
)
@every_layer
def test_a_bad_form_or_layout_is_named(layer, kwargs, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        layer(DIM, HEAD, nn.BatchNorm2d, **kwargs)


@every_layout
@every_form
@every_layer
def test_every_module_is_called(layer, form, layout, num_prefix):
    """The forward of each module with parameters is called, so that hooks can change its output."""
    mrla = randomize(norm_value(build(layer, form, layout))).eval()
    x, o = tensors(layout, num_prefix), tensors(layout, num_prefix)
    memory = build(MrlaBase, form, layout)(x, (), (3, 5))[1]  # an earlier block: a single weight is always 1
    plain, _ = run(mrla, x, o, memory, (3, 5))
    names = [n for n, m in mrla.named_modules() if n and [*m.parameters(recurse=False)]]
    assert {'attn.qk', 'v', 'norm' if form == 'post' else 'norm_x'} < {*names, ''}
    for name in names:
        hook = mrla.get_submodule(name).register_forward_hook(lambda m, args, out: 2 * out)
        changed, _ = run(mrla, x, o, memory, (3, 5))
        assert (changed - plain).abs().max() > 1e-3, name
        hook.remove()
        assert torch.equal(run(mrla, x, o, memory, (3, 5))[0], plain), name


@every_form
@every_layer
def test_a_hook_on_queries_and_keys_changes_the_weights(layer, form):
    """Without queries and keys, light's gate is 1/2 and base's attention is the mean."""
    mrla, x, o = build(layer, form).eval(), tensors('NCHW'), tensors('NCHW')
    memory = build(MrlaBase, form)(x, ())[1]
    mrla.attn.qk.register_forward_hook(lambda m, args, out: 0 * out)
    out = mrla.attn(x, DIM) if layer is MrlaLight else mrla.attn(x, DIM, memory[::2])[0].softmax(-1)
    assert torch.equal(out, torch.full_like(out, 0.5))
    hooked, _ = run(mrla, x, o, memory, None)
    nn.init.zeros_(mrla.attn.qk.weight)
    mrla.attn.qk._forward_hooks.clear()
    torch.testing.assert_close(hooked, run(mrla, x, o, memory, None)[0], rtol=1e-12, atol=1e-12)


@every_form
@every_layer
def test_pruned_weights_train(layer, form):
    """Each forward pass uses the updated weights, and pruned weights stay zero."""
    mrla = build(layer, form)
    convs = {'attn.qk': mrla.attn.qk, 'v': mrla.v}
    for conv in convs.values():
        prune.random_unstructured(conv, 'weight', amount=2)  # few, so that neither query nor key is all zero
    optimizer = torch.optim.SGD(mrla.parameters(), lr=0.1)
    first = {name: conv.weight.detach().clone() for name, conv in convs.items()}
    for _ in range(2):
        optimizer.zero_grad()
        # two blocks, because with one block, base has a single weight of 1
        out, memory = run(mrla, tensors('NCHW'), tensors('NCHW'), (), None)
        run(mrla, out, tensors('NCHW'), memory, None)[0].square().mean().backward()
        optimizer.step()
    x, o, (_, memory) = tensors('NCHW'), tensors('NCHW'), build(MrlaBase, form)(tensors('NCHW'), ())
    trained, _ = run(mrla, x, o, memory, None)
    for name, conv in convs.items():
        kept = conv.weight_mask.bool()
        assert 0 < kept.sum() < kept.numel(), name
        assert (conv.weight[~kept] == 0).all(), name
        assert (conv.weight[kept] != first[name][kept]).all(), name
        prune.remove(conv, 'weight')
    torch.testing.assert_close(run(mrla, x, o, memory, None)[0], trained, rtol=1e-12, atol=1e-12)


@every_layer
def test_autocast_keeps_maps_in_bfloat16(layer):
    mrla = layer(DIM, HEAD, norm_layer=nn.BatchNorm2d)
    x = torch.randn(2, DIM, 4, 4, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        out, _ = run(mrla, x, x, (), None)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@every_form
@every_layer
def test_precisions_and_memory_formats(layer, form, dtype, memory_format, batch):
    """Values and gradients of two blocks, up to the rounding of the input and the parameters."""

    def step(dtype, memory_format):
        torch.manual_seed(0)
        blocks = nn.ModuleList(build(layer, form) for _ in range(2)).bfloat16().to(dtype)
        blocks.to(memory_format=memory_format)
        x = torch.randn(batch, DIM, 5, 7).bfloat16().to(dtype).to(memory_format=memory_format).requires_grad_()
        out, memory = run(blocks[0], x, x, (), None)
        out, memory = run(blocks[1], out, x, memory, None)
        assert out.is_contiguous(memory_format=memory_format)
        (out * torch.randn(out.shape).bfloat16().to(dtype)).sum().backward()
        return {'out': out, 'x': x.grad, **{n: p.grad for n, p in blocks.named_parameters()}}

    exact, rounded = step(torch.float64, torch.contiguous_format), step(dtype, memory_format)
    # larger for attn: a head reduces query and key to one number, whose rounding error falls on few weights
    for name, tensor in exact.items():
        tolerance = (100 if '.attn.' in name else 10) * torch.finfo(dtype).eps
        assert (rounded[name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_float16_holds_the_mean_of_a_large_map():
    attn = Gate(DIM, HEAD)
    nn.init.constant_(attn.qk.weight[0], 0.01)
    nn.init.constant_(attn.qk.weight[1], -0.01)
    x = torch.full((1, DIM, 100, 100), 10.0)  # 1e5 in sum, beyond float16
    torch.testing.assert_close(attn.half()(x.half(), DIM).float(), attn.float()(x, DIM), rtol=1e-2, atol=0.0)


def test_channels_have_the_weights_of_their_heads():
    weights = torch.randn(2, 3)
    out = Gate(12, 4).per_channel(weights, 12)
    assert out.shape == (2, 12, 1, 1)
    for c in range(12):
        assert torch.equal(out[:, c, 0, 0], weights[:, c // 4])


def test_memory_grows_with_the_number_of_blocks():
    """The memory saved for backward grows by the same amount with each block: no block copies the memory."""

    def saved(num_blocks):
        blocks = [MrlaBase(DIM, HEAD, nn.BatchNorm2d) for _ in range(num_blocks)]
        storages, memory, x = {}, (), torch.randn(1, DIM, 16, 16, requires_grad=True)
        map_bytes = x.untyped_storage().nbytes()

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for mrla in blocks:
                x, memory = mrla(x, memory)
        # only maps: the weights of the heads grow quadratically, but are small
        return sum(t.untyped_storage().nbytes() >= map_bytes for t in storages.values())

    assert saved(9) - saved(6) == saved(6) - saved(3)


@pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])
def test_heads_stay_where_pruning_takes_channels(layer):
    """Keep half of the channels of each head: equal to a layer built with that width."""
    wide = layer(24, 6, nn.BatchNorm2d).double().eval()
    narrow = layer(12, 3, nn.BatchNorm2d).double().eval()
    narrow.attn.load_state_dict(wide.attn.state_dict())
    kept = torch.arange(24).view(4, 6)[:, :3].flatten()
    for ours, theirs in ((wide.v, narrow.v), (wide.norm, narrow.norm)):
        for name, p in ours.named_parameters():
            setattr(ours, name, nn.Parameter(p[kept]))
        for name, buffer in ours.named_buffers():
            setattr(ours, name, buffer[kept] if buffer.ndim else buffer)
        theirs.load_state_dict(ours.state_dict())
    wide.v.in_channels = wide.v.out_channels = wide.v.groups = 12
    x, o = torch.randn(2, 2, 12, 5, 5, dtype=torch.float64)
    if layer is MrlaLight:
        narrow.lam = wide.lam = nn.Parameter(wide.lam[kept])
        assert torch.equal(wide(x, o), narrow(x, o))
        assert torch.equal(wide.fuse()(x, o), narrow.fuse()(x, o))
    else:
        memory = [layer(o)[1] for layer in (wide, narrow)]
        assert torch.equal(wide(x, memory[0])[0], narrow(x, memory[1])[0])
    wide.v.in_channels = wide.v.out_channels = wide.v.groups = 10
    wide.v.weight = nn.Parameter(wide.v.weight[:10])
    with pytest.raises(ValueError, match='10 channels are no multiple of the 4 heads'):
        wide(x[:, :10], *([o[:, :10]] if layer is MrlaLight else []))


def test_tokens_need_no_private_flag_of_torch(monkeypatch):
    mrla, x = build(MrlaLight, 'pre', 'NLC'), tensors('NLC')
    expected = mrla(x, x, (3, 5))
    monkeypatch.delattr(torch.compiler, '_is_exporting_flag', raising=False)
    assert torch.equal(mrla(x, x, (3, 5)), expected)
