"""`timm-mrla run SCRIPT` against `python SCRIPT`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PYTHON = [sys.executable]
COMMAND = [str(Path(sys.executable).with_name('timm-mrla')), 'run']
MODULE = [sys.executable, '-m', 'timm_mrla', 'run']
launchers = pytest.mark.parametrize('launcher', [COMMAND, MODULE], ids=['command', 'module'])

REPORT = """
import json, sys
def where():
    return sys._getframe().f_globals is sys.modules['__main__'].__dict__
if __name__ == '__main__':
    print(json.dumps([sys.argv, sys.path[0], __file__, __name__, where(), repr(__spec__)]))
"""


def run(launcher, *args, cwd, **kwargs):
    env = dict(os.environ, OMP_NUM_THREADS='1', **kwargs.pop('env', {}))
    return subprocess.run([*launcher, *args], cwd=cwd, capture_output=True, text=True, env=env, **kwargs)


def write(folder, text, name='script.py'):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ('launcher', 'path'),
    [
        (COMMAND, 'script.py'),
        (MODULE, 'script.py'),
        (COMMAND, '../folder/script.py'),
        (MODULE, 'absolute'),
        (COMMAND, 'link.py'),
    ],
)
def test_a_script_finds_itself_as_under_python(launcher, path, tmp_path):
    folder = tmp_path / 'folder'
    absolute = write(folder, REPORT)
    write(tmp_path / 'elsewhere', '')
    (folder / 'link.py').symlink_to(tmp_path / 'elsewhere' / 'real.py')
    write(tmp_path / 'elsewhere', REPORT, 'real.py')
    path = absolute if path == 'absolute' else path
    args = [path, '--model', 'resnet18_mrla', '-x', '--', 'run', '--help']
    expected = run(PYTHON, *args, cwd=folder)
    actual = run(launcher, *args, cwd=folder)
    assert actual.stderr == expected.stderr
    assert json.loads(actual.stdout) == json.loads(expected.stdout)


@launchers
def test_models_are_registered(launcher, tmp_path):
    script = write(tmp_path, "import timm; print(timm.create_model('resnet18_mrla', device='meta').num_classes)")
    assert run(launcher, script, cwd=tmp_path).stdout == '1000\n'


@launchers
def test_a_timm_beside_the_script_is_the_timm_that_is_used(launcher, tmp_path):
    """As in a checkout of timm, whatever folder the command is given in."""
    checkout = tmp_path / 'checkout'
    script = write(checkout, "import timm, timm_mrla; print(timm.__file__, timm.is_model('resnet18_mrla'))")
    import timm

    (checkout / 'timm').symlink_to(Path(timm.__file__).parent)
    other = tmp_path / 'other'
    write(other / 'timm', 'raise ImportError("the timm of the working directory")', '__init__.py')
    assert run(launcher, script, cwd=other).stdout == f'{checkout / "timm" / "__init__.py"} True\n'
    elsewhere = write(tmp_path / 'scripts', 'import timm; print(timm.__file__)')
    assert run(launcher, elsewhere, cwd=other).stdout == f'{timm.__file__}\n'


@pytest.mark.parametrize(
    ('launcher', 'code', 'returncode'),
    [
        (COMMAND, 'import sys; sys.exit(7)', 7),
        (MODULE, "import sys; sys.exit('out of luck')", 1),
        (COMMAND, "def f():\n    raise KeyError('lost')\n\nf()", 1),
        (MODULE, "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('chained') from e", 1),
        (COMMAND, 'def f(:', 1),
        (MODULE, "import atexit; atexit.register(print, 'bye'); print(__file__)", 0),
    ],
)
def test_exit_codes_and_tracebacks_are_those_of_python(launcher, code, returncode, tmp_path):
    script = write(tmp_path, code)
    expected = run(PYTHON, script, cwd=tmp_path)
    actual = run(launcher, script, cwd=tmp_path)
    assert (actual.returncode, actual.stdout, actual.stderr) == (returncode, expected.stdout, expected.stderr)
    assert expected.returncode == returncode


def test_interrupt(tmp_path):
    script = write(tmp_path, "import time, timm\nprint('ready', flush=True)\ntime.sleep(60)")
    results = []
    for command in (PYTHON, COMMAND):
        process = subprocess.Popen(
            [*command, script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )
        assert process.stdout.readline() == 'ready\n'
        time.sleep(0.2)  # into the sleep
        process.send_signal(signal.SIGINT)
        results.append((process.communicate(timeout=60)[1], process.returncode))
    assert results[1] == results[0]


WORKERS = """
import multiprocessing, sys
import torch
from torch.utils.data import DataLoader

class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return i * i, sys.argv[1], __name__

def rename(name):
    return name.upper()

if __name__ == '__main__':
    loader = DataLoader(Squares(), batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1])
    print([(x.tolist(), *rest) for x, *rest in loader])
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.map(rename, ['a', 'b']))
"""


@pytest.mark.parametrize(
    ('launcher', 'method'), [(COMMAND, 'fork'), (COMMAND, 'spawn'), (MODULE, 'spawn'), (MODULE, 'forkserver')]
)
def test_workers(launcher, method, tmp_path):
    script = write(tmp_path, WORKERS)
    expected = run(PYTHON, script, method, cwd=tmp_path)
    actual = run(launcher, script, method, cwd=tmp_path)
    assert (actual.stdout, actual.stderr) == (expected.stdout, expected.stderr)
    assert '[49, 36]' in expected.stdout or '[36, 49]' in expected.stdout


def test_torchrun(tmp_path):
    script = write(
        tmp_path,
        """
import sys, timm, torch, torch.distributed as dist

def train():
    model = timm.create_model('resnet18_mrla', num_classes=sys.argv.count('x'))
    model = torch.nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(dist.get_rank())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    grad = model.module.fc.weight.grad.clone()
    dist.all_reduce(grad, op=dist.ReduceOp.MAX)
    equal = torch.equal(grad, model.module.fc.weight.grad)
    sys.stdout.write(f'{sys.path[0]} {__name__} {equal}\\n')  # at once, for there are two of them

dist.init_process_group('gloo')
train()  # a function, so that the model is gone before the group that it uses
dist.destroy_process_group()
""",
    )
    torchrun = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node=2',
        '-m',
        'timm_mrla',
        'run',
    ]
    result = run(torchrun, script, 'x', 'x', 'x', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split('\n') == [f'{tmp_path} __main__ True'] * 2 + ['']


@launchers
def test_a_missing_script_is_one_line(launcher, tmp_path):
    result = run(launcher, 'train.py', '--model', 'resnet18_mrla', cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "'train.py'" in line
    assert 'github.com/huggingface/pytorch-image-models' in line


def test_a_package_that_imports_this_one_under_python_m(tmp_path):
    """Only the launcher itself leaves registration to later."""
    write(tmp_path / 'package', 'import timm_mrla', '__init__.py')
    write(tmp_path / 'package', "import timm; print(timm.is_model('resnet18_mrla'))", '__main__.py')
    result = run([sys.executable, '-m', 'package'], cwd=tmp_path)
    assert result.stdout == 'True\n', result.stderr
