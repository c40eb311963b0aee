"""Pre-activation ResNet, also BiT, with MRLA-light."""

from functools import partial

from timm.models.resnetv2 import Bottleneck, PreActBasic, PreActBottleneck

from timm_mrla.models._registry import Recipe, register_entries

_recipe = partial(Recipe, 'post', where=lambda block: block.downsample is None)
blocks = {PreActBottleneck: _recipe('norm1'), PreActBasic: _recipe('norm1'), Bottleneck: _recipe('norm3')}
register_entries(__name__, blocks)
