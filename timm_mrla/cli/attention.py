"""The command `timm-mrla attention`: draws layer attention, or the feature maps of a block, for image files."""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from timm_mrla.attention import feature_maps, layer_attention, layer_of_block, layers_by_block
from timm_mrla.checkpoints import load_checkpoint
from timm_mrla.checks import check_checkpoint, check_model_name, explain_build_errors
from timm_mrla.cli.images import check_picture_path, open_image
from timm_mrla.model_card import IMAGE_MODES
from timm_mrla.plot import plot_attention, plot_feature_maps


def build(args: argparse.Namespace, checkpoint: str | None = None, **kwargs) -> nn.Module:
    """Build the model, and load a checkpoint if one is given."""
    if checkpoint:
        return load_checkpoint(checkpoint, args.model, **args.model_kwargs)
    with explain_build_errors(args.model, args.model_kwargs):
        return timm.create_model(args.model, **kwargs, **args.model_kwargs)


def check_model(args: argparse.Namespace) -> None:
    """Raise ValueError if the model has no layer attention, or none in the given block, or takes no images of files.

    No weights are read.
    """
    if ':' not in args.model:  # timm finds out which model a folder or repository contains
        check_model_name(args.model)
    model = build(args, device='meta')
    if args.features is None:
        layers_by_block(model)
    else:
        layer_of_block(model, args.features)
    channels = resolve_input_data_config(model)['input_size'][0]
    if channels not in IMAGE_MODES:
        raise ValueError(
            f'{args.model} takes images of {channels} channels, and image files have 1 or 3: use '
            'timm_mrla.layer_attention and feature_maps, which take tensors'
        )


def to_batch(images: list[Image.Image], model: nn.Module) -> torch.Tensor:
    """Transform images to the model's own input size and channels."""
    data_config = resolve_input_data_config(model)
    transform, mode = create_transform(**data_config), IMAGE_MODES[data_config['input_size'][0]]
    return torch.stack([transform(image.convert(mode)) for image in images])


def draw_features(found: list, args: argparse.Namespace, name: str, titles: list[str]) -> tuple[Figure, dict]:
    """Draw the maps of a block before and after layer attention; returns the figure and its numbers."""
    before, after = (torch.cat(maps) for maps in zip(*found, strict=True))
    figure = plot_feature_maps(before, after, f'Layer attention in {args.features} of {name}', titles)
    return figure, {'before': before, 'after': after}


def draw_attention(found: list, args: argparse.Namespace, name: str, titles: list[str]) -> tuple[Figure, dict]:
    """Draw the weights of layer attention; returns the figure and its numbers."""
    numbers = found[0]
    numbers.update({stage: torch.cat([attention[stage] for attention in found]) for stage in numbers})
    return plot_attention(numbers, f'What the blocks of {name} retrieve', titles, args.heads), numbers


def main(args: argparse.Namespace) -> None:
    """Read the images, run the model with each checkpoint, and write the picture, and the numbers if asked to."""
    out = Path(args.out)
    check_picture_path(out, {f'.{ending}' for ending in Figure().canvas.get_supported_filetypes()})
    for path in args.checkpoint or []:
        check_checkpoint(path)
    images = [open_image(image) for image in args.images]
    check_model(args)

    found, titles = [], []
    for checkpoint in args.checkpoint or [None]:
        model = build(args, checkpoint, pretrained=args.pretrained)
        batch = to_batch(images, model)
        found.append(
            feature_maps(model, batch, args.features) if args.features is not None else layer_attention(model, batch)
        )
        weights = checkpoint or (args.model if args.pretrained else 'random weights')
        titles += [f'{image}, {weights}' for image in args.images]

    draw = draw_attention if args.features is None else draw_features
    figure, numbers = draw(found, args, model.pretrained_cfg['architecture'], titles)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        figure.savefig(Path(tmp, out.name))
        if args.npz:
            np.savez(Path(tmp, 'numbers.npz'), **{name: x.numpy() for name, x in numbers.items()})
            os.replace(Path(tmp, 'numbers.npz'), out.with_suffix('.npz'))
        os.replace(Path(tmp, out.name), out)
