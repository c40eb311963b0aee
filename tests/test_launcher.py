"""Tests of `timm-mrla run`: it runs a SCRIPT or `-m MODULE` just as python does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm

import timm_mrla
from timm_mrla.cli import launcher as launcher_module
from timm_mrla.cli import main

PYTHON = [sys.executable]
COMMAND = [str(Path(sys.executable).with_name('timm-mrla')), 'run']
MODULE = [sys.executable, '-m', 'timm_mrla', 'run']
STARTED = [sys.executable, launcher_module.__file__]  # the command that both execute; takes half the time
# starts that command, without other imports
LAUNCH = f"import runpy; runpy.run_path({launcher_module.__file__!r})['launch']('script.py')"
SCRIPT, AS_MODULE = ['script.py'], ['-m', 'script']

# sys.path without the temporary folder that torch 2.9 appends for generated modules
PATH = """
import json, sys
instantiator = sys.modules.get('torch.distributed.nn.jit.instantiator')
path = [p for p in sys.path if p != getattr(instantiator, 'INSTANTIATED_TEMPLATE_DIR_PATH', None)]
"""
REPORT = f"""{PATH}
def where():
    return sys._getframe().f_globals is sys.modules['__main__'].__dict__
if __name__ == '__main__':
    spec = __spec__ and __spec__.name
    print(json.dumps([sys.argv, path, __file__, __name__, __package__, where(), spec]))
"""


def run(launcher, *args, cwd, **kwargs):
    env = dict(os.environ, OMP_NUM_THREADS='1', **kwargs.pop('env', {}))
    return subprocess.run([*launcher, *args], cwd=cwd, capture_output=True, text=True, env=env, **kwargs)


def write(folder, text, name='script.py'):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('launcher', 'path'),
    [
        (COMMAND, 'script.py'),
        (MODULE, 'script.py'),
        (STARTED, '../folder/script.py'),
        (STARTED, 'absolute'),
        (STARTED, 'link.py'),
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
    assert (actual.stderr, actual.returncode) == (expected.stderr, 0)
    assert json.loads(actual.stdout) == json.loads(expected.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(('launcher', 'module'), [(STARTED, 'package'), (MODULE, 'package.tool')])
def test_a_module_finds_itself_as_under_python(launcher, module, tmp_path):
    for name in ('__main__.py', 'tool.py'):
        write(tmp_path / 'package', REPORT, name)
    write(tmp_path / 'package', 'import sys; print(sys.argv)', '__init__.py')
    args = ['-m', module, '--model', 'resnet18_mrla', '-m', '--', 'run', '--help']
    expected = run(PYTHON, *args, cwd=tmp_path)
    actual = run(launcher, *args, cwd=tmp_path)
    assert (actual.stdout, actual.stderr) == (expected.stdout, expected.stderr)
    assert 'package.' in expected.stdout


@pytest.mark.slow
def test_models_are_registered_for_a_module(tmp_path):
    write(tmp_path, "import timm; print(timm.create_model('resnet18_mrla', device='meta').num_classes)")
    assert run(STARTED, *AS_MODULE, cwd=tmp_path).stdout == '1000\n'


@pytest.mark.slow
def test_the_flags_of_python_stay(tmp_path):
    report = 'print(json.dumps([sys.flags, sys._xoptions, sys.warnoptions, path]))\n'
    write(tmp_path, PATH + report + 'print(sys.flags.optimize, sys.stdout.write_through)')
    flags = ['-O', '-u', '-B', '-s', '-Wignore::UserWarning', '-Xno_debug_ranges', '-Xint_max_str_digits=5000']
    flags += ['-P'] * (sys.version_info >= (3, 11))
    python = [sys.executable, *flags]
    env = dict(PYTHONUNBUFFERED='')
    expected = run(python, *SCRIPT, cwd=tmp_path, env=env).stdout.splitlines()
    actual = run([*python, '-c', LAUNCH], cwd=tmp_path, env=env).stdout.splitlines()
    assert json.loads(actual[0]) == json.loads(expected[0])
    assert actual[1] == expected[1] == '1 True'
    isolated = run([sys.executable, '-I', '-c', LAUNCH], cwd=tmp_path).stdout
    assert isolated == run([sys.executable, '-I'], *SCRIPT, cwd=tmp_path).stdout != ''


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='exec starts another process there')
def test_the_process_and_what_it_printed_stay(tmp_path):
    write(tmp_path, 'import os; print(os.getpid())')
    result = run(
        [sys.executable, '-c', f'import os; print(os.getpid()); {LAUNCH}'], cwd=tmp_path, env=dict(PYTHONUNBUFFERED='')
    )
    first, second = result.stdout.splitlines()
    assert first == second


@pytest.mark.slow
def test_a_checkout_that_is_not_installed(tmp_path):
    (tmp_path / 'timm_mrla').symlink_to(Path(timm_mrla.__file__).parent)
    script = write(tmp_path / 'scripts', "import timm; print(timm.is_model('resnet18_mrla'))")
    env = dict(PYTHONPATH=str(Path(timm.__file__).parents[1]))
    # without site, so that python does not find an editable installation
    assert run([sys.executable, '-S', *MODULE[1:]], script, cwd=tmp_path, env=env).stdout == 'True\n'


@pytest.mark.slow
def test_a_timm_beside_the_script_is_the_timm_that_is_used(tmp_path):
    """As in a checkout of timm, from any working directory, even another checkout."""
    checkout = tmp_path / 'checkout'
    script = write(checkout, "import timm, timm_mrla; print(timm.__file__, timm.is_model('resnet18_mrla'))")
    other = tmp_path / 'other'
    other.mkdir()
    for folder in (checkout, other):
        (folder / 'timm').symlink_to(Path(timm.__file__).parent)
    assert run(MODULE, script, cwd=other).stdout == f'{checkout / "timm" / "__init__.py"} True\n'
    elsewhere = write(tmp_path / 'scripts', 'import timm; print(timm.__file__)')
    assert run(STARTED, elsewhere, cwd=other).stdout == f'{timm.__file__}\n'


ENDS = [
    (SCRIPT, "import atexit, sys; atexit.register(print, 'bye'); print(__file__); sys.exit(7)", 7),
    (SCRIPT, "import sys; sys.exit('out of luck')", 1),
    (
        SCRIPT,
        "def f():\n  try:\n    1 / 0\n  except ArithmeticError as e:\n    raise KeyError('lost') from e\n\nf()",
        1,
    ),
    (SCRIPT, 'def f(:', 1),
    (AS_MODULE, 'import sys; sys.exit(7)', 7),
    (AS_MODULE, 'import atexit; atexit.register(lambda: print(__file__)); import lost', 1),
    (AS_MODULE, 'def f(:', 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(('target', 'code', 'returncode'), ENDS)
def test_exit_codes_and_tracebacks_are_those_of_python(target, code, returncode, tmp_path):
    write(tmp_path, code)
    expected = run(PYTHON, *target, cwd=tmp_path)
    actual = run(STARTED, *target, cwd=tmp_path)
    assert (actual.returncode, actual.stdout, actual.stderr) == (returncode, expected.stdout, expected.stderr)
    assert expected.returncode == returncode


@pytest.mark.slow
def test_interrupt(tmp_path):
    # the other imports decide the exit status, too
    script = write(tmp_path, "import time, timm_mrla\nprint('ready', flush=True)\ntime.sleep(60)")
    results = []
    for command in (PYTHON, STARTED):
        process = subprocess.Popen(
            [*command, script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
        )
        assert process.stdout.readline() == 'ready\n'
        time.sleep(0.2)  # into the sleep
        process.send_signal(signal.SIGINT)
        results.append((process.communicate(timeout=60)[1], process.returncode))
    assert results[1] == results[0]


WORKERS = """
import sys
import torch
from torch.utils.data import DataLoader

