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
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from adapter_tasks import TASKS, Task
from peft import LoraConfig, inject_adapter_in_model
from timm.data import resolve_model_data_config
from timm.layers import set_fused_attn
from timm.scheduler import CosineLRScheduler
from torch import nn
from tqdm import tqdm

import timm_mrla
from timm_mrla.compare.machine import describe_machine

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
    'bitfit': Arm(lr=2e-3, trains=lambda name: name.endswith('bias')),
    'mrla-last-third': Arm(lr=1e-2, attention=True, blocks=[f'blocks.{i}' for i in range(8, 12)]),
    'norms': Arm(lr=2e-3, trains=lambda name: '.norm' in name or '.bn' in name or name.startswith(('norm', 'bn'))),
    'full': Arm(lr=1e-4, trains=lambda name: True),
    'mrla+lora': Arm(lr=5e-3, attention=True, lora=True),
}


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


def run_all(args: argparse.Namespace) -> None:
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


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('train', help='train arms on tasks')
    command.add_argument('backbone', choices=BACKBONES)
    command.add_argument('weights', help='file with its weights')
    command.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
    command.add_argument('--arms', nargs='+', choices=ARMS, default=[*ARMS][:4])
    command.add_argument('--seeds', type=int, default=5)
    command.add_argument(
        '--tune', action='store_true', help='hold out a quarter of the training images, no test images'
    )
    command.add_argument('--lr', nargs='+', type=float, help='learning rates to try')
    command.add_argument('--out', type=Path, required=True, help='folder of the results')
    args = parser.parse_args()
    run_all(args)


if __name__ == '__main__':
    main()
