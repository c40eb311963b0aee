"""MambaOut with MRLA-light."""

from timm.models.mambaout import GatedConvBlock

from timm_mrla.models._graft import LightBlock, Recipe

LightBlock.define(__name__, {GatedConvBlock: Recipe('pre', 'norm', 'NHWC')})
