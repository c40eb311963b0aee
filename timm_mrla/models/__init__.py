from timm_mrla.models import ceit, deit, efficientnet, pvt_v2, resnet

__all__ = ['ceit', 'deit', 'efficientnet', 'pvt_v2', 'resnet']
