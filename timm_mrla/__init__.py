"""Layer attention (MRLA) for timm. Importing this package registers its models and does nothing else."""

from timm_mrla import detection, models
from timm_mrla.attention import feature_maps, layer_attention
from timm_mrla.models import attach, sites

__all__ = ['attach', 'detection', 'feature_maps', 'layer_attention', 'models', 'sites']
__version__ = '0.1.0'
