"""Compares ways to adapt a frozen backbone with 1,000 images: layer attention, LoRA, biases, a linear probe and others.

    python benchmarks/adapters.py train vit-s14 vit_s14.pth --tasks count turn elpv clipart --out FOLDER
    python benchmarks/adapters.py costs vit-s14 vit_s14.pth --out FOLDER
    python benchmarks/adapters.py report FOLDER --picture PNG

`data.py` writes the weights, and says which packages contain them. `train` writes results after each run, and skips
runs that have results. Each arm trains its own parameters and the classifier, with AdamW, a cosine schedule, batches
of 32, and no augmentation, under bfloat16 autocast. The arms of a seed have the same initial classifier and order of
images.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from adapter_tasks import TASKS, Task
from matplotlib.figure import Figure
from memory import saved_bytes
from timm.data import resolve_model_data_config
from timm.layers import set_fused_attn
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

import timm_mrla
from timm_mrla.compare.machine import describe_machine
from timm_mrla.compare.paired_statistics import Interval, interval
from timm_mrla.layers import layer_attentions

BATCH = 32
SIZES = {'vit-s14': 56, 'lite0': 96}  # of the images, in pixels
BACKBONES = {  # model of timm, its arguments, and the layers that LoRA adapts
    'vit-s14': ('vit_small_patch14_dinov2', {'img_size': SIZES['vit-s14']}, ['qkv']),
    'lite0': ('tf_efficientnet_lite0', {}, ['conv_pw', 'conv_pwl']),
}


class Arm(NamedTuple):
    """What an arm trains beside the classifier: the parameters that `add` adds to the model, and those that it has."""

    lr: float  # of its own parameters; the classifier's is 1e-3 if there are any
    steps: int = 186  # six epochs
    blocks: list[str] | None = None  # with layer attention
    attention: bool = False
    lora: bool = False
    trains: Callable[[str], bool] = lambda name: False  # names of the backbone's parameters


ARMS = {
    'linear': Arm(lr=1e-2, steps=930),
    'mrla': Arm(lr=1e-2, attention=True),
    'lora': Arm(lr=5e-3, lora=True),
    'bitfit': Arm(lr=1e-2, trains=lambda name: name.endswith('bias')),
    'mrla-last-third': Arm(lr=1e-2, attention=True, blocks=[f'blocks.{i}' for i in range(8, 12)]),
    'norms': Arm(lr=1e-2, trains=lambda name: '.norm' in name or '.bn' in name or name.startswith(('norm', 'bn'))),
    'full': Arm(lr=1e-4, trains=lambda name: True),
    'mrla+lora': Arm(lr=5e-3, attention=True, lora=True),
}
LABELS = ['linear probe', 'layer attention', 'LoRA, rank 4', 'biases']  # of the first four


def build(backbone: str, weights: str, arm: Arm, num_classes: int, seed: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """Build a model in training mode, and return it with the parameters that an arm trains beside the classifier."""
    name, kwargs, lora_layers = BACKBONES[backbone]
    torch.manual_seed(seed)
    overlay = {'file': weights, 'num_classes': 0}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, **kwargs)
    head, plain = {*model.get_classifier().parameters()}, {*model.parameters()}
    chosen = [p for name, p in model.named_parameters() if p not in head and arm.trains(name)]
    model.requires_grad_(False).eval()
    if arm.attention:
        timm_mrla.attach(model, arm.blocks, adapter=True).train()  # in which the backbone's norms stay frozen
    if arm.lora:
        from peft import LoraConfig, inject_adapter_in_model  # not in the extra of the tests

        inject_adapter_in_model(LoraConfig(r=4, target_modules=lora_layers), model)
    chosen += [p for p in model.parameters() if p not in plain]
    for p in (*chosen, *head):
        p.requires_grad_()
    return model, chosen


def train(model: nn.Module, chosen: list[nn.Parameter], arm: Arm, task: Task, seed: int) -> dict[str, float]:
    """Train one run, and return its results on the test images."""
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    x, x_test = ((images - mean) / std for images in (task.x, task.x_test))
    head, net = [*model.get_classifier().parameters()], model
    if not chosen:  # the features do not change
        with torch.inference_mode():
            x, x_test = (
                torch.cat([model.forward_head(model.forward_features(b), pre_logits=True) for b in images.split(100)])
                for images in (x, x_test)
            )
        x, x_test, net = x.clone(), x_test.clone(), model.get_classifier()
    groups = [{'params': head, 'lr': 1e-3 if chosen else arm.lr, 'weight_decay': 0.01}]
    optimizer = torch.optim.AdamW([*groups, {'params': chosen, 'lr': arm.lr, 'weight_decay': 0.0}])
    scheduler = CosineLRScheduler(optimizer, arm.steps, warmup_t=arm.steps // 10, t_in_epochs=False)
    rng, batches = torch.Generator().manual_seed(seed), []
    for step in tqdm(range(arm.steps), leave=False):
        if not batches:
            batches = [*torch.randperm(len(x), generator=rng).split(BATCH)[: len(x) // BATCH]]
        batch = batches.pop()
        scheduler.step_update(step)
        with torch.autocast('cpu', torch.bfloat16):
            out = net(x[batch])
        loss = F.cross_entropy(out.float(), task.y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        out = torch.cat([net(images) for images in x_test.split(100)]).float()
    right = (out.argmax(1) == task.y_test).float().mean()
    found = {'top1': 100 * right.item(), 'test_loss': F.cross_entropy(out, task.y_test).item(), 'loss': loss.item()}
    return {name: round(value, 4) for name, value in found.items()}


def tuning_part(task: Task) -> Task:
    """Split the training images: three quarters for training, and the rest in place of the test images."""
    n = len(task.x) * 3 // 4  # the images are in random order
    return Task(task.x[:n], task.y[:n], task.x[n:], task.y[n:])


def train_all(args: argparse.Namespace) -> None:
    """Train what has no results yet, and write the results after each run."""
    torch.set_num_threads(1)
    set_fused_attn(False)  # in bfloat16 on a CPU, torch's fused attention is slower
    args.out.mkdir(parents=True, exist_ok=True)
    for task_name in args.tasks:
        path = args.out / f'{args.backbone}-{task_name}.json'
        results = json.loads(path.read_text()) if path.exists() else {**describe_machine('cpu'), 'arms': {}}
        task = TASKS[task_name](SIZES[args.backbone])
        if args.tune:
            task = tuning_part(task)
        for seed in range(args.seeds):
            for name in args.arms:
                for lr in args.lr or [ARMS[name].lr]:
                    arm = ARMS[name]._replace(lr=lr)
                    found = results['arms'].setdefault(f'{name}@{lr:g}' if args.lr else name, {'lr': lr, 'runs': {}})
                    if str(seed) in found['runs']:
                        continue
                    model, chosen = build(args.backbone, args.weights, arm, int(task.y.max()) + 1, seed)
                    found['parameters'] = sum(p.numel() for p in chosen)
                    found['runs'][str(seed)] = train(model, chosen, arm, task, seed)
                    path.write_text(json.dumps(results, indent=2) + '\n')


def measure_costs(args: argparse.Namespace) -> None:
    """Measure a training step of each arm, in turns, and what it saves for backward; write both."""
    torch.set_num_threads(1)
    set_fused_attn(False)
    x = torch.randn(BATCH, 3, SIZES[args.backbone], SIZES[args.backbone])
    y, steps, rows = torch.randint(10, (BATCH,)), {}, {}
    variants = {name: ARMS[name] for name in args.arms}
    for name in (*variants, 'mrla, recomputed'):
        model, chosen = build(args.backbone, args.weights, variants.get(name, ARMS['mrla']), 10, 0)
        for layer in layer_attentions(model).values():
            layer.recompute = name not in variants

        def step(model: nn.Module = model) -> None:
            with torch.autocast('cpu', torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            model.zero_grad()

        with torch.autocast('cpu', torch.bfloat16):
            saved = saved_bytes(model, x) / BATCH / 2**20
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        file = len(safetensors.torch.save(trained)) / 1024
        rows[name] = {'parameters': sum(p.numel() for p in chosen), 'file_kib': file, 'saved_mib': saved}
        steps[name] = Timer('step()', globals={'step': step}, num_threads=1)
    seconds = {name: [] for name in steps}
    for i in tqdm(range(args.rounds + 1)):
        for name, timer in steps.items():
            if i:  # the first round warms up
                seconds[name].append(timer.timeit(2).mean)
            else:
                timer.timeit(1)
    for name, row in rows.items():
        row['seconds'] = median(seconds[name])
        row['ratio'] = median(s / base for s, base in zip(seconds[name], seconds['lora'], strict=True))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f'{args.backbone}-costs.json').write_text(
        json.dumps({**describe_machine('cpu'), 'arms': rows}, indent=2) + '\n'
    )


def read(folder: Path, backbone: str) -> dict[str, dict[str, dict[str, float]]]:
    """Read top-1 by task, arm and seed."""
    found = {}
    for task in TASKS:
        path = folder / f'{backbone}-{task}.json'
        if path.exists():
            arms = json.loads(path.read_text())['arms']
            found[task] = {name: {seed: run['top1'] for seed, run in arm['runs'].items()} for name, arm in arms.items()}
    return found


def differences(arms: dict[str, dict[str, float]], name: str, other: str) -> Interval | None:
    """The mean difference between two arms in pairs of one seed, with its 95 % interval; None without two pairs."""
    seeds = sorted({*arms.get(name, ())} & {*arms.get(other, ())})
    return interval([arms[name][seed] - arms[other][seed] for seed in seeds]) if len(seeds) > 1 else None


def report(args: argparse.Namespace) -> None:
    """Print the tables of all backbones, and draw the picture."""
    for backbone in BACKBONES:
        results, path = read(args.folder, backbone), args.folder / f'{backbone}-costs.json'
        if not results:
            continue
        costs = json.loads(path.read_text())['arms'] if path.exists() else {}
        names = [*dict.fromkeys([*(name for arms in results.values() for name in arms), *costs])]
        header = ['arm', 'parameters', 'file (KiB)', 'step', 'MiB saved', *results]
        lines = [header, ['---'] * len(header)]
        for name in names:
            cost = costs.get(name)
            texts = (
                [
                    f'{cost["parameters"]:,}',
                    f'{cost["file_kib"]:.0f}',
                    f'{cost["ratio"]:.2f}',
                    f'{cost["saved_mib"]:.1f}',
                ]
                if cost
                else [''] * 4
            )
            runs = [[*arms.get(name, {}).values()] for arms in results.values()]
            means = [
                f'{interval(values).text(".1f")}, {len(values)} seeds' if len(values) > 1 else '' for values in runs
            ]
            lines.append([f'`{name}`', *texts, *means])
        print(f'\n{backbone}, top-1\n\n' + '\n'.join(f'| {" | ".join(line)} |' for line in lines))
        lines = [['arm', *results], ['---'] * (1 + len(results))]
        for name in names:
            gaps = [differences(arms, 'mrla', name) for arms in results.values()]
            if name != 'mrla' and any(gaps):
                lines.append([f'`{name}`', *(gap.text('+.2f') if gap else '' for gap in gaps)])
        print('\n`mrla` to the other arms, paired by seed\n\n' + '\n'.join(f'| {" | ".join(line)} |' for line in lines))
    draw(read(args.folder, 'vit-s14')).savefig(args.picture)


def draw(results: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """Draw top-1 of the arms for each task: seeds as points, means with 95 % intervals."""
    fig = Figure(figsize=(10, 2.8), dpi=120, layout='constrained')
    shown = [*ARMS][:4]
    for ax, (task, arms) in zip(fig.subplots(1, len(results)), results.items(), strict=True):
        for y, name in enumerate(shown):
            values, color = [*arms.get(name, {}).values()], 'darkorange' if name == 'mrla' else 'tab:blue'
            if len(values) > 1:
                found = interval(values)
                ax.plot(values, [y] * len(values), 'o', color=color, alpha=0.3, markeredgewidth=0)
                ax.errorbar(found.mean, y, xerr=(found.high - found.low) / 2, fmt='D', capsize=4, color=color)
        ax.set(xlabel='top-1', title=task, ylim=(len(shown) - 0.5, -0.5))
        ax.set_yticks(range(len(shown)), LABELS if ax.get_subplotspec().is_first_col() else [''] * len(shown))
        ax.spines[['top', 'right']].set_visible(False)
    return fig


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('backbone', choices=BACKBONES)
    common.add_argument('weights', help='file with its weights')
    common.add_argument('--arms', nargs='+', choices=ARMS, default=[*ARMS][:4])
    common.add_argument('--out', type=Path, required=True, help='folder of the results')
    command = commands.add_parser('train', parents=[common], help='train arms on tasks')
    command.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
    command.add_argument('--seeds', type=int, default=5)
    command.add_argument('--tune', action='store_true', help='train on three quarters, and test on the rest')
    command.add_argument('--lr', nargs='+', type=float, help='learning rates to try')
    command.set_defaults(main=train_all)
    command = commands.add_parser('costs', parents=[common], help='measure time, memory and size of files')
    command.add_argument('--rounds', type=int, default=9)
    command.set_defaults(main=measure_costs)
    command = commands.add_parser('report', help='print the tables and draw the picture')
    command.add_argument('folder', type=Path, help='folder of the results')
    command.add_argument('--picture', type=Path, required=True, help='PNG to write')
    command.set_defaults(main=report)
    args = parser.parse_args()
    args.main(args)


if __name__ == '__main__':
    main()
