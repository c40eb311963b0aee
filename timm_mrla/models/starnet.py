"""StarNet with MRLA-light."""

from timm.models.starnet import Block

from timm_mrla.models._graft import LightBlock, Recipe
from timm_mrla.models._registry import register_models

LightBlock.define(__name__, {Block: Recipe('post', 'g.bn')})
register_models(__name__)
