"""Tests that every supported timm module must pass, with a small model for each kind of block, form and layout."""

import copy
import pickle

import naive
import pytest
import safetensors.torch
import timm
import torch
from slow import slow_except
from timm.models import get_pretrained_cfg
from timm.utils.model import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_mrla
from timm_mrla.hub import save_pretrained
from timm_mrla.layers import layer_attentions, to_map
from timm_mrla.models import BACKBONES, classifier_names

SHALLOW = {'depths': (1, 1, 2, 1)}
NARROW = {'img_size': 64, 'embed_dim': (32, 32, 64, 64), 'depths': (1, 2, 2, 1)}
# timm's entry, arguments for a small model, and the size of its images
CASES = {
    'resnet': ('test_resnet', {}, (64, 96)),
    'resnet with basic blocks': ('resnet10t', {'channels': (32, 32, 64, 64)}, (64, 96)),
    'resnetv2': ('resnetv2_18', {'channels': (32, 32, 64, 64)}, (64, 96)),
    'resnetv2 with group norm': ('resnetv2_50d_gn', {'layers': (1, 2, 2, 1)}, (32, 64)),
    'regnet': ('regnety_002', {'depth': 9}, (64, 96)),
    'efficientnet': ('tinynet_e', {}, (64, 96)),
    'efficientnet with fused blocks': ('efficientnet_es', {}, (32, 64)),
    'mobilenetv3': ('mobilenetv3_small_050', {}, (64, 96)),
    'mobilenetv3 with attention': ('mobilenetv4_hybrid_medium_075', {}, (32, 64)),
    'convnext': ('test_convnext', SHALLOW, (64, 96)),
    'convnext with convolutional mlp': ('test_convnext3', {}, (64, 96)),
    'swin_transformer': ('swin_tiny_patch4_window7_224', {'embed_dim': 24, **SHALLOW}, (56, 84)),
    'swin_transformer_v2': ('swinv2_tiny_window8_256', {'embed_dim': 24, **SHALLOW}, (64, 96)),
    'vision_transformer': ('test_vit', {}, (64, 96)),
    'vision_transformer with registers': ('test_vit2', {'reg_tokens': 4}, (64, 96)),
    'vision_transformer with parallel blocks': ('vit_small_patch16_18x2_224', {'depth': 2, 'embed_dim': 96}, (64, 96)),
    'deit': ('deit_tiny_patch16_224', {'depth': 3}, (64, 96)),
    'deit with two prefix tokens': ('deit_tiny_distilled_patch16_224', {'depth': 3}, (64, 96)),
    'eva': ('eva02_tiny_patch14_224', {'depth': 3}, (56, 84)),
    'eva with registers': ('vit_small_patch16_dinov3', {'depth': 3, 'embed_dim': 96, 'num_heads': 3}, (64, 96)),
    'pvt_v2': ('pvt_v2_b0', {'embed_dims': (16, 32, 40, 64), **SHALLOW}, (64, 96)),
    'maxxvit': ('maxvit_rmlp_pico_rw_256', NARROW, (64, 64)),
    'maxxvit of one kind of block': ('coatnet_pico_rw_224', NARROW, (64, 64)),
    'metaformer': ('poolformerv2_s12', {}, (32, 64)),
    'metaformer with tokens': ('caformer_s18', {}, (32, 64)),
    'edgenext': ('edgenext_xx_small', {'depths': (1, 2, 2, 2)}, (64, 96)),
    'fastvit': ('fastvit_sa12', {'embed_dims': (32, 64, 64, 128), 'layers': (1, 1, 1, 1)}, (64, 96)),
    'inception_next': ('inception_next_atto', SHALLOW, (64, 96)),
    'mambaout': ('test_mambaout', {}, (64, 96)),
    'starnet': ('starnet_s050', {}, (64, 96)),
    'focalnet': ('focalnet_tiny_srf', {}, (32, 64)),
    'davit': ('davit_tiny', {'embed_dims': (32, 64, 96, 128), 'num_heads': (2, 2, 3, 4), **SHALLOW}, (64, 96)),
}
ENTRIES = {backbone: entry for entry, backbone in BACKBONES.items() if entry.endswith('_mrla')}
MODULES = [case for case in CASES if ' ' not in case]
# those with pretrained weights in timm -> the first of their warm starts
WARM = {case: timm.list_pretrained(f'{ENTRIES[name]}.*') for case, (name, _, _) in CASES.items()}
PRETRAINED = {case: names[0] for case, names in WARM.items() if names}
every = pytest.mark.parametrize('case', CASES)
# in the plain test command, one module of each form, layout and kind of norm; all of them for the equations and the
# identity
FEW = ['resnet', 'efficientnet', 'convnext', 'swin_transformer', 'vision_transformer', 'pvt_v2', 'metaformer']
every_module = pytest.mark.parametrize('case', slow_except(FEW, CASES))


