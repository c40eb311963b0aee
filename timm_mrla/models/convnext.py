"""ConvNeXt and ConvNeXt-V2 with MRLA-light."""

from timm.models.convnext import ConvNeXtBlock
from torch import nn

from timm_mrla.models._registry import Recipe, register_entries

blocks = {ConvNeXtBlock: Recipe('pre', 'norm', where=lambda block: isinstance(block.shortcut, nn.Identity))}
register_entries(__name__, blocks)
