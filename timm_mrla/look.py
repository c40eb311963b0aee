"""Looks at a model by name, with images and checkpoints from files, and writes the picture."""

import os
import tempfile
from pathlib import Path
from textwrap import shorten

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, load_state_dict
from torch import nn

import timm_mrla.models  # noqa: F401  registers
from timm_mrla.attention import feature_maps, layer_attention
from timm_mrla.plot import plot_attention, plot_feature_maps

__all__ = ['look']


def _read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f'there is no checkpoint {path!r}')
    try:
        return load_state_dict(path)
    except Exception as e:  # pickles, archives and safetensors have errors of their own
        raise ValueError(f'{path!r} is not a checkpoint that timm reads: {shorten(str(e), 200)}') from e


def _create(model_name: str, pretrained: bool, checkpoint: str | None) -> nn.Module:
    named = ':' not in model_name  # else timm finds the model's configuration with its weights
    if named and not timm.is_model(model_name):
        raise ValueError(
            f"there is no model {model_name!r}; timm.list_models('*_mrla*') lists those with layer attention"
        )
    kwargs = {'pretrained': pretrained}
    if checkpoint is not None:
        state_dict = _read_checkpoint(checkpoint)
        overlay = {'source': '', 'state_dict': state_dict}
        kwargs = {'pretrained': True, 'pretrained_cfg_overlay': overlay}
        if named:
            # as many classes as the checkpoint has
            classifier = to_2tuple(get_pretrained_cfg(model_name).classifier)[0]
            if f'{classifier}.weight' in state_dict:
                kwargs['num_classes'] = overlay['num_classes'] = len(state_dict[f'{classifier}.weight'])
    try:
        return timm.create_model(model_name, **kwargs)
    except RuntimeError as e:
        source = f'{checkpoint!r} does not fit {model_name}' if checkpoint else f'{model_name} cannot be created'
        raise ValueError(f'{source}: {shorten(str(e), 300)}') from e


def _open(path: str, mode: str) -> Image.Image:
    try:
        return Image.open(path).convert(mode)
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no image {path!r}') from None
    except OSError as e:
        raise ValueError(f'{path!r} is not an image that Pillow reads') from e


def look(
    model: str,
    images: list[str],
    out: str,
    checkpoints: list[str] | None = None,
    pretrained: bool = False,
    heads: bool = False,
    features: str | None = None,
    npz: bool = False,
) -> None:
    """Draw the layer attention of a model, each checkpoint's and each image's side by side.

    Args:
        model: A name that `timm.create_model` takes.
        images: Paths of images.
        out: Path of the picture; its ending says which of matplotlib's formats it has.
        checkpoints: Paths of checkpoints that timm reads, with any number of classes.
        pretrained: Take the weights that come with the model.
        heads: Draw each head.
        features: Name of a block whose maps before and after layer attention are drawn instead.
        npz: Write the numbers too, next to the picture: the arrays of `layer_attention` by stage or those of
            `feature_maps` as `before` and `after`, in the order in which the picture has them from left to right.

    Raises:
        ValueError: There is no such model or block, or a file is not what it should be.
        OSError: There is no such file, or the picture cannot be written.
    """
    out = Path(out)
    if out.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise ValueError(f"{str(out)!r} does not end like a picture; '.png' does")
    if not out.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {str(out.parent)!r} to write to')

    found, titles = [], []
    for checkpoint in checkpoints or [None]:
        net = _create(model, pretrained, checkpoint)
        data_config = resolve_model_data_config(net)
        transform = create_transform(**data_config)
        mode = 'L' if data_config['input_size'][0] == 1 else 'RGB'
        batch = torch.stack([transform(_open(image, mode)) for image in images])
        found.append(feature_maps(net, batch, features) if features else layer_attention(net, batch))
        weights = checkpoint or (model if pretrained else 'random weights')
        titles += [f'{image}, {weights}' for image in images]
    name = net.pretrained_cfg['architecture']

    if features:
        before, after = (torch.cat(maps) for maps in zip(*found, strict=True))
        numbers = {'before': before, 'after': after}
        figure = plot_feature_maps(before, after, f'Layer attention in {features} of {name}', titles)
    else:
        numbers = found[0]
        numbers.update({stage: torch.cat([attention[stage] for attention in found]) for stage in numbers})
        figure = plot_attention(numbers, f'What the blocks of {name} retrieve', titles, heads)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        figure.savefig(Path(tmp, out.name))
        if npz:
            np.savez(Path(tmp, 'numbers.npz'), **{name: x.numpy() for name, x in numbers.items()})
            os.replace(Path(tmp, 'numbers.npz'), out.with_suffix('.npz'))
        os.replace(Path(tmp, out.name), out)
