"""The command `timm-mrla run`: runs a script, such as timm's train.py, with the models registered."""

import argparse
import os
from pathlib import Path

from timm_mrla.cli.launcher import launch


def main(args: argparse.Namespace) -> None:
    """Check that there is such a script, of text, and go on as that script."""
    if not (args.module or os.path.isfile(args.script)):
        raise ValueError(
            f'there is no script {args.script!r}; timm keeps its scripts at the top of its repository, '
            'https://github.com/huggingface/pytorch-image-models'
        )
    if not args.module and b'\0' in Path(args.script).read_bytes():
        raise ValueError(f'{args.script!r} is a binary file, no Python script')
    launch(*['-m'] * args.module, args.script, *args.args)
