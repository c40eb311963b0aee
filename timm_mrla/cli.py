"""The command line: `timm-mrla COMMAND`, the same as `python -m timm_mrla COMMAND`."""

import argparse
import ast
import os
import sys

from timm_mrla import __version__
from timm_mrla.launcher import launch


def _argument(text: str) -> tuple[str, object]:
    """`name=value`, the value a Python literal or else a string."""
    name, equals, value = text.partition('=')
    if not (name and equals):
        raise argparse.ArgumentTypeError(f'{text!r} is not name=value')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _run(args: argparse.Namespace) -> None:
    if not (args.module or os.path.isfile(args.script)):
        raise ValueError(
            f'there is no script {args.script!r}; timm keeps its scripts at the top of its repository, '
            'https://github.com/huggingface/pytorch-image-models'
        )
    launch(*['-m'] * args.module, args.script, *args.args)


def _demo(args: argparse.Namespace) -> None:
    try:
        from timm_mrla.demo import test_digits, train_digits
    except ModuleNotFoundError as e:
        raise ValueError(f"the demo needs {e.name}: pip install 'timm-mrla[demo]'") from e
    accuracy = train_digits(args.model, args.out, args.epochs)
    name = f'local-dir:{args.out}'
    print(f"""
test accuracy:                                {accuracy:.2%}
of timm.create_model('{name}'): {test_digits(name):.2%}

On your own images, a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, with timm's train.py:
  timm-mrla run train.py DATA --model {args.model} --num-classes N --amp --channels-last""")


def _metadata(args: argparse.Namespace) -> dict[str, object]:
    """Arguments of `model_card`."""
    from timm_mrla.checks import check_metrics

    metrics = dict(args.metric)
    check_metrics(metrics, args.dataset)
    return dict(license=args.license, datasets=args.dataset, base_model=args.base_model, metrics=metrics)


def _convert(args: argparse.Namespace) -> None:
    from timm_mrla.checks import check_mrla_name, check_new_folder
    from timm_mrla.hub import load_checkpoint, model_card, save_pretrained

    check_new_folder(args.out)
    check_mrla_name(args.model)
    metadata = _metadata(args)
    model = load_checkpoint(args.checkpoint, args.model, **dict(args.model_kwargs))
    name = f'local-dir:{args.out}'
    save_pretrained(model, args.out, model_card(model, name, **metadata))
    print(f"{args.model} with {model.num_classes} classes: timm.create_model('{name}', pretrained=True)")


def _push(args: argparse.Namespace) -> None:
    from timm_mrla.checks import check_mrla_name, check_repo
    from timm_mrla.hub import load_checkpoint, load_folder, model_card, push_to_hub

    check_repo(args.repo)
    metadata, card = _metadata(args), None
    if os.path.isdir(args.source):
        model, card = load_folder(args.source)
        if card and any(metadata.values()):
            raise ValueError(f'{args.source!r} has a model card, README.md: write its licence, data and results there')
    elif args.model:
        check_mrla_name(args.model)
        model = load_checkpoint(args.source, args.model, **dict(args.model_kwargs))
    else:
        raise ValueError(f'{args.source!r} is no folder; for a checkpoint, say what it is of: --model NAME')
    card = card or model_card(model, f'hf-hub:{args.repo}', **metadata)
    print(push_to_hub(model, args.repo, card, private=args.private))


def _attention(args: argparse.Namespace) -> None:
    try:
        from timm_mrla.look import look
    except ModuleNotFoundError as e:
        raise ValueError(f"drawing needs {e.name}: pip install 'timm-mrla[plot]'") from e
    look(
        args.model,
        args.images,
        args.out,
        checkpoints=args.checkpoint,
        pretrained=args.pretrained,
        heads=args.heads,
        features=args.features,
        npz=args.npz,
        **dict(args.model_kwargs),
    )


def _detect(args: argparse.Namespace) -> None:
    from timm_mrla.picture import detect

    detect(args.model, args.images, args.out)


def _compare(args: argparse.Namespace) -> None:
    try:
        from timm_mrla.compare import compare, report
    except ModuleNotFoundError as e:
        raise ValueError(f"comparing needs {e.name}: pip install 'timm-mrla[compare]'") from e
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


