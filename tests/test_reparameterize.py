"""What is folded for inference computes what it computed before."""

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from timm_mrla.layers import MrlaBase, MrlaLight, layer_attentions

MODELS = [
    'resnet18_mrla',
    'resnet18_mrlab',
    'efficientnet_b0_mrla',
    'ceit_tiny_mrla',
    'deit_tiny_mrla',
    'pvt_v2_b0_mrlab',
]


def create(name, dtype):
    """A model whose batch norms have seen something."""
    torch.manual_seed(0)
    size = {'img_size': 64} if timm.models.get_pretrained_cfg(name).fixed_input_size else {}
    model = timm.create_model(name, num_classes=7, dtype=dtype, **size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_equal_outputs(name, dtype, tolerance):
    model, x = create(name, dtype), torch.randn(2, 3, 64, 64, dtype=dtype)
    folded = reparameterize_model(model)
    expected = model(x)
    torch.testing.assert_close(folded(x), expected, rtol=tolerance, atol=tolerance * expected.std().item())
    layers = layer_attentions(folded).values()
    assert not any(isinstance(m, nn.BatchNorm2d) for layer in layers for m in layer.modules())
    assert all((layer.bias is None) == name.startswith(('deit', 'pvt', 'ceit')) for layer in layers)


def folded_and_plain(layer, dtype, layout=torch.contiguous_format, batch=2, backend=None):
    """Values and input gradients of two blocks, before and after folding."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(layer(32, 8, norm_layer=nn.BatchNorm2d) for _ in range(2))
    for block in blocks:
        for tensor in (block.norm.weight, block.norm.bias, block.norm.running_mean, block.norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    blocks = blocks.to(dtype).to(memory_format=layout).eval()
    x = torch.randn(batch, 32, 5, 7, dtype=torch.float64).to(dtype).to(memory_format=layout).requires_grad_()

    def run(blocks):
        out, memory = blocks[0](x, x, [])
        out, memory = blocks[1](out, x, memory)
        return out, *torch.autograd.grad(out.square().sum(), x)

    plain = run(blocks)
    for block in blocks:
        block.reparameterize()
        assert isinstance(block.norm, nn.Identity)
    torch._dynamo.reset()
    compiled = [torch.compile(block, fullgraph=True, backend=backend) for block in blocks] if backend else blocks
    return run(compiled), plain


@pytest.mark.parametrize(
    'case',
    [{}, {'layout': torch.channels_last}, {'batch': 1}, {'backend': 'aot_eager'}],
    ids=['two images', 'channels_last', 'one image', 'compiled'],
)
@pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])
def test_layers(layer, case):
    folded, plain = folded_and_plain(layer, torch.float64, **case)
    torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('layer', [MrlaLight, MrlaBase])
def test_bfloat16_loses_no_more(layer):
    """Folded in bfloat16, it is as close to float64 as it is unfolded."""
    _, exact = folded_and_plain(layer, torch.float64)
    for folded, plain, expected in zip(*folded_and_plain(layer, torch.bfloat16), exact, strict=True):
        assert (folded - expected).norm() < 2 * (plain - expected).norm()
