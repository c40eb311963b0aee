"""RegNet with MRLA-light."""

from functools import partial

from timm.models.regnet import Bottleneck, PreBottleneck
from torch import nn

from timm_mrla.models._graft import LightBlock, Recipe

_recipe = partial(Recipe, 'post', where=lambda block: isinstance(block.downsample, nn.Identity))
LightBlock.define(__name__, {Bottleneck: _recipe('conv3.bn'), PreBottleneck: _recipe('norm1')})
