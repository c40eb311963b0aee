"""Tests of layer attention as an adapter: what trains, what is written, and what is loaded again, with a local Hub."""

import copy
import json

import pytest
import safetensors.torch
import timm
import torch
from hub import add_backbone
from huggingface_hub import ModelCard, constants
from slow import slow
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

import timm_mrla
from timm_mrla.checkpoints import load_checkpoint
from timm_mrla.hub import load_folder, push_to_hub, save_pretrained
from timm_mrla.layers import layer_attentions

TAG, REPO = 'r160_in1k', 'user/adapter'
RESNET, VIT = 'test_resnet_mrla', 'test_vit_mrla'
NAMES = {RESNET: {}, VIT: {'img_size': 64}}
every = pytest.mark.parametrize('name', NAMES)


def create(name, **kwargs):
    args = {'num_classes': 3, **NAMES[name], **kwargs}
    return timm.create_model(f'{name}.warmstart_{TAG}', pretrained=True, mrla_adapter=True, **args)


def train(model, seed=0):
    """Two steps of training; returns the model in evaluation mode."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x, y = torch.randn(4, 3, 64, 64, dtype=next(model.parameters()).dtype), torch.arange(4) % 2
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    return model.eval()


def images(**kwargs):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), **kwargs)


def names_in(folder):
    return {*safetensors.torch.load_file(folder / 'model.safetensors')}


def trained_names(model):
    return {name for name in model.state_dict() if '.mrla.' in name or name.startswith(('fc.', 'head.'))}


@every
def test_from_the_hub_and_from_the_cache(name, hub, tmp_path, monkeypatch):
    add_backbone(hub, name)
    model = train(create(name))
    expected = model(images())
    push_to_hub(model, REPO)
    files = hub.repos[REPO][-1]
    assert {*safetensors.torch.load(files['model.safetensors'])} == trained_names(model)
    assert len(files['model.safetensors']) < 200_000
    card = ModelCard(files['README.md'].decode())
    assert (card.data.base_model, card.data.base_model_relation) == (f'timm/{name[:-5]}.{TAG}', 'adapter')
    assert json.loads(files['config.json'])['model_args']['mrla_adapter'] in card.text

    assert torch.equal(timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()(images()), expected)
    hub.requests.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert torch.equal(timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()(images()), expected)
    assert not hub.requests


@every
def test_what_is_loaded_is_saved_again(name, hub, tmp_path):
    """With other classes, too; the card says once which weights the backbone has."""
    add_backbone(hub, name)
    model = train(create(name))
    save_pretrained(model, tmp_path / 'first')
    loaded, card = load_folder(str(tmp_path / 'first'))
    save_pretrained(loaded, tmp_path / 'second', card)
    for file in ('config.json', 'model.safetensors'):
        assert (tmp_path / 'second' / file).read_bytes() == (tmp_path / 'first' / file).read_bytes()
    assert (tmp_path / 'second' / 'README.md').read_text().count('## Backbone') == 1
    more = timm.create_model(f'local-dir:{tmp_path}/first', pretrained=True, num_classes=5)
    save_pretrained(train(more), tmp_path / 'third')
    again = timm.create_model(f'local-dir:{tmp_path}/third', pretrained=True).eval()
    assert torch.equal(again(images()), more(images()))


def test_another_size_and_other_channels(hub, tmp_path):
    """timm resamples the position embedding and sums up the first convolution, and the fingerprint stays the same."""
    add_backbone(hub, VIT)
    found = []
    for kwargs in ({'img_size': 64}, {'img_size': (96, 64), 'in_chans': 1}):
        model = create(VIT, **kwargs)
        nn.init.normal_(model.blocks[0].mrla.norm_x.weight)
        folder = tmp_path / str(len(found))
        save_pretrained(model.eval(), folder)
        assert names_in(folder) == trained_names(model)
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        x = torch.randn(1, kwargs.get('in_chans', 3), *loaded.patch_embed.img_size)
        assert torch.equal(loaded(x), model(x))
        found.append(json.loads((folder / 'config.json').read_text())['model_args']['mrla_adapter'])
    assert found[0] == found[1]


@every
def test_attached_it_is_the_same_adapter(name, hub, tmp_path):
    add_backbone(hub, name)
    plain = timm.create_model(f'{name[:-5]}.{TAG}', pretrained=True, num_classes=3, **NAMES[name])
    model = train(timm_mrla.attach(plain, blocks=['*.0'], adapter=True))
    save_pretrained(model, tmp_path / 'adapter')
    assert names_in(tmp_path / 'adapter') == trained_names(model)
    loaded = timm.create_model(f'local-dir:{tmp_path}/adapter', pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))
    assert [*layer_attentions(loaded)] == [*layer_attentions(model)]


def test_features_of_an_adapter(hub, tmp_path):
    add_backbone(hub, RESNET)
    model = train(create(RESNET))
    save_pretrained(model, tmp_path / 'adapter')
    features = timm.create_model(f'local-dir:{tmp_path}/adapter', pretrained=True, features_only=True).train()
    assert not any(p.requires_grad for name, p in features.named_parameters() if '.mrla.' not in name)
    before = copy.deepcopy(features.state_dict())
    features(images())
    moved = {name for name, tensor in features.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all('.mrla.' in name for name in moved)
    *_, last = features.load_state_dict(before) and features.eval()(images())
    assert torch.equal(last, model.forward_features(images()))


def test_what_is_unfrozen_trains_and_is_saved(hub, tmp_path, caplog):
    add_backbone(hub, RESNET)
    model = create(RESNET)
    model.layer4.requires_grad_()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    before = copy.deepcopy(model.state_dict())
    train(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert names <= changed
    assert {n.partition('.')[0] for n in changed if '.mrla.' not in n} == {'layer4', 'fc'}

    # its running statistics moved, too, so the whole model is written
    save_pretrained(model, tmp_path / 'whole')
    assert 'frozen tensors of its backbone differ from timm/test_resnet.r160_in1k: layer4.' in caplog.text
    assert names_in(tmp_path / 'whole') == {*model.state_dict()}
    loaded = timm.create_model(f'local-dir:{tmp_path}/whole', pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))
    assert not any(p.requires_grad for p in loaded.conv1.parameters())


def test_trained_parameters_are_a_part_of_the_adapter(hub, tmp_path):
    add_backbone(hub, VIT)
    model = create(VIT)
    model.norm.requires_grad_()
    train(model)
    save_pretrained(model, tmp_path / 'adapter')
    assert names_in(tmp_path / 'adapter') == trained_names(model) | {'norm.weight', 'norm.bias'}
    loaded = timm.create_model(f'local-dir:{tmp_path}/adapter', pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))
    with pytest.raises(ValueError, match=r'has no or another norm\.bias, norm\.weight'):
        timm_mrla.load_adapter(create(VIT), f'local-dir:{tmp_path}/adapter')


@pytest.mark.parametrize(
    'build, message',
    [
        (lambda: timm.create_model(VIT, mrla_adapter=True, **NAMES[VIT]), "does not say from which of timm's weights"),
        (
            lambda: timm_mrla.attach(timm.create_model('resnet10t', num_classes=3), adapter=True),
            'the weights that its backbone started from cannot be loaded',
        ),
    ],
    ids=['random weights', 'weights that are not there'],
)
def test_of_any_other_backbone_the_whole_model_is_written(build, message, hub, tmp_path, caplog):
    model = train(build())
    save_pretrained(model, tmp_path / 'whole')
    assert message in caplog.text
    loaded = timm.create_model(f'local-dir:{tmp_path}/whole', pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))


@every
def test_another_backbone_is_refused(name, hub, tmp_path):
    """The sentence names the weights that the adapter was trained on, and those that were found."""
    add_backbone(hub, name)
    save_pretrained(train(create(name)), tmp_path / 'adapter')
    torch.save(add_backbone(hub, name, seed=1).state_dict(), tmp_path / 'other.pth')
    repo = f'timm/{name[:-5]}.{TAG}'
    with pytest.raises(RuntimeError, match=f'trained on the weights {repo}, with the fingerprint .* and {repo} has '):
        timm.create_model(f'local-dir:{tmp_path}/adapter', pretrained=True)
    overlay = {'file': str(tmp_path / 'other.pth')}
    with pytest.raises(RuntimeError, match=f'trained on the weights {repo}, with .* and {overlay["file"]} has '):
        timm.create_model(f'local-dir:{tmp_path}/adapter', pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda tensors: tensors.pop('blocks.3.mrla.lam'), 'it lacks blocks.3.mrla.lam'),
        (lambda tensors: tensors.pop('head.weight'), 'head.weight'),
        (lambda tensors: tensors.update({'blocks.9.mrla.lam': torch.zeros(64)}), 'the model has no blocks.9.mrla.lam'),
        (lambda tensors: tensors.update({'blocks.3.mrla.lam': torch.zeros(3)}), r'its blocks.3.mrla.lam is \(3,\)'),
        (lambda tensors: tensors.clear(), 'it lacks'),
    ],
    ids=['layer attention missing', 'classifier missing', 'unknown', 'shape', 'empty'],
)
def test_a_changed_file_is_refused(change, message, hub, tmp_path):
    add_backbone(hub, VIT)
    save_pretrained(train(create(VIT)), tmp_path / 'adapter')
    tensors = safetensors.torch.load_file(tmp_path / 'adapter' / 'model.safetensors')
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / 'adapter' / 'model.safetensors')
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(f'local-dir:{tmp_path}/adapter', pretrained=True)
    model = create(VIT)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'does not fit|holds no weights'):
        timm_mrla.load_adapter(model, f'local-dir:{tmp_path}/adapter')
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@every
def test_several_adapters_share_a_backbone(name, hub, tmp_path):
    """Exchanged in place, also with other numbers of classes; what does not fit changes nothing."""
    add_backbone(hub, name)
    models = [train(create(name, num_classes=n), seed=n) for n in (3, 5)]
    for i, model in enumerate(models):
        save_pretrained(model, tmp_path / str(i))
    hub.add(REPO, tmp_path / '1')
    other = create(name, num_classes=2)
    backbone = [p.data_ptr() for p in other.parameters() if not p.requires_grad]
    for source, model in ((f'local-dir:{tmp_path}/0', models[0]), (f'hf-hub:{REPO}', models[1])):
        timm_mrla.load_adapter(other, source)
        assert torch.equal(other.eval()(images()), model(images()))
        assert other.num_classes == other.pretrained_cfg['num_classes'] == model.num_classes
        assert all(p.requires_grad for p in other.get_classifier().parameters())
    assert [p.data_ptr() for p in other.parameters() if not p.requires_grad] == backbone
    save_pretrained(other, tmp_path / 'again')
    assert names_in(tmp_path / 'again') == names_in(tmp_path / '1')

    attached = timm.create_model(f'{name[:-5]}.{TAG}', pretrained=True, **NAMES[name])
    timm_mrla.load_adapter(timm_mrla.attach(attached, adapter=True), f'hf-hub:{REPO}')
    assert torch.equal(attached.eval()(images()), models[1](images()))


@pytest.mark.parametrize(
    'build, message',
    [
        (lambda: timm.create_model(RESNET), 'AdapterResNet|ResNet is no adapter: build it with mrla_adapter=True'),
        (lambda: create(VIT), 'is an adapter of test_resnet_mrla .* and the model is test_vit_mrla'),
        (lambda: create(RESNET, in_chans=1), "'in_chans': 3.* and the model is test_resnet_mrla with .*'in_chans': 1"),
        (lambda: create(RESNET, mrla_blocks=['layer1.0']), 'does not fit: .*layer2.0.mrla'),
        (lambda: timm.create_model(RESNET, mrla_adapter=True), "the model's backbone has weights of its own"),
    ],
    ids=['no adapter', 'another model', 'channels', 'blocks', 'random weights'],
)
def test_an_adapter_that_does_not_fit(build, message, hub, tmp_path):
    for name in NAMES:
        add_backbone(hub, name)
    save_pretrained(train(create(RESNET)), tmp_path / 'adapter')
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        timm_mrla.load_adapter(model, f'local-dir:{tmp_path}/adapter')
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match='no model'):
        timm_mrla.load_adapter(create(RESNET), f'local-dir:{tmp_path}/missing')


def test_sync_batch_norm_and_averages_keep_the_backbone(hub):
    plain = add_backbone(hub, RESNET).state_dict()
    model = convert_sync_batchnorm(create(RESNET))
    ema = ModelEmaV3(model, decay=0.5)
    train(model)
    ema.update(model)
    for net in (model, ema.module):
        assert all(torch.equal(v, plain[k]) for k, v in net.state_dict().items() if k in plain and 'fc.' not in k)
    assert not torch.equal(model.layer1[0].mrla.norm.running_mean, torch.zeros(32))


@pytest.mark.parametrize('how', ['checkpointed', 'recomputed', slow('compiled'), 'autocast'])
@every
def test_however_it_is_trained(how, name, hub):
    """Gradients are those of the plain loop, though the first input of a frozen backbone requires none."""
    add_backbone(hub, name)
    model = train(create(name)).train()
    x, grads = images(), []
    for ours in (model, copy.deepcopy(model)):
        forward = ours
        if grads:
            if how == 'checkpointed':
                ours.set_grad_checkpointing()
            elif how == 'recomputed':
                for layer in layer_attentions(ours).values():
                    layer.recompute = True
            elif how == 'compiled':
                forward = torch.compile(ours, backend='aot_eager')
        ours.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
            forward(x).float().square().sum().backward()
        grads.append({k: p.grad for k, p in ours.named_parameters() if p.requires_grad})
        assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_in_bfloat16(hub, tmp_path):
    """Its backbone is compared with the weights in bfloat16."""
    add_backbone(hub, VIT)
    model = train(create(VIT, dtype=torch.bfloat16))
    save_pretrained(model, tmp_path / 'adapter')
    assert names_in(tmp_path / 'adapter') == trained_names(model)


def test_base(hub, tmp_path):
    add_backbone_of = timm.create_model('deit_tiny_patch16_224', depth=3)
    torch.save(add_backbone_of.state_dict(), tmp_path / 'plain.pth')
    overlay = {'file': str(tmp_path / 'plain.pth')}
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    model = timm.create_model('deit_tiny_mrlab.warmstart_fb_in1k', mrla_adapter=True, depth=3, **kwargs)
    x = torch.randn(1, 3, 224, 224)
    nn.functional.mse_loss(model(x), torch.zeros(1, 1000)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    save_pretrained(model.eval(), tmp_path / 'adapter')
    loaded = timm.create_model(f'local-dir:{tmp_path}/adapter', **kwargs).eval()
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match='no gradient passes the ReLU'):
        timm.create_model('resnet18_mrlab', mrla_adapter=True)


def test_a_checkpoint_of_a_training_script(hub, tmp_path):
    """It has the whole model; named by its warm start, it becomes a small file."""
    add_backbone(hub, VIT)
    model = train(create(VIT))
    torch.save({'state_dict': model.state_dict(), 'epoch': 3}, tmp_path / 'last.pth.tar')
    kwargs = dict(mrla_adapter=True, img_size=64)
    loaded = load_checkpoint(str(tmp_path / 'last.pth.tar'), f'{VIT}.warmstart_{TAG}', **kwargs)
    save_pretrained(loaded, tmp_path / 'adapter')
    assert names_in(tmp_path / 'adapter') == trained_names(model)
    assert torch.equal(
        timm.create_model(f'local-dir:{tmp_path}/adapter', pretrained=True).eval()(images()), model(images())
    )
