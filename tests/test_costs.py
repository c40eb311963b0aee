"""Tests of parameters and multiply-adds against the plain backbones and the paper."""

import pytest
import timm
import torch
from entries import backbone, input_size, paper_entries
from flops import costs
from slow import slow_except

from timm_mrla.layers import MrlaLight, layer_attentions


@pytest.mark.parametrize('name', slow_except(['resnet50_mrla', 'ceit_tiny_mrla'], paper_entries()))
def test_what_mrla_adds(name):
    """The difference to the plain backbone follows from the equations: q, k, v, lam and norms."""
    model = timm.create_model(name, device='meta').eval()
    params, macs = 0, 0

    def count(mrla, args, _):
        nonlocal params, macs
        x, width = args[0], mrla.v.in_channels
        kernel_size = mrla.attn.qk.kernel_size[1]
        norms = [getattr(mrla, n, None) for n in ('norm', 'norm_v', 'norm_x', 'norm_o')]
        scales, biases = (sum(getattr(n, p, None) is not None for n in norms) for p in ('weight', 'bias'))
        params += 9 * width + 2 * kernel_size + (scales + biases) * width + width * isinstance(mrla, MrlaLight)
        positions = x[0].numel() // width - (getattr(model, 'num_prefix_tokens', 0) if x.ndim == 3 else 0)
        macs += 9 * width * positions + 2 * kernel_size * width

    layers = layer_attentions(model)
    for mrla in layers.values():
        mrla.register_forward_hook(count)
    model(torch.empty(1, *input_size(name), device='meta'))
    assert len(layers) > 0

    plain, kwargs = backbone(name)
    total, plain_total = costs(name, input_size(name)), costs(plain, input_size(name), plain=True, **kwargs)
    assert total[0] - plain_total[0] == params
    assert total[1] - plain_total[1] == macs


def test_the_papers_numbers():
    """ResNet-50: 0.16 M parameters, 0.18 M with the norms, and 0.05 G MACs of convolution."""
    params, macs = (
        a - b for a, b in zip(costs('resnet50_mrla', (3, 224, 224)), costs('resnet50', (3, 224, 224)), strict=True)
    )
    assert round(params / 1e6, 2) == 0.18
    assert round(macs / 1e9, 2) == 0.05
