"""Writes docs/api.md from docstrings: `python tests/api.py`."""

import inspect
from importlib import import_module
from pathlib import Path

MODULES = ('timm_mrla', 'timm_mrla.layers', 'timm_mrla.hub', 'timm_mrla.detection')


def _signature(obj: object) -> str:
    """The parameters with their defaults, without types."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(obj).parameters.values()]
    return str(inspect.Signature(parameters))


def api_page() -> str:
    """The page: public functions and classes by module, with their signatures and first lines of docstrings."""
    parts = [
        '# API reference',
        'Public functions and classes; `help(NAME)` shows the whole docstring. `python tests/api.py` writes this page.',
    ]
    for name in MODULES:
        module = import_module(name)
        parts += [f'## {name}', inspect.getdoc(module).splitlines()[0]]
        public = [(key, getattr(module, key)) for key in sorted(module.__all__)]
        for key, obj in public:
            # torch's own signatures differ between its versions
            if inspect.isfunction(obj) or (
                inspect.isclass(obj) and 'timm_mrla' in getattr(obj.__init__, '__module__', '')
            ):
                parts.append(f'- `{key}{_signature(obj)}`\n\n  {inspect.getdoc(obj).splitlines()[0]}')
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    Path(__file__).parent.parent.joinpath('docs', 'api.md').write_text(api_page())
