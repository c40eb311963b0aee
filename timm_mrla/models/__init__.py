"""Models of timm with layer attention, one file for each module of timm; importing one registers its entries."""

# ruff: noqa: F401, I001
from timm_mrla.models import ceit, convnext, davit, deit, edgenext, efficientnet, eva, fastvit, focalnet, inception_next
from timm_mrla.models import mambaout, maxxvit, metaformer, mobilenetv3, pvt_v2, regnet, resnet, resnetv2, starnet
from timm_mrla.models import swin_transformer, swin_transformer_v2, vision_transformer
from timm_mrla.models._attach import attach, sites

__all__ = ['attach', 'sites']
