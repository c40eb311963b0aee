"""The demo, as a user gives it."""

import json
import re
import subprocess
import sys

import pytest
import timm
import torch


def demo(*args, cwd):
    return subprocess.run([sys.executable, '-m', 'timm_mrla', 'demo', *args], cwd=cwd, capture_output=True, text=True)


def test_it_learns_writes_and_loads(tmp_path):
    result = demo('--out', 'runs/digits', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    trained, loaded = map(float, re.findall(r'(\d+\.\d+)%\n', result.stdout))
    assert trained >= 97
    assert loaded == trained
    assert 'timm-mrla run train.py' in result.stdout
    assert 'accuracy=' in result.stderr  # the progress bar
    files = sorted(p.name for p in (tmp_path / 'runs' / 'digits').iterdir())
    assert files == ['README.md', 'config.json', 'model.safetensors']
    assert [p.name for p in (tmp_path / 'runs').iterdir()] == ['digits']

    model = timm.create_model(f'local-dir:{tmp_path}/runs/digits', pretrained=True).eval()
    assert timm.data.resolve_model_data_config(model)['input_size'] == (1, 32, 32)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_another_entry(tmp_path):
    result = demo('--model', 'deit_tiny_mrlab', '--epochs', '1', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / 'mrla-digits' / 'config.json').read_text())
    assert config['architecture'] == 'deit_tiny_mrlab'


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--model', 'resnet19_mrla'], "no model 'resnet19_mrla'"),
        (['--epochs', '0'], '0 epochs'),
        (['--out', 'taken'], "'taken' exists"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(args, message, tmp_path):
    (tmp_path / 'taken').mkdir()
    result = demo(*args, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert [p.name for p in tmp_path.rglob('*')] == ['taken']


@pytest.mark.parametrize('module', ['sklearn', 'tqdm'])
def test_a_missing_extra_is_named(module, tmp_path):
    code = f"""
import sys
sys.modules[{module!r}] = None  # as if it were not installed
sys.argv = ['timm-mrla', 'demo']
from timm_mrla.cli import main
main()
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f'needs {module}' in line
    assert "pip install 'timm-mrla[demo]'" in line
