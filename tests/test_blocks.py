"""Tests of blocks with layer attention in user code: own loops over blocks, wrappers around them, their lifetime."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import timm
import torch
from timm.utils import AttentionExtract
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import timm_mrla
from timm_mrla.layers import layer_attentions

SMALL = {'img_size': (48, 64), 'depth': 3, 'embed_dim': 64, 'num_heads': 2, 'num_classes': 5}
TOKENS = {
    'vit_tiny_patch16_224_mrla': SMALL,
    'deit_tiny_distilled_mrla': SMALL,
    'vit_small_patch16_dinov3_mrla': SMALL,
}
KINDS = {
    **TOKENS,
    'resnet18_mrla': {'channels': (8, 8, 16, 16)},
    'resnet18_mrlab': {'channels': (32, 32, 64, 64)},
    'deit_tiny_mrlab': SMALL,
    'ceit_tiny_mrla': SMALL,
    'pvt_v2_b0_mrlab': {'num_classes': 5},
    'test_convnext_mrla': {},
    'test_mambaout_mrla': {},
}
tokens = pytest.mark.parametrize('name', TOKENS)


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**KINDS.get(name, SMALL), **kwargs}).eval()


def images(*size, batch=2):
    return torch.randn(batch, 3, *(size or (48, 64)))


def loop(model, x):
    """The loop that others write over the blocks of a vision transformer."""
    x = model.patch_embed(x)
    x = model._pos_embed(x)
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)
    for block in model.blocks:
        x = block(x) if rope is None else block(x, rope=rope)
    return model.norm(x)


@tokens
def test_a_loop_of_ones_own_runs_at_the_models_input_size(name):
    model = create(name, dynamic_img_size=False)
    for size in ((48, 64), (64, 96)):
        if size != (48, 64):
            model.set_input_size(size)
        x = images(*size)
        expected = model.forward_intermediates(x, norm=True, output_fmt='NLC', intermediates_only=True)[-1]
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(loop(copied, x)[:, model.num_prefix_tokens :], expected)


def test_a_sequence_of_blocks_is_called_as_one():
    model, x = create('vit_tiny_patch16_224_mrla'), images()
    y = model.norm(model.blocks(model._pos_embed(model.patch_embed(x))))
    assert torch.equal(y, model.forward_features(x))


@tokens
@pytest.mark.parametrize('size', [(64, 64), (32, 96), (48, 64)], ids=str)
def test_a_loop_of_ones_own_over_images_of_several_sizes_says_what_a_block_needs(name, size):
    """2 x 6 and 3 x 4 patches are both 12 tokens, so a guessed grid could be wrong."""
    model = create(name, dynamic_img_size=True)
    with pytest.raises(ValueError, match=r'do not tell the grid of their patches: .* as feat_size='):
        loop(model, images(*size))


def test_a_stem_that_takes_any_size_does_not_tell_the_grid():
    model = timm_mrla.attach(timm.create_model('vit_tiny_r_s16_p8_224', img_size=64, depth=1))
    with pytest.raises(ValueError, match='do not tell the grid of their patches'):
        model.blocks(model._pos_embed(model.patch_embed(images(64, 64))))


@pytest.mark.parametrize('name', [*TOKENS, 'deit_tiny_mrlab', 'ceit_tiny_mrla', 'caformer_s18_mrla'])
def test_tokens_behind_the_patches_are_refused(name):
    """They would be read as patches, and patches as prefix tokens."""
    with torch.device('meta'):
        model = timm.create_model(name)
        block = model.stages[3].blocks[0] if 'caformer' in name else model.blocks[0]
        P = getattr(model, 'num_prefix_tokens', 0)
        x = torch.empty(2, P + 12 + 3, block.norm1.weight.shape[0])
        block(x[:, : P + 12], feat_size=(3, 4))
        with pytest.raises(ValueError, match=f'{P + 15} tokens are not {P} prefix tokens and 3 x 4 patches'):
            block(x, feat_size=(3, 4))


def test_prompt_tokens_that_the_model_counts():
    plain, prompts = create('vit_tiny_patch16_224', **SMALL), torch.randn(2, 5, 64)
    plain.num_prefix_tokens += 5
    model = timm_mrla.attach(copy.deepcopy(plain))

    def with_prompts(net):
        x = net._pos_embed(net.patch_embed(torch.ones(2, 3, 48, 64)))
        return net.blocks(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))

    assert torch.equal(with_prompts(model), with_prompts(plain))


@pytest.mark.parametrize(
    ('name', 'error', 'message'),
    [('deit_tiny_mrlab', TypeError, r'x, \*memory = block'), ('ceit_tiny_mrla', ValueError, r'feat_size=\(H, W\)')],
)
def test_a_loop_of_ones_own_over_other_blocks_says_what_a_block_needs(name, error, message):
    with pytest.raises(error, match=message):
        loop(create(name), images())


def test_a_block_of_memory_says_what_it_passes_on():
    model = create('deit_tiny_mrlab')
    block, x = model.blocks[0], torch.randn(2, 13, 64)
    with pytest.raises(TypeError, match=r'x, \*memory = block\(x, \*memory'):
        block(block(x, feat_size=(3, 4)), feat_size=(3, 4))


WRAPPERS = {
    'sequential': lambda block: nn.Sequential(block, nn.Identity()),
    'attributes': checkpoint_wrapper,
}


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_blocks(wrap):
    model, x = timm_mrla.attach(create('vit_tiny_patch16_224', **SMALL), identity=False), images()
    expected = model(x)
    model.blocks[1] = wrap(model.blocks[1])
    assert torch.equal(model(x), expected)
    model.set_grad_checkpointing()
    model(x).sum().backward()


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_blocks_never_take_one_grid_for_another(wrap):
    """3 x 4 and 4 x 3 patches are both 12 tokens, so a guessed grid could be wrong."""
    model, x = create('vit_tiny_patch16_224_mrla', dynamic_img_size=True), images(64, 48)
    expected = model(x)
    model.blocks[1] = wrap(model.blocks[1])
    if wrap is WRAPPERS['sequential']:
        with pytest.raises(ValueError, match=r'do not tell the grid of their patches: .* a wrapper of a block'):
            model(x)
    else:
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize('name', ['deit_tiny_mrlab', 'resnet18_mrlab'])
def test_a_hidden_block_of_memory_is_refused(name):
    model = create(name)
    stage = model.blocks if 'deit' in name else model.layer1
    stage[1] = nn.Sequential(stage[1], nn.Identity())
    with pytest.raises(TypeError, match='a wrapper gets the memory if it has the attribute `mrla`'):
        model(images())


@pytest.mark.parametrize('name', ['deit_tiny_mrlab', 'resnet18_mrlab', 'pvt_v2_b0_mrlab'])
def test_memory_passes_blocks_that_have_no_layer_attention(name):
    pattern = {'deit_tiny_mrlab': 'blocks.[02]', 'resnet18_mrlab': 'layer*.1', 'pvt_v2_b0_mrlab': 'stages.1.blocks.1'}
    model = create(name, mrla_blocks=pattern[name])
    assert 0 < len(layer_attentions(model)) < 8
    model(images()).sum().backward()
    assert all(p.grad is not None for layer in layer_attentions(model).values() for p in layer.parameters())


def test_patches_that_are_dropped_later_are_refused():
    model, x = create('vit_tiny_patch16_224_mrla', reg_tokens=4), images()
    expected = model(x)
    model.patch_drop = timm.layers.PatchDropout(0.2, num_prefix_tokens=5)
    with pytest.raises(ValueError, match='tokens are not 5 prefix tokens and 3 x 4 patches'):
        model(x)
    model.eval()
    assert torch.equal(model(x), expected)  # nothing is dropped in evaluation


def test_threads_with_images_of_two_sizes():
    model = create('vit_tiny_patch16_224_mrla', dynamic_img_size=True)
    sizes = [(48, 64), (64, 48)]
    inputs = [images(*size) for size in sizes]
    expected, wrong = [model(x) for x in inputs], []

    def run(i):
        for _ in range(20):
            wrong.extend([i] * (not torch.equal(model(inputs[i]), expected[i])))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize('name', [n for n in KINDS if n not in ('pvt_v2_b0_mrlab', 'vit_small_patch16_dinov3_mrla')])
def test_an_empty_batch_gives_no_logits(name):
    model = create(name)
    assert model(images(batch=0)).shape == (0, model.num_classes)


@pytest.mark.parametrize('name', ['deit_tiny_mrla', 'deit_tiny_mrlab'])
def test_extractors_of_attention_find_the_attention_of_tokens_alone(name):
    model = create(name)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert [*AttentionExtract(model, method='fx')(images())] == [f'blocks.{i}.attn.softmax' for i in range(3)]


def backward(model):
    model.train()(images()).sum().backward()
    return model


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def checkpointing(model):
    model.set_grad_checkpointing()
    return backward(model)


WAYS = {
    'created': lambda name: create(name),
    'backward': lambda name: backward(create(name)),
    'checkpointing': lambda name: checkpointing(create(name)),
    'recompute': lambda name: backward(create(name, mrla_recompute=True)),
    'deepcopy': lambda name: copy.deepcopy(create(name)),
    'pickle': lambda name: pickle.loads(pickle.dumps(create(name))),
    'torch.save': lambda name: reloaded(create(name)),
    'features': lambda name: timm.create_model(name, features_only=True),
}
OTHER_WAYS = {
    'identity': lambda: create('resnet18_mrla', mrla_identity=True),
    'attach': lambda: timm_mrla.attach(timm.create_model('test_vit')),
    'copy of attach': lambda: copy.deepcopy(timm_mrla.attach(timm.create_model('test_vit'))),
    'warm start': lambda: timm.create_model(
        'test_vit_mrla.warmstart_r160_in1k',
        pretrained=True,
        pretrained_cfg_overlay={'state_dict': timm.create_model('test_vit').state_dict()},
    ),
}


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', ['resnet18_mrla', 'resnet18_mrlab', 'deit_tiny_mrlab', 'vit_tiny_patch16_224_mrla'])
def test_a_model_is_freed_with_its_last_name(name, way, no_collector):
    model = WAYS[way](name)
    model, parameter = weakref.ref(model), weakref.ref(next(model.parameters()))
    assert model() is None and parameter() is None


@pytest.mark.parametrize('way', OTHER_WAYS)
def test_a_model_made_otherwise_is_freed_with_its_last_name(way, no_collector):
    model = OTHER_WAYS[way]()
    model, parameter = weakref.ref(model), weakref.ref(next(model.parameters()))
    assert model() is None and parameter() is None
