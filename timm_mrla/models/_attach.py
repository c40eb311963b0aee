"""Adds layer attention to a model that a user has built, and lists the blocks that support it."""

from collections.abc import Iterable

from torch import nn

from timm_mrla.layers import layer_attentions
from timm_mrla.models._adapter import freeze_backbone
from timm_mrla.models._graft import LightBlock, Sites, find_sites, graft
from timm_mrla.models._registry import BACKBONES
from timm_mrla.models._weights import backbone_cfg, drop_weights_description
from timm_mrla.switches import is_on


def _backbone(model: nn.Module) -> str:
    """The name in timm's registry of a model, or of its plain backbone; empty if there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f'a model is needed, and {model!r:.80} is none; timm.create_model builds one')
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or ''
    return BACKBONES.get(name, name)


def sites(model: nn.Module) -> Sites:
    """List the blocks of a model, and which of them support layer attention.

    Args:
        model: A model of timm's, with or without layer attention.

    Returns:
        The blocks in order: name, name of the class, channels, form and layout of layer attention, and the reason why
        the block supports none, empty if it does. Printed, a table.
    """
    return find_sites(model, LightBlock, _backbone(model))


def _wrapper(model: nn.Module) -> str:
    """The name of a wrapper around a model or a part of it; empty if there is none."""
    from torch.distributed.fsdp import FSDPModule  # slow to import

    if getattr(model, '_compiled_call_impl', None) is not None or hasattr(model, '_orig_mod'):
        return 'torch.compile'
    for module in model.modules():
        own = {*module._modules, *dir(type(module))}
        parts = [part for c in module.children() if type(c) not in LightBlock.classes for part in c.named_children()]
        passes_on = any(name not in own and getattr(module, name, None) is part for name, part in parts)  # __getattr__
        holds = len(module._modules) == 1 and isinstance(getattr(module, 'module', None), nn.Module)  # torch's, timm's
        alone = isinstance(module, nn.Sequential) and len(module) == 1 and hasattr(module[0], 'forward_features')
        if passes_on or holds or alone or isinstance(module, FSDPModule):
            return type(module).__name__
    return ''


def attach(
    model: nn.Module, blocks: str | Iterable[str] | None = None, identity: bool = True, adapter: bool = False
) -> nn.Module:
    """Add MRLA-light to every supported block of a model of timm's, in place, as its child `mrla`; return the model.

    The backbone keeps its parameters, their names, device, dtype, memory format, mode and `requires_grad`. A model that
    `timm.create_model` built can be saved and published afterwards, and loads as `<name>_mrla`.

    timm's `freeze_batch_norm_2d` freezes the norms of layer attention too: freeze first, then attach. With stochastic
    depth, layer attention draws random numbers of its own, so the backbone drops other samples than without it. If a
    ViT pools the class token, nothing reads the patches of its last block, so only `norm_x` of layer attention learns
    there.

    Args:
        model: The model.
        blocks: Shell-style patterns of names of blocks, such as 'stages.2.*'; by default, all supported blocks.
        identity: Whether the outputs stay bit-identical until you train; the new layers receive gradients from the
            first step. Otherwise layer attention is initialized as for training from scratch.
        adapter: Whether everything but layer attention and the classifier is frozen. Batch norms of the backbone keep
            their running statistics in training mode then, unless you make their parameters require gradients again.

    Raises:
        TypeError: `model` is no model, or a pattern is no string.
        ValueError: The model has layer attention, is wrapped, or has no supported block, or a pattern matches none.
    """
    backbone, adapter = _backbone(model), is_on('adapter', adapter)
    if layer_attentions(model):
        raise ValueError(f'{type(model).__name__} has layer attention already; attach it to the plain model, once')
    if wrapper := _wrapper(model):
        raise ValueError(f'this model is wrapped by {wrapper}; attach first, then wrap')
    patterns = graft(model, LightBlock, backbone, blocks=blocks, identity=identity)
    name = next((name for name, plain in BACKBONES.items() if plain == backbone and name.endswith('_mrla')), None)
    weights = backbone_cfg(name, model.pretrained_cfg) if name and adapter else None
    if name:
        args = {} if patterns is None else {'mrla_blocks': patterns}
        if adapter:
            args['mrla_adapter'] = True
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'architecture': name}
        drop_weights_description(model)
        model._model_args = {**getattr(model, '_model_args', {}), **args}  # timm saves these arguments with the model
    return freeze_backbone(model, weights) if adapter else model
