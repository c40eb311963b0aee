"""Prints the results of a benchmark: machine, versions, date and a table."""

import json
from pathlib import Path

from timm_mrla.compare.machine import describe_machine

__all__ = ['report']


def report(rows: list[dict[str, object]], device: str, path: str | None) -> None:
    """Print machine and versions, then rows with the same keys as a table; write both as JSON if there is a path."""
    measured = describe_machine(device)
    print('\n' + '; '.join(f'{key} {value}' for key, value in measured.items()) + '\n')
    print('| ' + ' | '.join(rows[0]) + ' |\n|' + '---|' * len(rows[0]))
    for row in rows:
        print('| ' + ' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values()) + ' |')
    if path:
        Path(path).write_text(json.dumps({**measured, 'results': rows}, indent=2) + '\n')
