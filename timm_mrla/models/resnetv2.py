"""Pre-activation ResNet, BiT among them, with MRLA-light."""

from timm.models.resnetv2 import Bottleneck, PreActBasic, PreActBottleneck

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


def _has_plain_shortcut(block) -> bool:
    return block.downsample is None


class MrlaPreActBottleneck(LightBlock, PreActBottleneck, form='post', norm='norm1', where=_has_plain_shortcut):
    """timm's pre-activation bottleneck, followed by layer attention."""


class MrlaPreActBasic(LightBlock, PreActBasic, form='post', norm='norm1', where=_has_plain_shortcut):
    """timm's pre-activation basic block, followed by layer attention."""


class MrlaBottleneck(LightBlock, Bottleneck, form='post', norm='norm3', where=_has_plain_shortcut):
    """timm's bottleneck, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
