"""Tests of `timm-mrla convert`: it turns checkpoints of the authors' and timm's scripts into folders for timm."""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from slow import slow_except
from test_parity import MODELS, reference
from test_parity import convert as converted
from timm.layers import resample_abs_pos_embed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.optim.swa_utils import AveragedModel

from timm_mrla.cli import main
from timm_mrla.hub import load_checkpoint


@pytest.fixture
def convert(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns the last line of stderr if it fails."""
    monkeypatch.chdir(tmp_path)

    def command(*args):
        monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'convert', *args])
        before = {path.name for path in tmp_path.iterdir()}
        try:
            main()
        except SystemExit as e:
            assert e.code == 2
            assert {path.name for path in tmp_path.iterdir()} == before
            return capsys.readouterr().err.splitlines()[-1]
        return None

    return command


def wrap(wrapper, state_dict):
    """Checkpoints in the formats of torch's, DeiT's and timm's scripts; averaged weights take precedence."""
    ddp = {f'module.{k}': v for k, v in state_dict.items()}
    stale = {k: torch.zeros_like(v) for k, v in ddp.items()}
    beside = {'epoch': 99, 'arch': 'x', 'optimizer': {'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': []}}
    return {
        'bare': state_dict,
        'torch': {'state_dict': ddp, 'best_acc1': torch.tensor(77.7), **beside},
        'deit': {'model': stale, 'model_ema': ddp, 'args': argparse.Namespace(lr=0.1), **beside},
        'timm': {'state_dict': stale, 'state_dict_ema': ddp, 'args': argparse.Namespace(lr=0.1), **beside},
    }[wrapper]


SCRIPTS = dict(zip(MODELS, ['torch', 'torch', 'deit', 'timm', 'bare', 'deit', 'timm'], strict=True))


@pytest.mark.parametrize(
    'name', slow_except(['deit_mrlal_tiny_patch16_224', 'deit_mrlab_tiny_patch16_224', 'efficientnet_mrla_b0'], MODELS)
)
def test_checkpoints_of_the_authors(name, convert):
    _, state_dict, _ = reference(name)
    entry = MODELS[name]
    torch.save(wrap(SCRIPTS[name], state_dict), 'checkpoint.pth')
    size = ['--model-kwargs', 'img_size=224'] if 'pos_embed' in state_dict else []
    assert convert('checkpoint.pth', '--model', entry, '--out', 'models/out', *size) is None
    assert os.listdir('models') == ['out']
    assert sorted(os.listdir('models/out')) == ['README.md', 'config.json', 'model.safetensors']
    model = timm.create_model('local-dir:models/out', pretrained=True)
    for key, tensor in converted(entry, state_dict, model).items():
        assert torch.equal(model.state_dict()[key], tensor)


@pytest.mark.slow
def test_the_command(tmp_path):
    """With another number of classes and another image size, as in the documentation."""
    model = timm.create_model('deit_tiny_mrla', num_classes=7, img_size=(64, 96), in_chans=1).eval()
    torch.save(model.state_dict(), tmp_path / 'last.pth.tar')
    command = [sys.executable, '-m', 'timm_mrla', 'convert', 'last.pth.tar', '--model', 'deit_tiny_mrla']
    options = ['--out', 'out', '--model-kwargs', 'img_size=(64,96)', 'in_chans=1', '--license', 'mit']
    result = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("deit_tiny_mrla with 7 classes: timm.create_model('local-dir:out', pretrained=True)\n")
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['requires'] == ['timm_mrla']
    assert ModelCard.load(tmp_path / 'out' / 'README.md').data.license == 'mit'
    x = torch.randn(1, 1, 64, 96)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).eval()(x), model(x))


def test_no_licence_is_claimed_that_nobody_gave(convert):
    torch.save(timm.create_model('resnet18_mrla').state_dict(), 'last.pth')
    assert convert('last.pth', '--model', 'resnet18_mrla', '--out', 'out') is None
    assert ModelCard.load('out/README.md').data.license is None
    assert 'license' not in json.loads(Path('out/config.json').read_text())['pretrained_cfg']


