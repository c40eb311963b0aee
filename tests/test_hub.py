"""Tests of models on the Hugging Face Hub: loading, publishing and errors, with the server of tests/hub.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from ast import literal_eval

import huggingface_hub.constants as constants
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from slow import slow, slow_except
from test_timm import OF_THE_PAPER
from timm.layers import to_ntuple
from timm.models import save_for_hf
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from timm_mrla.cli import main
from timm_mrla.hub import model_card, push_to_hub, save_pretrained

REPO = 'user/model.in1k'


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def run(*args, env, **kwargs):
    command, env = [sys.executable, *map(str, args)], {**os.environ, **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, **kwargs)


def push(*args, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'push', *map(str, args)])
    main()


def cached_files(hub):
    return sorted(path.name for path in hub.cache.glob('models--*/snapshots/*/*'))


@pytest.mark.parametrize('name', slow_except(['resnet18_mrlab', 'deit_tiny_mrla', 'ceit_tiny_mrla'], OF_THE_PAPER))
def test_arguments_that_timm_has_for_pretrained_models(name, hub, tmp_path):
    fixed = timm.models.get_pretrained_cfg(name).fixed_input_size
    model = create(name, num_classes=7, **({'img_size': 64} if fixed else {}))
    save_pretrained(model, tmp_path / 'model')
    hub.add(REPO, tmp_path / 'model')
    x = torch.randn(1, 3, 64, 64)
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(x), model(x))

    source = f'local-dir:{tmp_path}/model'
    adapted = timm.create_model(
        source, pretrained=True, num_classes=3, in_chans=1, **({'img_size': 48} if fixed else {})
    )
    assert adapted.eval()(x[:, :1, :48, :48]).shape == (1, 3)
    theirs = model.state_dict()
    changed = {
        k for k, v in adapted.state_dict().items() if not (v.shape == theirs[k].shape and torch.equal(v, theirs[k]))
    }
    replaced = {*to_ntuple(1)(model.pretrained_cfg['classifier']), model.pretrained_cfg['first_conv'], 'pos_embed'}
    assert {k for k in changed if k not in replaced and k.rpartition('.')[0] not in replaced} == set()

    features = timm.create_model(f'hf-hub:{REPO}', pretrained=True, features_only=True).eval()
    expected, indices = model.forward_intermediates(x, intermediates_only=True), features.feature_info.out_indices
    assert all(torch.equal(y, expected[i]) for y, i in zip(features(x), indices, strict=True))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: hasattr(module, 'mrla'))
    return model


def with_a_compiled_stage(model):
    model.layer2 = torch.compile(model.layer2)
    return model


@pytest.mark.parametrize(
    'wrap',
    [
        lambda model: model.to(memory_format=torch.channels_last),
        torch.compile,
        slow(with_a_compiled_stage),
        ModelEmaV3,
        slow(AveragedModel),
        DistributedDataParallel,
        slow(lambda model: torch.compile(DistributedDataParallel(model))),
        slow(lambda model: DistributedDataParallel(torch.compile(model))),
        slow(lambda model: ModelEmaV3(torch.compile(model))),
        lambda model: fully_shard(model, mesh=torch.distributed.init_device_mesh('cpu', (1,))),
        checkpointed,
    ],
    ids=[
        'channels_last',
        'compile',
        'stage',
        'EMA',
        'SWA',
        'DDP',
        'compile DDP',
        'DDP compile',
        'EMA compile',
        'FSDP2',
        'AC',
    ],
)
def test_what_is_wrapped_around_a_model_is_seen_through(wrap, process_group, hub, tmp_path):
    """The written files are byte-identical to those of the unwrapped model."""
    model, x = create('resnet18_mrla', num_classes=2), torch.randn(1, 3, 64, 64)
    expected = model(x)
    save_pretrained(model, tmp_path / 'plain')
    wrapped = wrap(model)
    before = {name: (tensor.stride(), tensor.data_ptr()) for name, tensor in wrapped.state_dict().items()}
    modules = [*wrapped.named_modules()]
    save_pretrained(wrapped, tmp_path / 'model')
    assert push_to_hub(wrapped, REPO) == f'{hub.url}/{REPO}'
    assert [*wrapped.named_modules()] == modules
    assert {name: (t.stride(), t.data_ptr()) for name, t in wrapped.state_dict().items()} == before
    for file in ('config.json', 'model.safetensors'):
        assert (tmp_path / 'model' / file).read_bytes() == (tmp_path / 'plain' / file).read_bytes()
    for name in (f'local-dir:{tmp_path}/model', f'hf-hub:{REPO}'):
        assert torch.equal(timm.create_model(name, pretrained=True).eval()(x), expected)


def test_revisions(hub, tmp_path):
    for i in range(2):
        torch.manual_seed(i)
        model = timm.create_model('resnet18_mrla', num_classes=2)
        save_pretrained(model, tmp_path / str(i))
        hub.add(REPO, tmp_path / str(i))
    first, latest = (
        timm.create_model(f'hf-hub:{REPO}{at}', pretrained=True).fc.weight
        for at in ('@' + hub.find(REPO, '0001')[1], '')
    )
    assert torch.equal(latest, model.fc.weight)
    assert not torch.equal(first, latest)


@pytest.mark.slow
def test_push_and_load_in_fresh_processes(hub, tmp_path):
    model = create('deit_tiny_mrlab', num_classes=5, img_size=64)
    torch.save({'state_dict': model.state_dict(), 'epoch': 3}, tmp_path / 'last.pth.tar')
    command = ['-m', 'timm_mrla', 'push', 'last.pth.tar', REPO, '--model', 'deit_tiny_mrlab']
    options = ['--model-kwargs', 'img_size=64', '--license', 'mit', '--dataset', 'imagenet-1k', 'user/more']
    options += ['--base-model', 'timm/deit_tiny_patch16_224.fb_in1k', '--metric', 'accuracy=0.712']
    result = run(*command, *options, cwd=tmp_path, env=hub.env)
    assert (result.returncode, result.stdout) == (0, f'{hub.url}/{REPO}\n'), result.stderr

    files = hub.repos[REPO][-1]
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    config = json.loads(files['config.json'])
    assert config['requires'] == ['timm_mrla']
    assert config['architecture'] == 'deit_tiny_mrlab'
    card = ModelCard(files['README.md'].decode())
    assert (card.data.library_name, card.data.license) == ('timm', 'mit')
    assert card.data.datasets == ['imagenet-1k', 'user/more']
    assert card.data.base_model == 'timm/deit_tiny_patch16_224.fb_in1k'
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ('imagenet-1k', 'accuracy', 0.712)
    assert {'timm', 'image-classification'} <= set(card.data.tags)

    # the code of the model card, online and then offline, in processes that import nothing else
    Image.new('RGB', (80, 80), 'red').save(tmp_path / 'image.jpg')
    (code,) = re.findall('```python\n(.*?)```', card.content, flags=re.DOTALL)
    code += 'print(probabilities.tolist())'
    online, offline = (
        run('-c', code, cwd=tmp_path, env={**hub.env, 'HF_HUB_OFFLINE': offline}) for offline in ('0', '1')
    )
    assert online.returncode == 0, online.stderr
    assert offline.stdout == online.stdout
    config = timm.data.resolve_model_data_config(timm.create_model(f'hf-hub:{REPO}'))
    image = timm.data.create_transform(**config)(Image.open(tmp_path / 'image.jpg'))
    with torch.inference_mode():
        expected = model(image.unsqueeze(0)).softmax(dim=1)
    torch.testing.assert_close(torch.tensor(json.loads(online.stdout)), expected)


def test_push_of_a_folder_brings_its_card_once(hub, tmp_path, monkeypatch):
    model = create('resnet18_mrla', num_classes=2)
    folder = tmp_path / 'model'
    save_pretrained(model, folder, model_card(model, f'local-dir:{folder}', license='mit'))
    with open(folder / 'README.md', 'a') as f:
        f.write('Trained on my own photographs.\n')
    push(folder, REPO, monkeypatch=monkeypatch)
    card = hub.repos[REPO][-1]['README.md'].decode()
    assert 'license: mit' in card
    assert 'Trained on my own photographs.' in card
    assert f"create_model('hf-hub:{REPO}'" in card
    assert 'local-dir' not in card

    hub.commit(REPO, {'README.md': b'edited on the Hub'})
    push_to_hub(create('resnet18_mrla', num_classes=3), REPO, commit_message='More classes')
    assert hub.repos[REPO][-1]['README.md'] == b'edited on the Hub'
    assert timm.create_model(f'hf-hub:{REPO}', pretrained=True).num_classes == 3


@pytest.mark.parametrize('channels', [1, 3, 5])
def test_the_code_of_a_card_prepares_images_for_the_model(channels, tmp_path, monkeypatch):
    """It has the model's own channels and size, and runs with any name of a folder."""
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (80, 60), 'red').save('image.jpg')
    folder = """it's "mine" """
    model = create('deit_tiny_mrla', img_size=(32, 48), depth=1, in_chans=channels, num_classes=2)
    save_pretrained(model, folder)
    (code,) = re.findall('```python\n(.*?)```', ModelCard.load(f'{folder}/README.md').content, flags=re.DOTALL)
    exec(code, names := {})
    assert names['probabilities'].shape == (1, 2)


