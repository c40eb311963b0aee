"""DaViT with MRLA-light."""

import torch
from timm.models.davit import ChannelBlock, SpatialBlock

from timm_mrla.models._graft import LightBlock, Recipe


class _TokenBlock(LightBlock):
    """A block whose maps are tokens in memory; read as maps, one image would get other strides, then other rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, o = (z.flatten(2).transpose(1, 2) for z in (super(LightBlock, self).forward(x), x))
        return self.mrla(y, o, x.shape[2:]).transpose(1, 2).view(x.shape)


_TokenBlock.define(__name__, dict.fromkeys((SpatialBlock, ChannelBlock), Recipe('pre', 'norm1', 'NLC')))
