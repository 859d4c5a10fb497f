"The plain forms that the benchmarks time give the library's scores, and its gradients; the benchmarks run."

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import bench, gpu, memory
from benchmarks.bench import PlainLoader
from benchmarks.plain import PLAIN, form
from imtm_lite.data import Split, batch_plan, batches
from imtm_lite.text import Vocab
from tests.matchers import make, ragged


@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize('name', PLAIN)
def test_plain_and_fast_agree_with_gradients(name, dtype, tolerance):
    torch.manual_seed(1)
    matcher, (regions, captions) = make(*form(name), dtype), ragged(dtype)
    images = matcher.encode_images(regions)
    sentences = matcher.encode_captions(captions)
    fast = matcher.match(images, sentences)
    plain = PLAIN[name](matcher, images, sentences)
    torch.testing.assert_close(plain, fast, atol=tolerance, rtol=0)
    weight = torch.randn_like(fast)
    learned = list(matcher.parameters())
    gradients = []
    for scores in (plain, fast):
        total = (scores * weight).sum()
        gradients.append(torch.autograd.grad(total, learned, retain_graph=True, allow_unused=True))
    for a, b in zip(*gradients):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)


def test_rows_are_what_their_names_say():
    camps = {name: bench.build(name, 32) for name in ('camp', 'camp scalar gates', 'camp released')}
    assert [c.config['form'] for c in camps.values()] == ['paper', 'paper', 'released']
    assert [c.image_fusion.gate for c in camps.values()] == ['elementwise', 'scalar', 'scalar']
    assert bench.build('scan both', 32).config['direction'] == 'both'
    task = bench.training_task('ssamt phase 2', 32, 4)
    assert not any(p.requires_grad for p in task.matcher.intra.parameters())
    assert all(p.requires_grad for p in task.matcher.inter.parameters())
    assert task(bench.training_batch(4))['phrase'].item() > 0, 'no phrase loss'


def test_counted_is_what_the_formulas_say():
    "At one length, so that no padding counts; what is counted is never below the least."
    regions, captions = bench.items(4, 40)
    one_length = captions[captions.lengths == 14][:4]
    B = 4
    R = 36
    T = 14
    P = 3
    D = 32
    short = dict(T=T, P=P, R=R, D=D)
    for name in PLAIN:
        matcher = bench.build(name, D)
        v = matcher.encode_images(regions)
        t = matcher.encode_captions(one_length).trimmed()
        counted = bench.madds(lambda: matcher.match(v, t)) / (B * len(t))
        assert counted >= 0.99 * bench.least(name, **short), name
        assert bench.least_of(name, v, t) == bench.least(name, **short), name
        if name == 'vse':
            assert counted == D
        if name == 'scan':
            assert counted == R * T * D + T * R * R
        if name == 'ssamt':
            n = 2 + P + T + R
            assert counted == pytest.approx(16 * n * D * D + 4 * n * n * D + n * D, rel=0.01)
            alone = bench.madds(lambda: matcher.pairs(v[: len(t)], t)) / len(t)
            assert alone == pytest.approx(counted, rel=0.01)


def test_fused_layers_are_back_after_counting():
    before = torch.backends.mha.get_fastpath_enabled()
    with bench.seen_through():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_part_has_lengths_like_the_whole():
    regions, captions = bench.items(8, 200)
    matcher = bench.build('scan', 32)
    codes = matcher.encode_captions(captions)
    mean = codes.mask.sum(1).double().mean()
    for n in (2, 5, 50):
        some = bench.spread(codes, n)
        assert len(some) == n
        assert abs(some.mask.sum(1).double().mean() - mean) < 1
    assert bench.spread(codes, 300) is codes
    v, t = bench.affordable(matcher.encode_images(regions), codes, 30)
    assert len(v) * len(t) <= 30
    assert min(len(v), len(t)) > 3


def test_plain_and_fast_loader_give_the_same_batches(world):
    split = Split(world, 'train')
    vocab = Vocab.build(split.captions)
    order = dict(size=32, seed=0, epoch=0, per_image=1)
    plain = PlainLoader(split, vocab)
    for rows, b in zip(
        batch_plan(split, **order), batches(split, vocab, **order, workers=2), strict=True
    ):
        by_length = b.captions.lengths.argsort(descending=True, stable=True)
        images, tokens, lengths = plain.batch(rows)
        assert images.equal(b.regions.features[by_length])
        assert tokens.equal(b.captions.tokens[by_length])
        assert lengths == b.captions.lengths[by_length].tolist()