def test_push_of_a_folder_whose_name_has_quotes(hub, tmp_path, monkeypatch):
    folder = tmp_path / """it's "mine" """
    save_pretrained(create('resnet18_mrla', num_classes=2), folder)
    push(folder, REPO, monkeypatch=monkeypatch)
    card = hub.repos[REPO][-1]['README.md'].decode()
    assert f"timm.create_model('hf-hub:{REPO}', pretrained=True)" in card
    assert 'local-dir' not in card


@pytest.mark.parametrize('name', ['resnet18_mrla', 'resnet18_mrlab', 'convnext_atto_mrla', 'deit_tiny_distilled_mrla'])
def test_what_a_card_says_of_the_layers(name):
    """Its module names and parameter counts are right, and its layer for Grad-CAM maps a tensor to a tensor."""
    model = create(name)
    said = model_card(model, f'hf-hub:{REPO}').content
    shown, count = (int(n.replace(',', '')) for n in re.search(r'([\d,]+) of ([\d,]+) parameters', said).groups())
    assert count == sum(p.numel() for p in model.parameters())
    assert shown == sum(p.numel() for n, p in model.named_parameters() if '.mrla.' in n)

    saved = literal_eval(re.search(r'modules_to_save=(\[.*?\])', said)[1])
    trained = {n for n, _ in model.named_modules() if any(n.endswith(end) for end in saved)}
    assert {n for n, _ in model.named_modules() if n.endswith('.mrla')} < trained
    assert trained & {n for n, m in model.named_modules() if m in to_ntuple(1)(model.get_classifier())}

    kernels = {int(dim): int(k) for k, dim in re.findall(r'(\d+) at (\d+)[,.]', said)}
    weights = model.state_dict()
    v = {n.removesuffix('.v.weight'): len(w) for n, w in weights.items() if n.endswith('.mrla.v.weight')}
    assert kernels == {dim: weights[f'{layer}.attn.qk.weight'].shape[-1] for layer, dim in v.items()}

    outputs, targets = [], re.findall(r"get_submodule\('(.*?)'\)", said)
    for target in targets:
        model.get_submodule(target).register_forward_hook(lambda module, args, output: outputs.append((args, output)))
    model(torch.randn(1, *model.pretrained_cfg['input_size']))
    assert all(output.shape == args[0].shape for args, output in outputs)
    assert len(outputs) == (name != 'resnet18_mrlab')


