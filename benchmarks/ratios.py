"""Draws the results of throughput.py as bars: time relative to timm's plain backbone, which is at 1.

python benchmarks/ratios.py benchmarks/results/costs/cpu.json --out .github/costs.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

COLORS = {'training': '#0072b2', 'inference': '#e69f00'}


def main() -> None:
    """Draw one panel of bars for each file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('results', nargs='+', metavar='JSON', help='what throughput.py --json wrote')
    parser.add_argument('--out', default='costs.png', help='picture to write (default: %(default)s)')
    args = parser.parse_args()
    files = [json.loads(Path(path).read_text()) for path in args.results]
    rows = max(len(file['results']) for file in files)
    figure = Figure(figsize=(7 * len(files), 1 + 0.28 * rows), layout='constrained')
    for ax, file in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        for i, row in enumerate(file['results']):
            ax.barh(i, row['ratio'], color=COLORS[row['task']])
            ax.plot([row['least'], row['greatest']], [i, i], color='black', linewidth=1)
            ax.text(0.02, i, f'{row["task"]}, {row["how"]}: {row["ratio"]:.2f}', va='center', fontsize=7, color='white')
        labels = [row['model'] + ('' if row['blocks'] == 'all' else f' ({row["blocks"]})') for row in file['results']]
        ax.set_yticks(range(len(labels)), labels, fontsize=7)
        ax.invert_yaxis()
        ax.axvline(1, color='black', linewidth=1, linestyle='--')
        ax.set_xlabel('time relative to the plain backbone; lines span all rounds', fontsize=8)
        ax.set_title(f'{file["device"]}, torch {file["torch"]}', fontsize=9)
    figure.savefig(args.out, dpi=150)


if __name__ == '__main__':
    main()
