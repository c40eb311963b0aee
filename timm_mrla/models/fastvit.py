"""FastViT with MRLA-light."""

from timm.models.fastvit import AttentionBlock, RepMixerBlock

from timm_mrla.models._graft import LightBlock, Recipe

LightBlock.define(__name__, dict.fromkeys((RepMixerBlock, AttentionBlock), Recipe('post', 'mlp.conv.bn')))
