"""EfficientNet with multi-head recurrent layer attention (MRLA)

Papers:
* `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985
* `EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks` - https://arxiv.org/abs/1905.11946
"""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import get_device_dtype
from timm.models import EfficientNet, EfficientNetFeatures, efficientnet, generate_default_cfgs
from timm.models._efficientnet_blocks import InvertedResidual  # the block; not exported
from timm.models._efficientnet_builder import efficientnet_init_weights  # the initialization; not exported
from torch import nn

from timm_mrla.layers import MrlaLight
from timm_mrla.models._builder import build_mrla, model_cfg, register_model
from timm_mrla.models._graft import graft, like
from timm_mrla.models._weights import convert_state_dict, warm_start_cfgs

__all__ = ['MrlaInvertedResidual']


class MrlaInvertedResidual(InvertedResidual):
    """timm's inverted residual with skip, followed by MRLA-light."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.mrla(super().forward(x), x, [])
        return x


def _mrla_efficientnet(stock: Callable[..., nn.Module], features_only: bool = False, **kwargs) -> nn.Module:
    """timm's EfficientNet with MRLA-light in each inverted residual that has a skip."""
    model = stock(features_only=features_only, **kwargs)
    for stage in model.blocks:
        for block in stage:
            if isinstance(block, InvertedResidual) and block.has_skip:
                dim = block.conv_pwl.out_channels
                mrla = MrlaLight(
                    dim,
                    dim_head=dim // 8,
                    norm_layer=like(block.bn3),
                    drop_path=getattr(block.drop_path, 'drop_prob', 0.0),
                    **get_device_dtype(block),
                )
                efficientnet_init_weights(mrla)
                graft(block, MrlaInvertedResidual, mrla=mrla)
    return model


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Convert a checkpoint of the authors' code; a feature extractor of timm's own has no head to load."""
    head = ('conv_head.', 'bn2.', 'classifier.') if isinstance(model, EfficientNetFeatures) else ()
    return {k: v for k, v in convert_state_dict(state_dict).items() if not k.startswith(head)}


def _create_efficientnet(
    variant: str, stock: Callable[..., nn.Module], pretrained: bool = False, **kwargs
) -> EfficientNet:
    # as in timm: feature extraction without feature_cls has a model class of its own, which has no head
    headless = kwargs.get('features_only', False) and 'feature_cls' not in kwargs
    if headless:
        kwargs.pop('features_only')
    return build_mrla(
        partial(_mrla_efficientnet, stock, features_only=headless),
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


_cfg = partial(model_cfg, pool_size=(7, 7), crop_pct=0.875, first_conv='conv_stem', classifier='classifier')

default_cfgs = generate_default_cfgs({
    **warm_start_cfgs(
        {f'efficientnet_b{i}_mrla': f'efficientnet_b{i}' for i in range(3)},
        tags=('ra_in1k', 'ft_in1k', 'ra4_e3600_r224_in1k', 'ra4_e3600_r240_in1k'),
    ),
    'efficientnet_b0_mrla.*': _cfg(),
    'efficientnet_b1_mrla.*': _cfg(input_size=(3, 240, 240), pool_size=(8, 8), crop_pct=0.882),
    'efficientnet_b2_mrla.*': _cfg(input_size=(3, 260, 260), pool_size=(9, 9), crop_pct=0.89),
})  # fmt: skip


@register_model
def efficientnet_b0_mrla(pretrained: bool = False, **kwargs) -> EfficientNet:
    """EfficientNet-B0 with MRLA-light."""
    return _create_efficientnet('efficientnet_b0_mrla', efficientnet.efficientnet_b0, pretrained, **kwargs)


@register_model
def efficientnet_b1_mrla(pretrained: bool = False, **kwargs) -> EfficientNet:
    """EfficientNet-B1 with MRLA-light."""
    return _create_efficientnet('efficientnet_b1_mrla', efficientnet.efficientnet_b1, pretrained, **kwargs)


@register_model
def efficientnet_b2_mrla(pretrained: bool = False, **kwargs) -> EfficientNet:
    """EfficientNet-B2 with MRLA-light."""
    return _create_efficientnet('efficientnet_b2_mrla', efficientnet.efficientnet_b2, pretrained, **kwargs)
