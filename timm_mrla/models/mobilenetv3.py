"""MobileNetV3, MobileNetV4 and related models with MRLA-light; efficientnet.py defines their blocks."""

from timm_mrla.models._registry import register_models

register_models(__name__, without='lcnet_.*')
