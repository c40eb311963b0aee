"""Tests of `timm_mrla.attach` and `timm_mrla.sites`. test_contract.py tests attached models of every module."""

import copy
import json
import types
from functools import partial

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.optim.swa_utils import AveragedModel

import timm_mrla
from timm_mrla.hub import save_pretrained
from timm_mrla.layers import MrlaLight, layer_attentions


def train(model, x):
    """One training step, so that layer attention is not an identity."""
    model.train()(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model.eval()


def test_sites_are_a_readable_table():
    sites = timm_mrla.sites(timm.create_model('efficientnet_b1'))
    assert sites[0] == ('blocks.0.0', 'DepthwiseSeparableConv', 16, 'post', 'NCHW', 'in the paper it has none')
    assert sites[3] == ('blocks.1.1', 'InvertedResidual', 24, 'post', 'NCHW', '')
    lines = str(sites).splitlines()
    assert lines[0].split() == ['block', 'class', 'channels', 'form', 'layout']
    assert lines[1].split(maxsplit=2) == ['blocks.0.0', 'DepthwiseSeparableConv', 'none: in the paper it has none']
    assert lines[4].split() == ['blocks.1.1', 'InvertedResidual', '24', 'post', 'NCHW']
    assert len(lines) == 1 + len(sites)
    assert timm_mrla.sites(nn.Linear(2, 2)) == []
    assert timm_mrla.sites(timm_mrla.attach(timm.create_model('efficientnet_b1'))) == sites


def test_a_choice_of_blocks_is_saved_with_the_model(tmp_path):
    model = timm.create_model('convnext_atto', num_classes=3)
    timm_mrla.attach(model, blocks=['stages.2.*', 'stages.[03].blocks.1'])
    names = [f'stages.2.blocks.{i}.mrla' for i in range(6)]
    assert [*layer_attentions(model)] == ['stages.0.blocks.1.mrla', *names, 'stages.3.blocks.1.mrla']
    x = torch.randn(2, 3, 64, 64)
    save_pretrained(train(model, x), tmp_path / 'folder')
    config = json.loads((tmp_path / 'folder' / 'config.json').read_text())
    assert config['architecture'] == 'convnext_atto_mrla'
    loaded = timm.create_model(f'local-dir:{tmp_path}/folder', pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    by_name = timm.create_model('convnext_atto_mrla', mrla_blocks='stages.2.*')
    assert [*layer_attentions(by_name)] == names


@pytest.mark.parametrize(
    ('backbone', 'entry'), [('deit_tiny_patch16_224', 'deit_tiny_mrla'), ('resnet18', 'resnet18_mrla')]
)
def test_what_was_attached_is_the_entry_of_the_paper(backbone, entry):
    model = timm_mrla.attach(timm.create_model(backbone, num_classes=3))
    assert model.pretrained_cfg['architecture'] == entry
    shapes = {k: v.shape for k, v in timm.create_model(entry, num_classes=3).state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes


def test_initialized_as_for_training_from_scratch():
    """The backbone is initialized first. Then the weights equal those of the model by name."""
    torch.manual_seed(0)
    attached = timm_mrla.attach(timm.create_model('resnet18'), identity=False)
    torch.manual_seed(0)
    assert all(
        map(torch.equal, attached.state_dict().values(), timm.create_model('resnet18_mrla').state_dict().values())
    )


def test_what_the_backbone_is_it_stays():
    model = timm.create_model('resnet18', num_classes=3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    model.requires_grad_(False).train()
    model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    timm_mrla.attach(model)
    assert modes == {n: m.training for n, m in model.named_modules() if '.mrla' not in n}
    assert not model.layer1[0].mrla.norm.training and model.layer2[0].mrla.norm.training
    assert {t.dtype for t in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad == ('.mrla.' in name) for name, p in model.named_parameters())
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    meta = timm_mrla.attach(timm.create_model('resnet18', device='meta'))
    assert {p.device.type for p in meta.parameters()} == {'meta'}


@pytest.mark.parametrize('name', ['test_resnet', 'mobilenetv3_small_050'])
def test_models_without_storage(name):
    """In torch's FakeTensorMode, models have shapes and no values."""
    shapes = {k: v.shape for k, v in timm.create_model(f'{name}_mrla').state_dict().items()}
    with FakeTensorMode():
        for model in (timm.create_model(f'{name}_mrla'), timm_mrla.attach(timm.create_model(name))):
            assert {k: v.shape for k, v in model.state_dict().items()} == shapes


@pytest.mark.parametrize('kwargs', [{}, {'feature_cls': 'hook'}, {'feature_cls': 'getter'}])
def test_feature_extractors(kwargs):
    plain = timm.create_model('convnext_atto', features_only=True, **kwargs)
    model, x = timm_mrla.attach(copy.deepcopy(plain)), torch.randn(1, 3, 64, 64)
    assert len(layer_attentions(model)) == 12
    assert all(map(torch.equal, model.eval()(x), plain.eval()(x)))


@pytest.mark.parametrize('pool', ['token', 'avg'])
def test_all_layers_learn_but_the_last_of_a_class_token(pool):
    """If a ViT pools the class token, nothing reads the patches of the last block."""
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=3, global_pool=pool)
    train(timm_mrla.attach(model), torch.randn(2, 3, 32, 32)).zero_grad()
    model.train()(torch.randn(2, 3, 32, 32)).square().sum().backward()
    still = {name for name, p in model.named_parameters() if '.mrla.' in name and not p.grad.any()}
    patches = ('attn.qk.weight', 'v.weight', 'lam', 'norm_o.weight', 'norm_o.bias')
    assert still == ({f'blocks.1.mrla.{name}' for name in patches} if pool == 'token' else set())


def test_a_frozen_layer_is_switched_off_by_its_output_scales():
    """The scales of a frozen norm are buffers."""
    model, x = freeze_batch_norm_2d(timm.create_model('test_resnet_mrla').eval()), torch.randn(1, 3, 32, 32)
    plain = freeze_batch_norm_2d(timm.create_model('test_resnet').eval())
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.equal(model(x), plain(x))
    for layer in layer_attentions(model).values():
        for scale in layer.output_scales():
            nn.init.zeros_(scale)
    assert torch.equal(model(x), plain(x))


def test_a_layer_that_cannot_be_switched_off_says_so():
    norms = {'post': partial(nn.BatchNorm2d, affine=False), 'pre': partial(nn.LayerNorm, elementwise_affine=False)}
    for form, norm in norms.items():
        with pytest.raises(ValueError, match='no weight that could be zero'):
            MrlaLight(16, 8, norm, form, 'NHWC').output_scales()


def test_norms_that_are_frozen_are_left_so():
    """Layer attention gets a trainable norm, because a frozen norm at zero could never add anything."""
    plain = freeze_batch_norm_2d(timm.create_model('resnet18').eval())
    model, x = timm_mrla.attach(copy.deepcopy(plain)), torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), plain(x))
    model(x).square().sum().backward()
    assert model.layer4[0].mrla.norm.weight.grad.any()


def test_blocks_are_tensor_to_tensor():
    """Parts of a model run as in timm, and a hook on a block gets the block's output."""
    model, seen = timm.create_model('resnet18_mrla').eval(), []
    model.layer4[-1].register_forward_hook(lambda block, args, out: seen.append((args, out)))
    model(torch.randn(1, 3, 64, 64))
    ((x,), out) = seen[0]
    assert isinstance(x, torch.Tensor) and out.shape == (1, 512, 2, 2)
    convnext = timm.create_model('convnext_atto_mrla').eval()
    x = torch.randn(1, 40, 16, 16)
    blocks = convnext.stages[0].blocks
    assert torch.equal(nn.Sequential(*blocks)(x), blocks(x))


class PassesOn(nn.Module):
    """A user's own wrapper, with a layer beside the model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.scale = model, nn.Linear(1, 1)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('model'), name)


class Holds(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.net = model


@pytest.mark.parametrize(
    'wrap',
    [
        nn.Sequential,
        nn.DataParallel,
        PassesOn,
        AveragedModel,
        ModelEmaV3,
        torch.compile,
        lambda model: Holds(PassesOn(model)),
        lambda model: PassesOn(Holds(model)),
        lambda model: PassesOn(PassesOn(model)),
        lambda model: nn.Sequential(torch.compile(model)),
    ],
)
@pytest.mark.parametrize('name', ['resnet18', 'test_vit', 'test_convnext'])
def test_wrapped_models_are_refused(wrap, name):
    model = wrap(timm.create_model(name))
    with pytest.raises(ValueError, match=r'wrapped by ([A-Z]|torch\.compile).*; attach first, then wrap'):
        timm_mrla.attach(model)
    assert not layer_attentions(model)


class OwnResNet(timm.models.ResNet):
    """A subclass with an attribute of its own."""

    def __getattr__(self, name):
        return self.num_features if name == 'width' else super().__getattr__(name)


class Named(nn.Module):
    """A network with own names for parts of its encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = timm.create_model('resnet18')

    @property
    def layer4(self):
        return self.encoder.layer4


@pytest.mark.parametrize(
    'build',
    [
        lambda: OwnResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1)),
        lambda: timm.create_model('test_vit', features_only=True),
        Named,
        lambda: Holds(timm.create_model('resnet18', features_only=True)),
        lambda: nn.Sequential(timm.create_model('resnet18', features_only=True), nn.Identity()),
        lambda: timm.create_model('resnet18').layer3,
        lambda: apply_to_blocks(timm.create_model('resnet18')),
    ],
)
def test_networks_that_hold_a_backbone_are_taken(build):
    assert layer_attentions(timm_mrla.attach(build()))


