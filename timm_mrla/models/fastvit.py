"""FastViT with MRLA-light."""

from timm.models.fastvit import AttentionBlock, RepMixerBlock

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class MrlaRepMixerBlock(LightBlock, RepMixerBlock, form='post', norm='mlp.conv.bn'):
    """timm's block that mixes by convolution, followed by layer attention."""


class MrlaAttentionBlock(LightBlock, AttentionBlock, form='post', norm='mlp.conv.bn'):
    """timm's block that mixes by attention, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
