"""Measures the processor's time for one layer in the fused kernels: everything but the launches, which do nothing.

    python benchmarks/launches.py

It needs Triton, but no GPU. At small batches, a GPU waits for this time. Each number is the least over the rounds, of
the time of this process, so that other load on the machine counts little.
"""

import argparse
import time
from collections.abc import Callable

import torch
from report import report
from timm.layers import LayerNorm
from torch import nn
from tqdm import tqdm
from triton.runtime.jit import JITFunction

from timm_mrla.layers import MrlaBase, MrlaLight
from timm_mrla.ops import proof, reason, reasons

DIM, HEADS, SIZE = 64, 2, (4, 4)
LAYERS = {
    'MRLA-light, post': (MrlaLight, nn.BatchNorm2d, 'post'),
    'MRLA-light, pre': (MrlaLight, LayerNorm, 'pre'),
    'MRLA-base, post, third block': (MrlaBase, nn.BatchNorm2d, 'post'),
    'MRLA-base, pre, third block': (MrlaBase, LayerNorm, 'pre'),
}


def microseconds(call: Callable[[], object], rounds: int) -> float:
    """The least time of a call."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(20):
            call()
        times.append((time.process_time() - start) / 20)
    return min(times) * 1e6


def measure(name: str, rounds: int) -> dict[str, object]:
    """Times of one layer in training, in evaluation mode, and folded."""
    kind, norm, form = LAYERS[name]
    layer = kind(DIM, DIM // HEADS, norm, form, 'NCHW' if form == 'post' else 'NLC')
    shape = (2, DIM, *SIZE) if form == 'post' else (2, SIZE[0] * SIZE[1], DIM)
    maps = [torch.zeros(2, DIM, *SIZE).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    memory = tuple(t for v in maps for t in (torch.zeros(2, HEADS, DIM // HEADS), v))
    x = maps[0] if form == 'post' else torch.zeros(shape)
    inputs = (x, x if kind is MrlaLight else memory, SIZE)
    x_grad = (x.clone().requires_grad_(), *inputs[1:])

    def forward() -> torch.Tensor:
        out = layer(*x_grad)
        return out if kind is MrlaLight else out[0]

    def step() -> None:
        forward().backward(x)

    def infer() -> None:
        with torch.no_grad():
            layer(*inputs)

    row = {'layer': name}
    for task, call in (('reason', lambda: reason(layer, *inputs)), ('forward', forward), ('training step', step)):
        row[f'{task}, us'] = microseconds(call, rounds)
    layer.eval()
    row['evaluation, us'] = microseconds(infer, rounds)
    layer = layer.fuse()
    row['folded, us'] = microseconds(infer, rounds)
    with torch.no_grad():
        assert reason(layer, *inputs) == ''
    return row


def main() -> None:
    """Measure all kinds of layers and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--json', metavar='PATH', help='write the results there too')
    args = parser.parse_args()
    JITFunction.run = lambda *args, **kwargs: None
    reasons._interpreter = proof.skipped = True  # as if CPU tensors could run in the kernels
    report([measure(name, args.rounds) for name in tqdm(LAYERS)], 'cpu', args.json)


if __name__ == '__main__':
    main()
