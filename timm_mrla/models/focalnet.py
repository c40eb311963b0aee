"""FocalNet with MRLA-light."""

from timm.models.focalnet import FocalNetBlock

from timm_mrla.models._registry import Recipe, register_entries

blocks = {FocalNetBlock: Recipe('pre', lambda block: block.norm1_post if block.use_post_norm else block.norm1)}
register_entries(__name__, blocks)
