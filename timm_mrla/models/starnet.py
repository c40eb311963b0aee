"""StarNet with MRLA-light."""

from timm.models.starnet import Block

from timm_mrla.models._graft import Recipe
from timm_mrla.models._registry import register_entries

register_entries(__name__, {Block: Recipe('post', 'g.bn')})
