"""Tests of README.md and docs/*.md: their Python runs, parsers accept their commands, their links exist.

The recipes of `readme.RECIPES` run in test_downstream.py, and training commands in test_scripts.py and
test_vision_scripts.py.
"""

import ast
import contextlib
import copy
import io
import re
import runpy
import subprocess

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from api import api_page
from entries import family, paper_entries
from readme import (
    COMMANDS,
    LINKED,
    PAGES,
    README,
    RECIPES,
    ROOT,
    assert_accepted,
    blocks,
    code,
    prose,
    recipe_source,
    sections,
)
from slow import slow_except

from timm_mrla import attach, set_fused
from timm_mrla.hub import save_pretrained
from timm_mrla.layers.query_key import Gate
from timm_mrla.models import BACKBONES

SHAPES = {  # of tensors that the code of a page makes
    'docs/getting-started.md': {'c5': (1, 2048, 15, 20)},
    'docs/attention.md': {'before': (2, 1024, 14, 14)},
    'docs/own-backbone.md': {'x': (2, 64, 56, 56), 'tokens': (2, 197, 64)},
}


def write_what_is_loaded(page, folder, hub):
    """Write the checkpoints, folders and repositories that a page loads."""
    if 'local-dir:resnet50_mrla' in page or 'hf-hub:user/resnet50_mrla' in page:
        save_pretrained(timm.create_model('resnet50_mrla'), folder / 'resnet50_mrla')
        hub.add('user/resnet50_mrla.in1k', folder / 'resnet50_mrla')
    if 'a1_in1k' in page:
        weights = safetensors.torch.save(timm.create_model('resnet50').state_dict())
        hub.commit('timm/resnet50.a1_in1k', {'model.safetensors': weights})
    if 'lvd1689m' in page:
        weights = safetensors.torch.save(timm.create_model('vit_small_patch16_dinov3').state_dict())
        hub.commit('timm/vit_small_patch16_dinov3.lvd1689m', {'model.safetensors': weights})
    if 'model_11.pth' in page:
        detector = torchvision.models.get_model('maskrcnn_resnet50_mrla_fpn')
        torch.save({'model': detector.state_dict()}, folder / 'model_11.pth')


@pytest.fixture
def kernels_on():
    """Turn the fused kernels on again after the test, because a page turns them off."""
    yield
    set_fused(True)


# test_scripts.py runs the page on fine-tuning, because its code needs what its training commands write
ELSEWHERE = (*RECIPES, 'docs/fine-tuning.md')
WITH_CODE = [page for page in PAGES if page not in ELSEWHERE and code(PAGES[page])]
SLOW = ('docs/detection.md', 'docs/getting-started.md', 'docs/how-it-works.md', 'docs/adapters.md')


@pytest.mark.parametrize('page', slow_except([page for page in WITH_CODE if page not in SLOW], WITH_CODE))
def test_code_runs(page, tmp_path, monkeypatch, hub, command_on_path, kernels_on):
    """Python blocks run from top to bottom in one namespace; those of getting-started.md each run alone.

    A `text` block is the output of the block before it.
    """
    monkeypatch.chdir(tmp_path)
    write_what_is_loaded(PAGES[page], tmp_path, hub)
    names, found = {'__name__': 'page'}, blocks(PAGES[page])
    for (language, source), (following, expected) in zip(found, [*found[1:], ('', '')], strict=True):
        printed = None
        if language == 'python':
            namespace = {} if page == 'docs/getting-started.md' else names
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(source, page, 'exec'), namespace)
            names.update(namespace)
            printed = stdout.getvalue()
        elif language == 'bash' and following == 'text':
            printed = subprocess.run(['bash', '-ec', source], check=True, capture_output=True, text=True).stdout
        if following == 'text':
            assert printed.splitlines() == expected.splitlines()
    for name, shape in SHAPES.get(page, {}).items():
        assert names[name].shape == shape