def test_a_reparameterized_model_is_refused(tmp_path):
    model = reparameterize_model(create('resnet18_mrla'))
    with pytest.raises(ValueError, match='save the one that it was made from'):
        save_pretrained(model, tmp_path / 'model')
    with pytest.raises(ValueError, match="'resnet18' is no model of timm-mrla"):
        push_to_hub(create('resnet18'), REPO)
    assert not [*tmp_path.iterdir()]


def test_a_folder_of_timms_own_is_pushed_without_its_pickle(hub, tmp_path, monkeypatch):
    model = create('resnet18_mrla', num_classes=2)
    save_for_hf(model, tmp_path / 'model')
    assert [path.name for path in (tmp_path / 'model').glob('*.bin')]
    push(tmp_path / 'model', REPO, monkeypatch=monkeypatch)
    assert sorted(hub.repos[REPO][-1]) == ['README.md', 'config.json', 'model.safetensors']
    assert torch.equal(timm.create_model(f'hf-hub:{REPO}', pretrained=True).fc.weight, model.fc.weight)


def test_what_cannot_be_pushed(hub, tmp_path, monkeypatch, capsys):
    def refusal(*args):
        with pytest.raises(SystemExit) as e:
            push(*args, monkeypatch=monkeypatch)
        assert e.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    folder = tmp_path / 'model'
    save_pretrained(create('resnet18_mrla', num_classes=2), folder)
    assert "'user/model'" in refusal('nowhere.pth', 'model', '--model', 'resnet18_mrla')
    assert "'user/a b'" in refusal('nowhere.pth', 'user/a b', '--model', 'resnet18_mrla')
    assert "'resnet18' is no model of timm-mrla" in refusal('nowhere.pth', REPO, '--model', 'resnet18')
    assert 'dataset' in refusal('nowhere.pth', REPO, '--model', 'resnet18_mrla', '--metric', 'accuracy=0.7')
    assert 'holds no model' in refusal(tmp_path, REPO)
    assert 'leave out --model' in refusal(folder, REPO, '--model', 'resnet34_mrla')
    assert 'leave out --model' in refusal(folder, REPO, '--model-kwargs', 'in_chans=1')
    assert 'README.md: write its licence' in refusal(folder, REPO, '--license', 'mit')
    for name, file, content in (
        ('torn', 'model.safetensors', (folder / 'model.safetensors').read_bytes()[:5000]),
        ('string', 'config.json', b'"resnet18_mrla"'),
        ('json', 'config.json', b'{"architecture": '),
        ('card', 'README.md', b'---\nlicense: [mit\n---\n'),
    ):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / file).write_bytes(content)
        assert str(tmp_path / name) in refusal(tmp_path / name, REPO)
    assert '--model NAME' in refusal(folder / 'model.safetensors', REPO)
    save_for_hf(create('resnet18', num_classes=2), tmp_path / 'plain', safe_serialization=True)
    assert "'resnet18' is no model of timm-mrla" in refusal(tmp_path / 'plain', REPO)
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    assert re.search(f'{REPO} cannot be pushed: .*401', refusal(folder, REPO))
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    assert f'{REPO} cannot be pushed: ' in refusal(folder, REPO)
    assert not hub.repos


