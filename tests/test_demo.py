"""Tests of the demo as a command line."""

import json
import re
import resource
import signal
import subprocess
import sys

import pytest
import timm
import torch
from torch.nn.modules.module import register_module_forward_hook

from timm_mrla.cli import main


def demo(*args, cwd):
    return subprocess.run([sys.executable, '-m', 'timm_mrla', 'demo', *args], cwd=cwd, capture_output=True, text=True)


def refusal(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'demo', *args])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.slow
def test_it_learns_writes_and_loads(tmp_path):
    result = demo('--out', 'runs/digits', '--epochs', '4', cwd=tmp_path)
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


@pytest.mark.slow
def test_another_entry(tmp_path):
    result = demo('--model', 'deit_tiny_mrlab', '--epochs', '1', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / 'mrla-digits' / 'config.json').read_text())
    assert config['architecture'] == 'deit_tiny_mrlab'


@pytest.mark.slow
def test_a_full_disk(tmp_path, monkeypatch, capsys):
    """A limit on the file size simulates it."""
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'demo', '--out', 'digits', '--epochs', '1'])
        with pytest.raises(SystemExit) as e:
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.code == 2
    assert "'digits' cannot be written: " in capsys.readouterr().err.splitlines()[-1]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--model', 'resnet19_mrla'], "no model 'resnet19_mrla'"),
        (['--epochs', '0'], '0 epochs'),
        (['--out', 'taken'], "'taken' exists"),
        (['--out', 'file/out'], "'file/out' cannot be made"),
        (['--model', 'resnet18'], "'resnet18' is no model of timm-mrla"),
        (['--model', 'maxvit_tiny_tf_224_mrla'], "maxvit_tiny_tf_224_mrla cannot be built with {'in_chans': 1, "),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(args, message, tmp_path, monkeypatch, capsys):
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'file').touch()
    monkeypatch.chdir(tmp_path)
    assert message in refusal(args, monkeypatch, capsys)
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['file', 'taken']


@pytest.mark.parametrize('module', ['sklearn', 'tqdm'])
def test_a_missing_extra_is_named(module, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.partition('.')[0] == module or n == 'timm_mrla.cli.demo']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # simulates that it is not installed
    message = refusal([], monkeypatch, capsys)
    assert f'needs {module}' in message
    assert "pip install 'timm-mrla[demo]'" in message


def test_stopped_it_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """The signal of Ctrl-C comes during the first step of training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'demo', '--out', 'digits', '--epochs', '1'])
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    hook = register_module_forward_hook(lambda *args: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(SystemExit) as exit:
            main()
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, handler)
    assert exit.value.code == 130
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1] == 'timm-mrla: stopped'
    assert 'Traceback' not in printed
    assert not [*tmp_path.iterdir()]
