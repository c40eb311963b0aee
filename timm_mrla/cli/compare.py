"""The command `timm-mrla compare`: trains models and their plain backbones alike, and reports what differs."""

import argparse
import sys

from timm_mrla.compare.comparison import compare
from timm_mrla.compare.report import report


def main(args: argparse.Namespace) -> None:
    """Do the comparison and print its report; exit with 1 if a run failed or diverged."""
    if args.jobs < 1:
        raise ValueError(f'--jobs {args.jobs} is less than 1')
    devices = [None] * args.jobs if args.devices is None else args.devices.split(',')
    if '' in devices:
        raise ValueError(f'--devices {args.devices!r} names no device between two commas')
    try:
        results = compare(args.script, args.model, args.out, args.train_args, args.seeds, args.metric, devices)
    except KeyboardInterrupt:
        raise KeyboardInterrupt('; the same command goes on from here') from None
    print(report(results))
    if results['failed'] or results['diverged']:
        sys.exit(1)
