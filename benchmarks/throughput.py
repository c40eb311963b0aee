"""Measures the time of inference and training steps, relative to timm's plain backbone.

    python benchmarks/throughput.py --models resnet50_mrla resnet50_mrlab --batch-size 4

Both models run in one process, in turns, so that other load on the machine affects both. The ratio is the median over
the rounds; the table also has the least and the greatest.
"""

import argparse
import itertools
from collections.abc import Callable
from statistics import median

import timm
import torch
import torch.nn.functional as F
from entries import backbone, input_size
from report import report
from timm.utils.model import reparameterize_model
from torch.utils.benchmark import Timer
from tqdm import tqdm

import timm_mrla

TASKS = ('inference', 'training')
HOW = ('eager', 'reparameterized', 'recomputed', 'compiled', 'reparameterized+compiled', 'recomputed+compiled')
LAYOUTS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}


def build(name: str, kwargs: dict[str, object], args: argparse.Namespace, case: tuple[str, ...]) -> Callable[[], None]:
    """Return a function that runs one step of a model in one case."""
    task, how, layout, dtype, _ = case
    model = timm.create_model(name, **kwargs).to(args.device, memory_format=LAYOUTS[layout])
    x = torch.randn(args.batch_size, *input_size(args.entry), device=args.device).to(memory_format=LAYOUTS[layout])
    y = torch.randint(model.num_classes, (args.batch_size,), device=args.device)
    model.train(task == 'training')
    if 'reparameterized' in how:
        model = reparameterize_model(model)
    if 'compiled' in how:
        model = torch.compile(model)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=dtype == 'bfloat16')

    def infer() -> None:
        with torch.inference_mode(), autocast:
            model(x)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = F.cross_entropy(model(x), y)
        loss.backward()

    return train if task == 'training' else infer


def compare(args: argparse.Namespace, case: tuple[str, ...], progress: tqdm) -> dict[str, object]:
    """Measure seconds per step of the entry and its backbone, and their ratios over the rounds."""
    plain, kwargs = backbone(args.entry)
    timm_mrla.set_fused(case[4] == 'on')
    ours = {'mrla_recompute': 'recomputed' in case[1]}
    if args.blocks:
        ours['mrla_blocks'] = args.blocks
    steps = {'ours': build(args.entry, ours, args, case), 'plain': build(plain, kwargs, args, case)}
    timers = {
        name: Timer('step()', globals={'step': step}, num_threads=torch.get_num_threads())
        for name, step in steps.items()
    }
    slowest = max(timer.timeit(2).mean for timer in timers.values())  # also compiles and warms up
    number = 1 + int(args.seconds / slowest)
    seconds = {name: [] for name in timers}
    for i in range(args.rounds):
        for name in sorted(timers, reverse=i % 2 == 1):
            seconds[name].append(timers[name].timeit(number).mean)
        progress.update()
    ratios = [ours / plain for ours, plain in zip(seconds['ours'], seconds['plain'], strict=True)]
    return {
        'model': args.entry,
        'backbone': plain,
        'blocks': ' '.join(args.blocks or ['all']),
        **dict(zip(('task', 'how', 'layout', 'dtype', 'fused'), case, strict=True)),
        'batch_size': args.batch_size,
        'seconds': median(seconds['ours']),
        'plain_seconds': median(seconds['plain']),
        'ratio': median(ratios),
        'least': min(ratios),
        'greatest': max(ratios),
    }


def main() -> None:
    """Run all cases and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['resnet50_mrla'])
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--task', nargs='+', choices=TASKS, default=TASKS)
    parser.add_argument('--how', nargs='+', choices=HOW, default=HOW[:3])
    parser.add_argument('--layout', nargs='+', choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument('--dtype', nargs='+', choices=('float32', 'bfloat16'), default=['float32'])
    parser.add_argument('--fused', nargs='+', choices=('on', 'off'), default=['on'], help='kernels, on a GPU')
    parser.add_argument('--blocks', nargs='+', metavar='PATTERN', help='blocks with layer attention (default: all)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=9, help='turns that the two models take (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=1.0, help='length of a turn (default: %(default)s)')
    parser.add_argument('--json', metavar='PATH', help='write the results there too')
    args = parser.parse_args()

    cases = [
        (model, case)
        for model in args.models
        for case in itertools.product(args.task, args.how, args.layout, args.dtype, args.fused)
        if {'training': 'reparameterized', 'inference': 'recomputed'}[case[0]] not in case[1]
    ]
    with tqdm(total=len(cases) * args.rounds, unit='round') as progress:
        rows = []
        for args.entry, case in cases:
            progress.set_description(' '.join((args.entry, *case)))
            rows.append(compare(args, case, progress))
    report(rows, args.device, args.json)


if __name__ == '__main__':
    main()
