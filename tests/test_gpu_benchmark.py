"""Tests of benchmarks/gpu.py, as far as a CPU can run it."""

import argparse
import json

import gpu as benchmark
import pytest


def test_its_parts_end_in_eight_minutes():
    args = argparse.Namespace(models=benchmark.MODELS, device='cuda', batch_size=128)
    assert sum(limit for _, limit in benchmark.parts(args).values()) <= 480


def test_parts_that_fail_leave_the_others_and_are_told(tmp_path):
    assert not benchmark.run('training', ['-c', 'raise SystemExit(3)'], 60, tmp_path)
    assert not benchmark.run('memory', ['-c', 'import time; print("slept", flush=True); time.sleep(9)'], 1, tmp_path)
    assert benchmark.table(tmp_path).splitlines() == ['| model | kernels |', '|---|---|']
    row = {'model': 'a', 'fused': 'on', 'task': 'inference', 'how': 'eager', 'batch_size': 1, 'ratio': 1.234}
    (tmp_path / 'batch-1.json').write_text(json.dumps({'results': [row, {**row, 'fused': 'off', 'ratio': 2}]}))
    assert benchmark.table(tmp_path).splitlines() == [
        '| model | kernels | inference, eager, batch 1 |',
        '|---|---|---|',
        '| a | on | 1.23 |',
        '| a | off | 2.00 |',
    ]


@pytest.mark.slow
def test_on_a_cpu(tmp_path):
    args = argparse.Namespace(models=['test_resnet_mrla'], device='cpu', batch_size=2)
    for name in ('training', 'memory'):
        command, limit = benchmark.parts(args)[name]
        assert benchmark.run(name, command, limit, tmp_path), (tmp_path / f'{name}.log').read_text()
    lines = benchmark.table(tmp_path).splitlines()
    benchmark.draw(tmp_path)
    assert (tmp_path / 'costs.png').stat().st_size > 1000
    assert lines[0] == '| model | kernels | training, eager, batch 2 | saved bytes | saved bytes, recomputed |'
    assert len(lines) == 4 and all(line.startswith('| test_resnet_mrla | o') for line in lines[2:])
