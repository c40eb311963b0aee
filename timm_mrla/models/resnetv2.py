"""Pre-activation ResNet, also BiT, with MRLA-light."""

from functools import partial

from timm.models.resnetv2 import Bottleneck, PreActBasic, PreActBottleneck

from timm_mrla.models._graft import LightBlock, Recipe

_recipe = partial(Recipe, 'post', where=lambda block: block.downsample is None)
_blocks = {PreActBottleneck: _recipe('norm1'), PreActBasic: _recipe('norm1'), Bottleneck: _recipe('norm3')}
LightBlock.define(__name__, _blocks)
