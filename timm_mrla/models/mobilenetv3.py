"""MobileNetV3, MobileNetV4 and their kin with MRLA-light."""

from timm_mrla.models import _mobile  # noqa: F401  the blocks
from timm_mrla.models._registry import register_light

default_cfgs = {}
register_light(__name__)
