"""The command `timm-mrla demo`: trains a model on handwritten digits, saves it and tests what timm loads back."""

import argparse

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from tqdm import trange

from timm_mrla.checks import check_mrla_name, check_new_folder, explain_build_errors
from timm_mrla.hub import save_pretrained

# mean and std are those of the digits, scaled to [0, 1]
_DATA_CONFIG = {
    'input_size': (1, 32, 32),
    'mean': (0.305,),
    'std': (0.324,),
    'crop_pct': 1.0,
    'interpolation': 'bilinear',
}


def _load_digits() -> list[torch.Tensor]:
    """Load scikit-learn's 1,797 scans: train and test images [N, 1, 32, 32], train and test labels [N]."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = F.interpolate(images, size=_DATA_CONFIG['input_size'][1:], mode='bilinear')
    images = (images - _DATA_CONFIG['mean'][0]) / _DATA_CONFIG['std'][0]
    labels = torch.from_numpy(digits.target)
    return train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)


@torch.inference_mode()
def _accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


def train_digits(model_name: str, out: str, epochs: int) -> float:
    """Train a model on 80 % of the digits and write it to a folder that `timm.create_model('local-dir:...')` loads.

    Args:
        model_name: Name of a model with layer attention.
        out: The folder, which must not exist yet.
        epochs: Epochs of training.

    Returns:
        The accuracy on the other 20 %, in [0, 1].

    Raises:
        ValueError: There is no such model, or epochs is less than 1.
        FileExistsError: The folder exists.
    """
    check_mrla_name(model_name)
    if epochs < 1:
        raise ValueError(f'{epochs} epochs are less than 1')
    check_new_folder(out)
    x_train, x_test, y_train, y_test = _load_digits()

    torch.manual_seed(0)
    # patches of 8x8 pixels: 16x16 would give only four tokens
    size = {'img_size': 32, 'patch_size': 8} if get_pretrained_cfg(model_name).fixed_input_size else {}
    model_kwargs = {'in_chans': 1, 'num_classes': 10, **size}
    with explain_build_errors(model_name, model_kwargs):
        model = timm.create_model(model_name, **model_kwargs)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(optimizer, 'cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-5)
    loss_fn = LabelSmoothingCrossEntropy(0.1)

    progress = trange(epochs, desc=model_name, unit='epoch')
    for epoch in progress:
        model.train()
        scheduler.step(epoch)
        for batch in torch.randperm(len(x_train)).split(32):
            loss = loss_fn(model(x_train[batch]), y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = _accuracy(model, x_test, y_test)
        progress.set_postfix(loss=f'{loss.item():.3f}', accuracy=f'{accuracy:.1%}')

    save_pretrained(model, out, data_config=_DATA_CONFIG)
    return accuracy


def test_digits(model_name: str) -> float:
    """Load a trained model by its name and return its accuracy, in [0, 1], on the digits that training left out."""
    _, x_test, _, y_test = _load_digits()
    return _accuracy(timm.create_model(model_name, pretrained=True), x_test, y_test)


def main(args: argparse.Namespace) -> None:
    """Train the model, load it back, and print both accuracies and how to train on other images."""
    accuracy = train_digits(args.model, args.out, args.epochs)
    name = f'local-dir:{args.out}'
    starts = timm.list_pretrained(f'{args.model}.*')
    model = f'{starts[0]} --pretrained' if starts else args.model
    print(f"""
test accuracy:                                {accuracy:.2%}
of timm.create_model({name!r}): {test_digits(name):.2%}

On your own images, a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, with timm's train.py:
  timm-mrla run train.py --data-dir DATA --model {model} --num-classes N --amp --channels-last""")
