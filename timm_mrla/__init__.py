"""Layer attention (MRLA) for timm. Importing this package registers its models and does nothing else."""

from timm_mrla import detection, models
from timm_mrla._version import __version__
from timm_mrla.adapters import load_adapter
from timm_mrla.attention import feature_maps, layer_attention, output_scales
from timm_mrla.fused import why_not_fused
from timm_mrla.models import attach, sites
from timm_mrla.ops import set_fused

__all__ = [
    '__version__',
    'attach',
    'detection',
    'feature_maps',
    'layer_attention',
    'load_adapter',
    'models',
    'output_scales',
    'set_fused',
    'sites',
    'why_not_fused',
]
