"""What the benchmarks print: the machine, the versions, the date, and a table."""

import json
from pathlib import Path

from timm_mrla.compare.machine import describe_machine

__all__ = ['report']


def report(rows: list[dict[str, object]], device: str, path: str | None) -> None:
    """Print rows of one set of keys as a table, below what they were measured on; write all of it as JSON to a path."""
    measured = describe_machine(device)
    print('\n' + '; '.join(f'{key} {value}' for key, value in measured.items()) + '\n')
    print('| ' + ' | '.join(rows[0]) + ' |\n|' + '---|' * len(rows[0]))
    for row in rows:
        print('| ' + ' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values()) + ' |')
    if path:
        Path(path).write_text(json.dumps({**measured, 'results': rows}, indent=2) + '\n')
