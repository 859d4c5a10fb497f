"The plain forms that the benchmarks time give the library's scores; the benchmarks run."

import json
import re
import subprocess
import sys
from itertools import product

import pytest
import torch

from benchmarks import bench, gpu, memory
from benchmarks.bench import PlainLoader
from benchmarks.plain import PLAIN, form
from imtm_lite.data import Split, batch_plan, batches
from imtm_lite.text import Vocab
from tests.matchers import close_with_gradients, codes_of, make, ragged


@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize('name', PLAIN)
def test_plain_and_fast_agree_with_gradients(name, dtype, tolerance):
    torch.manual_seed(1)
    matcher = make(*form(name), dtype)
    images, sentences = codes_of(matcher, *ragged(dtype))
    fast = matcher.match(images, sentences)
    plain = PLAIN[name](matcher, images, sentences)
    of_gradients = dict(gradient_atol=10 * tolerance, gradient_rtol=10 * tolerance)
    close_with_gradients(matcher, plain, fast, atol=tolerance, **of_gradients)


def test_rows_are_what_their_names_say():
    camps = {name: bench.build(name, 32) for name in ('camp', 'camp scalar gates', 'camp released')}
    assert [c.config['form'] for c in camps.values()] == ['paper', 'paper', 'released']
    assert [c.image_fusion.gate for c in camps.values()] == ['elementwise', 'scalar', 'scalar']
    assert bench.build('scan both', 32).config['direction'] == 'both'
    task = bench.training_task('ssamt phase 2', 32, 4)
    assert not any(each.requires_grad for each in task.matcher.intra.parameters())
    assert all(each.requires_grad for each in task.matcher.inter.parameters())
    assert task(bench.training_batch(4))['phrase'].item() > 0, 'no phrase loss'


R = 36
T = 14
P = 3
D = 32
EXACTLY = {'vse': D, 'scan': R * T * D + T * R * R}  # multiply-adds as the code has them


def codes_of_one_length(name):
    "A matcher, and codes of pictures and captions without padding."
    regions, captions = bench.items(4, 40)
    captions = captions[captions.lengths == T][:4]
    matcher = bench.build(name, D)
    return matcher, matcher.encode_images(regions), matcher.encode_captions(captions).trimmed()


@pytest.mark.parametrize('name', PLAIN)
def test_counted_is_what_the_formulas_say(name):
    "What is counted is never below the least."
    matcher, v, t = codes_of_one_length(name)
    counted = bench.madds(lambda: matcher.match(v, t)) / (len(v) * len(t))
    least = bench.least(name, T=T, P=P, R=R, D=D)
    assert counted >= 0.99 * least
    assert bench.least_of(name, v, t) == least
    if name in EXACTLY:
        assert counted == EXACTLY[name]


def test_aligned_pairs_cost_what_pairs_cost():
    matcher, v, t = codes_of_one_length('ssamt')
    n = 2 + P + T + R
    want = 16 * n * D * D + 4 * n * n * D + n * D
    aligned = bench.madds(lambda: matcher.pairs(v[: len(t)], t)) / len(t)
    crossed = bench.madds(lambda: matcher.match(v, t)) / (len(v) * len(t))
    assert aligned == pytest.approx(want, rel=0.01)
    assert crossed == pytest.approx(want, rel=0.01)


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
        few = bench.spread(codes, n)
        assert len(few) == n
        assert abs(few.mask.sum(1).double().mean() - mean) < 1
    assert bench.spread(codes, 300) is codes
    v, t = bench.affordable(matcher.encode_images(regions), codes, 30)
    assert len(v) * len(t) <= 30
    assert min(len(v), len(t)) > 3


