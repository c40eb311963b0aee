"""Tests of timm's own scripts through the launcher, on generated images.

TIMM_SCRIPTS names a folder that holds timm's train.py, validate.py, inference.py, benchmark.py and onnx_export.py.
"""

import contextlib
import csv
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub import add_backbone
from readme import COMMANDS, PAGES, assert_accepted, blocks, code, sections
from test_contract import CASES, ENTRIES, arguments

import timm_mrla  # noqa: F401
from timm_mrla.models import backbone_names

SCRIPTS = os.environ.get('TIMM_SCRIPTS')
pytestmark = [
    pytest.mark.scripts,
    pytest.mark.skipif(
        not SCRIPTS, reason="TIMM_SCRIPTS does not name a folder of timm's scripts, which PyPI does not have"
    ),
]
MODELS = ['resnet18_mrla', 'resnet18_mrlab', 'deit_tiny_mrla', 'deit_tiny_mrlab']
MODELS += ['efficientnet_b0_mrla', 'pvt_v2_b0_mrla', 'pvt_v2_b0_mrlab', 'ceit_tiny_mrla']


def run(*args, cwd, env=None):
    command = [sys.executable, '-m', 'timm_mrla', *map(str, args)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **(env or {})})
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stdout + result.stderr


def script(name, *args, **kwargs):
    return run('run', Path(SCRIPTS).absolute() / name, *args, **kwargs)


def size(model):
    tokens = model.startswith(('deit', 'ceit'))
    return ['--img-size', 64, '--model-kwargs', 'img_size=64'] if tokens else ['--img-size', 64]


def train(model, images, cwd, *args):
    options = ['--num-classes', 2, *size(model), '-b', 4, '-j', 1, '--device', 'cpu', '--opt', 'adamw', '--lr', 1e-3]
    return script('train.py', '--data-dir', images, '--model', model, *options, '--output', cwd, *args, cwd=cwd)


def rows(folder):
    with open(folder / 'summary.csv') as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize('model', MODELS)
def test_train_resume_validate_infer_and_export(model, images, tmp_path):
    train(model, images, tmp_path, '--experiment', 'run', '--epochs', 1, '--model-ema', '--grad-checkpointing')
    assert [row['epoch'] for row in rows(tmp_path / 'run')] == ['0']
    assert all(np.isfinite(float(row['eval_loss'])) for row in rows(tmp_path / 'run'))
    resume = ['--resume', tmp_path / 'run' / 'last.pth.tar', '--drop-path', 0.1]
    train(model, images, tmp_path, '--experiment', 'more', '--epochs', 2, *resume)
    assert [row['epoch'] for row in rows(tmp_path / 'more')] == ['1']

    finetune = ['--pretrained', '--pretrained-path', tmp_path / 'run' / 'last.pth.tar']
    train(model, images, tmp_path, '--experiment', 'tuned', '--epochs', 1, *finetune)
    assert len(rows(tmp_path / 'tuned')) == 1

    checkpoint = [
        '--model',
        model,
        '--num-classes',
        2,
        '--checkpoint',
        tmp_path / 'more' / 'last.pth.tar',
        *size(model),
    ]
    loader = ['--data-dir', images / 'val', '-b', 4, '-j', 1, '--device', 'cpu']
    assert '"top1"' in script('validate.py', *checkpoint, *loader, '--reparam', cwd=tmp_path)
    results = ['--fullname', '--results-dir', tmp_path / 'results', '--results-format', 'csv']
    script('inference.py', *checkpoint, *loader, *results, cwd=tmp_path)
    (table,) = (tmp_path / 'results').glob('*.csv')
    assert len(table.read_text().splitlines()) == 1 + 8

    weights = tmp_path / 'weights.pth'  # at the model's default size, because the script cannot set another
    torch.save(timm.create_model(model, num_classes=2).state_dict(), weights)
    export = ['--model', model, '--num-classes', 2, '--checkpoint', weights, '--dynamo']
    script('onnx_export.py', tmp_path / 'model.onnx', *export, cwd=tmp_path)
    assert (tmp_path / 'model.onnx').stat().st_size > 0