class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return i * i, sys.argv[1], __name__

def collate(samples):
    return samples, __name__

if __name__ == '__main__':
    method = sys.argv[1]
    print(*DataLoader(Squares(), batch_size=4, num_workers=1, multiprocessing_context=method, collate_fn=collate))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('target', 'method'), [(SCRIPT, 'spawn'), (AS_MODULE, 'spawn'), (SCRIPT, 'fork'), (SCRIPT, 'forkserver')]
)
def test_workers(target, method, tmp_path):
    write(tmp_path, WORKERS)
    expected = run(PYTHON, *target, method, cwd=tmp_path)
    actual = run(STARTED, *target, method, cwd=tmp_path)
    assert (actual.stdout, actual.stderr) == (expected.stdout, expected.stderr)
    assert f"(49, '{method}', '__" in expected.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ('launcher', 'target'), [(MODULE[1:], SCRIPT), (STARTED[1:], AS_MODULE)], ids=['script', 'module']
)
def test_torchrun(launcher, target, tmp_path):
    write(
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
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    result = run(torchrun, *launcher, *target, 'x', 'x', 'x', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith('[Gloo]')]  # a log of torch 2.9
    assert lines == [f'{tmp_path} __main__ True'] * 2


def test_a_missing_script_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'run', 'train.py', '--model', 'resnet18_mrla'])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'train.py'" in line
    assert 'github.com/huggingface/pytorch-image-models' in line


def test_a_binary_file_is_no_script(tmp_path, monkeypatch, capsys):
    (tmp_path / 'last.pth').write_bytes(b'\x89\0\1')
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'run', str(tmp_path / 'last.pth')])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("last.pth' is a binary file, no Python script")


@pytest.mark.slow
@pytest.mark.parametrize('module', ['nowhere', 'xml'], ids=['none', 'no __main__'])
def test_a_missing_module_is_one_line(module, tmp_path):
    result = run(STARTED, '-m', module, '--model', 'resnet18_mrla', cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f'timm-mrla: No module named {module}')


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', '--version'])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    assert capsys.readouterr().out == f'timm-mrla {timm_mrla.__version__}\n'


@pytest.mark.slow
def test_a_package_that_imports_this_one_under_python_m(tmp_path):
    """The import registers the models, however python was started."""
    write(tmp_path / 'package', 'import timm_mrla', '__init__.py')
    write(tmp_path / 'package', "import timm; print(timm.is_model('resnet18_mrla'))", '__main__.py')
    result = run([sys.executable, '-m', 'package'], cwd=tmp_path)
    assert result.stdout == 'True\n', result.stderr
