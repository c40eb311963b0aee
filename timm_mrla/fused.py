"""Reports for each layer of a model why the fused GPU kernels do not run."""

import torch
from torch import nn

from timm_mrla.hooks import NOT_RUN, run_with_hooks
from timm_mrla.layers import layer_attentions
from timm_mrla.ops import reason

__all__ = ['why_not_fused']


def why_not_fused(model: nn.Module, images: torch.Tensor) -> dict[str, str]:
    """Report for each layer attention of a model why it does not run in the fused GPU kernels.

    The images pass through the model once, in evaluation mode. If you train under autocast, call this under autocast.

    Args:
        model: A model with layer attention.
        images: Images [B, C, H, W] or one image [C, H, W], on the device and in the memory format of your training.

    Returns:
        A dict from layer name to reason: one sentence, or an empty string if the kernels run.
    """
    layers, found = layer_attentions(model), {}

    def record(name: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
            found[name] = reason(layer, *args, **kwargs)

        return hook

    idle = run_with_hooks(model, images, {layer: record(name) for name, layer in layers.items()})
    return {name: f'it did not run: {NOT_RUN}' if layer in idle else found[name] for name, layer in layers.items()}
