"""Registers kernels as PyTorch custom ops for torch.compile; eager mode calls them without the detours of an op."""

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from timm_mrla.ops.reasons import in_dispatch_mode


class Operator:
    """A functional custom op, which modifies no argument. In eager mode, an autograd function calls its kernels.

    torch's own way from a call of a custom op to its function takes more of the processor's time than the function.
    """

    def __init__(self, name: str, fn: Callable) -> None:
        @functools.wraps(fn)
        def launch(x: Tensor, *args):
            with torch.cuda.device_of(x):
                return self.fn(x, *args)

        self.fn, self.launch, self.function = fn, launch, None
        self.op = custom_op(name, launch, mutates_args=())
        self.register_fake = self.op.register_fake
        parameters = inspect.signature(fn).parameters.values()
        self.lists = [i for i, p in enumerate(parameters) if p.annotation == list[Tensor]]

    def spread(self, args: Sequence) -> list:
        """Arguments with their lists of tensors spread, because autograd sees no tensors in lists."""
        flat = [*args]
        for i in reversed(self.lists):
            flat[i : i + 1] = args[i]
        return flat

    def register_autograd(self, differentiate: Callable, save: Callable = lambda ctx, inputs, output: None) -> None:
        """Register the gradient `differentiate(ctx, *grads)` and `save(ctx, inputs, output)`, as for a custom op."""
        self.op.register_autograd(differentiate, setup_context=save)
        launch = self.launch

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, lengths, *flat):
                args = [*flat]
                for i, length in zip(self.lists, lengths, strict=True):
                    args[i : i + length] = [args[i : i + length]]
                output = launch(*args)
                save(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx, *grads):
                return None, *self.spread(differentiate(ctx, *grads))

        self.function = Function

    def __call__(self, *args):
        # before torch 2.14, a gradient is traced under a dispatch mode alone
        if torch.compiler.is_compiling() or in_dispatch_mode():
            return self.op(*args)
        if self.function is None or not torch.is_grad_enabled():
            return self.launch(*args)
        return self.function.apply([len(args[i]) for i in self.lists], *self.spread(args))


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorate a function that launches kernels, on the device of its first argument."""
    return lambda fn: Operator(name, fn)


def second_order(ctx, *grads) -> None:
    """The gradient of a backward pass."""
    raise RuntimeError(
        'the fused kernels of layer attention have no second derivative: call timm_mrla.set_fused(False) before the '
        'forward pass'
    )
