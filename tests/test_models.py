"""Tests of timm's usual operations on models, with one small entry of each kind."""

import copy
import re

import pytest
import timm
import torch
from entries import backbone
from slow import slow, slow_except
from timm.models import VisionTransformer, group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from timm_mrla.layers import MrlaBase, MrlaLight, layer_attentions

TORCH = tuple(map(int, torch.__version__.split('.')[:2]))
RESNETS = ['resnet18_mrla', 'resnet18_mrlab']
PVTS = ['pvt_v2_b0_mrla', 'pvt_v2_b0_mrlab']
MAPS = [*RESNETS, *PVTS, 'efficientnet_b0_mrla']
DEITS = ['deit_tiny_mrla', 'deit_tiny_mrlab', 'deit_tiny_distilled_mrla']
TOKENS = [*DEITS, 'ceit_tiny_mrla']
SOME = [*RESNETS, 'pvt_v2_b0_mrlab', 'deit_tiny_mrlab', 'ceit_tiny_mrla']
every = pytest.mark.parametrize('name', slow_except(SOME, MAPS + TOKENS))
resnets = pytest.mark.parametrize('name', RESNETS)
maps = pytest.mark.parametrize('name', slow_except(SOME, MAPS))
deits = pytest.mark.parametrize('name', DEITS)
tokens = pytest.mark.parametrize('name', TOKENS)


def create(name, dtype=torch.float64, **kwargs):
    """A small model in which layer attention and residual branches are all non-zero."""
    torch.manual_seed(0)
    if name in TOKENS:
        kwargs = dict({'img_size': (48, 64), 'depth': 5, 'embed_dim': 64, 'num_heads': 2}, **kwargs)
    elif name in RESNETS:
        kwargs = dict({'channels': (32, 32, 64, 64)}, **kwargs)
    features = kwargs.get('features_only', False)
    model = timm.create_model(name, dtype=dtype, **kwargs, **({} if features else {'num_classes': 7}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def images(*size, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, *(size or (48, 64)), dtype=dtype)


def neutralize(model):
    """Make MRLA add zero: set the norm after it to zero, or, in the form `pre`, the norm before it and lam."""
    for m in model.modules():
        if isinstance(m, MrlaLight | MrlaBase):
            zero = [*m.norm.parameters()] or [*m.norm_x.parameters(), *([m.lam] if isinstance(m, MrlaLight) else [])]
            for p in zero:
                nn.init.zeros_(p)
    return model


def gradients(model, x, features=False):
    out = model(x)
    sum(y.square().sum() for y in (out if features else [out])).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def assert_equal_functions(ours, theirs):
    x = images(64, 96)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        outputs.append(model(x))
    assert torch.equal(*outputs)
    ours.eval()
    theirs.eval()
    for a, b in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
        assert torch.equal(a, b)


TOKEN_ARGUMENTS = [
    {},
    {'global_pool': 'avg'},
    {'class_token': False, 'global_pool': 'avg'},
    {'reg_tokens': 3},
    {'init_values': 0.1, 'dynamic_img_size': True},
]
CONV_ARGUMENTS = [
    {},
    {'output_stride': 8},
    {'output_stride': 16},
    {'stem_type': 'deep_tiered', 'stem_width': 24, 'avg_down': True},
    {'replace_stem_pool': True, 'act_layer': 'silu', 'norm_layer': 'groupnorm1'},
    {'aa_layer': nn.AvgPool2d, 'drop_rate': 0.1, 'drop_block_rate': 0.1, 'global_pool': 'catavgmax'},
    {'block_args': {'attn_layer': 'se'}},
]


@resnets
@pytest.mark.parametrize('kwargs', CONV_ARGUMENTS, ids=str)
@pytest.mark.parametrize('train', slow_except([False], [False, True]))
def test_without_its_branch_it_is_timms_resnet(name, kwargs, train):
    plain, stem = backbone(name)
    kwargs = dict(stem, **kwargs) if 'stem_type' not in kwargs else kwargs
    ours = neutralize(create(name, **kwargs)).train(train)
    theirs = timm.create_model(plain, num_classes=7, channels=(32, 32, 64, 64), dtype=torch.float64, **kwargs)
    theirs.train(train).load_state_dict({k: v for k, v in ours.state_dict().items() if '.mrla.' not in k})
    assert_equal_functions(ours, theirs)


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    # the distilled DeiT of timm has two prefix tokens and reads both
    [
        (n, k)
        for n in DEITS
        for k in TOKEN_ARGUMENTS
        if 'distilled' not in n or not {'global_pool', 'reg_tokens'} & set(k)
    ],
    ids=str,
)
def test_without_its_branch_it_is_timms_vision_transformer(name, kwargs):
    ours = neutralize(create(name, **kwargs))
    theirs = timm.create_model(
        backbone(name)[0],
        **{'num_classes': 7, 'img_size': (48, 64), 'depth': 5, 'embed_dim': 64, 'num_heads': 2, **kwargs},
        dtype=torch.float64,
    )
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if '.mrla.' not in k})
    x, mask = images(), torch.rand(12 + ours.num_prefix_tokens, 12 + ours.num_prefix_tokens).double()
    for model in (ours, theirs):
        model.eval()
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x, attn_mask=mask), theirs(x, attn_mask=mask))
    assert torch.equal(ours(x, is_causal=True), theirs(x, is_causal=True))
    for arguments in (
        {},
        {'indices': 2, 'norm': True},
        {'indices': [0, 3], 'return_prefix_tokens': True, 'stop_early': True},
        {'indices': [1], 'intermediates_only': True, 'output_fmt': 'NLC'},
        {'output_dict': True},
        {'output_dict': True, 'return_prefix_tokens': True, 'intermediates_only': True},
    ):
        expected = theirs.forward_intermediates(x, **arguments)
        torch.testing.assert_close(ours.forward_intermediates(x, **arguments), expected, rtol=0, atol=0)
    torch.testing.assert_close(ours.get_intermediate_layers(x, 2), theirs.get_intermediate_layers(x, 2), rtol=0, atol=0)


