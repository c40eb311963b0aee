"""Helpers for tests of the fused kernels: device, random maps and layers, comparison with float64.

Triton's interpreter must be chosen before Triton is imported, so tests in it run in a separate process.
"""

import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import timm_mrla
from timm_mrla.layers import layer_attentions

INTERPRETER = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETER or not torch.cuda.is_available() else 'cuda'
GPU = DEVICE == 'cuda' and torch.cuda.get_device_capability() >= (8, 0)
CHANNELS_LAST = {'memory_format': torch.channels_last}
COMPILED_FOR = ((torch.float32, 80), (torch.bfloat16, 90))  # dtypes, and compute capabilities of GPUs
if INTERPRETER:  # two thirds of its time: checks of integer overflow, and patching the language anew in each function
    from triton.language import standard
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._patch_lang(standard.sum.fn)  # once, for all functions of Triton's own
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    from watched import watched
else:
    watched = contextlib.nullcontext  # nothing sees the addresses that a GPU reads and writes
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def kernels(test):
    """Mark a test that runs kernels, on a GPU or in the interpreter."""
    return pytest.mark.cuda(pytest.mark.skipif(not (GPU or INTERPRETER), reason='no GPU, no interpreter')(test))


def on_gpu(test):
    """Mark a test that needs a GPU."""
    return pytest.mark.cuda(pytest.mark.skipif(not GPU, reason='no GPU')(test))


def assert_close(name, expected, result, ratio):
    """Assert that the error, relative to the norm of the expected tensor, is below a ratio."""
    expected, result = expected.double(), result.double()
    assert expected.shape == result.shape, name
    error = (expected - result).norm() / expected.norm().clamp_min(1e-6)
    assert error < ratio, f'{name}: {error:.1e}'


def maps(*shape, dtype=torch.float32, shift=0.0):
    x = torch.randn(shape, device=DEVICE) + shift
    return (x.contiguous(**CHANNELS_LAST) if len(shape) == 4 else x).to(dtype)


def draw(layer, dtype):
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        for name, buffer in layer.named_buffers():
            if 'running' in name:
                buffer.uniform_(0.5, 2)
    return layer.to(DEVICE, dtype)


def model_and_images(name, size, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **({'img_size': size} if 'vit' in name else {}), **kwargs)
    return model.to(DEVICE, **CHANNELS_LAST), torch.randn(2, 3, *size, device=DEVICE).contiguous(**CHANNELS_LAST)


def steps(model, x, count=3):
    """The losses of some training steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(count):
        loss = model.train()(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_trains_as_plain(model, x):
    """In three training steps, the kernels' losses are as close to float64 as the losses of the plain layers."""
    reasons = timm_mrla.why_not_fused(model, x)
    assert [*reasons] == [*layer_attentions(model)] and set(reasons.values()) == {''}
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    losses = steps(model, x)
    timm_mrla.set_fused(False)
    plain_losses, expected = steps(plain, x).double(), steps(exact, x.double())
    timm_mrla.set_fused(True)
    assert_close('losses', expected, losses, max(1e-5, 5 * ((plain_losses - expected).norm() / expected.norm()).item()))


def recording(nodes):
    """A backend of torch.compile that adds the names of the layer's ops in its graphs to a list."""

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes if 'timm_mrla' in str(node.target))
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    return backend


def run_in_interpreter(files, marked):
    """Run the tests of files with some marks in another process, in Triton's interpreter; return how many passed."""
    arguments = [*files, '-n', '0', '-q', '-p', 'no:cacheprovider', '-m', marked]
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', *arguments],
        cwd=Path(__file__).parent,
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return int(result.stdout.split(' passed')[0].split()[-1])
