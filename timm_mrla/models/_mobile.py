"""The blocks of EfficientNet and its kin, followed by MRLA-light: with eight heads, where the block has a skip."""

import math
from functools import partial

from timm.models._efficientnet_blocks import (  # the blocks; not exported
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    MobileAttention,
    UniversalInvertedResidual,
)
from torch import nn

from timm_mrla.models._graft import LightBlock

_recipe = dict(
    form='post',
    where=lambda block: block.has_skip,
    num_heads=8,
    init_v=partial(nn.init.normal_, std=math.sqrt(2 / 9)),
    not_in=('efficientnet_b0', 'efficientnet_b1', 'efficientnet_b2'),
)


class MrlaInvertedResidual(LightBlock, InvertedResidual, norm='bn3', **{**_recipe, 'not_in': ()}):
    """timm's inverted residual, followed by layer attention."""


class MrlaEdgeResidual(LightBlock, EdgeResidual, norm='bn2', **_recipe):
    """timm's fused inverted residual, followed by layer attention."""


class MrlaDepthwiseSeparableConv(LightBlock, DepthwiseSeparableConv, norm='bn2', **_recipe):
    """timm's depthwise-separable block, followed by layer attention."""


class MrlaUniversalInvertedResidual(LightBlock, UniversalInvertedResidual, norm='pw_proj.bn', **_recipe):
    """timm's universal inverted residual, followed by layer attention."""


class MrlaMobileAttention(LightBlock, MobileAttention, norm='norm', **_recipe):
    """timm's mobile attention, followed by layer attention."""


class MrlaConvBnAct(LightBlock, ConvBnAct, norm='bn1', **_recipe):
    """timm's convolution with a skip, followed by layer attention."""
