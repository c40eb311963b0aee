"""RegNet with MRLA-light."""

from timm.models.regnet import Bottleneck, PreBottleneck
from torch import nn

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


def _has_plain_shortcut(block: nn.Module) -> bool:
    return isinstance(block.downsample, nn.Identity)


class MrlaBottleneck(LightBlock, Bottleneck, form='post', norm='conv3.bn', where=_has_plain_shortcut):
    """timm's bottleneck, followed by layer attention."""


class MrlaPreBottleneck(LightBlock, PreBottleneck, form='post', norm='norm1', where=_has_plain_shortcut):
    """timm's pre-activation bottleneck, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
