"""MobileNetV3, MobileNetV4 and their kin with MRLA-light. Their blocks are EfficientNet's."""

from timm_mrla.models._registry import register_light

register_light(__name__, {})
