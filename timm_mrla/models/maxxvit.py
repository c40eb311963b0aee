"""MaxViT, CoAtNet and their kin with MRLA-light."""

from timm.models.maxxvit import ConvNeXtBlock, MaxxVitBlock, MbConvBlock, ParallelMaxxVitBlock, TransformerBlock2d
from torch import nn

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


def _first(conv: nn.Module) -> nn.Module:
    return conv[0] if isinstance(conv, nn.Sequential) else conv


def _norm(conv: nn.Module) -> nn.Module:
    conv = _first(conv)
    return conv.pre_norm if isinstance(conv, MbConvBlock) else conv.norm


_recipe = dict(form='post', where=lambda block: isinstance(block.shortcut, nn.Identity))
_compound = dict(
    form='post',
    norm=lambda block: _norm(block.conv),
    where=lambda block: isinstance(_first(block.conv).shortcut, nn.Identity),
)


class MrlaMbConvBlock(LightBlock, MbConvBlock, norm=_norm, **_recipe):
    """timm's MBConv block, followed by layer attention."""


class MrlaConvNeXtBlock(LightBlock, ConvNeXtBlock, norm=_norm, **_recipe):
    """timm's ConvNeXt block, followed by layer attention."""


class MrlaTransformerBlock2d(LightBlock, TransformerBlock2d, norm='norm2', **_recipe):
    """timm's transformer block on maps, followed by layer attention."""


class MrlaMaxxVitBlock(LightBlock, MaxxVitBlock, **_compound):
    """timm's convolution with block and grid attention, followed by layer attention."""


class MrlaParallelMaxxVitBlock(LightBlock, ParallelMaxxVitBlock, **_compound):
    """timm's convolution with both attentions at once, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
