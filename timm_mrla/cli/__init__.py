"""The command line: `timm-mrla COMMAND`, the same as `python -m timm_mrla COMMAND`.

Each command is a file of this folder, whose `main` gets the parsed arguments. Only the chosen command is imported.
"""

import argparse
import ast
import sys
from importlib import import_module
from types import ModuleType

from timm_mrla._version import __version__

_EXTRAS = {'demo': 'demo', 'attention': 'plot', 'compare': 'compare'}  # command -> extra that it needs


def _name_value(text: str) -> tuple[str, object]:
    """Parse `name=value`. The value is a Python literal, or else a string."""
    name, equals, value = text.partition('=')
    if not (name and equals):
        raise argparse.ArgumentTypeError(f'{text!r} is not name=value')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


class _StoreDict(argparse.Action):
    """Adds names and values to a dictionary."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **dict(values)})


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-mrla', description='Models with layer attention (MRLA) for timm.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from, for a bug report')
    commands = parser.add_subparsers(dest='command', required=True)

    run = commands.add_parser('run', help="run a script, such as timm's, or a module with the models registered")
    run.add_argument('-m', dest='module', action='store_true', help='run a module, as python -m does')
    run.add_argument('script', help='path of the script, train.py, validate.py, ..., or with -m name of the module')
    run.add_argument('args', nargs=argparse.REMAINDER, help='its arguments')

    demo = commands.add_parser('demo', help='train a model on handwritten digits in two minutes')
    demo.add_argument('--model', default='resnet18_mrla', help='name of the model (default: %(default)s)')
    demo.add_argument('--out', default='mrla-digits', help='folder to write the model to (default: %(default)s)')
    demo.add_argument('--epochs', type=int, default=12, help='epochs of training (default: %(default)s)')

    kwargs = argparse.ArgumentParser(add_help=False)
    kwargs.add_argument(
        '--model-kwargs',
        type=_name_value,
        action=_StoreDict,
        nargs='*',
        default={},
        metavar='NAME=VALUE',
        help='arguments that the model was trained with, such as img_size=384',
    )
    card = argparse.ArgumentParser(add_help=False, parents=[kwargs])
    card.add_argument('--license', help='licence of the weights, for the model card: apache-2.0, ...')
    card.add_argument(
        '--dataset', action='extend', nargs='*', metavar='NAME', help='what it was trained on: imagenet-1k, ...'
    )
    card.add_argument('--base-model', metavar='USER/REPO', help='the model that it was trained from')
    card.add_argument(
        '--metric',
        type=_name_value,
        action=_StoreDict,
        nargs='*',
        default={},
        metavar='NAME=VALUE',
        help='results on the first data set, such as accuracy=0.792',
    )

    convert = commands.add_parser('convert', parents=[card], help='make a folder that timm loads from a checkpoint')
    convert.add_argument('checkpoint', help="checkpoint of timm's training script or of the paper's")
    convert.add_argument('--model', required=True, help='name of the model: resnet50_mrla, ...')
    convert.add_argument('--out', required=True, help='folder to write config.json, model.safetensors and README.md to')

    push = commands.add_parser('push', parents=[card], help='publish a model on the Hugging Face Hub')
    push.add_argument('source', metavar='DIR_OR_CHECKPOINT', help='folder of a model, or a checkpoint')
    push.add_argument('repo', metavar='USER/REPO', help='repository, made if there is none')
    push.add_argument('--model', help='name of the model, for a checkpoint: resnet50_mrla, ...')
    push.add_argument('--private', action='store_true', default=None, help='make a new repository a private one')

    attention = commands.add_parser(
        'attention', parents=[kwargs], help='draw what the blocks of a model retrieve from each other'
    )
    attention.add_argument('model', help="name of the model, also 'local-dir:FOLDER'")
    attention.add_argument('images', nargs='+', metavar='IMAGE', help='path of an image; several stand side by side')
    attention.add_argument('--out', default='attention.png', help='picture to write (default: %(default)s)')
    weights = attention.add_mutually_exclusive_group()
    weights.add_argument(
        '--checkpoint', action='extend', nargs='+', metavar='PATH', help='checkpoints to draw side by side'
    )
    weights.add_argument('--pretrained', action='store_true', help='the weights that come with the model')
    view = attention.add_mutually_exclusive_group()
    view.add_argument('--heads', action='store_true', help='draw each head')
    view.add_argument('--features', metavar='BLOCK', help='draw the maps of a block before and after layer attention')
    attention.add_argument('--npz', action='store_true', help='write the numbers to an .npz file beside the picture')

    detect = commands.add_parser('detect', help='draw what a detector finds in images')
    detect.add_argument(
        'model', metavar='MODEL_FOLDER', help="folder of a detector, also 'local-dir:FOLDER' or 'hf-hub:USER/REPO'"
    )
    detect.add_argument('images', nargs='+', metavar='IMAGE', help='path of an image; several stand side by side')
    detect.add_argument('--out', default='detections.png', help='picture to write (default: %(default)s)')

    comparison = commands.add_parser(
        'compare',
        help="train models and their plain backbones alike with timm's train.py, and report what differs",
        usage='%(prog)s [options] TRAIN_PY --model NAME [NAME ...] --out DIR -- ARGUMENTS OF TRAIN_PY',
    )
    comparison.add_argument('script', metavar='TRAIN_PY', help="path of timm's train.py")
    comparison.add_argument(
        '--model',
        action='extend',
        nargs='+',
        required=True,
        metavar='NAME',
        help='names of models, with or without .warmstart_TAG; NAME+KEY=VALUE gives one its own arguments',
    )
    comparison.add_argument(
        '--out', required=True, metavar='DIR', help='folder of the comparison; the same command continues it'
    )
    comparison.add_argument(
        '--seeds', type=int, default=5, metavar='N', help='runs of each model (default: %(default)s)'
    )
    comparison.add_argument('--metric', default='top1', help='top1, top5 or loss (default: %(default)s)')
    at_once = comparison.add_mutually_exclusive_group()
    at_once.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at once (default: %(default)s)')
    at_once.add_argument('--devices', metavar='0,1,...', help='GPUs, each with one run at a time')
    return parser


def main() -> None:
    """Parse the command line and run its command."""
    parser = _build_parser()
    argv, train_args = sys.argv[1:], []
    if '--' in argv and next(arg for arg in argv if arg != '--traceback') == 'compare':
        end = argv.index('--')
        argv, train_args = argv[:end], argv[end + 1 :]
    args = parser.parse_args(argv)
    args.train_args = train_args
    try:
        _import_command(args.command).main(args)
    except KeyboardInterrupt as e:
        parser.exit(130, f'timm-mrla: stopped{e}\n')  # the exit code that a shell reports
    except (ValueError, RuntimeError, OSError) as e:
        if args.traceback:
            raise
        parser.exit(2, f'timm-mrla: {" ".join(str(e).split()) or type(e).__name__}\n')


def _import_command(command: str) -> ModuleType:
    """Import the file of a command; ValueError if its extra is not installed."""
    try:
        return import_module(f'timm_mrla.cli.{command}')
    except ModuleNotFoundError as e:
        if command not in _EXTRAS:
            raise
        raise ValueError(f"{command} needs {e.name}: pip install 'timm-mrla[{_EXTRAS[command]}]'") from e
