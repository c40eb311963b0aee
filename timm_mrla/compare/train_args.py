"""Reads the arguments that a user gives to train.py, and refuses those that a comparison sets itself."""

import argparse
from pathlib import Path
from typing import Any

import yaml


def _read_config(path: str) -> dict[str, Any]:
    """Read a YAML file of arguments for train.py; ValueError if it is none."""
    try:
        config = yaml.safe_load(Path(path).read_text()) if path else {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f'{path!r} cannot be read as YAML: {e}') from e
    if not isinstance(config, dict):
        raise ValueError(f'{path!r} holds no arguments of train.py by name, such as lr: 0.1')
    return config


def parse_train_args(train_args: list[str]) -> argparse.Namespace:
    """Parse the arguments that a comparison adds to, and keep all others in `rest`.

    As in train.py, the command line overrides a YAML file (-c).
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own = [parser.add_argument(f'--{name}') for name in ('model', 'seed', 'output', 'experiment', 'resume')]
    own.append(parser.add_argument('--pretrained', action='store_true', default=None))
    parser.add_argument('-c', '--config', default='')
    parser.add_argument('--model-kwargs', nargs='*')
    parser.add_argument('--device')
    parser.add_argument('--device-modules', nargs='+')
    options = parser._option_string_actions  # private, but argparse lists its options nowhere else
    for name in (arg.partition('=')[0] for arg in train_args):
        if len(name) > 2 and name not in options and (long := [o for o in options if o.startswith(name)]):
            raise ValueError(f'{name} may be short for {" or ".join(long)}; write it in full')
    args, rest = parser.parse_known_args(train_args)
    config = _read_config(args.config)
    for action in own:
        if getattr(args, action.dest) is not None:
            raise ValueError(f'compare itself gives train.py its {action.option_strings[0]}; leave it out')
        if config.get(action.dest) not in (None, '') and config[action.dest] is not False:
            raise ValueError(f'compare itself gives train.py its {action.dest}; leave it out of {args.config!r}')
    if args.model_kwargs is None:
        kwargs = config.get('model_kwargs') or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f'model_kwargs in {args.config!r} are not values by name, such as drop_rate: 0.1')
        args.model_kwargs = [f'{name}={value!r}' for name, value in kwargs.items()]
    modules, device = config.get('device_modules') or [], config.get('device') or ''
    if not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
        raise ValueError(f'device_modules in {args.config!r} are {modules!r}, and no list of names of modules')
    if not isinstance(device, str):
        raise ValueError(f'device in {args.config!r} is {device!r}, and no name of a device')
    args.device_modules = args.device_modules or modules
    args.device = args.device or device or 'cuda'  # train.py's default
    args.rest = [] if 'checkpoint_hist' in config else ['--checkpoint-hist', '1']
    args.rest += (['-c', args.config] if args.config else []) + rest
    return args
