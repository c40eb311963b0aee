"""Measures time and page faults of the depthwise 3x3 convolution on a CPU, by memory format and size.

    python benchmarks/depthwise.py

oneDNN computes the convolution on blocks of channels. It converts a map in NCHW to blocks and back, with three buffers
of the map's size. If the allocator does not keep such large buffers, each call requests them again, page by page.
"""

import argparse
import resource
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import report
from torch.utils.benchmark import Timer
from tqdm import tqdm

SHAPES = (
    *((4, 256, 56), (4, 512, 28), (4, 1024, 14), (4, 2048, 7)),
    *((1, 256, 56), (16, 256, 56), (16, 512, 28), (16, 1024, 14), (16, 2048, 7)),
)


def measure(fn: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds and page faults of a call."""
    timer = Timer('fn()', globals={'fn': fn}, num_threads=torch.get_num_threads())
    timer.timeit(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = timer.timeit(20).mean
    # Timer adds two warm-up calls
    return seconds * 1e3, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 22


def compare(B: int, C: int, H: int) -> dict[str, object]:
    """Measure several ways to convolve a map [B, C, H, H]; they must give the same result."""
    x, weight = torch.randn(B, C, H, H), torch.randn(C, 1, 3, 3)
    x_last = x.to(memory_format=torch.channels_last)

    def convolve(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, padding=1, groups=C)

    def shifted() -> torch.Tensor:
        padded, out = F.pad(x, (1, 1, 1, 1)), torch.zeros_like(x)
        for i in range(9):
            out.addcmul_(weight[:, 0, i // 3, i % 3, None, None], padded[:, :, i // 3 :, i % 3 :][:, :, :H, :H])
        return out

    ways = {
        'NCHW': lambda: convolve(x),
        'image by image': lambda: torch.cat([convolve(image) for image in x.split(1)]),
        'shifted products': shifted,
        'there and back': lambda: convolve(x.to(memory_format=torch.channels_last)).contiguous(),
        'channels_last': lambda: convolve(x_last),
    }
    row = {'map': f'{B}x{C}x{H}x{H}'}
    for name, way in ways.items():
        torch.testing.assert_close(way(), convolve(x), rtol=1e-4, atol=1e-4)
        row[f'{name}, ms'], faults = measure(way)
        if name in ('NCHW', 'channels_last'):
            row['faults' if name == 'NCHW' else 'its faults'] = round(faults)
    return row


def main() -> None:
    """Measure all sizes and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', metavar='PATH', help='write the results there too')
    args = parser.parse_args()
    report([compare(*shape) for shape in tqdm(SHAPES)], 'cpu', args.json)


if __name__ == '__main__':
    main()