def test_plain_and_fast_loader_give_the_same_batches(world):
    split = Split(world, 'train')
    vocab = Vocab.build(split.captions)
    order = dict(size=32, seed=0, epoch=0, per_image=1)
    plain = PlainLoader(split, vocab)
    fast = batches(split, vocab, **order, workers=2)
    for rows, batch in zip(batch_plan(split, **order), fast, strict=True):
        by_length = batch.captions.lengths.argsort(descending=True, stable=True)
        images, tokens, lengths = plain.batch(rows)
        assert images.equal(batch.regions.features[by_length])
        assert tokens.equal(batch.captions.tokens[by_length])
        assert lengths == batch.captions.lengths[by_length].tolist()


# ---------------------------------------------------------------- dry runs


def run(module, out):
    command = [sys.executable, '-m', f'benchmarks.{module}', '--quick', '--out', out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def rows_of(rows, what):
    return [row for row in rows if row['what'] == what]


def names_of(rows):
    return {(row['model'], row['form']) for row in rows}


FIGURES = {'per_s', 'ratio_to_plain', 'peak_share', 'peak_mb', 'madds_a_pair', 'least_a_pair'}
ABOUT = {'what', 'model', 'form', 'shape', 'timed_pairs'}


def test_dry_run_leaves_a_table_and_a_file(tmp_path):
    printed, rows = run('bench', tmp_path / 'r.json')
    kinds = {row['what'] for row in rows}
    assert kinds == {'scoring', 'cost', 'training step', 'ranks', 'loader'}
    assert not (tmp_path / 'r.json.partial').exists()
    scoring = rows_of(rows, 'scoring')
    assert names_of(scoring) == {*product(PLAIN, ('fast', 'plain')), ('ssamt', 'pairs')}
    for row in scoring:
        assert FIGURES | ABOUT <= row.keys()
        assert row['per_s'] > 0
    assert [row['model'] for row in rows_of(rows, 'cost')] == ['cmsei', 'hire']
    assert printed.count('times scan both') == 2
    trained = {row['model'] for row in rows_of(rows, 'training step')}
    assert trained == set(bench.TRAINED)
    for what in ('ranks', 'loader'):
        ratios = {row['form']: row['ratio_to_plain'] for row in rows_of(rows, what)}
        assert ratios.keys() == {'fast', 'plain'}
        assert all(ratio > 0 for ratio in ratios.values())


def test_dry_run_of_the_gpu_benchmark(tmp_path):
    printed, record = run('gpu', tmp_path / 'g.json')
    assert {'device', 'torch', 'tflops', 'rows'} <= record.keys()
    assert printed.count('\n') == 2 + len(record['rows'])
    scoring = rows_of(record['rows'], 'scoring')
    assert names_of(scoring) == set(product(PLAIN, ('float32', 'bfloat16')))
    for row in scoring:
        allowed = 1e-5 if row['form'] == 'float32' else 0.3
        assert row['largest_difference'] < allowed
    trained = rows_of(record['rows'], 'training')
    assert names_of(trained) == set(product(gpu.SCHEDULES, ('float32', 'bfloat16')))
    for row in trained:
        assert row['steps'] == 2
        assert row['peak_share'] > 0
        if row['model'].startswith('camp'):
            assert row['projected_hours'] > 0
    for exact, rough in zip(trained[::2], trained[1::2]):
        assert rough['first_loss'] == pytest.approx(exact['first_loss'], rel=0.1)


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
    want = 8000 / 50 * 4000 / 128 * 2 / 3600
    assert gpu.hours('ssamt phase 2', a_step=2.0, size=128) == round(want, 2)


def test_what_tiles_keep_is_what_a_step_needs(capsys):
    line = '--batch 40 --width 32 --region-width 16 --keep 0 1 --form camp'
    memory.main([*line.split(), 'camp released'])
    peaks = re.findall(r'peak ([0-9,]+) MiB', capsys.readouterr().out)
    recomputed, kept, released_recomputed, released_kept = (
        int(peak.replace(',', '')) for peak in peaks
    )
    assert 2 * recomputed < kept
    assert 2 * released_recomputed < released_kept