def apply_to_blocks(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, timm.models.resnet.BasicBlock))
    return model


def meta(name='resnet18', **kwargs):
    return timm.create_model(name, device='meta', **kwargs)


def compiled_in_place():
    model = meta()
    model.compile()
    return model


@pytest.mark.parametrize(
    ('create', 'kwargs', 'message'),
    [
        (lambda: timm_mrla.attach(meta()), {}, 'already'),
        (lambda: nn.DataParallel(meta()), {}, 'wrapped by DataParallel; attach first'),
        (lambda: torch.compile(meta()), {}, r'wrapped by torch\.compile; attach first'),
        (compiled_in_place, {}, r'wrapped by torch\.compile; attach first'),
        (lambda: meta('vgg11'), {}, 'vgg11 has no block that can have'),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, 'Sequential has no block that can have'),
        (lambda: meta('lcnet_050'), {}, 'no shortcut that keeps the shape'),
        (lambda: meta('vit_tiny_patch16_224', patch_drop_rate=0.5), {}, 'patch_drop_rate 0.5'),
        (meta, {'blocks': ['layer1.*', 'layer9.*']}, r"'layer9\.\*' matches no block"),
        (meta, {'blocks': []}, 'matches no block'),
        (meta, {'adapter': 'perhaps'}, "adapter 'perhaps' is neither on nor off"),
    ],
    ids=[
        'attached twice',
        'data parallel',
        'compiled',
        'compiled in place',
        'no such block',
        'not of timm',
        'none with a shortcut',
        'patch dropout',
        'a pattern of nothing',
        'no pattern',
        'no switch',
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(create, kwargs, message):
    model = create()
    count = sum(isinstance(m, MrlaLight) for m in model.modules())
    with pytest.raises(ValueError, match=message) as e:
        timm_mrla.attach(model, **kwargs)
    assert '\n' not in str(e.value)
    assert sum(isinstance(m, MrlaLight) for m in model.modules()) == count


@pytest.mark.parametrize('value', [None, 'resnet18', {'conv1.weight': torch.ones(1000)}, timm.models.ResNet])
@pytest.mark.parametrize('fn', [timm_mrla.attach, timm_mrla.sites])
def test_what_is_no_model_is_one_sentence(fn, value):
    with pytest.raises(TypeError, match=r'^a model is needed, and .* is none; timm\.create_model builds one$') as e:
        fn(value)
    assert repr(value)[:40] in str(e.value) and len(str(e.value)) < 200


@pytest.mark.parametrize('blocks', [3, 0, [3], ['layer1.*', None], b'layer1.*', nn.Sequential(nn.ReLU())])
def test_what_is_no_pattern_is_one_sentence(blocks):
    model = timm.create_model('resnet18', device='meta')
    with pytest.raises(TypeError, match=r"no patterns of names of blocks, such as 'stages\.2\.\*'$"):
        timm_mrla.attach(model, blocks=blocks)
    assert not layer_attentions(model)
    timm_mrla.attach(model, blocks=(f'layer{i}.*' for i in (1, 2)))
    assert len(layer_attentions(model)) == 4


def test_under_fully_sharded_and_distributed_wrappers(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        sharded, parallel = (timm.create_model('resnet18') for _ in range(2))
        fully_shard(sharded.layer1)
        with pytest.raises(ValueError, match='wrapped by FSDPSequential; attach first'):
            timm_mrla.attach(sharded)
        with pytest.raises(ValueError, match='wrapped by FullyShardedDataParallel; attach first'):
            timm_mrla.attach(nn.Sequential(FullyShardedDataParallel(nn.ReLU(), device_id=torch.device('cpu'))))
        with pytest.raises(ValueError, match='wrapped by DistributedDataParallel; attach first'):
            timm_mrla.attach(nn.parallel.DistributedDataParallel(parallel))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('resnet18', {}),
        ('efficientnet_b0', {}),
        ('test_vit', {'drop_path_rate': 0.3}),
        ('test_convnext', {'drop_path_rate': 0.3}),
        ('test_mambaout', {'drop_path_rate': 0.3}),
        ('efficientnet_b0', {'drop_path_rate': 0.3}),
    ],
    ids=str,
)
def test_in_training_mode_it_computes_what_it_did(name, kwargs):
    """With drop path, this holds only if layer attention draws no random numbers."""
    model, x = timm.create_model(name, num_classes=3, **kwargs), torch.randn(4, 3, 64, 64)
    if 'vit' in name:
        x = torch.randn(4, 3, *model.patch_embed.img_size)
    outputs = []
    for ours in (copy.deepcopy(model), timm_mrla.attach(model)):
        for layer in layer_attentions(ours).values():
            if layer.form == 'post':
                layer.drop_path = nn.Identity()
        torch.manual_seed(0)
        outputs.append(ours(x))
    assert torch.equal(*outputs)


