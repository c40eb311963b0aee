"""Tests of warm starts from timm's plain backbones, with random weights from the server of tests/hub.py."""

import copy
import json
import logging
import pickle

import pytest
import safetensors.torch
import timm
import torch
from entries import backbone
from slow import slow_except
from timm.models import get_pretrained_cfg, group_parameters, save_for_hf
from timm.optim import param_groups_layer_decay

from timm_mrla.hub import push_to_hub, save_pretrained
from timm_mrla.layers import layer_attentions
from timm_mrla.models import BACKBONES

WARM = {
    'resnet18_mrla': 'a1_in1k',
    'deit_tiny_mrla': 'fb_in1k',
    'deit_tiny_mrlab': 'fb_in1k',
    'deit_tiny_distilled_mrla': 'fb_in1k',
    'efficientnet_b0_mrla': 'ra_in1k',
    'pvt_v2_b0_mrla': 'in1k',
    'pvt_v2_b0_mrlab': 'in1k',
}
every = pytest.mark.parametrize(
    'name', slow_except(['resnet18_mrla', 'deit_tiny_mrlab', 'deit_tiny_distilled_mrla'], WARM)
)
LOGGER = 'timm_mrla.models._build'


def randomize(model):
    """Move a model away from its initial values: trivial batch norm statistics, zero biases and norms."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.02 * torch.rand(tensor.shape, generator=generator)
            tensor.copy_(1 + noise if name.endswith('running_var') else tensor + noise)
    return model


def add_backbone(hub, name, state_dict=None):
    """Upload random weights of an entry's plain backbone to timm's repository; returns the backbone."""
    repo = get_pretrained_cfg(f'{name}.warmstart_{WARM[name]}').hf_hub_id
    plain = randomize(timm.create_model(backbone(name)[0])).eval()
    assert repo == f'timm/{backbone(name)[0]}.{WARM[name]}'
    hub.commit(repo, {'model.safetensors': safetensors.torch.save(state_dict or plain.state_dict())})
    return plain


def warm(name, **kwargs):
    return timm.create_model(f'{name}.warmstart_{WARM[name]}', pretrained=True, **kwargs)


@every
def test_it_computes_what_the_backbone_computes(name, hub):
    """Bit-identical in eval and train mode, also with batch norms; the output scales get gradients."""
    plain, model = add_backbone(hub, name), warm(name)
    size = 224 if name.startswith('deit') else 64
    x = torch.randn(2, 3, size, size)
    for mode in (False, True):
        expected, actual = plain.train(mode)(x), model.train(mode)(x)
        assert torch.equal(*(torch.cat(y) if isinstance(y, tuple) else y for y in (expected, actual)))
    theirs = {k: v for k, v in model.state_dict().items() if '.mrla.' not in k}
    assert all(torch.equal(v, theirs[k]) for k, v in plain.state_dict().items())

    (actual if isinstance(actual, torch.Tensor) else torch.cat(actual)).square().sum().backward()
    layers = [*layer_attentions(model).values()]
    # a DeiT's head reads no patch tokens, so the lam of the last block never gets a gradient
    dead = layers[-1].lam if name.startswith('deit') and hasattr(layers[-1], 'lam') else None
    assert all(scale.grad.any() for layer in layers for scale in layer.output_scales() if scale is not dead)


@every
def test_it_can_be_adapted(name, hub):
    plain = add_backbone(hub, name)
    size = {'img_size': 64} if get_pretrained_cfg(name).fixed_input_size else {}
    model = warm(name, num_classes=3, in_chans=1, drop_path_rate=0.1, **size).eval()
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    features = warm(name, features_only=True, **size).eval()
    x = torch.randn(1, 3, 64, 64)
    if not size:
        indices = features.feature_info.out_indices
        expected = plain.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(y, expected[i]) for y, i in zip(features(x), indices, strict=True))


@every
def test_layer_decay_takes_it_for_as_new_as_the_head(name, hub, tmp_path):
    """Saved and loaded as a trained model, it gets the rate of its block, as if trained from scratch."""
    plain, model = add_backbone(hub, name), warm(name)
    for ours in (model, pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        expected, groups = (group_parameters(m, m.group_matcher(), reverse=True) for m in (plain, ours))
        assert {k: v for k, v in groups.items() if '.mrla.' not in k} == expected
        assert {v for k, v in groups.items() if '.mrla.' in k} == {max(expected.values())}
    head = {k for k, v in expected.items() if v == max(expected.values())}
    (no_decay, decay) = param_groups_layer_decay(model, layer_decay=1e-9, no_opt_scale=0.5)
    assert no_decay['lr_scale'] == decay['lr_scale'] == 1
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained == head | {k for k in groups if '.mrla.' in k}

    save_pretrained(randomize(model), tmp_path / 'trained')
    loaded = timm.create_model(f'local-dir:{tmp_path}/trained', pretrained=True)
    fresh = timm.create_model(name)
    expected, groups = (group_parameters(m, m.group_matcher(), reverse=True) for m in (fresh, loaded))
    assert groups == expected
    assert max(v for k, v in groups.items() if '.mrla.' in k) < max(groups.values())


def test_deit_that_pools_its_patches(hub):
    plain = add_backbone(hub, 'deit_tiny_mrla')
    model = warm('deit_tiny_mrla', global_pool='avg', num_classes=3)
    assert torch.equal(model.fc_norm.weight, plain.norm.weight)


@pytest.mark.parametrize('num_classes', slow_except([3], [1000, 3]))
def test_what_is_no_backbone_is_refused_by_name(num_classes, hub):
    def message(state_dict):
        add_backbone(hub, 'resnet18_mrla', state_dict)
        with pytest.raises(RuntimeError, match=r'resnet18_mrla cannot be loaded from timm/resnet18\.a1_in1k: ') as e:
            warm('resnet18_mrla', num_classes=num_classes)
        return str(e.value)

    state_dict = timm.create_model('resnet18').state_dict()
    assert 'it lacks layer3.0.bn1.bias' in message({k: v for k, v in state_dict.items() if k != 'layer3.0.bn1.bias'})
    lam = {'layer1.0.mrla.lam': torch.zeros(64)}
    assert 'it lacks layer1.0.mrla.attn.qk.weight' in message({**state_dict, **lam})
    assert 'the model has no layer9.weight' in message({**state_dict, 'layer9.weight': torch.zeros(1)})


def test_the_plain_entry_takes_no_backbone(hub, tmp_path):
    """A repository that contains only a plain backbone is refused, too, even with the tag of a warm start."""
    plain = add_backbone(hub, 'resnet18_mrla')
    with pytest.raises(RuntimeError, match='No pretrained weights exist for resnet18_mrla'):
        timm.create_model('resnet18_mrla', pretrained=True)
    with pytest.raises(RuntimeError, match=r'lacks layer1\.0\.mrla\.lam'):
        overlay = {'state_dict': plain.state_dict()}
        timm.create_model('resnet18_mrla', pretrained=True, pretrained_cfg_overlay=overlay)
    config = {'architecture': 'resnet18_mrla', 'pretrained_cfg': {'tag': 'warmstart_a1_in1k'}}
    weights = safetensors.torch.save(plain.state_dict())
    hub.commit('user/model', {'config.json': json.dumps(config).encode(), 'model.safetensors': weights})
    with pytest.raises(RuntimeError, match=r'user/model: it lacks layer1\.0\.mrla\.lam'):
        timm.create_model('hf-hub:user/model', pretrained=True)


def test_it_says_once_what_it_is(hub, caplog):
    add_backbone(hub, 'resnet18_mrla')
    with caplog.at_level(logging.WARNING):
        warm('resnet18_mrla')
    (record,) = caplog.records
    assert (record.name, record.levelname) == (LOGGER, 'WARNING')
    assert 'timm/resnet18.a1_in1k' in record.message
    assert 'untrained' in record.message


def test_a_trained_checkpoint_under_the_name_of_a_warm_start(tmp_path, caplog):
    """A user who continues training passes it to train.py like this."""
    trained = timm.create_model('resnet18_mrla')
    torch.save({'state_dict': trained.state_dict()}, tmp_path / 'last.pth.tar')
    overlay = {'file': str(tmp_path / 'last.pth.tar')}
    model = timm.create_model('resnet18_mrla.warmstart_a1_in1k', pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.layer1[0].mrla.norm.weight, trained.layer1[0].mrla.norm.weight)
    assert not caplog.records


def test_no_network(monkeypatch, hub):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match=r'resnet18_mrla cannot be loaded from timm/resnet18\.a1_in1k: .*connection'):
        warm('resnet18_mrla')


def test_what_is_saved_after_training_is_no_warm_start(hub, tmp_path):
    add_backbone(hub, 'resnet18_mrla')
    model = warm('resnet18_mrla', num_classes=2)
    with pytest.raises(ValueError, match='train it first'):
        save_pretrained(model, tmp_path / 'untrained')
    with pytest.raises(ValueError, match='train it first'):
        push_to_hub(model, 'user/model')
    assert not (tmp_path / 'untrained').exists()
    assert 'user/model' not in hub.repos

    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    save_pretrained(model, tmp_path / 'ours')
    save_for_hf(model, tmp_path / 'timms', safe_serialization=True)
    for folder in ('ours', 'timms'):
        text = (tmp_path / folder / 'config.json').read_text()
        assert 'warmstart' not in text
        assert not {'tag', 'description', 'notes'} & set(json.loads(text)['pretrained_cfg'])
        assert json.loads(text)['pretrained_cfg']['crop_pct'] == get_pretrained_cfg('resnet18.a1_in1k').crop_pct


def test_every_configuration():
    """Each tag of a stock entry has a warm start, never as the default; the rest of the configuration is equal."""
    names = timm.list_pretrained('*_mrla*')
    light = {entry: plain for entry, plain in BACKBONES.items() if entry.endswith('_mrla')}
    expected = {
        f'{entry}.warmstart_{tag}'
        for entry, plain in {**light, **{e: BACKBONES[e] for e in WARM if e.endswith('_mrlab')}}.items()
        for tag in (name.partition('.')[2] for name in timm.list_pretrained(f'{plain}.*'))
    }
    assert {name for name in names if name.partition('.')[0] in {*light, *WARM}} == expected
    assert not [name for name in names if name.startswith('resnet') and '_mrlab' in name]
    for name in names:
        cfg = get_pretrained_cfg(name)
        plain = get_pretrained_cfg(f'{BACKBONES[cfg.architecture]}.{cfg.tag.removeprefix("warmstart_")}')
        theirs = {
            k: v for k, v in vars(plain).items() if k not in ('url', 'architecture', 'tag', 'description', 'notes')
        }
        assert theirs == {k: v for k, v in vars(cfg).items() if k in theirs}
        assert bool(cfg.hf_hub_id) != bool(cfg.url)
        assert 'untrained' in cfg.description
        assert f'{plain.architecture}.{plain.tag}' in cfg.notes[0]
        assert not get_pretrained_cfg(cfg.architecture).has_weights


def test_at_another_size(hub):
    """Position embeddings and windows are resampled, as timm does for the backbone."""
    plain = randomize(timm.create_model('swin_tiny_patch4_window7_224', img_size=224))
    repo = 'timm/swin_tiny_patch4_window7_224.ms_in22k_ft_in1k'
    hub.commit(repo, {'model.safetensors': safetensors.torch.save(plain.state_dict())})
    name = 'swin_tiny_patch4_window7_224_mrla.warmstart_ms_in22k_ft_in1k'
    models = [
        timm.create_model(n, pretrained=True, img_size=(112, 160), num_classes=3).eval()
        for n in (name, name.replace('_mrla.warmstart_', '.'))
    ]
    x = torch.randn(1, 3, 112, 160)
    assert torch.equal(*(model.forward_features(x) for model in models))
    assert get_pretrained_cfg(name).license == get_pretrained_cfg(repo.removeprefix('timm/')).license


def test_weights_of_which_timm_knows_that_a_part_is_missing(hub):
    """FCMAE weights have no head; the warm start must load all the same."""
    state_dict = {
        k: v for k, v in timm.create_model('convnextv2_atto').state_dict().items() if not k.startswith('head.')
    }
    hub.commit('timm/convnextv2_atto.fcmae', {'model.safetensors': safetensors.torch.save(state_dict)})
    models = [
        timm.create_model(n, pretrained=True).eval()
        for n in ('convnextv2_atto_mrla.warmstart_fcmae', 'convnextv2_atto.fcmae')
    ]
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(*(model.forward_features(x) for model in models))
    with pytest.raises(RuntimeError, match=r'lacks stages\.0\.blocks\.0\.mrla\.lam'):
        state_dict = {**state_dict, 'stages.0.blocks.0.mrla.v.weight': torch.zeros(40, 1, 3, 3)}
        overlay = {'state_dict': state_dict}
        timm.create_model('convnextv2_atto_mrla.warmstart_fcmae', pretrained=True, pretrained_cfg_overlay=overlay)


def test_what_timm_builds_differently_for_its_weights():
    """With pretrained weights, timm builds FBNet's batch norms with another eps."""
    overlay = {'state_dict': randomize(timm.create_model('fbnetc_100')).state_dict()}
    models = [
        timm.create_model(n, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        for n in ('fbnetc_100_mrla.warmstart_rmsp_in1k', 'fbnetc_100')
    ]
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(*(model(x) for model in models))
    assert models[0].bn1.eps == models[1].bn1.eps == 1e-3