@pytest.mark.parametrize(('page', 'heading'), [(page, heading) for page in RECIPES for heading in sections(page)])
def test_recipes_compile(page, heading):
    """Each heading has one recipe and a test in test_downstream.py."""
    ast.parse(recipe_source(heading))
    assert f"'{heading}'" in (ROOT / 'tests' / 'test_downstream.py').read_text()


@pytest.mark.parametrize(('page', 'command'), COMMANDS, ids=[f'{page}-{" ".join(c[:3])}' for page, c in COMMANDS])
def test_commands_are_accepted(page, command, monkeypatch):
    """The parsers of `timm-mrla` and of the benchmarks accept the arguments; the extras of `pip install` exist."""
    while '=' in command[0]:  # variables of the environment
        command = command[1:]
    if command[0] == 'torchrun':
        assert command[1].startswith('--nproc-per-node=') and command[2] == '-m'
        command = ['python', *command[2:]]
    if command[:3] == ['python', '-m', 'timm_mrla']:
        command = ['timm-mrla', *command[3:]]
    if command[:2] == ['pip', 'install']:
        extras = re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), flags=re.MULTILINE)
        for extra in re.findall(r'\[([\w,]+)\]', ' '.join(command)):
            assert set(extra.split(',')) <= {*extras}
        return
    if command[:2] == ['python', '-c']:
        ast.parse(command[2])
        return
    if command[0] not in ('timm-mrla', 'python') or command[1] == 'train.py':
        assert command[0] in ('pytest', 'apt-get', 'echo', 'trtexec') or command[1] == 'train.py'
        return

    if command[1] == 'benchmarks/coco_digits.py':
        pytest.importorskip('pycocotools')
        pytest.importorskip('skimage')
    if command[0] == 'timm-mrla':
        assert_accepted(command, lambda: runpy.run_module('timm_mrla', run_name='__main__'), monkeypatch)
    else:
        assert_accepted(command[1:], lambda: runpy.run_path(str(ROOT / command[1]), run_name='__main__'), monkeypatch)


