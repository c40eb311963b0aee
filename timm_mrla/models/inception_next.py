"""InceptionNeXt with MRLA-light."""

from timm.models.inception_next import MetaNeXtBlock

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class MrlaMetaNeXtBlock(LightBlock, MetaNeXtBlock, form='post', norm='norm'):
    """timm's block, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