@pytest.mark.parametrize('name', [*PVTS, 'efficientnet_b0_mrla'])
@pytest.mark.parametrize('train', slow_except([False], [False, True]))
def test_without_its_branch_it_is_the_stock_model(name, train):
    plain = backbone(name)[0]
    kwargs = {'drop_path_rate': 0.2, 'drop_rate': 0.1}
    ours = neutralize(create(name, **kwargs)).train(train)
    theirs = timm.create_model(plain, num_classes=7, dtype=torch.float64, **kwargs).train(train)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if '.mrla.' not in k})
    if train:  # drop path in layer attention would shift the random numbers
        for m in ours.modules():
            if isinstance(m, MrlaLight | MrlaBase):
                m.drop_path = nn.Identity()
    assert_equal_functions(ours, theirs)


def test_cardinality_and_base_width_make_a_resnext():
    ours = timm.create_model('resnet50_mrla', cardinality=32, base_width=4, device='meta')
    theirs = timm.create_model('resnext50_32x4d', device='meta')
    shapes = {k: v.shape for k, v in ours.state_dict().items() if '.mrla.' not in k}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items()}


@every
@pytest.mark.parametrize('reentrant', slow_except([False], [False, True]))
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    from timm.layers import set_reentrant_ckpt

    x = images()
    plain, checkpointed = create(name), create(name)
    checkpointed.set_grad_checkpointing()
    set_reentrant_ckpt(reentrant)
    try:
        expected, actual = gradients(plain, x), gradients(checkpointed, x)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(checkpointed(x), plain(x), rtol=1e-12, atol=1e-12)
    finally:
        set_reentrant_ckpt(False)


