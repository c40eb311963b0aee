"""Reports how the models of a comparison differ from one of them, in pairs of one seed.

    python benchmarks/ablations.py RESULTS_JSON --to MODEL

The file is a result of `timm-mrla compare`.
"""

import argparse
import json
from pathlib import Path

from depth import COLUMNS, bullet, gaps


def main() -> None:
    """Print the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('results', type=Path, help='results.json of a comparison')
    parser.add_argument('--to', required=True, help='the model that the others are compared with')
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    if args.to not in results['arms']:
        parser.error(f'{args.to!r} is none of its models: {", ".join(results["arms"])}')
    for model in results['arms']:
        if model != args.to:
            print(bullet(f'`{model}`', {column: gaps(results, model, args.to, column) for column in COLUMNS}))


if __name__ == '__main__':
    main()
