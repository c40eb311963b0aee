"""Models of timm with layer attention, one file for each module of timm; importing one registers its entries."""

# ruff: noqa: F401, I001
from timm_mrla.models import ceit, convnext, davit, deit, edgenext, efficientnet, eva, fastvit, focalnet, inception_next
from timm_mrla.models import mambaout, maxxvit, metaformer, mobilenetv3, pvt_v2, regnet, resnet, resnetv2, starnet
from timm_mrla.models import swin_transformer, swin_transformer_v2, vision_transformer
from timm_mrla.models._adapter import Adapter, backbone_names, classifier_names
from timm_mrla.models._attach import attach, sites
from timm_mrla.models._graft import is_lost
from timm_mrla.models._loops import SelfWithOverrides
from timm_mrla.models._registry import BACKBONES, MODEL_ARGS
from timm_mrla.models._weights import TAG, weights_source

__all__ = ['attach', 'sites']
