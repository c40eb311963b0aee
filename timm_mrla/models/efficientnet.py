"""EfficientNet and related models with MRLA-light, eight heads, in all blocks with a shortcut."""

import math
from functools import partial

from timm.models import _efficientnet_blocks as timm_blocks  # not exported
from torch import nn

from timm_mrla.models._graft import LightBlock, Recipe

_init_v = partial(nn.init.normal_, std=math.sqrt(2 / 9))
_recipe = partial(Recipe, 'post', where=lambda block: block.has_skip, num_heads=8, init_v=_init_v)
_not_in = ('efficientnet_b0', 'efficientnet_b1', 'efficientnet_b2')

_blocks = {
    timm_blocks.InvertedResidual: _recipe('bn3'),
    timm_blocks.EdgeResidual: _recipe('bn2'),
    timm_blocks.DepthwiseSeparableConv: _recipe('bn2', not_in=_not_in),
    timm_blocks.UniversalInvertedResidual: _recipe('pw_proj.bn'),
    timm_blocks.MobileAttention: _recipe('norm'),
    timm_blocks.ConvBnAct: _recipe('bn1'),
}
LightBlock.define(__name__, _blocks)