def test_what_does_not_fit_is_named_and_nothing_is_written(convert):
    state_dict = timm.create_model('resnet18_mrla').state_dict()
    torch.save(state_dict, 'resnet18.pth')
    lam = state_dict.pop('layer1.0.mrla.lam')
    torch.save({**state_dict, 'layer1.0.mrla.lam': lam[:3], 'lost': lam}, 'odd.pth')
    torch.save(timm.create_model('deit_tiny_mrla', img_size=64).state_dict(), 'deit64.pth')
    torch.save(timm.create_model('resnet18').state_dict(), 'plain.pth')

    message = convert('odd.pth', '--model', 'resnet18_mrla', '--out', 'out')
    assert message == (
        "timm-mrla: 'odd.pth' does not fit: the model has no lost; "
        'its layer1.0.mrla.lam is (3,) and the model has (64,)'
    )
    message = convert('resnet18.pth', '--model', 'resnet34_mrla', '--out', 'out')
    assert 'lacks layer1.2.conv1.weight' in message
    message = convert('deit64.pth', '--model', 'deit_tiny_mrla', '--out', 'out', '--model-kwargs', 'img_size=224')
    assert 'pos_embed is (1, 17, 192) and not (1, 197, 192); give the img_size' in message
    message = convert('plain.pth', '--model', 'resnet18_mrla', '--out', 'out')
    assert 'lacks layer1.0.mrla.lam' in message and 'add the tag of a warm start' in message
    warm = 'resnet18_mrla.warmstart_a1_in1k'
    assert 'train it first' in convert('plain.pth', '--model', warm, '--out', 'out')


WRAPPERS = [
    '',
    'model.',
    'net.backbone.',
    '_orig_mod.',
    'module._orig_mod.',
    '_orig_mod.module.',
    'model._orig_mod.module.',
]


@pytest.mark.parametrize('prefix', WRAPPERS)
@pytest.mark.parametrize('key', ['', 'state_dict', 'model', 'model_ema', 'state_dict_ema'])
def test_a_prefix_that_all_names_have_is_dropped(prefix, key, tmp_path):
    narrow = {'channels': (32, 32, 64, 64)}
    state_dict = timm.create_model('resnet18_mrla', num_classes=2, **narrow).state_dict()
    wrapped = {f'{prefix}{name}': tensor for name, tensor in state_dict.items()}
    torch.save({key: wrapped, 'epoch': 3} if key else wrapped, tmp_path / 'last.pth')
    loaded = load_checkpoint(str(tmp_path / 'last.pth'), 'resnet18_mrla', **narrow).state_dict()
    assert [*loaded] == [*state_dict]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state_dict.items())