def weights(**kwargs):
    model = create('resnet18_mrla', num_classes=2)
    return {**model.state_dict(), **kwargs}


@pytest.mark.parametrize(
    ('tensors', 'message'),
    [
        (b'\xff' * 64, 'deserializing header'),
        (weights(**{'layer1.0.mrla.lam': torch.zeros(3)}), r'layer1.0.mrla.lam is \(3,\) and the model has \(64,\)'),
        ({k: v for k, v in weights().items() if '.mrla.' not in k}, 'lacks layer1.0.mrla.lam'),
        ({k: v for k, v in weights().items() if k != 'layer3.1.mrla.lam'}, 'lacks layer3.1.mrla.lam'),
        (weights(more=torch.zeros(1)), 'the model has no more'),
    ],
    ids=['corrupt header', 'wrong shape', 'plain backbone', 'partial', 'unknown key'],
)
@pytest.mark.parametrize('num_classes', slow_except([3], [2, 3]))
def test_weights_that_do_not_fit(tensors, message, num_classes, hub, tmp_path):
    """Also with another number of classes, where timm loads with strict=False."""
    save_pretrained(create('resnet18_mrla', num_classes=2), tmp_path / 'model')
    hub.add(REPO, tmp_path / 'model')
    hub.commit(REPO, {'model.safetensors': tensors if isinstance(tensors, bytes) else safetensors.torch.save(tensors)})
    with pytest.raises(RuntimeError, match=f'resnet18_mrla cannot be loaded from {REPO}: .*{message}'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True, num_classes=num_classes)
    hub.add(REPO, tmp_path / 'model')  # after a corrected upload, loading works
    assert timm.create_model(f'hf-hub:{REPO}', pretrained=True, num_classes=num_classes).num_classes == num_classes


def test_what_the_hub_does_not_give(hub, tmp_path):
    save_pretrained(create('resnet18_mrla', num_classes=2), tmp_path / 'model')
    hub.add(REPO, tmp_path / 'model')

    def message(name, error):
        with pytest.raises(error) as e:
            timm.create_model(name, pretrained=True)
        return str(e.value)

    assert 'user/none' in message('hf-hub:user/none', OSError)
    assert f'{REPO}/resolve/0007' in message(f'hf-hub:{REPO}@0007', OSError)
    hub.gated.add(REPO)
    assert f'Access to model {REPO} is restricted' in message(f'hf-hub:{REPO}', OSError)
    hub.gated.clear()
    hub.truncated.add('model.safetensors')
    assert re.search(f'{REPO}.*should be of size', message(f'hf-hub:{REPO}', RuntimeError))
    hub.truncated.clear()
    assert cached_files(hub) == ['config.json']
    hub.commit(REPO, {'model.safetensors': b'', 'pytorch_model.bin': b'a pickle'})
    del hub.repos[REPO][-1]['model.safetensors']
    hub.requests.clear()
    assert re.search(f'{REPO}/resolve/main/model.safetensors', message(f'hf-hub:{REPO}', OSError))
    assert not [request for request in hub.requests if 'pytorch_model' in request]
    hub.add(REPO, tmp_path / 'model')
    assert timm.create_model(f'hf-hub:{REPO}', pretrained=True).num_classes == 2
