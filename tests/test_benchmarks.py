"The plain forms that the benchmarks time give the library's scores, and its gradients."
import json
import subprocess
import sys

import pytest
import torch
from tests.test_matchers import make, ragged

from benchmarks import memory
from benchmarks.bench import PlainLoader
from benchmarks.plain import PLAIN, form
from imtm_lite.data import Split, batches, plan
from imtm_lite.text import Vocab


@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize('name', PLAIN)
def test_plain_and_fast_agree_with_gradients(name, dtype, tolerance):
    torch.manual_seed(1)
    matcher, (regions, captions) = make(*form(name), dtype), ragged(dtype)
    images, sentences = matcher.encode_images(regions), matcher.encode_captions(captions)
    fast, plain = matcher.match(images, sentences), PLAIN[name](matcher, images, sentences)
    torch.testing.assert_close(plain, fast, atol=tolerance, rtol=0)
    weight = torch.randn_like(fast)
    parts = [torch.autograd.grad((s * weight).sum(), list(matcher.parameters()), retain_graph=True, allow_unused=True) for s in (plain, fast)]
    for a, b in zip(*parts):
        if a is not None or b is not None: torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)


def test_plain_and_fast_loader_give_the_same_batches(world):
    split = Split(world, 'train')
    vocab = Vocab.build(split.captions)
    order, plain = dict(size=32, seed=0, epoch=0, per_image=1), PlainLoader(split, vocab)
    for rows, b in zip(plan(split, **order), batches(split, vocab, **order, workers=2), strict=True):
        by_length = b.captions.lengths.argsort(descending=True, stable=True)
        images, tokens, lengths = plain.batch(rows)
        assert images.equal(b.regions.features[by_length]) and tokens.equal(b.captions.tokens[by_length]) and lengths == b.captions.lengths[by_length].tolist()


def test_dry_run_leaves_a_table_and_a_file(tmp_path):
    out = subprocess.run([sys.executable, '-m', 'benchmarks.bench', '--quick', '--out', tmp_path / 'r.json'], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = json.loads((tmp_path / 'r.json').read_text())
    scoring = [r for r in rows if r['what'] == 'scoring']
    assert {(r['model'], r['form']) for r in scoring} == {(m, f) for m in PLAIN for f in ('fast', 'plain')}
    assert all({'what', 'model', 'form', 'shape', 'per_s', 'ratio_to_plain', 'peak_share', 'peak_mb'} <= r.keys() and r['per_s'] > 0 for r in scoring)
    assert {r['form']: r['ratio_to_plain'] > 0 for r in rows if r['what'] == 'loader'} == {'fast': True, 'plain': True}
    assert {r['what'] for r in rows} == {'scoring', 'training step', 'ranks', 'loader'} and not (tmp_path / 'r.json.partial').exists()


def test_dry_run_of_the_gpu_benchmark(tmp_path):
    out = subprocess.run([sys.executable, '-m', 'benchmarks.gpu', '--quick', '--out', tmp_path / 'g.json'], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    record = json.loads((tmp_path / 'g.json').read_text())
    assert {'device', 'torch', 'tflops', 'rows'} <= record.keys()
    assert {(r['model'], r['form']) for r in record['rows'] if r['what'] == 'scoring'} == {(m, f) for m in PLAIN for f in ('float32', 'bfloat16')}
    assert all(r['largest_difference'] < (1e-5 if r['form'] == 'float32' else .3) for r in record['rows'] if r['what'] == 'scoring')
    train = [r for r in record['rows'] if r['what'] == 'training']
    assert [r['model'] for r in train] == ['camp-stage1', 'camp'] * 2 and all(r['steps'] == 2 and r['projected_hours'] > 0 for r in train)


def test_what_tiles_keep_is_what_a_step_needs(capsys):
    memory.main('--batch 40 --width 32 --region-width 16 --keep 0 1'.split())
    first, second = (int(line.split('peak ')[1].split(' MiB')[0].replace(',', '')) for line in capsys.readouterr().out.split('\n')[1:3])
    assert 2 * first < second
