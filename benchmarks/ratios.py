"""Draws the results of throughput.py as bars: time relative to timm's plain backbone, which is at 1.

python benchmarks/ratios.py benchmarks/results/costs/cpu.json --out .github/costs.png
"""

import argparse
import json
import re
from pathlib import Path

from matplotlib.figure import Figure

# (task, how) -> position of the bar and colour: a training step, and inference as it is deployed, with folded norms
BARS = {('training', 'eager'): (-0.2, '#0072b2'), ('inference', 'reparameterized'): (0.2, '#e69f00')}


def main() -> None:
    """Draw two bars for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('results', nargs='+', metavar='JSON', help='what throughput.py --json wrote')
    parser.add_argument('--out', default='costs.png', help='picture to write (default: %(default)s)')
    args = parser.parse_args()
    files = [json.loads(Path(path).read_text()) for path in args.results]
    found = [row for file in files for row in file['results'] if (row['task'], row['how']) in BARS]
    for row in found:
        row['model'] = re.sub('_patch.*_224', '', row['model']) + (', no kernels' if row['fused'] == 'off' else '')
    models = [*dict.fromkeys(row['model'] for row in found)]
    figure = Figure(figsize=(6.5, 0.8 + 0.3 * len(models)), layout='constrained')
    ax = figure.subplots()
    for (task, how), (offset, color) in BARS.items():
        rows = {row['model']: row for row in found if (row['task'], row['how']) == (task, how)}
        at = [models.index(model) + offset for model in rows]
        ratios = [row['ratio'] for row in rows.values()]
        ax.barh(at, ratios, height=0.36, color=color, label=task if how == 'eager' else f'{task}, folded')
        for y, ratio in zip(at, ratios, strict=True):
            ax.text(ratio + 0.01, y, f'{ratio:.2f}', va='center', fontsize=7)
    ax.set_yticks(range(len(models)), models, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(1, color='black', linewidth=1, linestyle='--')
    ax.set_xlabel(f'time relative to the plain backbone ({files[0]["device"]})', fontsize=8)
    ax.set_xlim(0, 1.1 * max(row['ratio'] for row in found))
    figure.legend(fontsize=7, loc='outside upper right', ncols=2)
    figure.savefig(args.out, dpi=130)


if __name__ == '__main__':
    main()
