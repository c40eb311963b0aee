"""MobileNetV3, MobileNetV4 and related models with MRLA-light; efficientnet.py defines their blocks."""