@every
def test_gradient_checkpointing_recomputes_each_block(name):
    """It saves memory: autograd keeps far fewer tensors for backward."""

    def saved(enable):
        model = create(name)
        model.set_grad_checkpointing(enable)
        count = 0

        def pack(t):
            nonlocal count
            count += 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(images())
        return count

    assert saved(True) < saved(False) / 3


@maps
def test_features_only_under_checkpointing(name):
    x = images()
    grads = []
    for enable in (False, True):
        model = create(name, features_only=True)
        model.set_grad_checkpointing(enable)
        grads.append(gradients(model, x, features=True))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


@every
def test_intermediates_are_what_the_forward_pass_computes(name):
    model = create(name).eval()
    x = images()
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    if isinstance(model, VisionTransformer):
        # block by block: a model that ends at block i has the i-th intermediate as its features
        for i, y in enumerate(intermediates):
            short = copy.deepcopy(model)
            short.blocks = short.blocks[: i + 1]
            patches = short.forward_intermediates(x, 1, intermediates_only=True)[0]
            assert torch.equal(patches, y)
            tokens = model.norm(y.flatten(2).transpose(1, 2))
            expected = short.forward_features(x)[:, model.num_prefix_tokens :]
            torch.testing.assert_close(tokens, expected, rtol=1e-12, atol=1e-12)
    elif name in RESNETS:
        y = intermediates[0]
        for stage, expected in zip([model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4],
                                   [None, *intermediates[1:]], strict=True):  # fmt: skip
            y = stage(y)
            assert expected is None or torch.equal(y, expected)


@resnets
def test_stages_are_the_equation(name):
    """Whole stages against timm's own blocks followed by the equations in loops."""
    import naive

    model = create(name).eval()
    x = images(32, 40, batch=1)
    intermediates = model.forward_intermediates(x, intermediates_only=True)
    y = model.maxpool(intermediates[0])
    for stage, expected in zip([model.layer1, model.layer2, model.layer3], intermediates[1:], strict=False):
        xs, mrlas = [], []
        for block in stage:
            o = y if block.downsample is None else block.downsample(y)
            xs.append(timm.models.BasicBlock.forward(block, y))
            mrlas.append(block.mrla)
            if isinstance(block.mrla, MrlaLight):
                y = xs[-1] + block.mrla.norm(naive.light(block.mrla, xs[-1], o))
            else:
                y = xs[-1] + block.mrla.norm(naive.base(mrlas, xs)).relu()
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', PVTS)
def test_pyramid_stages_are_the_equation(name):
    """Whole stages against timm's own blocks followed by the equations in loops, the memory empty at each stage."""
    import naive

    model = create(name, embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2), depths=(2, 3, 1, 1)).eval()
    x = images(40, 48, batch=1)
    y = model.patch_embed(x)
    for stage, expected in zip(model.stages[:2], model.forward_intermediates(x, intermediates_only=True), strict=False):
        y = y if stage.downsample is None else stage.downsample(y)
        _, H, W, C = y.shape
        y = y.reshape(1, H * W, C)
        mrlas, normed = [], []
        for block in stage.blocks:
            mrla, o = block.mrla, y
            y = timm.models.pvt_v2.Block.forward(block, y, (H, W))
            mrlas.append(mrla)
            normed.append(mrla.norm_x(y).transpose(1, 2).unflatten(2, (H, W)))
            if isinstance(mrla, MrlaLight):
                m = naive.light(mrla, normed[-1], mrla.norm_o(o).transpose(1, 2).unflatten(2, (H, W)))
            else:
                m = naive.base(mrlas, normed)
            y = y + m.flatten(2).transpose(1, 2)
        y = stage.norm(y).reshape(1, H, W, C).permute(0, 3, 1, 2)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_layer_attention_is_where_the_paper_has_it_in_efficientnet():
    """In the inverted residuals that have a skip, with eight heads."""
    model = create('efficientnet_b1_mrla')
    for stage in model.blocks:
        for i, block in enumerate(stage):
            inverted = isinstance(block, timm.models._efficientnet_blocks.InvertedResidual)
            assert hasattr(block, 'mrla') == (inverted and i > 0)
            if hasattr(block, 'mrla'):
                assert block.mrla.attn.num_heads == 8
                assert block.mrla.norm is not block.bn3


