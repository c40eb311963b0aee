"""RegNet with MRLA-light."""

from functools import partial

from timm.models.regnet import Bottleneck, PreBottleneck
from torch import nn

from timm_mrla.models._registry import Recipe, register_entries

_recipe = partial(Recipe, 'post', where=lambda block: isinstance(block.downsample, nn.Identity))
register_entries(__name__, {Bottleneck: _recipe('conv3.bn'), PreBottleneck: _recipe('norm1')})
