"""EfficientNet and its kin with MRLA-light.

Papers:
* `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985
* `EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks` - https://arxiv.org/abs/1905.11946
"""

from timm_mrla.models import _mobile  # noqa: F401  the blocks
from timm_mrla.models._registry import register_light

default_cfgs = {}
register_light(__name__)