def test_ceit_reads_the_class_tokens_of_its_layers():
    """Only the last class token is a query, and the head reads only class tokens."""
    model = create('ceit_tiny_mrla').eval()
    x = images()
    _, taken = model.forward_intermediates(x, return_prefix_tokens=True)
    tokens = torch.cat([prefix for _, prefix in taken], 1) + model.pos_layer_embed
    q, k, v = model.lca.attn.qkv(model.lca.norm1(tokens)).reshape(2, 5, 3, 2, 32).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, -1:] @ k.transpose(-2, -1) / 32**0.5).softmax(-1)
    last = tokens[:, -1] + model.lca.attn.proj((weights @ v).transpose(1, 2).reshape(2, 64))
    last = last + model.lca.mlp(model.lca.norm2(last))
    torch.testing.assert_close(model(x), model.head(model.norm(last)), rtol=1e-12, atol=1e-12)


def test_deit_base_forgets_after_four_blocks():
    import naive

    model = create('deit_tiny_mrlab', depth=6).eval()
    x = images(batch=1)
    H, W = model.patch_embed.grid_size
    y = model._pos_embed(model.patch_embed(x))
    for i, block in enumerate(model.blocks):
        if i % 4 == 0:
            mrlas, normed = [], []
        y = timm.models.vision_transformer.Block.forward(block, y)
        n = block.mrla.norm_x(y)
        mrlas.append(block.mrla)
        normed.append(n[:, 1:].transpose(1, 2).unflatten(2, (H, W)))
        y = y + torch.cat([n[:, :1], naive.base(mrlas, normed).flatten(2).transpose(1, 2)], 1)
    torch.testing.assert_close(model.norm(y), model.forward_features(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(create('deit_tiny_mrlab', depth=6, mrla_stage_depth=6).eval()(x), model(x))


@every
def test_each_image_of_a_batch_stands_alone(name):
    model = create(name).eval()
    x = images(batch=3)
    torch.testing.assert_close(model(x), torch.cat([model(y[None]) for y in x]), rtol=1e-10, atol=1e-10)


@maps
@pytest.mark.parametrize('size', [(33, 47), (32, 97), (64, 64)])
def test_maps_of_any_size(name, size):
    model = create(name).eval()
    out = model(images(*size))
    assert out.shape == (2, 7)
    assert out.isfinite().all()


@tokens
def test_grids_of_any_size(name):
    x = images(64, 80)
    fixed = create(name).eval()
    with pytest.raises(AssertionError):
        fixed(x)
    dynamic = create(name, dynamic_img_size=True).eval()
    y = images()
    torch.testing.assert_close(dynamic(y), fixed(y), rtol=1e-12, atol=1e-12)
    assert dynamic(x).isfinite().all()
    fixed.set_input_size(img_size=(64, 80))
    torch.testing.assert_close(dynamic(x), fixed(x), rtol=1e-5, atol=1e-6)  # timm resamples in float32
    padded = create(name, dynamic_img_size=True, dynamic_img_pad=True).eval()
    assert padded.forward_intermediates(images(50, 70), 1)[1][0].shape[-2:] == (4, 5)


def test_ceit_keeps_its_patch_size():
    model = create('ceit_tiny_mrla')
    model.set_input_size(img_size=(64, 64), patch_size=16)
    with pytest.raises(ValueError, match='patch_size 8'):
        model.set_input_size(patch_size=8)


@deits
def test_transposed_grid_is_not_the_same_grid(name):
    """The same number of patches in another shape gives other outputs: the model uses the true grid, not a guess."""
    wide = create(name, pos_embed='none', dynamic_img_size=True).eval()
    x = images(48, 64)
    patches = wide.patch_embed.proj(x)
    tall = torch.zeros(2, 3, 64, 48, dtype=x.dtype)
    for i in range(12):
        h, w, th, tw = i // 4, i % 4, i // 3, i % 3
        tall[..., 16 * th : 16 * th + 16, 16 * tw : 16 * tw + 16] = x[..., 16 * h : 16 * h + 16, 16 * w : 16 * w + 16]
    torch.testing.assert_close(wide.patch_embed.proj(tall).flatten(2), patches.flatten(2))
    assert not torch.allclose(wide(x), wide(tall))


@every
@pytest.mark.parametrize('indices', slow_except([[0, 2, 3]], [[0], [2], [0, 2, 3]]))
def test_pruned_models_keep_their_taps_and_nothing_else(name, indices):
    model = create(name, drop_rate=0.5)
    x = images()
    expected = model.eval().forward_intermediates(x, indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices, prune_norm=True)
    actual = model.forward_intermediates(x, taken, intermediates_only=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    model.set_grad_checkpointing()
    actual = model.train().forward_intermediates(x, taken, intermediates_only=True)
    sum(y.sum() for y in actual).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert model.eval()(x).isfinite().all()


def test_a_pruned_ceit_with_a_head_attends_to_the_layers_that_are_left():
    model, shallow = create('ceit_tiny_mrla').eval(), create('ceit_tiny_mrla', depth=2).eval()
    model.prune_intermediate_layers([1], prune_head=False)
    state_dict = model.state_dict()
    shallow.load_state_dict({**state_dict, 'pos_layer_embed': state_dict['pos_layer_embed'][:, :2]})
    x = images()
    assert torch.equal(model(x), shallow(x))


FEATURES = [(name, feature_cls) for name in RESNETS for feature_cls in (None, 'list', 'dict', 'getter', 'hook', 'fx')]
FEATURES += [('efficientnet_b0_mrla', feature_cls) for feature_cls in (None, 'getter', 'hook', 'fx')]


@pytest.mark.parametrize('output_stride', slow_except([32], [8, 16, 32]))
@pytest.mark.parametrize(('name', 'feature_cls'), [slow(v) if v[0].startswith('eff') else v for v in FEATURES])
def test_features(name, feature_cls, output_stride):
    model = create(
        name, features_only=True, output_stride=output_stride, out_indices=(1, 2, 4), feature_cls=feature_cls
    )
    x = images(64, 96)
    out = model.eval()(x)
    out = list(out.values()) if isinstance(out, dict) else out
    strides = [4, 8, output_stride]
    assert model.feature_info.reduction() == strides
    channels = model.feature_info.channels()
    assert [tuple(y.shape[1:]) for y in out] == [(c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)]
    whole = create(name, output_stride=output_stride).eval()
    theirs = {n.replace('model.', '').replace('body.', ''): p for n, p in model.state_dict().items()}
    if feature_cls != 'fx':  # fx uses other names
        assert not whole.load_state_dict(theirs, strict=False).unexpected_keys
        torch.testing.assert_close(
            out, whole.forward_intermediates(x, [1, 2, 4], intermediates_only=True), rtol=0, atol=0
        )


@pytest.mark.parametrize('name', PVTS)
@pytest.mark.parametrize('feature_cls', slow_except([None], [None, 'dict', 'getter', 'hook', 'fx']))
def test_pyramid_features(name, feature_cls):
    model = create(name, features_only=True, out_indices=(1, 3), feature_cls=feature_cls).eval()
    out = model(images(64, 96))
    out = list(out.values()) if isinstance(out, dict) else out
    assert [tuple(y.shape[1:]) for y in out] == [(64, 8, 12), (256, 2, 3)]


@tokens
def test_token_features(name):
    model = create(name, features_only=True, out_indices=(1, 3)).eval()
    assert [tuple(y.shape) for y in model(images())] == [(2, 64, 3, 4)] * 2
    assert model.feature_info.reduction() == [16, 16]


@every
def test_head(name):
    model = create(name).eval()
    x = images()
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.forward_head(features))
    pooled = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(11)
    assert model(x).shape == (2, 11)


def test_distilled_training_returns_two_predictions():
    model = create('deit_tiny_distilled_mrla').train()
    model.set_distilled_training(True)
    out, out_dist = model(images())
    assert out.shape == out_dist.shape == (2, 7)
    torch.testing.assert_close(model.eval()(images() * 0), model.forward_head(model.forward_features(images() * 0)))


@every
def test_drop_path(name):
    """Zero at the first block, the given rate at the last, on the residual and on the branch of layer attention."""
    model = create(name, drop_path_rate=0.3)
    rates = [getattr(m.drop_path, 'drop_prob', 0.0) for m in model.modules() if isinstance(m, MrlaLight | MrlaBase)]
    if name in DEITS + PVTS:  # the paper's DeiT drops no path of its layer attention
        assert set(rates) == {0.0}
    elif name in RESNETS:
        assert rates == pytest.approx([0.3 * i / 7 for i in range(8)])
        assert rates[1:] == pytest.approx([b.drop_path.drop_prob for b in stages(model)[1:]])
    elif name == 'ceit_tiny_mrla':
        assert rates == pytest.approx([0.3 * i / 4 for i in range(5)])
        assert rates[1:] == [b.drop_path1.drop_prob for b in model.blocks[1:]]
    else:
        blocks = [b for stage in model.blocks for b in stage]
        assert rates == [b.drop_path.drop_prob for b in blocks if hasattr(b, 'mrla')]
        assert len(rates) == 9
        assert min(rates) > 0


def stages(model):
    return [*model.layer1, *model.layer2, *model.layer3, *model.layer4]


@resnets
def test_the_papers_drop_path_is_constant_and_on_layer_attention_alone(name):
    model = create(name, mrla_drop_path=0.2)
    assert [b.mrla.drop_path.drop_prob for b in stages(model)] == [0.2] * 8
    assert all(b.drop_path is None for b in stages(model))
    model = create(name, mrla_drop_path=0.0, drop_path_rate=0.3)
    assert all(isinstance(b.mrla.drop_path, nn.Identity) for b in stages(model))


@pytest.mark.parametrize('name', ['resnet18_mrla', 'pvt_v2_b0_mrlab', 'convnext_atto_mrla'])
def test_from_scratch_it_can_begin_as_its_backbone(name):
    model = timm.create_model(name, mrla_identity=True).eval()
    plain, kwargs = backbone(name)
    plain = timm.create_model(plain, **kwargs).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if '.mrla.' not in k})
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x))
    model(x).square().sum().backward()
    assert all(scale.grad.any() for layer in layer_attentions(model).values() for scale in layer.output_scales())


