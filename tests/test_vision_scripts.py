"""Tests of torchvision's own training script through the launcher, on a generated data set.

VISION_SCRIPTS names torchvision's folder references/detection.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from readme import code, sections

from timm_mrla.detection import mask_rcnn

SCRIPTS = os.environ.get('VISION_SCRIPTS')
SMALL = Path(__file__).parent.parent / 'benchmarks' / 'small_detectors.py'
pytestmark = [
    pytest.mark.scripts,
    pytest.mark.skipif(
        not SCRIPTS, reason="VISION_SCRIPTS does not name a folder of torchvision's scripts, which PyPI does not have"
    ),
]


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    from coco_digits import write_split

    folder = tmp_path_factory.mktemp('digits')
    write_split(folder, 'train', 6, seed=0)
    write_split(folder, 'val', 2, seed=1)
    return folder


def train(digits, cwd, *args, small=True):
    script = str(Path(SCRIPTS).absolute() / 'train.py')
    command = [sys.executable, '-m', 'timm_mrla', 'run', *([SMALL] if small else []), script]
    command += ['--dataset', 'coco', '--data-path', digits, '--device', 'cpu', '-j', 1, *args]
    result = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stdout


def precision(output):
    """The lines that pycocotools printed in the last evaluation."""
    kinds = len(set(re.findall('IoU metric: (.*)', output)))
    return re.findall(r'Average Precision.*', output)[-6 * kinds :]


@pytest.mark.parametrize(('model', 'kinds'), [('fasterrcnn_small', ['bbox']), ('maskrcnn_small', ['bbox', 'segm'])])
def test_train_resume_and_test(model, kinds, digits, tmp_path):
    backbone = timm.create_model('resnet18_mrla')
    torch.save({'state_dict': backbone.state_dict()}, tmp_path / 'last.pth.tar')
    options = ['--model', model, '--weights-backbone', tmp_path / 'last.pth.tar', '-b', 2, '--output-dir', tmp_path]
    out = train(digits, tmp_path, *options, '--epochs', 1)
    assert re.findall('IoU metric: (.*)', out) == kinds
    out = train(digits, tmp_path, *options, '--epochs', 2, '--resume', tmp_path / 'model_0.pth')
    assert 'Epoch: [1]' in out
    assert 'Epoch: [0]' not in out
    first, second = (torch.load(tmp_path / f'model_{i}.pth', weights_only=False)['model'] for i in (0, 1))
    frozen, learned = 'backbone.body.layer1.0.mrla.lam', 'backbone.body.layer4.1.mrla.lam'
    assert torch.equal(first[frozen], backbone.layer1[0].mrla.lam)
    assert torch.equal(second[frozen], first[frozen])
    assert not torch.equal(second[learned], first[learned])
    assert not [name for name in second if name.endswith('num_batches_tracked')]

    tested = train(digits, tmp_path, *options, '--resume', tmp_path / 'model_1.pth', '--test-only')
    assert precision(tested) == precision(out)
    assert len(precision(out)) == 6 * len(kinds)
    more = ['--model', model, '--weights', tmp_path / 'model_1.pth', '-b', 2, '--output-dir', tmp_path / 'more']
    train(digits, tmp_path, *more, '--epochs', 1, '--lr', 0)
    assert torch.equal(
        torch.load(tmp_path / 'more' / 'model_0.pth', weights_only=False)['model'][learned], second[learned]
    )
    if model == 'maskrcnn_small':
        loaded = mask_rcnn('resnet18_mrla', weights=str(tmp_path / 'model_1.pth'))
        assert loaded.config['num_classes'] == 91


COMMANDS = code(sections('docs/detection.md', '###')["The paper's settings"], 'bash')


@pytest.mark.parametrize('number', range(3))
def test_the_papers_training(number, digits, tmp_path):
    """The command lines of docs/detection.md, for one epoch of a few images, on a smaller, untrained backbone."""
    command = shlex.split(COMMANDS[number].replace('\\\n', ''))
    options = command[command.index('references/detection/train.py') + 1 :]
    value = {name: options[options.index(name) + 1] for name in ('--model', '-b', '--lr', '--epochs')}
    assert int(command[1].split('=')[1]) * int(value['-b']) == 16
    assert (float(value['--lr']), int(value['--epochs'])) == ((0.02, 12), (0.02, 12), (0.01, 12))[number]
    assert options[options.index('--lr-steps') + 1 :][:2] == ['8', '11']
    assert torchvision.models.get_model(value['--model']).transform.min_size == (800,)
    torch.save({'state_dict': timm.create_model('resnet18_mrla').state_dict()}, tmp_path / 'last.pth.tar')
    small = ['--data-path', digits, '--model', value['--model'].replace('resnet50', 'resnet18'), '--epochs', 1]
    small += ['--weights-backbone', tmp_path / 'last.pth.tar', '-j', 1, '--device', 'cpu']
    out = train(digits, tmp_path, *options, *small, small=False)
    assert 'IoU metric: bbox' in out
    assert (tmp_path / options[options.index('--output-dir') + 1] / 'model_0.pth').exists()
