"""StarNet with MRLA-light."""

from timm.models.starnet import Block

from timm_mrla.models._registry import Recipe, register_entries

register_entries(__name__, {Block: Recipe('post', 'g.bn')})
