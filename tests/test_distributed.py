"""Tests of DistributedDataParallel and sharding: two gloo processes against one process with the whole batch."""

from multiprocessing import forkserver

import pytest
import timm
import torch
import torch.distributed as dist
from test_detection import batch, write_checkpoint
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from timm_mrla.detection import retina_net
from timm_mrla.hub import save_pretrained

# import it once in the fork server, because the import takes longer than the test itself
forkserver.set_forkserver_preload(['timm_mrla.detection'])

MODELS = {
    # group norms, because BatchNorm sees only the batch of its own process
    'resnet18_mrla': dict(channels=(32, 32, 64, 64), norm_layer='groupnorm1', mrla_recompute=True),
    'resnet18_mrlab': dict(channels=(32, 32, 64, 64), norm_layer='groupnorm1', mrla_recompute=True),
    'deit_tiny_mrla': dict(img_size=32, depth=3),
    'deit_tiny_mrlab': dict(img_size=32, depth=6),
    'deit_small_mrla': dict(img_size=32, depth=3, mrla_adapter=True),
}


def create(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, dtype=torch.float64, **MODELS[name])


def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 32, 32, dtype=torch.float64)


def train_half(rank, name, checkpointing, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = create(name)
    model.set_grad_checkpointing(checkpointing)
    ddp = DistributedDataParallel(model)  # which fails if a parameter gets no gradient
    for _ in range(2):
        model.zero_grad()
        ddp(images()[2 * rank : 2 * rank + 2]).square().mean().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters()}, f'{folder}/gradients.pth')
    dist.destroy_process_group()


@pytest.mark.parametrize(('name', 'checkpointing'), [*zip(MODELS, (False, True, True, False, True), strict=True)])
def test_gradients_are_those_of_the_whole_batch(name, checkpointing, tmp_path):
    start_processes(train_half, (name, checkpointing, str(tmp_path)), nprocs=2, start_method='forkserver')
    model = create(name)
    model(images()).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(torch.load(tmp_path / 'gradients.pth'), expected, rtol=1e-10, atol=1e-12)


def train_sharded(rank, name, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    mesh = dist.init_device_mesh('cpu', (2,))
    model = create(name)
    for module in model.modules():
        if hasattr(module, 'mrla'):
            fully_shard(module.mrla.attn, mesh=mesh)
            fully_shard(module.mrla, mesh=mesh)
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(images()[2 * rank : 2 * rank + 2]).square().mean().backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    if rank == 0:
        torch.save(gradients, f'{folder}/gradients.pth')
    save_pretrained(model, f'{folder}/model')
    dist.destroy_process_group()


@pytest.mark.parametrize('name', ['resnet18_mrla', 'deit_tiny_mrlab'])
def test_sharded_models_train_and_are_saved_whole(name, tmp_path):
    """Also if single layers inside layer attention are sharded separately."""
    start_processes(train_sharded, (name, str(tmp_path)), nprocs=2, start_method='forkserver')
    model = create(name)
    expected = model.eval()(images())
    model.train()(images()).square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(torch.load(tmp_path / 'gradients.pth'), gradients, rtol=1e-10, atol=1e-12)
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True, dtype=torch.float64).eval()
    assert torch.equal(loaded(images()), expected)


def batch_of_one_size():
    """With different sizes, one process would pad the smaller image, and two processes would not."""
    images, targets = batch(torch.float64)
    images = [image[:, :64, :60] for image in images]
    for target in targets:
        target['boxes'] = target['boxes'].clamp(max=60)
    return images, targets


def train_one_image(rank, checkpoint, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = retina_net('resnet18_mrla', weights_backbone=checkpoint, num_classes=4, min_size=32, max_size=48).double()
    model.load_state_dict(torch.load(f'{folder}/model.pth'))
    images, targets = batch_of_one_size()
    ddp = DistributedDataParallel(model.train())  # which fails if a parameter gets no gradient
    for _ in range(2):
        model.zero_grad()
        sum(ddp(images[rank : rank + 1], targets[rank : rank + 1]).values()).backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, f'{folder}/gradients.pth')
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_a_detector_are_those_of_the_whole_batch(tmp_path):
    """RetinaNet, because its losses are means over images and involve no random sampling."""
    checkpoint = write_checkpoint(tmp_path / 'checkpoint', 'resnet18_mrla')
    model = retina_net('resnet18_mrla', weights_backbone=checkpoint, num_classes=4, min_size=32, max_size=48).double()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    start_processes(train_one_image, (checkpoint, str(tmp_path)), nprocs=2, start_method='forkserver')
    sum(model.train()(*batch_of_one_size()).values()).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert any('layer4.1.mrla.lam' in name for name in expected)
    torch.testing.assert_close(torch.load(tmp_path / 'gradients.pth'), expected, rtol=1e-10, atol=1e-12)
