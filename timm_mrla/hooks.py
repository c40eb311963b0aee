"""Runs a model once with forward hooks, and leaves it as it was."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

NOT_RUN = 'the class or the forward of its block was replaced after it got layer attention'


def run_with_hooks(
    model: nn.Module, images: torch.Tensor, hooks: dict[nn.Module, Callable[..., None]]
) -> list[nn.Module]:
    """Run a model in evaluation mode with forward hooks on some modules, and return those of them that did not run.

    Afterwards, hooks and modes are as before.
    """
    if images.ndim not in (3, 4):
        raise ValueError(f'images {[*images.shape]} are neither [C, H, W] nor [B, C, H, W]')
    images = images.to(next(model.parameters()))
    modes, idle = {module: module.training for module in model.modules()}, dict.fromkeys(hooks)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance('force_eager'))  # hooks would trigger a new compilation
        for module, hook in hooks.items():
            stack.enter_context(module.register_forward_hook(hook, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(lambda module, *_: idle.pop(module, None)))
        try:
            for module in modes:
                module.training = False
            model(images if images.ndim == 4 else images[None])
        finally:
            for module, mode in modes.items():
                module.training = mode
    return [*idle]
