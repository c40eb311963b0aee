"""FocalNet with MRLA-light."""

from timm.models.focalnet import FocalNetBlock

from timm_mrla.models._graft import LightBlock, Recipe

_blocks = {FocalNetBlock: Recipe('pre', lambda block: block.norm1_post if block.use_post_norm else block.norm1)}
LightBlock.define(__name__, _blocks)
