"""The command `timm-mrla push`: publishes a folder or a checkpoint on the Hugging Face Hub."""

import argparse
import os

from timm_mrla.checkpoints import load_checkpoint
from timm_mrla.checks import check_metrics, check_mrla_name, check_repo
from timm_mrla.hub import load_folder, push_to_hub
from timm_mrla.model_card import model_card


def main(args: argparse.Namespace) -> None:
    """Load the model, upload it with a model card and print its address."""
    check_repo(args.repo)
    check_metrics(args.metric, args.dataset)
    metadata = dict(license=args.license, datasets=args.dataset, base_model=args.base_model, metrics=args.metric)
    card = None
    if os.path.isdir(args.source):
        if args.model is not None or args.model_kwargs:
            raise ValueError(f'{args.source!r} says itself which model it holds: leave out --model and --model-kwargs')
        model, card = load_folder(args.source)
        if card and any(metadata.values()):
            raise ValueError(f'{args.source!r} has a model card, README.md: write its licence, data and results there')
    elif args.model:
        check_mrla_name(args.model)
        model = load_checkpoint(args.source, args.model, **args.model_kwargs)
    else:
        raise ValueError(f'{args.source!r} is no folder; for a checkpoint, name the model: --model NAME')
    card = card or model_card(model, f'hf-hub:{args.repo}', **metadata)
    print(push_to_hub(model, args.repo, card, private=args.private))
