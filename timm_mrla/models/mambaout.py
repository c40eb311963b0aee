"""MambaOut with MRLA-light."""

from timm.models.mambaout import GatedConvBlock

from timm_mrla.models._graft import LightBlock, Recipe
from timm_mrla.models._registry import register_models

LightBlock.define(__name__, {GatedConvBlock: Recipe('pre', 'norm', 'NHWC')})
register_models(__name__)
