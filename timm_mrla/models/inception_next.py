"""InceptionNeXt with MRLA-light."""

from timm.models.inception_next import MetaNeXtBlock

from timm_mrla.models._graft import LightBlock, Recipe
from timm_mrla.models._registry import register_models

LightBlock.define(__name__, {MetaNeXtBlock: Recipe('post', 'norm')})
register_models(__name__)
