"""InceptionNeXt with MRLA-light."""

from timm.models.inception_next import MetaNeXtBlock

from timm_mrla.models._graft import LightBlock, Recipe

LightBlock.define(__name__, {MetaNeXtBlock: Recipe('post', 'norm')})