def main() -> None:
    """Parse the command line and run its command."""
    parser = argparse.ArgumentParser(prog='timm-mrla', description='Models with layer attention (MRLA) for timm.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(dest='command', required=True)

    run = commands.add_parser('run', help="run a script, such as timm's, or a module with the models registered")
    run.add_argument('-m', dest='module', action='store_true', help='run a module, as python -m does')
    run.add_argument('script', help='path of the script, train.py, validate.py, ..., or with -m name of the module')
    run.add_argument('args', nargs=argparse.REMAINDER, help='its arguments')
    run.set_defaults(fn=_run)

    demo = commands.add_parser('demo', help='train a model on handwritten digits in two minutes')
    demo.add_argument('--model', default='resnet18_mrla', help='name of the model (default: %(default)s)')
    demo.add_argument('--out', default='mrla-digits', help='folder to write the model to (default: %(default)s)')
    demo.add_argument('--epochs', type=int, default=12, help='epochs of training (default: %(default)s)')
    demo.set_defaults(fn=_demo)

    kwargs = argparse.ArgumentParser(add_help=False)
    kwargs.add_argument(
        '--model-kwargs',
        type=_argument,
        nargs='*',
        default=[],
        metavar='NAME=VALUE',
        help='arguments that the model was trained with, such as img_size=384',
    )
    card = argparse.ArgumentParser(add_help=False, parents=[kwargs])
    card.add_argument('--license', help='licence of the weights, for the model card: apache-2.0, ...')
    card.add_argument('--dataset', nargs='*', metavar='NAME', help='what it was trained on: imagenet-1k, ...')
    card.add_argument('--base-model', metavar='USER/REPO', help='the model that it was trained from')
    card.add_argument(
        '--metric',
        type=_argument,
        nargs='*',
        default=[],
        metavar='NAME=VALUE',
        help='results on the first data set, such as accuracy=0.792',
    )

    convert = commands.add_parser('convert', parents=[card], help='make a folder that timm loads from a checkpoint')
    convert.add_argument('checkpoint', help="what a training script wrote, timm's or the paper's authors'")
    convert.add_argument('--model', required=True, help='name of the model: resnet50_mrla, ...')
    convert.add_argument('--out', required=True, help='folder to write config.json, model.safetensors and README.md to')
    convert.set_defaults(fn=_convert)

    push = commands.add_parser('push', parents=[card], help='publish a model on the Hugging Face Hub')
    push.add_argument('source', metavar='DIR_OR_CHECKPOINT', help='folder of a model, or what a training script wrote')
    push.add_argument('repo', metavar='USER/REPO', help='repository, made if there is none')
    push.add_argument('--model', help='name of the model, for a checkpoint: resnet50_mrla, ...')
    push.add_argument('--private', action='store_true', default=None, help='make a new repository a private one')
    push.set_defaults(fn=_push)

    attention = commands.add_parser(
        'attention', parents=[kwargs], help='draw what the blocks of a model retrieve from each other'
    )
    attention.add_argument('model', help="name of the model, also 'local-dir:FOLDER'")
    attention.add_argument('images', nargs='+', metavar='IMAGE', help='path of an image; several stand side by side')
    attention.add_argument('--out', default='attention.png', help='picture to write (default: %(default)s)')
    weights = attention.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', nargs='+', metavar='PATH', help='what a training script wrote; also several')
    weights.add_argument('--pretrained', action='store_true', help='the weights that come with the model')
    view = attention.add_mutually_exclusive_group()
    view.add_argument('--heads', action='store_true', help='draw each head')
    view.add_argument('--features', metavar='BLOCK', help='draw the maps of a block before and after layer attention')
    attention.add_argument('--npz', action='store_true', help='write the numbers to an .npz file beside the picture')
    attention.set_defaults(fn=_attention)

    detect = commands.add_parser('detect', help='draw what a detector finds in images')
    detect.add_argument('model', metavar='MODEL_FOLDER', help="folder of a detector, also 'hf-hub:USER/REPO'")
    detect.add_argument('images', nargs='+', metavar='IMAGE', help='path of an image; several stand side by side')
    detect.add_argument('--out', default='detections.png', help='picture to write (default: %(default)s)')
    detect.set_defaults(fn=_detect)

    comparison = commands.add_parser(
        'compare',
        help="train models and their plain backbones alike with timm's train.py, and report what differs",
        usage='%(prog)s [options] TRAIN_PY --model NAME [NAME ...] --out DIR -- ARGUMENTS OF TRAIN_PY',
    )
    comparison.add_argument('script', metavar='TRAIN_PY', help="path of timm's train.py")
    comparison.add_argument(
        '--model', nargs='+', required=True, metavar='NAME', help='names of models, with or without .warmstart_TAG'
    )
    comparison.add_argument(
        '--out', required=True, metavar='DIR', help='folder of the comparison; the same again goes on with it'
    )
    comparison.add_argument(
        '--seeds', type=int, default=5, metavar='N', help='runs of each model (default: %(default)s)'
    )
    comparison.add_argument('--metric', default='top1', help='top1, top5 or loss (default: %(default)s)')
    at_once = comparison.add_mutually_exclusive_group()
    at_once.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at once (default: %(default)s)')
    at_once.add_argument('--devices', metavar='0,1,...', help='GPUs, each with one run at a time')
    comparison.set_defaults(fn=_compare)

    argv, train_args = sys.argv[1:], []
    if argv[:1] == ['compare'] and '--' in argv:
        end = argv.index('--')
        argv, train_args = argv[:end], argv[end + 1 :]
    args = parser.parse_args(argv)
    args.train_args = train_args
    try:
        args.fn(args)
    except KeyboardInterrupt:
        parser.exit(130, 'timm-mrla: stopped\n')  # as a shell reports it
    except (ValueError, RuntimeError, OSError) as e:
        parser.exit(2, f'timm-mrla: {" ".join(str(e).split())}\n')
