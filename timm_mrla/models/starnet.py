"""StarNet with MRLA-light."""

from timm.models.starnet import Block

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class MrlaBlock(LightBlock, Block, form='post', norm='g.bn'):
    """timm's block, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