def test_code_of_the_benchmarks(tmp_path, monkeypatch):
    """Its Python block prints the output scales of a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (source,) = code(LINKED['benchmarks/README.md'])
    path = re.search(r"'(.*\.pth\.tar)'", source)[1]
    (tmp_path / path).parent.mkdir(parents=True)
    torch.save({'state_dict': timm.create_model('tf_efficientnet_lite0_mrla').state_dict()}, path)
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        exec(compile(source, 'benchmarks/README.md', 'exec'), {})
    assert set(ast.literal_eval(stdout.getvalue()).values()) == {1.0}


def test_blocks_have_a_known_language():
    """A block of another language would be run by no test."""
    for page, text in LINKED.items():
        assert text.count('```') == 2 * len(blocks(text)), page
        assert {language for language, _ in blocks(text)} <= {'python', 'bash', 'text', 'bibtex'}, page
    assert len(code(README, 'bibtex')) == 1


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    found = []
    for heading in re.findall(r'^#+ (.*?)\s*$', prose(text), flags=re.MULTILINE):
        heading = re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading)
        slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        count = sum(re.fullmatch(rf'{re.escape(slug)}(-\d+)?', other) is not None for other in found)
        found.append(f'{slug}-{count}' if count else slug)
    return found


def test_anchors():
    text = "# `a_b` of c's\n## A  b\n## x, y: z\n## x, y: z\n```bash\n# no heading\n```\n### [t](u) (v)\n"
    assert anchors(text) == ['a_b-of-cs', 'a--b', 'x-y-z', 'x-y-z-1', 't-v']


@pytest.mark.parametrize('page', LINKED)
def test_links(page):
    """A file that is linked exists, and has the heading."""
    links = re.findall(r'\]\(([^)\s]+)\)', prose(LINKED[page]))
    for link in links:
        if re.match(r'https?://', link):
            continue
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_index():
    """The index of the documentation has each page, and the README leads to it."""
    pages = {page.removeprefix('docs/') for page in PAGES if page.startswith('docs/')} - {'README.md'}
    assert set(re.findall(r'^\| \[.*?\]\((.*?)\)', PAGES['docs/README.md'], flags=re.MULTILINE)) == pages
    assert pages <= {link.removeprefix('docs/') for link in re.findall(r'\((docs/[\w-]+\.md)', README)}


def test_the_api_reference():
    """`python tests/api.py` writes it."""
    assert PAGES['docs/api.md'] == api_page()


@pytest.mark.slow
def test_what_is_not_supported():
    """`attach` refuses the models; the file that shows how to add a module is as it is."""
    rows = re.findall(r'^\| (\w+) \| `(\w+)` \|', sections('docs/models.md')['Not supported'], flags=re.MULTILINE)
    assert len(rows) >= 10
    for module, name in rows:
        assert timm.models.model_entrypoint(name).__module__ == f'timm.models.{module}'
        with pytest.raises(ValueError, match=r'no block .*can have layer attention'):
            attach(timm.create_model(name, device='meta'))
    (source,) = code(PAGES['docs/questions.md'], 'text')
    assert source == (ROOT / 'timm_mrla' / 'models' / 'starnet.py').read_text()


def test_the_readme_is_short():
    """It is short enough to read in a few minutes."""
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 12_000


def test_the_widths_of_kernels():
    """3 up to 127 channels, 5 from 128 to 2047, 7 from 2048 on."""
    for dim in (16, 64, 127, 128, 512, 2047, 2048):
        assert Gate(dim, 1).qk.kernel_size == (1, 3 if dim < 128 else 5 if dim < 2048 else 7)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet50', 'resnet50_mrla'])
def test_what_bfloat16_loses(name):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 224, 224)
    model = timm.create_model(name)
    with torch.no_grad():
        for _ in range(2):  # for non-trivial running statistics
            model.train()(x)
        expected = model.eval()(x)
        error = (copy.deepcopy(model).bfloat16().float()(x) - expected).norm() / expected.norm()
    assert 0.001 < error.item() < 0.01


ROWS = re.findall(r'^\| (\w+) \| (\d+) \| (\d+) \| .* \| `(\w+)` \|', README, flags=re.MULTILINE)


def entries(module):
    return [name for name in timm.list_models('*_mrla', module=module) if name in BACKBONES]


def test_the_tables():
    """All entries of the paper; each module with an example."""
    named = re.findall(r'^\| `(\w+_mrlab?)` \|', PAGES['docs/models.md'], flags=re.MULTILINE)
    assert sorted(named) == sorted(paper_entries())
    assert [row[0] for row in sorted(ROWS)] == sorted({family(name) for name in BACKBONES})
    for module, _, _, example in ROWS:
        assert example in entries(module)


def test_the_numbers_of_entries():
    """They hold for the version of timm that the README names, which CI installs as the lower bound."""
    readme, how = (' '.join(PAGES[page].split()) for page in ('README.md', 'docs/how-it-works.md'))
    version = re.search(r'numbers of this page are of timm ([\d.]+)\)', readme)[1]
    assert f'timm>={version}"' in (ROOT / 'pyproject.toml').read_text()
    assert f'models with timm {version},' in how
    if timm.__version__ != version:
        pytest.skip(f'other versions than timm {version} have other entries')
    for module, count, tags, _ in ROWS:
        names = entries(module)
        assert int(count) == len(names)
        assert int(tags) == sum(len(timm.list_pretrained(f'{name}.*')) for name in names)
    light, base, warm = (
        len(timm.list_models('*_mrla')),
        len(timm.list_models('*_mrlab')),
        timm.list_pretrained('*_mrla*'),
    )
    assert f'{light} models' in readme and f'{base} models' in readme and f'all {len(warm):,} warm starts' in readme
    assert f'registers {light + base} models' in how
