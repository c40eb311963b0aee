"""DaViT with MRLA-light."""

import torch
from timm.models.davit import ChannelBlock, SpatialBlock

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import Recipe, register_entries


class _TokenBlock(LightBlock):
    """A block whose maps are tokens in memory; read as maps, one image would get other strides, then other rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, o = (z.flatten(2).transpose(1, 2) for z in (super(LightBlock, self).forward(x), x))
        return self.mrla(y, o, x.shape[2:]).transpose(1, 2).view(x.shape)


blocks = dict.fromkeys((SpatialBlock, ChannelBlock), Recipe('pre', 'norm1', 'NLC'))
register_entries(__name__, blocks, base=_TokenBlock)