@pytest.mark.parametrize('name', ['test_resnet_mrla', 'test_vit_mrla'])
def test_an_adapter_from_training_to_export(name, images, hub, tmp_path):
    """Frozen to the last bit in train.py, a small file by convert, and loaded by the other scripts as it is."""
    add_backbone(hub, name)
    where, warm, small = dict(cwd=tmp_path, env=hub.env), f'{name}.warmstart_r160_in1k', {}
    kwargs = ['--model-kwargs', 'mrla_adapter=True']
    if 'vit' in name:
        small['img_size'] = 64
        kwargs.append('img_size=64')
    plain = timm.create_model(warm, pretrained=True, **small).state_dict()
    options = ['--data-dir', images, '--model', warm, '--pretrained', '--num-classes', 2, '--img-size', 64, *kwargs]
    options += ['-b', 4, '-j', 1, '--device', 'cpu', '--opt', 'adamw', '--lr', 5e-3, '--output', tmp_path]
    options += ['--amp', '--amp-dtype', 'bfloat16', '--model-ema', '--layer-decay', 0.7, '--grad-checkpointing']
    script('train.py', *options, '--experiment', 'run', '--epochs', 1, **where)
    last = tmp_path / 'run' / 'last.pth.tar'
    script('train.py', *options, '--experiment', 'more', '--epochs', 2, '--resume', last, **where)
    last = tmp_path / 'more' / 'last.pth.tar'
    for key in ('state_dict', 'state_dict_ema'):
        found = torch.load(last, weights_only=False)[key]
        frozen = {k for k in found if '.mrla.' not in k and not k.startswith(('fc.', 'head.'))}
        assert all(torch.equal(found[k], plain[k]) for k in frozen)
        assert all(v.any() for k, v in found.items() if k.endswith(('.mrla.norm.weight', '.mrla.norm_x.weight')))

    run('convert', last, '--model', warm, '--out', 'adapter', *kwargs, **where)
    assert (tmp_path / 'adapter' / 'model.safetensors').stat().st_size < 200_000
    loader = ['--data-dir', images / 'val', '-b', 4, '-j', 1, '--device', 'cpu', '--img-size', 64]
    adapter = ['--model', 'local-dir:adapter', '--pretrained']
    checkpoint = ['--model', name, '--checkpoint', last, '--use-ema', '--num-classes', 2]
    checkpoint += ['--model-kwargs', 'img_size=64'] if small else []
    results = [script('validate.py', *model, *loader, **where) for model in (adapter, checkpoint)]
    of_adapter, of_checkpoint = (re.findall(r'Loss: *[0-9.]+ \(([0-9.]+)\)', result)[-1] for result in results)
    assert of_adapter == of_checkpoint
    script(
        'inference.py',
        *adapter,
        *loader,
        '--fullname',
        '--results-dir',
        tmp_path / 'results',
        '--results-format',
        'csv',
        **where,
    )
    script('onnx_export.py', tmp_path / 'model.onnx', '--model', 'local-dir:adapter', '--dynamo', **where)
    assert (tmp_path / 'model.onnx').stat().st_size > 0


def test_the_page_on_fine_tuning(images, hub, command_on_path, tmp_path, monkeypatch):
    """Its commands and its code run from top to bottom, with small models on a small folder."""
    pytest.importorskip('onnxruntime')
    changes = {
        'convnext_tiny_mrla': 'test_resnet_mrla',
        'vit_small_patch16_dinov3_mrla': 'test_vit_mrla',
        r'warmstart_\w+': 'warmstart_r160_in1k',
        r'\b(train|validate)\.py': rf'{Path(SCRIPTS).absolute()}/\1.py -j 1 --device cpu',
        '--epochs [0-9]+': '--epochs 1',
        '--warmup-epochs [0-9]': '--warmup-epochs 0',
        '--num-classes 10': '--num-classes 2',
        '-b 64( --amp)?': '-b 4',
        '--layer-decay 0.7': '--layer-decay 0.7 --img-size 64',
        'mrla_adapter=True --out': 'mrla_adapter=True img_size=160 --out',  # for its position embedding
    }
    for name in ('test_resnet_mrla', 'test_vit_mrla'):
        add_backbone(hub, name)
    monkeypatch.chdir(tmp_path)
    Path('DATA').symlink_to(images)
    Path('picture.jpg').symlink_to(images / 'val' / 'red' / '0.jpg')
    names, printed = {}, []
    for language, source in blocks(PAGES['docs/fine-tuning.md']):
        for old, new in changes.items():
            source = re.sub(old, new, source)
        if language == 'bash':
            subprocess.run(['bash', '-ec', source], check=True, env={**os.environ, **hub.env})
        elif language == 'python':
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(source, 'docs/fine-tuning.md', 'exec'), names)
            printed.append(stdout.getvalue())
    scales, top, _ = printed
    assert all(float(line.split()[1]) > 0 for line in scales.splitlines())
    assert {line.split()[0] for line in top.splitlines()} == {'red', 'blue'}
    assert os.path.getsize('birds_adapter/model.safetensors') < os.path.getsize('birds/model.safetensors')


