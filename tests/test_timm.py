"""Runs timm's own test_models.py, unmodified, on our models.

timm's source distribution on PyPI contains its tests; the user's cache keeps them. timm selects tests by the names of
models and modules, so a wrong name could silently drop tests: our entry and its plain backbone must run the same tests.
"""

import json
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
from entries import backbone, paper_entries

import timm_mrla  # noqa: F401

OF_THE_PAPER = [  # MRLA-base in both of its forms
    *('resnet18_mrla', 'resnet18_mrlab', 'deit_tiny_mrla', 'deit_tiny_mrlab'),
    *('efficientnet_b0_mrla', 'pvt_v2_b0_mrla', 'ceit_tiny_mrla'),
]
SMALL = [
    *OF_THE_PAPER,
    *('test_vit_mrla', 'test_convnext_mrla'),
    # and the smallest of each other module that has a few layer attentions
    *('resnetv2_18_mrla', 'regnety_002_mrla', 'mobilenetv3_small_050_mrla', 'davit_tiny_mrla'),
    *('swin_tiny_patch4_window7_224_mrla', 'swinv2_tiny_window8_256_mrla'),
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
    # uses fixed model names; test_on_fixed_names runs it with ours
    'test_model_features_output_stride',
}
# CeiT is not in timm's list of models with tokens, so the configuration test expects maps, nor in its list of modules
# with forward_intermediates; test_on_fixed_names runs those tests on it. One test of FX skips fixed sizes above 224.
LEFT_OUT_OF = {'ceit': {'test_model_default_cfgs'}, 'swinv2': {'test_model_backward_fx'}}


@pytest.fixture(scope='session')
def timms_tests():
    """The folder of timm's tests, without the copy of timm in the source distribution."""
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


# pytest with our models registered, which writes the names of all tests, with or without a model, to its first argument
# (torchvision compares each node of a graph with all before it by regular expressions, which took half of the time)
RUN = """
import json, pathlib, pytest, re, sys, timm_mrla
from torchvision.models import feature_extraction
class Quick:
    @staticmethod
    def match(pattern, name):
        start = pattern.removesuffix('(_[0-9]+)?$')
        return re.match(pattern, name) if start == pattern or name.startswith(start) else None
feature_extraction.re = Quick
class Names:
    @pytest.hookimpl(tryfirst=True)  # before -k
    def pytest_collection_modifyitems(self, items):
        pathlib.Path(sys.argv[1]).write_text(json.dumps([item.name for item in items]))
sys.exit(pytest.main(sys.argv[2:], plugins=[Names()]))
"""


def split(name):
    """Split the name of a test into its function and its model with tag, empty if it has none."""
    function, _, ids = name.rstrip(']').partition('[')
    return function, ids.partition('-')[2]  # the batch size precedes the model; without it, the test has a fixed model


def problems(folder, names, tmp_path):
    """Failed tests, and tests that run on a plain backbone but not on our entry."""
    env = dict(os.environ, HF_HUB_OFFLINE='1', TIMEOUT='3600')
    keyword = ' or '.join(f'-{name}] or -{name}.' for name in names)  # and with the tags of its weights
    deselect = [arg for test in LEFT_OUT for arg in ('--deselect', f'tests/test_models.py::{test}')]
    report, collected = tmp_path / 'report.xml', tmp_path / 'names.json'
    args = ['tests/test_models.py', '-q', '-p', 'no:cacheprovider', f'-k{keyword}', f'--junitxml={report}', *deselect]
    command = [sys.executable, '-c', RUN, collected, *args]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    found, functions, run = [], defaultdict(set), defaultdict(set)
    for case in ElementTree.parse(report).iter('testcase'):
        function, model = split(case.get('name'))
        run[model.partition('.')[0]].add(function)
        if len(case) and function not in left_out(model):  # it failed or was skipped
            found.append((function, model))
    if found:
        print(result.stdout[-20_000:])
    for function, model in map(split, json.loads(collected.read_text())):
        functions[model.partition('.')[0]].add(function)
    for name in names:
        expected = {'test_model_forward', 'test_model_backward', 'test_model_forward_fx', 'test_model_backward_fx'}
        expected |= functions[backbone(name)[0]] - left_out(name)
        found += [(function, name) for function in expected - run[name]]
    return found


@pytest.mark.slow
def test_small_entries(timms_tests, tmp_path):
    assert problems(timms_tests, SMALL, tmp_path) == []


@pytest.mark.slow
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
def test_the_larger_entries_of_the_paper(timms_tests, tmp_path):
    larger = [name for name in paper_entries() if name not in OF_THE_PAPER]
    assert problems(timms_tests, larger, tmp_path) == []
