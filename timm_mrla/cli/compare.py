"""The command `timm-mrla compare`: trains models and their plain backbones alike, and reports what differs."""

import argparse
import sys

from timm_mrla.compare.comparison import compare
from timm_mrla.compare.report import report


def main(args: argparse.Namespace) -> None:
    """Do the comparison and print its report; exit with 1 if a run failed."""
    if args.jobs < 1:
        raise ValueError(f'--jobs {args.jobs} is less than 1')
    devices = args.devices.split(',') if args.devices else [None] * args.jobs
    try:
        results = compare(args.script, args.model, args.out, args.train_args, args.seeds, args.metric, devices)
    except KeyboardInterrupt:
        sys.exit('timm-mrla: stopped; the same command goes on from here')
    print(report(results))
    if results['failed']:
        sys.exit(1)
