"""MobileNetV3, MobileNetV4 and related models with MRLA-light; efficientnet.py defines their blocks."""

from timm_mrla.models._registry import register_entries

register_entries(__name__, {}, without='lcnet_.*')