def arguments(case, **kwargs):
    name, small, size = CASES[case]
    if get_pretrained_cfg(name).fixed_input_size:
        small = {'img_size': size, **small}
    return name, {'num_classes': 7, **small, **kwargs}


def randomize(model):
    """Move a model away from its initial values: trivial statistics, zero biases and norms, tiny layer scales."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim < 2:
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model


def stock(case, dtype=torch.float64, **kwargs):
    """timm's plain model with random weights."""
    torch.manual_seed(0)
    name, kwargs = arguments(case, **kwargs)
    return randomize(timm.create_model(name, **kwargs)).to(dtype).eval()


def create(case, dtype=torch.float64, **kwargs):
    """Our model by name, initialized for training from scratch."""
    torch.manual_seed(0)
    name, kwargs = arguments(case, **kwargs)
    return randomize(timm.create_model(ENTRIES[name], **kwargs)).to(dtype).eval()


def images(case, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, *CASES[case][2], dtype=dtype, generator=torch.Generator().manual_seed(1))


def assert_equal_functions(ours, theirs, x):
    """Outputs in eval and train mode and intermediate features are bit-identical."""
    for mode in (False, True):
        outputs = []
        for model in (ours, theirs):
            torch.manual_seed(0)
            outputs.append(model.train(mode)(x))
        assert torch.equal(*outputs)
    intermediates = [model.eval().forward_intermediates(x)[1] for model in (ours, theirs)]
    assert all(torch.equal(*pair) for pair in zip(*intermediates, strict=True))


@every
def test_attached_it_computes_what_it_did_and_can_learn(case):
    plain = stock(case)
    model = copy.deepcopy(plain)
    frozen = next(model.parameters()).requires_grad_(False)
    assert timm_mrla.attach(model) is model
    assert not model.training and not any(m.training for m in model.modules())
    sites = [site for site in timm_mrla.sites(model) if not site.reason]
    assert [f'{site.name}.mrla' for site in sites] == [*layer_attentions(model)]
    names = {n for n, _ in model.named_parameters() if '.mrla.' not in n}
    assert names == {n for n, _ in plain.named_parameters()}
    theirs = plain.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items() if '.mrla.' not in k)
    assert_equal_functions(model, plain, images(case))

    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    out, intermediates = model.train().forward_intermediates(images(case))
    (model.forward_head(out).square().sum() + sum(y.square().mean() for y in intermediates)).backward()
    for name, layer in layer_attentions(model).items():
        assert all(scale.grad.any() for scale in layer.output_scales()), name


@every_module
def test_a_warm_start_by_name_is_the_stock_model(case):
    plain = stock(case, dtype=torch.float32, num_classes=1000)
    name, kwargs = arguments(case, num_classes=1000)
    tag = next((t for t in timm.list_pretrained(f'{ENTRIES[name]}.warmstart_*')), None)
    if tag is None:
        pytest.skip(f'timm has no weights of {name}')
    size = {'input_size': (3, *CASES[case][2])} if 'img_size' in kwargs else {}
    overlay = {'state_dict': plain.state_dict(), 'num_classes': 1000, **size}
    model = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert_equal_functions(model, plain, images(case, dtype=torch.float32))


@every
@torch.no_grad()
def test_the_first_and_the_last_block_are_the_equation(case):
    """timm's own block, then the equations in loops."""
    model, calls = create(case), {}
    layers = layer_attentions(model)
    for name in layers:
        block = model.get_submodule(name.removesuffix('.mrla'))
        block.register_forward_hook(
            lambda block, args, kwargs, out, name=name: calls.update({name: (block, args, kwargs, out)}),
            with_kwargs=True,
        )
    model(images(case, batch=1))
    for name in {next(iter(layers)), [*layers][-1]}:
        block, args, kwargs, out = calls[name]
        mrla, o, feat_size = block.mrla, args[0], kwargs.pop('feat_size', args[1] if len(args) > 1 else None)
        y = block.stock.forward(block, *args, **kwargs)
        if getattr(block, 'downsample', None) is not None and o.shape != y.shape:
            o = block.downsample(o)
        if case == 'davit':  # maps, read as tokens
            feat_size, out, y, o = y.shape[2:], *(z.flatten(2).transpose(1, 2) for z in (out, y, o))
        if mrla.form == 'pre':
            normed, o = mrla.norm_x(y), mrla.norm_o(o)
            m = naive.light(mrla, to_map(normed, mrla.layout, feat_size)[0], to_map(o, mrla.layout, feat_size)[0])
            prefix = to_map(normed, mrla.layout, feat_size)[1]
        else:
            m, prefix = mrla.norm(naive.light(mrla, y, o)), None
        before, after = (to_map(z, mrla.layout, feat_size) for z in (y, out))
        torch.testing.assert_close(after[0], before[0] + m, rtol=1e-10, atol=1e-10)
        if prefix is not None:
            torch.testing.assert_close(after[1], before[1] + prefix, rtol=1e-10, atol=1e-10)


