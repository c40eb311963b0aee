"""StarNet with MRLA-light."""

from timm.models.starnet import Block

from timm_mrla.models._graft import LightBlock, Recipe

LightBlock.define(__name__, {Block: Recipe('post', 'g.bn')})
