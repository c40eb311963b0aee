"""The layers MRLA-light and MRLA-base, and the functions that models need to call them."""

from timm_mrla.layers.layer_attention import MrlaBase, MrlaLight, layer_attentions
from timm_mrla.layers.layout import Grid, from_map, to_map
from timm_mrla.layers.query_key import Memory, QueryKey
from timm_mrla.layers.recompute import recompute

__all__ = ['Grid', 'Memory', 'MrlaBase', 'MrlaLight', 'QueryKey', 'from_map', 'layer_attentions', 'recompute', 'to_map']
