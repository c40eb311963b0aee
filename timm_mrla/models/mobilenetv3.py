"""MobileNetV3, MobileNetV4 and their kin with MRLA-light. Their blocks are EfficientNet's."""

from timm_mrla.models._registry import register_entries

register_entries(__name__, {}, without='lcnet_.*')