@every_module
def test_gradient_checkpointing_and_recomputation_change_nothing(case):
    grads = []
    for checkpointing, recompute in ((False, False), (True, False), (True, True)):
        model = create(case, mrla_recompute=recompute).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        model(images(case)).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('case', slow_except(['vision_transformer'], MODULES))
@torch.no_grad()
def test_it_compiles_without_a_graph_break_and_exports(case):
    model, x = create(case), images(case)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=1e-9, atol=1e-9)


@every_module
def test_copies_pickles_and_folders_are_the_model(case, tmp_path):
    model, x = create(case, dtype=torch.float32), images(case, dtype=torch.float32)
    expected = model(x)
    copied = copy.deepcopy(model)
    nn.init.ones_(next(model.parameters()))
    assert torch.equal(copied(x), expected)
    assert not torch.equal(model(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(copied))(x), expected)
    save_pretrained(copied, tmp_path / 'folder')
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}/folder', pretrained=True).eval()(x), expected)


def train_adapter(model, x):
    """Two steps with weight decay: the first moves the output scales, the second what they multiply."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        optimizer.step()


@every_module
def test_the_backbone_of_an_adapter_stays_frozen(case):
    """In training mode, and in copies and pickles: parameters and buffers, to the last bit."""
    plain, x = stock(case), images(case)
    model = timm_mrla.attach(copy.deepcopy(plain), adapter=True)
    train_adapter(model, x)
    before, after, classifier = plain.state_dict(), model.state_dict(), classifier_names(model)
    assert {*before} == {k for k in after if '.mrla.' not in k}
    assert all(torch.equal(after[k], before[k]) for k in {*before} - classifier)
    assert all(p.requires_grad == ('.mrla.' in k or k in classifier) for k, p in model.named_parameters())
    for layer in layer_attentions(model).values():
        assert all(scale.any() for scale in (*layer.norm.parameters(), *layer.norm_x.parameters()))
        assert getattr(layer.norm, 'num_batches_tracked', 2) == 2
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))).train()
    model(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in {*before} - classifier)


@pytest.mark.parametrize('case', slow_except(FEW, PRETRAINED))
def test_the_file_of_an_adapter_is_small(case, tmp_path):
    """It has layer attention and the classifier, and is loaded with the backbone's weights, here from a file."""
    plain, x = stock(case, dtype=torch.float32), images(case, dtype=torch.float32)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    _, kwargs = arguments(case)
    overlay = {'file': str(tmp_path / 'plain.pth'), 'num_classes': -1}
    model = timm.create_model(
        PRETRAINED[case], pretrained=True, pretrained_cfg_overlay=overlay, mrla_adapter=True, **kwargs
    )
    train_adapter(model, x)
    expected = model.eval()(x)
    save_pretrained(model, tmp_path / 'adapter')
    trained = {k for k in model.state_dict() if '.mrla.' in k} | classifier_names(model)
    assert {*safetensors.torch.load_file(tmp_path / 'adapter' / 'model.safetensors')} == trained
    loaded = timm.create_model(f'local-dir:{tmp_path}/adapter', pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded.eval()(x), expected)
    assert all(p.requires_grad == (k in trained) for k, p in loaded.named_parameters())


@every_module
@torch.no_grad()
def test_layouts_folding_and_half_precision(case):
    model, x = create(case), images(case)
    expected = model(x)
    folded = reparameterize_model(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-9, atol=1e-9)
    half = model.float().bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@every_module
@torch.no_grad()
def test_parameters_and_macs_are_those_of_the_equations(case):
    """Parameters: 2 K(C) + 10 C and the norms. MACs: the convolutions of q, k and v."""

    def cost(model):
        with FlopCounterMode(display=False) as counter:
            model(images(case, batch=1))
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2

    model, maps = create(case), []
    for layer in layer_attentions(model).values():
        layer.attn.register_forward_pre_hook(lambda attn, args: maps.append(args[0].shape))
    params, macs = (a - b for a, b in zip(cost(model), cost(stock(case)), strict=True))
    norms = [
        sum(p.numel() for norm in (layer.norm, layer.norm_x, layer.norm_o) for p in norm.parameters())
        for layer in layer_attentions(model).values()
    ]
    assert params == sum(2 * naive.kernel_size(C) + 10 * C for _, C, _, _ in maps) + sum(norms)
    assert macs == sum(9 * C * H * W + 2 * naive.kernel_size(C) * C for _, C, H, W in maps)
