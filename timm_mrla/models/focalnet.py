"""FocalNet with MRLA-light."""

from timm.models.focalnet import FocalNetBlock

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class MrlaFocalNetBlock(
    LightBlock,
    FocalNetBlock,
    form='pre',
    norm=lambda block: block.norm1_post if block.use_post_norm else block.norm1,
):
    """timm's block, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
