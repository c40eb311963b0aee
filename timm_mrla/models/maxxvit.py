"""MaxViT, CoAtNet and related models with MRLA-light."""

from functools import partial

from timm.models.maxxvit import ConvNeXtBlock, MaxxVitBlock, MbConvBlock, ParallelMaxxVitBlock, TransformerBlock2d
from torch import nn

from timm_mrla.models._graft import LightBlock, Recipe


def _conv(block: nn.Module) -> nn.Module:
    """The first convolution of a block, or the block itself."""
    conv = getattr(block, 'conv', block)
    return conv[0] if isinstance(conv, nn.Sequential) else conv


def _norm(block: nn.Module) -> nn.Module:
    conv = _conv(block)
    return conv.pre_norm if isinstance(conv, MbConvBlock) else conv.norm


_recipe = partial(Recipe, 'post', where=lambda block: isinstance(_conv(block).shortcut, nn.Identity))

_blocks = dict.fromkeys((MbConvBlock, ConvNeXtBlock, MaxxVitBlock, ParallelMaxxVitBlock), _recipe(_norm))
LightBlock.define(__name__, {**_blocks, TransformerBlock2d: _recipe('norm2')})
