"""The command `timm-mrla convert`: makes a folder that timm loads from a checkpoint of a training script."""

import argparse

from timm_mrla.checkpoints import load_checkpoint
from timm_mrla.checks import check_metrics, check_mrla_name, check_new_folder
from timm_mrla.hub import save_pretrained
from timm_mrla.model_card import model_card


def main(args: argparse.Namespace) -> None:
    """Load the checkpoint, write the folder and print how to load it."""
    check_new_folder(args.out)
    check_mrla_name(args.model)
    check_metrics(args.metric, args.dataset)
    metadata = dict(license=args.license, datasets=args.dataset, base_model=args.base_model, metrics=args.metric)
    model = load_checkpoint(args.checkpoint, args.model, **args.model_kwargs)
    name = f'local-dir:{args.out}'
    save_pretrained(model, args.out, model_card(model, name, **metadata))
    print(f'{args.model} with {model.num_classes} classes: timm.create_model({name!r}, pretrained=True)')
