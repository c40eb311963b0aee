"""The layers against the equations in loops, and their gradients against finite differences."""

import naive
import pytest
import torch
from torch import nn

from timm_mrla.layers import LightWeights, MrlaBase, MrlaBaseTokens, MrlaLight, MrlaLightTokens

torch.manual_seed(0)
DIM, HEAD = 32, 8
DD = {'dtype': torch.float64}


def maps(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def randomize(module):
    """Weights that are no identity anywhere."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


@pytest.mark.parametrize('size', [(5, 7), (1, 1)])
def test_light_is_the_equation(size):
    mrla = randomize(MrlaLight(DIM, HEAD, norm_v=nn.BatchNorm2d, act_v=nn.GELU, norm_layer=nn.BatchNorm2d, **DD)).eval()
    x, o = maps(2, DIM, *size), maps(2, DIM, *size)
    out, memory = mrla(x, o, [])
    assert memory == []
    torch.testing.assert_close(out, x + mrla.norm(naive.light(mrla, x, o)), rtol=1e-12, atol=1e-12)


def test_base_is_the_equation():
    blocks = [
        randomize(MrlaBase(DIM, HEAD, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU, **DD)).eval() for _ in range(4)
    ]
    xs = [maps(2, DIM, 4, 3) for _ in blocks]
    memory = []
    for t, (mrla, x) in enumerate(zip(blocks, xs, strict=True)):
        out, memory = mrla(x, x, memory)
        assert len(memory) == t + 1
        expected = x + mrla.norm(naive.base(blocks[: t + 1], xs[: t + 1])).relu()
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('num_prefix', [0, 1, 3])
@pytest.mark.parametrize('kind', ['light', 'base'])
def test_tokens_are_the_equation(kind, num_prefix):
    """Patches retrieve on the map of the true grid; a prefix token c becomes c + LN_x(c)."""
    H, W = 3, 5
    if kind == 'light':
        blocks = [MrlaLightTokens(DIM, HEAD, nn.LayerNorm, nn.LayerNorm, act_v=nn.GELU, **DD) for _ in range(2)]
    else:
        blocks = [MrlaBaseTokens(DIM, HEAD, nn.LayerNorm, **DD) for _ in range(2)]
    memory, normed = [], []
    for t, mrla in enumerate(map(randomize, blocks)):
        x, o = maps(2, num_prefix + H * W, DIM), maps(2, num_prefix + H * W, DIM)
        out, memory = mrla(x, o, (H, W), memory)

        def to_map(tokens):
            return torch.stack(
                [torch.stack([y[num_prefix + i * W : num_prefix + (i + 1) * W] for i in range(H)]) for y in tokens]
            )

        normed.append(to_map(mrla.norm_x(x)).permute(0, 3, 1, 2))
        if kind == 'light':
            m = naive.light(mrla, normed[-1], to_map(mrla.norm_o(o)).permute(0, 3, 1, 2))
        else:
            m = naive.base(blocks[: t + 1], normed)
        expected = torch.cat([mrla.norm_x(x)[:, :num_prefix], m.permute(0, 2, 3, 1).reshape(2, H * W, DIM)], 1)
        torch.testing.assert_close(out, x + expected, rtol=1e-12, atol=1e-12)


def test_gradients():
    light = MrlaLight(8, 4, norm_layer=nn.BatchNorm2d, norm_v=nn.BatchNorm2d, act_v=nn.GELU, **DD)
    base = [MrlaBase(8, 4, norm_layer=nn.BatchNorm2d, **DD) for _ in range(3)]
    tokens = MrlaLightTokens(8, 4, nn.LayerNorm, nn.LayerNorm, **DD)

    def stage(*xs):
        memory, out = [], []
        for mrla, x in zip(base, xs, strict=True):
            x, memory = mrla(x, x, memory)
            out.append(x)
        return tuple(out)

    assert torch.autograd.gradcheck(lambda x, o: light(x, o, [])[0], (maps(2, 8, 3, 2), maps(2, 8, 3, 2)))
    assert torch.autograd.gradcheck(stage, tuple(maps(2, 8, 2, 3) for _ in base))
    assert torch.autograd.gradcheck(lambda x, o: tokens(x, o, (2, 3), [])[0], (maps(1, 7, 8), maps(1, 7, 8)))


def test_parameter_gradients():
    """Every parameter, against finite differences in a random direction."""
    for mrla in (MrlaLight(8, 4, norm_layer=nn.BatchNorm2d, **DD), MrlaBase(8, 4, norm_layer=nn.BatchNorm2d, **DD)):
        x, o, weight = maps(2, 8, 3, 3), maps(2, 8, 3, 3), torch.randn(2, 8, 3, 3, **DD)

        def loss(mrla=mrla, x=x, o=o, weight=weight):
            first, memory = mrla(x, o, [])
            return (mrla(first, o, memory)[0] * weight).sum()

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
def test_kernel_size_grows_with_the_width(dim, kernel_size):
    """t = int(|(log2 C + 1) / 2|), or t + 1 if t is even."""
    assert MrlaLight(dim, 8).attn.q.kernel_size == MrlaBase(dim, 8).attn.k.kernel_size == (kernel_size,)


@pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])
@pytest.mark.parametrize('dim_head', [5, 0])
def test_heads_must_divide_the_width(layer, dim_head):
    with pytest.raises(ValueError, match=f'dim 32 is not divisible by dim_head {dim_head}'):
        layer(32, dim_head)


@pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])
def test_autocast_keeps_maps_in_bfloat16(layer):
    mrla = layer(DIM, HEAD, norm_layer=nn.BatchNorm2d)
    x = torch.randn(2, DIM, 4, 4, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        out, _ = mrla(x, x, [])
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])
def test_precisions_and_layouts(layer, dtype, layout, batch):
    """Values and gradients of two blocks, within what rounding the input and the parameters leaves."""

    def step(dtype, layout):
        torch.manual_seed(0)
        blocks = nn.ModuleList(layer(DIM, HEAD, norm_layer=nn.BatchNorm2d) for _ in range(2)).bfloat16().to(dtype)
        blocks.to(memory_format=layout)
        x = torch.randn(batch, DIM, 5, 7).bfloat16().to(dtype).to(memory_format=layout).requires_grad_()
        out, memory = blocks[0](x, x, [])
        out, memory = blocks[1](out, x, memory)
        assert out.is_contiguous(memory_format=layout)
        (out * torch.randn(out.shape).bfloat16().to(dtype)).sum().backward()
        return {'out': out, 'x': x.grad, **{n: p.grad for n, p in blocks.named_parameters()}}

    exact, rounded = step(torch.float64, torch.contiguous_format), step(dtype, layout)
    # a query and a key end in one number a head, whose rounding is spread over few weights
    for name, tensor in exact.items():
        tolerance = (100 if '.attn.' in name else 10) * torch.finfo(dtype).eps
        assert (rounded[name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_float16_holds_the_mean_of_a_large_map():
    attn = LightWeights(DIM, HEAD)
    nn.init.constant_(attn.q.weight, 0.01)
    nn.init.constant_(attn.k.weight, -0.01)
    x = torch.full((1, DIM, 100, 100), 10.0)  # 1e5 in sum, beyond float16
    torch.testing.assert_close(attn.half()(x.half()).float(), attn.float()(x), rtol=1e-2, atol=0.0)


def test_memory_grows_with_the_number_of_blocks():
    """What is kept for the backward pass grows by the same amount with each block: the memory is never copied."""

    def saved(num_blocks):
        blocks = [MrlaBase(DIM, HEAD) for _ in range(num_blocks)]
        storages, memory, x = {}, [], torch.randn(1, DIM, 16, 16, requires_grad=True)
        map_bytes = x.untyped_storage().nbytes()

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for mrla in blocks:
                x, memory = mrla(x, x, memory)
        # the maps alone: weights of the heads do grow with the square, and are small
        return sum(t.untyped_storage().nbytes() >= map_bytes for t in storages.values())

    assert saved(9) - saved(6) == saved(6) - saved(3)
