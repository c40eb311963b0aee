"""What is folded for inference computes what it computed before."""

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from timm_mrla.layers import layer_attentions

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