def run(module, out):
    command = [sys.executable, '-m', f'benchmarks.{module}', '--quick', '--out', out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_dry_run_leaves_a_table_and_a_file(tmp_path):
    said, rows = run('bench', tmp_path / 'r.json')
    assert {r['what'] for r in rows} == {'scoring', 'cost', 'training step', 'ranks', 'loader'}
    assert not (tmp_path / 'r.json.partial').exists()
    scoring = [r for r in rows if r['what'] == 'scoring']
    both = {(m, f) for m in PLAIN for f in ('fast', 'plain')}
    assert {(r['model'], r['form']) for r in scoring} == both | {('ssamt', 'pairs')}
    figures = {
        'what',
        'model',
        'form',
        'shape',
        'per_s',
        'ratio_to_plain',
        'peak_share',
        'peak_mb',
        'timed_pairs',
        'madds_a_pair',
        'least_a_pair',
    }
    assert all(figures <= r.keys() and r['per_s'] > 0 for r in scoring)
    assert [r['model'] for r in rows if r['what'] == 'cost'] == ['cmsei', 'hire']
    assert said.count('times scan both') == 2
    assert {r['model'] for r in rows if r['what'] == 'training step'} == set(bench.TRAINED)
    loaders = {r['form']: r['ratio_to_plain'] > 0 for r in rows if r['what'] == 'loader'}
    assert loaders == {'fast': True, 'plain': True}


def test_dry_run_of_the_gpu_benchmark(tmp_path):
    said, record = run('gpu', tmp_path / 'g.json')
    assert {'device', 'torch', 'tflops', 'rows'} <= record.keys()
    scoring = [r for r in record['rows'] if r['what'] == 'scoring']
    both = {(m, f) for m in PLAIN for f in ('float32', 'bfloat16')}
    assert {(r['model'], r['form']) for r in scoring} == both
    assert all(r['largest_difference'] < (1e-5 if r['form'] == 'float32' else 0.3) for r in scoring)
    train = [r for r in record['rows'] if r['what'] == 'training']
    assert [r['model'] for r in train] == [name for name in gpu.SCHEDULES for _ in range(2)]
    assert all(r['steps'] == 2 and r['peak_share'] > 0 for r in train)
    assert all(r['projected_hours'] > 0 for r in train if r['model'].startswith('camp'))
    for exact, rough in zip(train[::2], train[1::2]):
        assert rough['first_loss'] == pytest.approx(exact['first_loss'], rel=0.1)
    assert said.count('\n') == 2 + len(record['rows'])


def test_hours_of_schedules(monkeypatch):
    pairs = 10 * gpu.F30K
    stages = [
        # one caption a picture
        dict(model='camp', size=128, epochs=10, per_image=1),
        # twice as dear an item
        dict(model='camp', size=256, epochs=10, per_image=1),
        dict(model='camp-stage1', size=128, epochs=99),
    ]
    monkeypatch.setitem(gpu.RECIPES, 'camp', {'f30k': stages})
    assert gpu.hours('camp', a_step=2.0, size=128) == round(3 * pairs / 128 * 2 / 3600, 2)
    assert gpu.hours('camp released', a_step=2.0, size=128) is None  # no such preset
    counted = [dict(model='ssamt', instances=8000, updates=1000, accumulate=4)]
    monkeypatch.setitem(gpu.RECIPES, 'ssamt', {'f30k': counted})
    assert gpu.hours('ssamt phase 1', a_step=2.0, size=128) is None
    assert gpu.hours('ssamt phase 2', a_step=2.0, size=128) == round(
        8000 / 50 * 4000 / 128 * 2 / 3600, 2
    )


def test_what_tiles_keep_is_what_a_step_needs(capsys):
    memory.main(
        [
            '--batch',
            '40',
            '--width',
            '32',
            '--region-width',
            '16',
            '--keep',
            '0',
            '1',
            '--form',
            'camp',
            'camp released',
        ]
    )
    lines = capsys.readouterr().out.splitlines()[1:]
    peaks = [int(line.split('peak ')[1].split(' MiB')[0].replace(',', '')) for line in lines]
    assert 2 * peaks[0] < peaks[1]
    assert 2 * peaks[2] < peaks[3]
