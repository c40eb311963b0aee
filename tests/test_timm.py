"""timm's own test_models.py, unmodified, on our models.

timm's source distribution on PyPI holds its tests; they are kept in the user's cache. The test names in timm's list of
tests depend on the names of models and modules, so that a wrong name would drop tests unseen: what is run on our entry
must be what is run on its plain backbone.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
from flops import backbone, paper_entries

import timm_mrla  # noqa: F401

OF_THE_PAPER = [  # MRLA-base in both of its forms
    *('resnet18_mrla', 'resnet18_mrlab', 'deit_tiny_mrla', 'deit_tiny_mrlab'),
    *('efficientnet_b0_mrla', 'pvt_v2_b0_mrla', 'ceit_tiny_mrla'),
]
SMALL = [
    *OF_THE_PAPER,
    # and the smallest of each other module that has a few layer attentions
    *('resnetv2_18_mrla', 'regnety_002_mrla', 'mobilenetv3_small_050_mrla', 'test_convnext_mrla', 'davit_tiny_mrla'),
    *('swin_tiny_patch4_window7_224_mrla', 'swinv2_tiny_window8_256_mrla', 'test_vit_mrla'),
    *('eva02_tiny_patch14_224_mrla', 'coatnet_pico_rw_224_mrla', 'poolformerv2_s12_mrla', 'edgenext_xx_small_mrla'),
    *('fastvit_t8_mrla', 'inception_next_atto_mrla', 'test_mambaout_mrla', 'starnet_s050_mrla'),
    'focalnet_tiny_srf_mrla',
]
LEFT_OUT = {
    # torch.jit is deprecated since torch 2.15. Scripting can neither follow `super().forward` into timm's block nor a
    # list that grows, and to please it we would have to copy timm's blocks. FX graphs of the models do script, and
    # test_model_forward_fx_torchscript runs.
    'test_model_forward_torchscript',
    # these download weights; test_hub.py and test_warm_start.py bring some of their own
    'test_model_load_pretrained',
    'test_model_features_pretrained',
    'test_model_inference',
    # of fixed names, which test_on_fixed_names gives ours
    'test_model_features_output_stride',
}
# timm does not know CeiT's name among those that have tokens, so that the configuration test asks it for maps; nor its
# module among those that have forward_intermediates. test_on_fixed_names runs what timm would run on it if it did.
# Inputs of a fixed size above 224 it skips in a test of FX.
LEFT_OUT_OF = {'ceit': {'test_model_default_cfgs'}, 'swinv2': {'test_model_backward_fx'}}


@pytest.fixture(scope='session')
def timms_tests():
    """The folder of timm's tests, without the copy of timm that lies beside it in the source distribution."""
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')) / 'timm-mrla' / f'timm-{timm.__version__}'
    if not cache.exists():
        tmp = cache.with_name(f'{cache.name}.{os.getpid()}')
        tmp.mkdir(parents=True)
        try:
            pip = f'-m pip download --quiet --no-deps --no-binary :all: timm=={timm.__version__}'
            command = [sys.executable, *pip.split()]
            result = subprocess.run(command, cwd=tmp, capture_output=True, text=True)
            if result.returncode:
                reason = f"timm's tests cannot be downloaded from PyPI: {result.stderr.strip().splitlines()[-1]}"
                (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(reason)
            (archive,) = tmp.glob('*.tar.gz')
            with tarfile.open(archive) as tar:
                root = archive.name.removesuffix('.tar.gz')
                wanted = [m for m in tar if m.name.startswith((f'{root}/tests/', f'{root}/pyproject.toml'))]
                tar.extractall(tmp, members=wanted, filter='data')
            (tmp / root).rename(cache)
        finally:
            shutil.rmtree(tmp)
    return cache


def left_out(name):
    return LEFT_OUT.union(*(tests for family, tests in LEFT_OUT_OF.items() if name.startswith(family)))


def run(folder, names, report, *args):
    """Run timm's test_models.py on these models; outcome by test function and model."""
    env = dict(os.environ, HF_HUB_OFFLINE='1', TIMEOUT='3600')
    keyword = ' or '.join(f'-{name}] or -{name}.' for name in names)  # and with the tags of its weights
    pytest_args = ['-q', '-p', 'timm_mrla', '-p', 'no:cacheprovider', f'-k{keyword}', f'--junitxml={report}', *args]
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', 'tests/test_models.py', *pytest_args],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    cases = {}
    for case in ElementTree.parse(report).iter('testcase'):
        function, _, ids = case.get('name').rstrip(']').partition('[')
        outcome = 'passed' if len(case) == 0 else case[0].tag
        cases[function, ids.split('-', 1)[-1]] = outcome
    return cases, result.stdout


def collect(folder):
    """The functions of timm's test_models.py by the model that they are run on, whatever the tags of its weights."""
    command = [sys.executable, '-m', 'pytest', 'tests/test_models.py', '-q', '--collect-only']
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    functions = defaultdict(set)
    for line in result.stdout.splitlines():
        if '::' in line:
            function, _, ids = line.split('::')[1].rstrip(']').partition('[')
            _, dash, model = ids.partition('-')
            if dash:  # without a batch size before it, a name that the test fixes
                functions[model.split('.')[0]].add(function)
    return functions


def problems(folder, names, tmp_path):
    """What fails, and what is run on the plain backbones and not on our entries."""
    deselect = [arg for test in LEFT_OUT for arg in ('--deselect', f'tests/test_models.py::{test}')]
    outcomes, output = run(folder, names, tmp_path / 'report.xml', *deselect)
    found = [case for case, outcome in outcomes.items() if outcome != 'passed' and case[0] not in left_out(case[1])]
    if found:
        print(output[-20_000:])
    collected = collect(folder)
    for name in names:
        functions = {function for function, model in outcomes if model.split('.')[0] == name}
        expected = {'test_model_forward', 'test_model_backward', 'test_model_forward_fx', 'test_model_backward_fx'}
        expected |= collected[backbone(name)[0]] - left_out(name)
        found += [(function, name) for function in expected - functions]
    return found


def test_small_entries(timms_tests, tmp_path):
    assert problems(timms_tests, SMALL, tmp_path) == []


def test_on_fixed_names(timms_tests):
    code = """
import timm_mrla
from tests import test_models
for name in ('convnext_atto_mrla', 'inception_next_atto_mrla'):
    test_models.test_model_features_output_stride(name, 8)
    test_models.test_model_features_output_stride(name, 16)
test_models.test_model_default_cfgs_non_std('ceit_tiny_mrla', 1, 'meta')
test_models.test_model_forward_intermediates('ceit_tiny_mrla', 1)
test_models.test_model_forward_intermediates_features('ceit_tiny_mrla', 1)
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=timms_tests, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.timm_full
def test_every_entry_of_the_paper(timms_tests, tmp_path):
    assert problems(timms_tests, paper_entries(), tmp_path) == []
