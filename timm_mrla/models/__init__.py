from timm_mrla.models import deit, resnet

__all__ = ['deit', 'resnet']