def test_names_that_wrappers_have_inside(tmp_path):
    model = timm.create_model('resnet18_mrla', num_classes=2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_activation_checkpointing(model, check_fn=lambda module: hasattr(module, 'mrla'))
    model.layer3 = torch.compile(model.layer3)
    torch.save(AveragedModel(model).state_dict(), tmp_path / 'last.pth')
    loaded = load_checkpoint(str(tmp_path / 'last.pth'), 'resnet18_mrla').state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_prefix_that_not_all_names_have(convert):
    """Like a Lightning checkpoint in which the loss has parameters, too."""
    state_dict = timm.create_model('resnet18_mrla').state_dict()
    torch.save({'loss.scale': torch.ones(1), **{f'model.{k}': v for k, v in state_dict.items()}}, 'last.ckpt')
    message = convert('last.ckpt', '--model', 'resnet18_mrla', '--out', 'out')
    assert 'the model has no loss.scale, model.conv1.weight, ' in message
    assert message.endswith('no name fits: a prefix is dropped only if all names have it')


def test_the_grid_of_a_position_embedding_is_told(convert):
    """7 x 28 patches of 16 pixels are as many as 14 x 14, the entry's own, and 8 x 32 of 14 as many as 16 x 16."""
    for name in ('deit_tiny_mrla', 'vit_tiny_patch16_224_mrla', 'ceit_tiny_mrla', 'eva02_tiny_patch14_224_mrla'):
        size = (112, 448)
        model = timm.create_model(name, img_size=size, num_classes=2, depth=2).eval()
        torch.save(model.state_dict(), 'last.pth')
        assert 'give the img_size' in convert('last.pth', '--model', name, '--out', 'out')
        kwargs = ['--model-kwargs', f'img_size={size}'.replace(' ', ''), 'depth=2']
        assert convert('last.pth', '--model', name, '--out', name, *kwargs) is None
        x = torch.randn(1, 3, *size)
        assert torch.equal(timm.create_model(f'local-dir:{name}', pretrained=True).eval()(x), model(x))
        other = timm.create_model(f'local-dir:{name}', pretrained=True, img_size=224)
        grid, embed = model.patch_embed.grid_size, model.pos_embed
        expected = resample_abs_pos_embed(embed, other.patch_embed.grid_size, grid, model.num_prefix_tokens)
        assert torch.equal(other.pos_embed, expected) and expected.shape == embed.shape


class Pickle:
    def __reduce__(self):
        return open, ('ran', 'w')


def test_what_is_no_checkpoint_is_not_run(convert):
    torch.save({'state_dict': timm.create_model('resnet18_mrla').state_dict(), 'more': Pickle()}, 'pickle.pth')
    Path('text.pth').write_text('hello')
    Path('empty.safetensors').write_bytes(b'')
    Path('cut.pth').write_bytes(Path('pickle.pth').read_bytes()[:100_000])
    torch.save([torch.zeros(1)], 'list.pth')
    torch.save({'state_dict': {'epoch': 3}}, 'number.pth')
    torch.save({}, 'nothing.pth')
    Path('empty.pth').touch()
    for name in (
        'empty.pth',
        'nothing.pth',
        'pickle.pth',
        'text.pth',
        'empty.safetensors',
        'cut.pth',
        'list.pth',
        'number.pth',
        'none.pth',
    ):
        message = convert(name, '--model', 'resnet18_mrla', '--out', 'out')
        assert f"'{name}'" in message, message
        assert 'pretrained' not in message
    assert 'open' in convert('pickle.pth', '--model', 'resnet18_mrla', '--out', 'out')
    assert not Path('ran').exists()


def test_mistakes_in_the_command(convert):
    torch.save(timm.create_model('resnet18_mrla').state_dict(), 'last.pth')
    os.mkdir('taken')
    assert "'taken' exists" in convert('last.pth', '--model', 'resnet18_mrla', '--out', 'taken')
    assert "no model 'resnet19_mrla'" in convert('last.pth', '--model', 'resnet19_mrla', '--out', 'out')
    # these fail before the checkpoint is read
    Path('text.pth').write_text('hello')
    assert "'last.pth/out' cannot be made" in convert('text.pth', '--model', 'resnet18_mrla', '--out', 'last.pth/out')
    assert "'resnet18' is no model of timm-mrla" in convert('text.pth', '--model', 'resnet18', '--out', 'out')
    assert 'dataset' in convert('text.pth', '--model', 'resnet18_mrla', '--out', 'out', '--metric', 'accuracy=0.7')
    assert 'foo' in convert('last.pth', '--model', 'resnet18_mrla.foo', '--out', 'out')
    assert 'foo' in convert('last.pth', '--model', 'resnet18_mrla', '--out', 'out', '--model-kwargs', 'foo=1')
    assert 'the name of the folder is empty' in convert('last.pth', '--model', 'resnet18_mrla', '--out', '')
    assert 'name=value' in convert('last.pth', '--model', 'resnet18_mrla', '--out', 'out', '--model-kwargs', 'foo')


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('features_only=True', 'a feature extractor has no classifier: save the whole model'),
        ('block=foo', "resnet18_mrla cannot be built with {'block': 'foo', "),
        ('norm_layer=abc', "resnet18_mrla cannot be built with {'norm_layer': 'abc', "),
        ('act_layer=abc', "resnet18_mrla cannot be built with {'act_layer': 'abc', "),
        ('model_name=abc', "resnet18_mrla cannot be built with {'model_name': 'abc', "),
        ('checkpoint_path=list.pth', "resnet18_mrla cannot be built with {'checkpoint_path': 'list.pth', "),
        ('checkpoint_path=missing.pth', "resnet18_mrla cannot be built with {'checkpoint_path': 'missing.pth', "),
    ],
)
def test_arguments_that_do_not_fit_the_model(argument, message, convert):
    narrow = {'channels': (8, 8, 8, 8)}
    torch.save(timm.create_model('resnet18_mrla', **narrow).state_dict(), 'last.pth')
    torch.save([torch.zeros(1)], 'list.pth')
    command = ['last.pth', '--model', 'resnet18_mrla', '--out', 'out', '--model-kwargs', argument]
    # arguments may be given in parts
    assert message in convert(*command, '--model-kwargs', 'channels=(8,8,8,8)')


def test_a_traceback_if_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, 'argv', ['timm-mrla', '--traceback', 'convert', '', '--model', 'resnet18_mrla', '--out', 'o']
    )
    with pytest.raises(ValueError, match="no checkpoint ''"):
        main()
    assert capsys.readouterr().err == ''


def test_values_that_are_not_finite_are_told(convert):
    state_dict = timm.create_model('resnet18_mrla').state_dict()
    state_dict['layer2.0.conv1.weight'][3, 5, 1, 1] = float('nan')
    state_dict['layer3.0.bn1.bias'][0] = float('inf')
    torch.save(state_dict, 'last.pth')
    with pytest.warns(UserWarning, match=r"'last\.pth' has values in layer2\.0\.conv1\.weight that are not finite"):
        convert('last.pth', '--model', 'resnet18_mrla', '--out', 'out')


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """A limit on the file size simulates it."""
    torch.save(timm.create_model('resnet18_mrla').state_dict(), tmp_path / 'last.pth')
    command = [sys.executable, '-m', 'timm_mrla', 'convert', 'last.pth', '--model', 'resnet18_mrla', '--out', 'out']
    result = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert result.returncode == 2, result.stderr
    assert "'out' cannot be written: " in result.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ['last.pth']