@pytest.mark.parametrize('part', ['lam', 'v'])
@pytest.mark.parametrize('name', ['test_resnet_mrla', 'test_vit_mrla'])
def test_without_one_of_its_parts(name, part):
    """For ablations: the part is zero and gets no gradient, and everything else trains."""
    model = timm.create_model(name, mrla_without=part)
    model(torch.randn(2, 3, 160, 160)).square().sum().backward()
    for layer in layer_attentions(model).values():
        parameters = dict(layer.named_parameters())
        left_out = parameters.pop('lam' if part == 'lam' else 'v.weight')
        assert not left_out.any() and left_out.grad is None
        assert all(p.requires_grad for p in parameters.values())


@every
def test_layer_decay_groups(name):
    model = create(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    for n in groups:
        if '.mrla.' in n:
            block = n.split('.mrla.')[0] + '.'
            assert len({g for m, g in groups.items() if m.startswith(block)}) == 1
    undecayed = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    decayed = param_groups_layer_decay(model, 0.1, no_weight_decay_list=undecayed, layer_decay=0.5)
    by_id = {id(p): g for g in decayed for p in g['params']}
    for n, p in model.named_parameters():
        if n.endswith('.lam') or 'norm' in n or n == 'pos_embed':
            assert by_id[id(p)]['weight_decay'] == 0
    scales = {g['lr_scale'] for g in decayed}
    assert len(scales) == len(set(groups.values()))


@every
def test_initialization_is_the_papers(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    lams = [m.lam for m in model.modules() if isinstance(m, MrlaLight)]
    assert bool(lams) == name.endswith('_mrla')
    if lams:
        lam = torch.cat(lams)
        assert lam.mean().abs() < 0.1
        assert abs(lam.std() - 1) < 0.1
    for m in model.modules():
        if isinstance(m, MrlaLight | MrlaBase) and isinstance(m.norm, nn.BatchNorm2d):
            assert (m.norm.weight == 1).all()
    if name in RESNETS:
        assert all((b.bn2.weight == 0).all() for b in stages(model))


@every
def test_device_and_dtype(name):
    meta = create(name, device='meta', dtype=torch.bfloat16)
    for n, t in [*meta.named_parameters(), *meta.named_buffers()]:
        assert t.device.type == 'meta', n
        assert t.dtype in (torch.bfloat16, torch.int64), n
    assert create(name, dtype=torch.bfloat16).eval()(images(dtype=torch.bfloat16)).dtype == torch.bfloat16


@every
def test_channels_last(name):
    model = create(name, dtype=torch.float32).eval()
    x = images(dtype=torch.float32)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-3)
    if name not in TOKENS + PVTS:
        features = model.forward_features(x.to(memory_format=torch.channels_last))
        assert features.is_contiguous(memory_format=torch.channels_last)


@every
def test_autocast(name):
    model = create(name, dtype=torch.float32).train()
    x = images(*((96, 128) if name in MAPS else ()), batch=4, dtype=torch.float32)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        out = model(x)
    assert out.isfinite().all()
    assert (out - expected).norm() < 0.1 * expected.norm()
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# one of each block, form and kind; test_contract.py compiles all modules, without gradients
@pytest.mark.slow
@pytest.mark.parametrize('name', [*RESNETS, 'pvt_v2_b0_mrlab', 'deit_tiny_mrla', 'deit_tiny_mrlab', 'ceit_tiny_mrla'])
def test_compile_without_a_graph_break(name):
    model = create(name)
    x = images()
    expected = gradients(model, x)
    expected = {n: g.clone() for n, g in expected.items()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    compiled(x).square().sum().backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18_mrla', 'deit_tiny_mrlab'])
def test_compile_with_inductor(name):
    model = create(name, dtype=torch.float32).eval()
    x = images(dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('name', MAPS + TOKENS)
def test_export(name):
    model = create(name).eval()
    shapes = {0: torch.export.Dim('batch', max=64)}
    x, y = images(), images(batch=5)
    if name in MAPS:
        # before torch 2.15, timm's plain ResNet also fails for sizes that are not multiples of 32
        step = 1 if TORCH >= (2, 15) else 32
        shapes[2] = step * torch.export.Dim('height', min=64 // step, max=512 // step)
        shapes[3] = step * torch.export.Dim('width', min=64 // step, max=512 // step)
        x, y = images(96, 128), images(128, 64 + step, batch=5)
    exported = torch.export.export(model, (x,), dynamic_shapes=(shapes,)).module()
    for z in (x, y):
        torch.testing.assert_close(exported(z), model(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', [*RESNETS, 'efficientnet_b0_mrla', 'ceit_tiny_mrla'])
def test_sync_batch_norm_keeps_every_norm(name):
    from timm.layers import convert_sync_batchnorm

    for convert in (convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm):
        model = create(name)
        norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        if convert is not convert_sync_batchnorm and name not in RESNETS:
            continue  # torch's own conversion drops the activations of timm's EfficientNet
        converted = convert(copy.deepcopy(model))
        assert [n for n, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm)] == norms
        assert any('mrla' in n for n in norms)
        acts = [(n, type(m)) for n, m in model.named_modules() if isinstance(m, nn.ReLU)]
        assert [(n, type(m)) for n, m in converted.named_modules() if isinstance(m, nn.ReLU)] == acts


@every
def test_nothing_is_kept_between_calls(name):
    """No module keeps a tensor, and a call does not change the outputs of the next."""
    model = create(name).eval()
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    x, y = images(), images()
    expected = model(y)
    model(x)
    assert torch.equal(model(y), expected)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    assert not [n for n, m in model.named_modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]


@every
def test_unknown_arguments(name):
    with pytest.raises(TypeError, match='not_an_argument'):
        timm.create_model(name, not_an_argument=1)


@pytest.mark.parametrize(
    ('name', 'argument', 'value'),
    [
        ('resnet18_mrla', 'output_stride', 12),
        ('resnet18_mrla', 'mrla_drop_path', 1.5),
        ('resnet18_mrlab', 'mrla_drop_path', -0.1),
        ('resnet18_mrlab', 'mrla_identity', True),
        ('resnet18_mrla', 'mrla_identity', 'maybe'),
        ('resnet18_mrla', 'mrla_without', 'qk'),
        ('deit_tiny_mrlab', 'mrla_without', 'lam'),
        ('ceit_tiny_mrla', 'mrla_recompute', 2),
        ('resnet18_mrla', 'global_pool', 'median'),
        ('resnet18_mrla', 'cardinality', 32),
        ('deit_tiny_mrla', 'global_pool', 'median'),
        ('deit_tiny_mrla', 'patch_drop_rate', 0.5),
        ('deit_tiny_mrlab', 'mrla_stage_depth', 0),
        ('convnext_atto_mrla', 'mrla_drop_path', 1.0),
        ('vit_tiny_patch16_224_mrla', 'use_naflex', True),
        ('eva02_tiny_patch14_224_mrla', 'patch_drop_rate', 0.25),
        ('convnext_atto_mrla', 'mrla_blocks', ['stages.9.*']),
        ('deit_tiny_distilled_mrla', 'global_pool', 'avg'),
        ('ceit_tiny_mrla', 'global_pool', 'avg'),
        ('ceit_tiny_mrla', 'class_token', False),
        ('ceit_tiny_mrla', 'patch_size', 14),
        ('ceit_tiny_mrla', 'embed_dim', 48),
        ('pvt_v2_b0_mrla', 'global_pool', 'max'),
        ('efficientnet_b0_mrla', 'global_pool', 'median'),
    ],
)
def test_bad_values_are_named(name, argument, value):
    with pytest.raises(ValueError, match=re.escape(str(value).strip('[]'))):
        timm.create_model(name, **{argument: value})


@pytest.mark.parametrize(
    ('value', 'is_on'),
    [('false', False), ('No', False), ('off', False), ('', False), (0, False), ('true', True), (1, True)],
)
def test_switches_as_they_are_typed(value, is_on):
    layers = layer_attentions(timm.create_model('test_resnet_mrla', mrla_identity=value, mrla_recompute=value))
    for layer in layers.values():
        assert layer.recompute is is_on
        assert layer.norm.weight.any() == (not is_on)


def test_a_checkpoint_at_another_size_is_resampled(tmp_path):
    small = timm.create_model('deit_tiny_mrla', img_size=64, num_classes=7)
    torch.save(small.state_dict(), tmp_path / 'small.pth')
    overlay = {'file': str(tmp_path / 'small.pth'), 'num_classes': 7, 'input_size': (3, 64, 64)}
    large = timm.create_model(
        'deit_tiny_mrla', pretrained=True, num_classes=7, img_size=(96, 128), pretrained_cfg_overlay=overlay
    )
    assert large.pos_embed.shape[1] == 1 + 6 * 8
    assert torch.equal(large.blocks[3].mrla.lam, small.blocks[3].mrla.lam)