def patch(block):
    """Replace the forward of a block as adapters do: with the forward of timm's class."""
    block.forward = types.MethodType(getattr(type(block), 'stock', type(block)).forward, block)


def change_class(block):
    """Change the class of a block as libraries that merge tokens do."""
    block.__class__ = type('OtherBlock', (block.stock,), {})


def small_vit():
    return timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=3)


def test_a_block_with_a_forward_of_its_own_is_refused():
    """Layer attention would never run in it."""
    for model, name in ((timm.create_model('test_resnet'), 'layer2.0'), (small_vit(), 'blocks.1')):
        block, cls = model.get_submodule(name), type(model)
        patch(block)
        with pytest.raises(ValueError, match=rf'forward of {name} was replaced, so .* attach first'):
            timm_mrla.attach(model)
        assert not layer_attentions(model) and type(model) is cls
        del block.forward
        assert layer_attentions(timm_mrla.attach(model))


def test_a_model_with_a_method_of_its_own_that_passes_the_grid_is_refused():
    model = small_vit()
    model.forward_features = model.forward_features
    with pytest.raises(ValueError, match='forward_features of VisionTransformer was replaced'):
        timm_mrla.attach(model)


@pytest.mark.parametrize('change', [patch, change_class])
def test_layer_attention_that_is_lost_later_is_noticed(change, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    model = train(timm_mrla.attach(timm.create_model('test_resnet')), x)
    change(model.layer2[0])
    for look in (timm_mrla.layer_attention, partial(timm_mrla.feature_maps, block='layer2.0')):
        with pytest.raises(ValueError, match=r'did not run in layer2\.0: the class or the forward of its block'):
            look(model, x)
    reasons = timm_mrla.why_not_fused(model, x)
    assert [name for name, reason in reasons.items() if reason.startswith('it did not run')] == ['layer2.0.mrla']
    if change is change_class:
        lost = [site.name for site in timm_mrla.sites(model) if site.reason.startswith('its class was changed')]
        assert lost == ['layer2.0']
        with pytest.raises(ValueError, match=r'class of layer2\.0 was changed'):
            save_pretrained(model, tmp_path / 'folder')


def test_a_forward_that_calls_the_old_one_is_fine():
    """As hooks of accelerate do it."""
    model, x = timm_mrla.attach(small_vit(), identity=False).eval(), torch.randn(1, 3, 32, 32)
    expected = timm_mrla.layer_attention(model, x)
    for block in model.blocks:
        block.forward = partial(lambda old, *args, **kwargs: old(*args, **kwargs), block.forward)
    assert torch.equal(timm_mrla.layer_attention(model, x)['blocks'], expected['blocks'])