@pytest.mark.parametrize('case', CASES)
def test_an_epoch_of_training_leaves_a_frozen_backbone_as_it_is(case, images, tmp_path, monkeypatch):
    """Parameters and buffers of every family, to the last bit, also in the averaged model."""
    name, kwargs = arguments(case, num_classes=2)
    start = timm.create_model(ENTRIES[name], mrla_adapter=True, **kwargs)
    torch.save(start.state_dict(), tmp_path / 'start.pth')
    kwargs = [f'{key}={value!r}'.replace(' ', '') for key, value in kwargs.items() if key != 'num_classes']
    options = ['--data-dir', images, '--model', ENTRIES[name], '--initial-checkpoint', tmp_path / 'start.pth']
    options += ['--model-kwargs', 'mrla_adapter=True', *kwargs, '--num-classes', 2, '--input-size', 3, *CASES[case][2]]
    options += [
        '-b',
        4,
        '-j',
        0,
        '--device',
        'cpu',
        '--opt',
        'adamw',
        '--lr',
        0.1,
        '--weight-decay',
        0.1,
        '--model-ema',
    ]
    options += ['--warmup-epochs', 0, '--epochs', 1, '--drop-path', 0, '--output', tmp_path, '--experiment', 'run']
    monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, options)])
    runpy.run_path(str(Path(SCRIPTS) / 'train.py'), run_name='__main__')
    checkpoint = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    names = backbone_names(start)
    for key in ('state_dict', 'state_dict_ema'):
        found, before = checkpoint[key], start.state_dict()
        assert all(torch.equal(found[name], before[name]) for name in names)
        assert any(not torch.equal(found[name], before[name]) for name in {*found} - names)


@pytest.mark.parametrize('model', MODELS)
def test_benchmark(model, tmp_path):
    options = ['--bench', 'both', '--device', 'cpu', '-b', 2, '--num-bench-iter', 5, '--num-warm-iter', 1]
    out = script('benchmark.py', '--model', model, *options, *size(model), cwd=tmp_path)
    assert 'infer_samples_per_sec' in out
    assert 'train_samples_per_sec' in out


def test_the_plugin_flag_of_train(images, tmp_path):
    """Without the launcher, train.py imports the package itself."""
    command = [
        sys.executable,
        Path(SCRIPTS).absolute() / 'train.py',
        '--device-modules',
        'timm_mrla',
        '--data-dir',
        images,
    ]
    options = ['--model', 'resnet18_mrla', '--num-classes', 2, '--img-size', 64, '-b', 4, '-j', 1, '--epochs', 1]
    output = ['--device', 'cpu', '--output', tmp_path, '--experiment', 'run', '--layer-decay', 0.7]
    result = subprocess.run([*map(str, command + options + output)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    assert len(rows(tmp_path / 'run')) == 1


@pytest.mark.parametrize(
    ('number', 'model', 'batch', 'lr'),
    [(0, 'resnet50_mrla', 256, 0.1), (1, 'deit_small_mrla', 1024, 1e-3), (2, 'efficientnet_b0_mrla', 768, 0.048)],
)
def test_the_papers_training(number, model, batch, lr, images, tmp_path):
    """The command lines of docs/training.md, for one epoch of a few small images, with the same total batch size."""
    command = shlex.split(
        code(sections('docs/training.md')["The paper's settings"], 'bash')[number].replace('\\\n', '')
    )
    processes, options = command[1], command[command.index('train.py') + 1 :]
    assert int(processes.split('=')[1]) * int(options[options.index('-b') + 1]) == batch
    small = ['--data-dir', images, '-b', 4, '--grad-accum-steps', batch // 4, '--epochs', 1, '--num-classes', 2]
    small += [*size(model), '-j', 1, '--device', 'cpu', '--output', tmp_path, '--experiment', 'run']
    small += ['--aug-repeats', 0]  # repeats need several processes, and train.py needs a GPU for each
    out = script('train.py', *options, *small, cwd=tmp_path)
    (logged,) = re.findall(r'Learning rate \((.*?)\)', out)
    assert float(logged) == pytest.approx(lr)
    assert len(rows(tmp_path / 'run')) == 1


NAMES = {'train.py', 'validate.py', 'inference.py', 'benchmark.py', 'onnx_export.py'}
DOCUMENTED = [(page, command) for page, command in COMMANDS if NAMES & {*command}]


@pytest.mark.parametrize(('page', 'command'), DOCUMENTED, ids=[f'{p}-{" ".join(c[:5])}' for p, c in DOCUMENTED])
def test_commands_are_accepted(page, command, monkeypatch):
    """timm's scripts take the arguments of the documentation's command lines."""
    (name,) = NAMES & {*command}
    path = str(Path(SCRIPTS) / name)
    args = command[command.index('--' if '--' in command else name) + 1 :]
    assert_accepted([path, *args], lambda: runpy.run_path(path, run_name='__main__'), monkeypatch)
