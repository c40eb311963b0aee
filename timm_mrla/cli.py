"""The command line: `timm-mrla COMMAND`, the same as `python -m timm_mrla COMMAND`."""

import argparse
import os


def main() -> None:
    """Parse the command line and run its command."""
    parser = argparse.ArgumentParser(prog='timm-mrla', description='Models with layer attention (MRLA) for timm.')
    commands = parser.add_subparsers(dest='command', required=True)

    run = commands.add_parser('run', help="run one of timm's scripts with the models registered")
    run.add_argument('script', help='path of the script: train.py, validate.py, ...')
    run.add_argument('args', nargs=argparse.REMAINDER, help='its arguments')

    demo = commands.add_parser('demo', help='train a model on handwritten digits in two minutes')
    demo.add_argument('--model', default='resnet18_mrla', help='name of the model (default: %(default)s)')
    demo.add_argument('--out', default='mrla-digits', help='folder to write the model to (default: %(default)s)')
    demo.add_argument('--epochs', type=int, default=12, help='epochs of training (default: %(default)s)')

    attention = commands.add_parser('attention', help='draw what the blocks of a model retrieve from each other')
    attention.add_argument('model', help="name of the model, also 'local-dir:FOLDER'")
    attention.add_argument('images', nargs='+', metavar='IMAGE', help='path of an image; several stand side by side')
    attention.add_argument('--out', default='attention.png', help='picture to write (default: %(default)s)')
    weights = attention.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', nargs='+', metavar='PATH', dest='checkpoints', help='weights; also several')
    weights.add_argument('--pretrained', action='store_true', help='the weights that come with the model')
    view = attention.add_mutually_exclusive_group()
    view.add_argument('--heads', action='store_true', help='draw each head')
    view.add_argument('--features', metavar='BLOCK', help='draw the maps of a block before and after layer attention')
    attention.add_argument('--npz', action='store_true', help='write the numbers to an .npz file beside the picture')

    args = parser.parse_args()
    if args.command == 'run':
        if not os.path.isfile(args.script):
            parser.exit(
                2,
                f'timm-mrla: there is no script {args.script!r}; timm keeps its scripts at the top of its '
                'repository, https://github.com/huggingface/pytorch-image-models\n',
            )
        from timm_mrla.launcher import launch

        launch(args.script, args.args)
    elif args.command == 'attention':
        try:
            from timm_mrla.look import look
        except ModuleNotFoundError as e:
            parser.exit(2, f"timm-mrla: drawing needs {e.name}: pip install 'timm-mrla[plot]'\n")
        try:
            look(**{name: value for name, value in vars(args).items() if name != 'command'})
        except (ValueError, OSError) as e:
            parser.exit(2, f'timm-mrla: {e}\n')
    else:
        try:
            from timm_mrla.demo import test_digits, train_digits
        except ModuleNotFoundError as e:
            parser.exit(2, f"timm-mrla: the demo needs {e.name}: pip install 'timm-mrla[demo]'\n")
        try:
            accuracy = train_digits(args.model, args.out, args.epochs)
        except (ValueError, FileExistsError) as e:
            parser.exit(2, f'timm-mrla: {e}\n')
        name = f'local-dir:{args.out}'
        print(f"""
test accuracy:                                {accuracy:.2%}
of timm.create_model('{name}'): {test_digits(name):.2%}

On your own images, a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, with timm's train.py:
  timm-mrla run train.py DATA --model {args.model} --num-classes N --amp --channels-last""")
