"Runs that can be repeated, killed and resumed; checkpoints that say what they are."

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import imtm_lite
import imtm_lite.gallery as gallery_module
from imtm_lite.attention import SCAN, attend
from imtm_lite.checkpoints import FORMAT, MODELS, check_fits, read_checkpoint, write_checkpoint
from imtm_lite.data import Batch, Split, batches, image_chunks
from imtm_lite.encoders import VSE
from imtm_lite.files import CheckpointError, DataError, SettingError
from imtm_lite.gallery import (
    RERANKED,
    TRIED,
    chosen_pairs,
    probe_accuracy,
    rerank,
    rerank_agreement,
    score_split,
    split_recall,
    split_scores,
)
from imtm_lite.health import diagnose, gradient_figures, health
from imtm_lite.losses import HardestBCE, Triplet
from imtm_lite.phrases import chunk
from imtm_lite.recipes import recipe, train_recipe
from imtm_lite.regions import Regions
from imtm_lite.runs import Log, train
from imtm_lite.scoring import encode
from imtm_lite.tasks import Task
from imtm_lite.text import UNK, Captions, Reader
from imtm_lite.training import drop_regions, drop_words, learning_rate, train_step
from tests.matchers import make, ragged

QUICK = dict(
    arguments=dict(width=16, word_width=8),
    epochs=2,
    size=20,
    lr=2e-3,
    per_image=2,
    min_freq=2,
    decay_at=(1,),
    device='cpu',
    progress=False,
)


def same(a: Path, b: Path, keys=lambda k: True):
    a, b = (read_checkpoint(p)[1] for p in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if keys(k))


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'scan'
    train('scan', world, out, **QUICK)
    return out


def test_reloaded_checkpoint_scores_bit_for_bit(world, tmp_path, monkeypatch):
    import imtm_lite.runs as module

    seen = {}
    keep = module.save_run

    # the matcher in memory, as it is saved
    def spy(run, path, **more):
        keep(run, path, **more)
        seen[path.name] = split_scores(run.matcher, run.dev, run.vocab)

    monkeypatch.setattr(module, 'save_run', spy)
    best = train('camp', world, tmp_path / 'camp', criterion='bce', **QUICK)
    matcher, vocab, card = imtm_lite.load(best)
    assert torch.equal(
        split_scores(matcher, Split(world, 'dev'), vocab), seen['best.safetensors']
    )


def test_the_same_seed_gives_the_same_run_and_another_seed_another(world, run, tmp_path):
    train('scan', world, tmp_path / 'again', **QUICK)
    train('scan', world, tmp_path / 'other', seed=1, **QUICK)
    assert same(run / 'last.safetensors', tmp_path / 'again/last.safetensors')
    assert Log(run / 'log.jsonl').lines() == Log(tmp_path / 'again/log.jsonl').lines()
    assert not same(run / 'last.safetensors', tmp_path / 'other/last.safetensors')


# everything that has a state or a count
RICH = dict(
    schedule='linear', warmup=3, accumulate=3, instances=160, drop_regions=0.2, drop_words=0.2
)


@pytest.mark.parametrize('more', [{}, RICH | dict(updates=13)], ids=['plain', 'rich'])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(world, tmp_path, more):
    settings = QUICK | dict(epochs=4) | more
    train('camp-stage1', world, tmp_path / 'whole', **settings)
    code = f'''
import torch; torch.set_num_threads({torch.get_num_threads()})
from imtm_lite.runs import train
train('camp-stage1', {str(world)!r}, {str(tmp_path / 'killed')!r}, save_every=1, resume=True, **{settings!r})
print('finished')'''
    last = tmp_path / 'killed/last.safetensors'
    kills = 0
    # after so many checkpoints, kill -9
    for moment in (1, 5, 12):
        child = subprocess.Popen(
            [sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        seen = 0
        stamp = last.stat().st_mtime_ns if last.exists() else 0
        deadline = time.time() + 120
        while child.poll() is None and seen < moment and time.time() < deadline:
            now = last.stat().st_mtime_ns if last.exists() else 0
            seen = seen + (now != stamp)
            stamp = now
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
        child.stderr.close()
    assert kills >= 2
    end = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'finished' in end.stdout, end.stderr
    assert same(tmp_path / 'whole/last.safetensors', last) and same(
        tmp_path / 'whole/best.safetensors', tmp_path / 'killed/best.safetensors'
    )
    assert Log(tmp_path / 'whole/log.jsonl').lines() == Log(tmp_path / 'killed/log.jsonl').lines()


def test_resume_of_a_finished_run_changes_nothing_and_more_epochs_go_on(world, tmp_path):
    train('vse', world, tmp_path / 'a', **QUICK | dict(epochs=3))
    train('vse', world, tmp_path / 'b', **QUICK | dict(epochs=1))
    before = (tmp_path / 'b/last.safetensors').read_bytes()
    train('vse', world, tmp_path / 'b', resume=True, **QUICK | dict(epochs=1))
    assert (tmp_path / 'b/last.safetensors').read_bytes() == before
    train('vse', world, tmp_path / 'b', resume=True, **QUICK | dict(epochs=3))
    assert same(tmp_path / 'a/last.safetensors', tmp_path / 'b/last.safetensors')


def test_an_unresumed_run_is_not_overwritten(world, run):
    with pytest.raises(CheckpointError, match='already holds a run'):
        train('scan', world, run, **QUICK)


@pytest.mark.parametrize(
    'change,said',
    [
        (dict(lr=1e-3), 'lr'),
        (dict(size=10), 'size'),
        (dict(epochs=1), 'epochs'),
        (dict(arguments=dict(width=8)), 'config'),
    ],
)
def test_resume_with_other_settings_is_refused(world, run, change, said):
    with pytest.raises(CheckpointError, match=f'the run has {said}') as fault:
        train('scan', world, run, resume=True, **QUICK | change)
    assert '\n' not in str(fault.value)


def test_a_full_disk_leaves_the_old_checkpoint_good(tmp_path):
    path = tmp_path / 'a.safetensors'
    before = {'model.w': torch.ones(10)}
    write_checkpoint(path, before, {'format': FORMAT})
    child = f'''
import resource, signal, torch
from pathlib import Path
from imtm_lite.checkpoints import write_checkpoint
from imtm_lite.files import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))              # no file may grow beyond this: the disk is full
try: write_checkpoint(Path({str(path)!r}), {{'model.w': torch.ones(1_000_000)}}, {{'format': 1}})
except CheckpointError as fault: print('refused:', fault)'''
    out = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True)
    assert 'refused:' in out.stdout and 'untouched' in out.stdout and out.stdout.count('\n') == 1, (
        out.stdout + out.stderr
    )
    assert os.listdir(tmp_path) == ['a.safetensors'] and torch.equal(
        read_checkpoint(path)[1]['model.w'], before['model.w']
    )


def spoiled(run, tmp_path, **card_changes):
    card, tensors = read_checkpoint(run / 'best.safetensors')
    write_checkpoint(tmp_path / 'best.safetensors', tensors, card | card_changes)
    return tmp_path


def test_faulty_checkpoints_are_refused_in_one_line(run, world, tmp_path):
    card, _ = read_checkpoint(run / 'best.safetensors')
    faults = {
        'newer': (dict(format=FORMAT + 1, library='9.0'), 'format 2, written by version 9.0'),
        'words': (dict(vocabulary=card['vocabulary'][:-1]), 'a vocabulary of'),
        'width': (dict(config=card['config'] | dict(width=8)), 'weights do not fit'),
        'model': (dict(model='camp', config=card['config']), 'weights do not fit'),
    }
    for name, (change, said) in faults.items():
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match=said) as fault:
            imtm_lite.load(spoiled(run, tmp_path / name, **change))
        assert '\n' not in str(fault.value) and 'best.safetensors' in str(fault.value)
    (tmp_path / 'cut.safetensors').write_bytes((run / 'best.safetensors').read_bytes()[:-100])
    (tmp_path / 'text.safetensors').write_text('not a checkpoint')
    for name in ('cut', 'text', 'absent'):
        with pytest.raises(CheckpointError, match='not a readable checkpoint'):
            imtm_lite.load(tmp_path / f'{name}.safetensors')


def test_warm_start_needs_the_same_vocabulary(run, world, tmp_path):
    words = read_checkpoint(run / 'best.safetensors')[0]['vocabulary']
    other = spoiled(run, tmp_path, vocabulary=words[:4] + words[5:] + ['zebra'])
    with pytest.raises(CheckpointError, match='another vocabulary'):
        train('scan', world, tmp_path / 'x', start=other / 'best.safetensors', **QUICK)


def test_data_of_another_width_is_refused(run, world):
    matcher, vocab, card = imtm_lite.load(run)
    split = Split(world, 'test')
    check_fits(matcher, split)
    matcher.config['region_width'] = 2048
    with pytest.raises(
        CheckpointError, match='features are 128 wide, the checkpoint was trained on 2048'
    ):
        check_fits(matcher, split)


def test_staged_recipe_starts_from_the_stage_before_and_freezes(world, tmp_path):
    changes = dict(
        epochs=1,
        size=20,
        per_image=1,
        min_freq=2,
        arguments=dict(width=16, word_width=8),
        frozen=[(), ('regions', 'words', 'messages')],
    )
    train_recipe(
        'camp',
        world,
        tmp_path / 'camp',
        preset='demo-released',
        changes=changes,
        device='cpu',
        progress=False,
    )
    first, last = (
        read_checkpoint(tmp_path / 'camp' / p)[1]
        for p in ('stage1/best.safetensors', 'best.safetensors')
    )
    moved = {k for k in first if k.startswith('model.') and not torch.equal(first[k], last[k])}
    assert not moved and any(k.startswith('model.head') for k in last)
    with pytest.raises(SettingError, match='nothing to freeze'):
        train('camp', world, tmp_path / 'y', **QUICK | dict(frozen=('nothing',)))


def test_recipes_name_their_faults():
    for wrong in (
        lambda: recipe('clip', 'demo'),
        lambda: recipe('camp', 'huge'),
        lambda: recipe('camp', 'demo', dict(epochs=[1, 2, 3, 4])),
    ):
        with pytest.raises(SettingError):
            wrong()
    assert [s['epochs'] for s in recipe('camp', 'demo-released', dict(epochs=[7, 8]))] == [7, 8]
    assert [
        s['arguments'].get('gate')
        for s in recipe('camp', 'demo-released', dict(arguments=dict(gate='none')))
    ] == [None, 'none']


def test_a_linear_rate_ends_at_zero_with_the_run():
    at = lambda step: learning_rate(
        step, 0, lr=2.0, warmup=10, decay_at=(0,), decay=0.1, schedule='linear', total=110
    )
    assert [at(0), at(9), at(10), at(60), at(109)] == pytest.approx([0.2, 2.0, 2.0, 1.0, 0.02])
    assert (
        learning_rate(
            110, 0, lr=2.0, warmup=10, decay_at=(), decay=0.1, schedule='linear', total=110
        )
        == 0
    )


def rates(out):
    return [line['lr'] for line in Log(out / 'log.jsonl').lines() if 'lr' in line]


def test_a_run_of_so_many_updates_ends_there_and_its_rate_at_zero(world, tmp_path):
    # 40 batches an epoch
    settings = QUICK | dict(size=4, epochs=1, schedule='linear', warmup=4, updates=60)
    train('vse', world, tmp_path / 'a', **settings)
    card = read_checkpoint(tmp_path / 'a/last.safetensors')[0]
    assert (card['step'], card['epoch'], card['skip']) == (60, 2, 0)
    assert rates(tmp_path / 'a') == pytest.approx([2e-3 * (60 - s) / 56 for s in (19, 39, 59)])
    before = (tmp_path / 'a/last.safetensors').read_bytes()
    # it has ended
    train('vse', world, tmp_path / 'a', resume=True, **settings)
    assert (tmp_path / 'a/last.safetensors').read_bytes() == before
    with pytest.raises(CheckpointError, match='the run has updates 60'):
        train('vse', world, tmp_path / 'a', resume=True, **settings | dict(updates=80))


def test_a_linear_run_cannot_be_made_longer_and_counts_its_steps(world, tmp_path):
    # 14 steps an epoch, the last of one batch
    settings = QUICK | dict(size=4, epochs=2, schedule='linear', accumulate=3)
    train('vse', world, tmp_path / 'a', **settings)
    assert read_checkpoint(tmp_path / 'a/last.safetensors')[0]['step'] == 28
    assert rates(tmp_path / 'a') == pytest.approx([2e-3 * (28 - 19) / 28])
    with pytest.raises(CheckpointError, match='the run has epochs 2'):
        train('vse', world, tmp_path / 'a', resume=True, **settings | dict(epochs=3))
    with pytest.raises(SettingError, match='warmup is 90 steps, and the run has 28'):
        train('vse', world, tmp_path / 'b', **settings | dict(warmup=90))


def gradient_of(task, parts, items):
    "What a step leaves in the gradients: its rate is 0."
    parameters = list(task.matcher.parameters())
    still = torch.optim.SGD(parameters, lr=0.0)
    train_step(task, parts, still, Accelerator(cpu=True), 1e9, items=items)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_parts_of_a_batch_are_added_where_the_loss_is_a_sum_and_averaged_where_it_is_a_mean(
    run, world
):
    matcher, vocab, card = imtm_lite.load(run)
    matcher = matcher.double()
    split = Split(world, 'train')
    parts = [
        b.each(lambda x: x.to(torch.float64) if hasattr(x, 'features') else x)
        for b in islice(batches(split, vocab, size=8, seed=0, epoch=0), 3)
    ]
    parts[2] = Batch(
        parts[2].regions[:5],
        parts[2].captions[:5],
        parts[2].image[:5],
        parts[2].caption_image[:5],
        parts[2].caption[:5],
    )

    # looks at matching pairs alone, so parts and whole agree
    class Own(torch.nn.Module):
        hardest = True

        def __init__(self, mean):
            super().__init__()
            self.mean = mean

        def forward(self, scores, same):
            return (
                (1 - scores.diagonal()).square().mean()
                if self.mean
                else (1 - scores.diagonal()).square().sum()
            )

    class OwnTask(Task):
        @property
        def mean(self):
            return self.criterion.mean

    for mean in (False, True):
        task = OwnTask(matcher, Own(mean))
        losses = [float(task(p)['total'].detach()) for p in parts]
        got, norm = train_step(
            task,
            parts,
            torch.optim.SGD(matcher.parameters(), lr=0.0),
            Accelerator(cpu=True),
            1e9,
            items=21,
        )
        want = sum(x * len(p) for x, p in zip(losses, parts)) / 21 if mean else sum(losses) / 21
        assert got == pytest.approx(want)
        alone = [gradient_of(task, [p], len(p)) for p in parts]
        weighted = sum(g * len(p) / 21 for g, p in zip(alone, parts)) if mean else sum(alone)
        torch.testing.assert_close(gradient_of(task, parts, 21), weighted, rtol=1e-9, atol=1e-12)
        assert norm == pytest.approx(float(weighted.norm()))
    soft = HardestBCE(hardest=False)
    task = Task(matcher, soft)
    assert task.mean
    soft.hardest = True
    assert not task.mean


def test_a_step_of_several_batches_is_the_run_of_their_sum(world, tmp_path):
    "The loss of a step is that of its pairs: the log of 3 x 7 pairs has as many lines as that of 21."
    for name, how in (('parts', dict(size=7, accumulate=3)), ('whole', dict(size=21))):
        train('vse', world, tmp_path / name, **QUICK | how | dict(epochs=2, decay_at=()))
    a, b = (
        read_checkpoint(tmp_path / n / 'last.safetensors')[0]['step'] for n in ('parts', 'whole')
    )
    assert a == b == 16


def test_dropped_regions_are_as_if_they_had_never_been(run):
    torch.manual_seed(0)
    real = torch.arange(9) < torch.randint(1, 10, (2000, 1))
    regions = Regions(features=torch.rand(2000, 9, 3), mask=real)
    for share in (0.0, 0.2, 0.999):
        got = drop_regions(regions, share)
        assert (
            not (got.mask & ~real).any()
            and (got.mask.sum(1) >= 1).all()
            and got.features is regions.features
        )
        several = real.sum(1) > 4
        assert float(got.mask[several].sum() / real[several].sum()) == pytest.approx(
            max(1 - share, float(several.sum() / real[several].sum())), abs=0.03
        )
    one = drop_regions(regions[real.sum(1) == 1], 0.999)
    # the last one stays
    assert one.mask.equal(regions[real.sum(1) == 1].mask)
    torch.manual_seed(1)
    a = drop_regions(regions, 0.5).mask
    torch.manual_seed(1)
    assert drop_regions(regions, 0.5).mask.equal(a)


def test_dropped_words_are_unknown_and_the_frame_stays():
    torch.manual_seed(0)
    captions = Captions.from_ids(
        [[1, *range(10, 10 + n), 2] for n in torch.randint(1, 20, (500,)).tolist()]
    )
    got = drop_words(captions, 0.3, UNK)
    gone = got.tokens != captions.tokens
    assert (got.tokens[gone] == UNK).all() and got.lengths.equal(captions.lengths)
    inside = captions.tokens >= 10
    assert not (gone & ~inside).any() and float(gone.sum() / inside.sum()) == pytest.approx(
        0.3, abs=0.02
    )
    assert drop_words(captions, 0.0, UNK).tokens.equal(captions.tokens)


def test_what_is_dropped_changes_the_run(world, run, tmp_path):
    for name, change in (('regions', dict(drop_regions=0.2)), ('words', dict(drop_words=0.2))):
        train('scan', world, tmp_path / name, **QUICK | change)
        assert not same(run / 'last.safetensors', tmp_path / f'{name}/last.safetensors')


class TwoLooks(VSE):
    "A matcher whose pairs are said to be expensive, with a first look that is nearly right."

    asked = 0

    def first_scores(self, images, captions):
        v = images.vector.clone()
        t = captions.vector
        v[:, ::7] = 0
        return v @ t.T

    def pairs(self, images, captions):
        self.asked += len(images)
        return super().pairs(images, captions)


def test_a_split_is_scored_exactly_or_by_two_looks_and_says_so(world, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'vse', TwoLooks)
    best = train('vse', world, tmp_path / 'exact', **QUICK)
    matcher, vocab, card = imtm_lite.load(best)
    dev = Split(world, 'dev')
    exact, record = score_split(matcher, dev, vocab)
    assert record == dict(scored='exactly', pairs=24 * 120) and matcher.asked == 0
    monkeypatch.setattr(gallery_module, 'EXACT_PAIRS', 1000)
    got, record = score_split(matcher, dev, vocab, candidates=4)
    images = encode(matcher.encode_images, image_chunks(dev))
    sentences = encode(matcher.encode_captions, [dev.encoded(vocab)[:]])
    first = matcher.first_scores(images, sentences)
    torch.testing.assert_close(
        got, rerank(matcher, images, sentences, first, candidates=4), rtol=0, atol=1e-6
    )
    assert (
        record['scored'] == 'reranked'
        and record['candidates'] == 4
        and record['pairs'] == chosen_pairs(first, 4).sum()
    )
    found = rerank_agreement(matcher, images, sentences, first, candidates=4, sample=TRIED)
    assert record['agreement'] == {str(k): round(x, 1) for k, x in found.items()}
    assert score_split(matcher, dev, vocab)[1]['candidates'] == RERANKED and score_split(
        matcher, dev, vocab, candidates=0
    )[0].equal(exact)
    torch.testing.assert_close(
        score_split(matcher, dev, vocab, candidates=1000)[0], exact, rtol=0, atol=1e-6
    )
    train('vse', world, tmp_path / 'two', candidates=5, **QUICK)
    said = [line['scored'] for line in Log(tmp_path / 'two/log.jsonl').lines() if 'dev' in line]
    assert [s['candidates'] for s in said] == [5, 5] and all(s['pairs'] < 24 * 120 for s in said)
    assert read_checkpoint(tmp_path / 'two/best.safetensors')[0]['scored']['scored'] == 'reranked'


# ---------------------------------------------------------------- health


class Shown(SCAN):
    "A SCAN that shows messages, gates and stages."

    def messages_of(self, images, captions):
        a = attend(images, captions, 4.0)[1]
        b = attend(captions, images, 9.0)[1].transpose(0, 1)
        return torch.einsum('bcrt,ctd->bcrd', a, captions.x), torch.einsum(
            'bctr,brd->bctd', b, images.x
        )

    def gates(self, images, captions):
        to_regions, to_words = self.messages_of(images, captions)
        # one element-wise, one scalar
        return torch.sigmoid(to_regions), torch.sigmoid(to_words.sum(-1))

    def stages(self, regions):
        v = self.regions(regions)
        return {'encoder': v, 'reasoning': v + 3 * v.mean(1, keepdim=True)}


def test_figures_of_health_are_those_of_plain_loops():
    torch.manual_seed(0)
    matcher, (regions, captions) = (
        Shown(region_width=7, words=30, width=8, word_width=4).double(),
        ragged(torch.float64, images=5, captions=5),
    )
    with torch.no_grad():
        got = health(matcher.train(), regions, captions)
        # as it was
        assert matcher.training
        v = matcher.encode_images(regions)
        t = matcher.encode_captions(captions)
        scores, (to_regions, to_words), (gate_r, gate_t), stages = (
            matcher.match(v, t),
            matcher.messages_of(v, t),
            matcher.gates(v, t),
            matcher.stages(regions),
        )
    n = range(5)
    have = [int(m.sum()) for m in v.mask]
    words = captions.lengths.tolist()
    mean = lambda some: float(sum(some) / len(some))

    # x: a list of (L, D)
    def alike(x, counts):
        return mean(
            [
                mean(
                    [
                        F.cosine_similarity(z[i], z[j], dim=0)
                        for i in range(k)
                        for j in range(k)
                        if i != j
                    ]
                )
                for z, k in zip(x, counts)
                if k > 1
            ]
        )

    def long(x, counts):
        return mean([z[i].norm() for z, k in zip(x, counts) for i in range(k)])

    own = [scores[k, k] for k in n]
    others = [scores[b, c] for b in n for c in n if b != c]
    want = dict(
        region_length=long(v.x, have),
        region_cosine=alike(v.x, have),
        word_length=long(t.x, words),
        word_cosine=alike(t.x, words),
        score_difference=mean(own) - mean(others),
        score_spread_own=float(torch.stack(own).std()),
        score_spread_others=float(torch.stack(others).std()),
    )
    want |= {f'region_cosine.{name}': alike(x, have) for name, x in stages.items()}
    for side, messages, counts in (('regions', to_regions, have), ('words', to_words, words)):
        mine = [messages[k, k] for k in n]
        want |= {
            f'message_length_{side}': long(mine, counts),
            f'message_cosine_{side}': alike(mine, counts),
        }
    for side, gate, count in (
        ('regions', gate_r.mean(-1), lambda b, c: have[b]),
        ('words', gate_t, lambda b, c: words[c]),
    ):
        want[f'gate_{side}_own'] = mean([gate[k, k, i] for k in n for i in range(count(k, k))])
        want[f'gate_{side}_others'] = mean(
            [gate[b, c, i] for b in n for c in n if b != c for i in range(count(b, c))]
        )
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize('name', MODELS)
def test_every_matcher_has_figures_of_health(name):
    matcher, (regions, captions) = make(name, {}, torch.float32), ragged(torch.float32)
    figures = health(matcher, regions, captions[:6])
    assert {
        'score_difference',
        'score_spread_own',
        'score_spread_others',
    } <= figures.keys() and all(map(math.isfinite, figures.values()))
    state = torch.get_rng_state()
    # looking changes nothing
    assert health(matcher, regions, captions[:6]) == figures and torch.get_rng_state().equal(state)
    diagnose(figures)


def test_alarms_sound_where_they_should():
    fine = dict(
        score_difference=0.4,
        score_spread_own=0.1,
        score_spread_others=0.1,
        region_length=1.0,
        word_length=1.2,
        region_cosine=0.5,
    )
    names = lambda **change: [a.name for a in diagnose(fine | change)]
    assert (
        names() == []
        and diagnose(dict(score_difference=0.4, score_spread_own=0.1, score_spread_others=0.1))
        == []
    )
    assert names(score_difference=0.001, score_spread_others=0.001) == ['collapsed']
    assert (
        names(score_difference=0.004, score_spread_others=0.1)
        == ['blind']
        == names(score_difference=-0.3)
    )
    assert names(region_cosine=0.95) == ['over-smoothed']
    assert names(**{'region_cosine.encoder': 0.4, 'region_cosine.implicit': 0.61}) == [
        'over-smoothed'
    ]
    assert (
        names(
            **{
                'region_cosine.encoder': 0.4,
                'region_cosine.implicit': 0.55,
                'region_cosine.explicit': 0.7,
            }
        )
        == []
    )
    assert (
        names(region_length=14.0)
        == ['drowned']
        == names(message_length_regions=0.05)
        == names(message_length_words=20.0)
    )
    assert names(message_cosine_regions=0.999) == ['alike']
    for alarm in diagnose(fine | dict(region_length=14.0, region_cosine=0.95)):
        assert '; try ' in str(alarm) and '\n' not in str(alarm)


def test_a_run_logs_its_health_once_an_epoch(run):
    lines = [line for line in Log(run / 'log.jsonl').lines() if 'health' in line]
    assert [line['epoch'] for line in lines] == [0, 1]
    for line in lines:
        assert {
            'region_length',
            'word_cosine',
            'score_difference',
            'gradient_mean',
            'gradient_max',
        } <= line['health'].keys()
    assert (
        gradient_figures([1.0, 3.0, float('inf')]) == dict(gradient_mean=2.0, gradient_max=3.0)
        and gradient_figures([]) == {}
    )


def test_learning_rate_warms_up_and_falls():
    at = lambda step, epoch: learning_rate(
        step, epoch, lr=1.0, warmup=10, decay_at=(2, 4), decay=0.1
    )
    assert [at(0, 0), at(9, 0), at(50, 1)] == [0.1, 1.0, 1.0]
    assert at(100, 2) == pytest.approx(0.1) and at(200, 4) == pytest.approx(0.01)


LEARNS = dict(
    arguments=dict(width=64, word_width=32),
    epochs=6,
    soft_epochs=2,
    size=20,
    lr=3e-3,
    min_freq=2,
    decay_at=(),
    device='cpu',
    progress=False,
)


@pytest.mark.parametrize('threads,seed', [(1, 0), (1, 1), (2, 0)])
def test_training_learns(world, tmp_path, threads, seed):
    "On its own training pictures, six epochs lift the recall far above what an untrained model has, whatever the last bits are."
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = train('scan', world, tmp_path / 'run', seed=seed, **LEARNS)
    finally:
        torch.set_num_threads(before)
    matcher, vocab, card = imtm_lite.load(best)
    own = Split(world, 'train')
    untrained = imtm_lite.load(
        train('scan', world, tmp_path / 'untrained', seed=seed, **LEARNS | dict(epochs=1, lr=0.0))
    )
    assert split_recall(untrained.matcher, own, untrained.vocab).rsum < 80
    # found: 454 to 551 of 600, five seeds with one thread, three with two
    assert split_recall(matcher, own, vocab).rsum > 250
    assert Log(tmp_path / 'run/log.jsonl').lines()[-1]['alarms'] == []


def test_probe_accuracy_counts_by_kind(run, world):
    matcher, vocab, card = imtm_lite.load(run)
    split = Split(world, 'test')
    accuracy = probe_accuracy(matcher, split, vocab)
    assert set(accuracy) == {p['kind'] for p in split.probes} and all(
        0 <= a <= 100 for a in accuracy.values()
    )
    matcher.match = lambda images, captions: torch.zeros(len(images), len(captions))
    # a tie is a miss
    assert set(probe_accuracy(matcher, split, vocab).values()) == {0.0}


def test_a_loss_that_is_not_a_number_stops_the_run(run, world):
    matcher, vocab, card = imtm_lite.load(run)
    split = Split(world, 'train')
    with torch.no_grad():
        matcher.regions.linear.weight[0, 0] = torch.nan
    batch = next(iter(batches(split, vocab, size=8, seed=0, epoch=0)))
    with pytest.raises(FloatingPointError, match='lower the learning rate'):
        train_step(
            Task(matcher, Triplet()),
            [batch],
            torch.optim.SGD(matcher.parameters(), lr=0.1),
            Accelerator(cpu=True),
            2.0,
            items=8,
        )


def test_the_step_tells_the_matching_loss_apart_from_others(run, world):
    matcher, vocab, card = imtm_lite.load(run)
    split = Split(world, 'train')

    class WithPenalty(Task):
        def losses(self, *arguments):
            match = super().losses(*arguments)['total']
            return {'match': match, 'phrase': 3 * match, 'total': 4 * match}

    batch = next(iter(batches(split, vocab, size=8, seed=0, epoch=0)))
    plain = float(Task(matcher, Triplet())(batch)['total'].detach()) / 8
    step, norm = train_step(
        WithPenalty(matcher, Triplet()),
        [batch],
        torch.optim.SGD(matcher.parameters(), lr=0.0),
        Accelerator(cpu=True),
        2.0,
        items=8,
    )
    assert step == pytest.approx(plain) and norm > 0


def test_ssamt_trains_resumes_and_comes_back_with_its_parser(world, tmp_path):
    quick = QUICK | dict(arguments=dict(width=8, heads=2, feedforward=16, parser='gold'))
    best = train('ssamt', world, tmp_path / 'run', **quick)
    matcher, vocab, card = imtm_lite.load(best)
    dev = Split(world, 'dev')
    # an annotated split is for training alone
    assert vocab.parser(dev.captions[0]) == chunk(dev.captions[0])
    scores = split_scores(matcher, dev, vocab)
    without = Reader(vocab.vocab, lambda caption: SimpleNamespace(units=[]))
    # phrases take part in the words
    assert not torch.equal(scores, split_scores(matcher, dev, without))
    with pytest.raises(SettingError, match='spacy download no_such_model|needs spaCy'):
        train(
            'ssamt',
            world,
            tmp_path / 'x',
            **quick | dict(arguments=dict(width=8, heads=2, parser='no_such_model')),
        )
    bare = shutil.copytree(
        world, tmp_path / 'bare', ignore=shutil.ignore_patterns('*_phrases*', 'pictures')
    )
    with pytest.raises(
        (SettingError, DataError),
        match='train_phrases.jsonl: this file is missing, and the gold parser needs it',
    ):
        train('ssamt', bare, tmp_path / 'y', **quick)


@pytest.mark.parametrize(
    'change',
    [
        dict(epochs='abc'),
        dict(lr='x'),
        dict(size=1),
        dict(criterion='foo'),
        dict(distinct='no'),
        dict(precision='half'),
        dict(per_image='all'),
        dict(epochs=2.5),
        dict(margin=True),
        dict(schedule='cosine'),
        dict(updates=0),
        dict(accumulate=0),
        dict(instances=1.5),
        dict(drop_regions=1.0),
        dict(drop_words='some'),
        dict(candidates=-1),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(change, world, tmp_path):
    for wrong in (
        lambda: recipe('camp', 'demo', change),
        lambda: train('scan', world, tmp_path / 'x', **QUICK | change),
    ):
        with pytest.raises(SettingError, match=next(iter(change))) as fault:
            wrong()
        assert '\n' not in str(fault.value)
    assert not (tmp_path / 'x').exists()


def test_a_run_that_died_before_its_first_checkpoint_starts_with_a_fresh_log(world, tmp_path):
    out = tmp_path / 'run'
    out.mkdir()
    (out / 'log.jsonl').write_text('{"step": 20, "epoch": 0, "loss": 1.0}\n{"step": 4')
    train('vse', world, out, resume=True, **QUICK)
    train('vse', world, tmp_path / 'other', **QUICK)
    assert Log(out / 'log.jsonl').lines() == Log(tmp_path / 'other/log.jsonl').lines()


def test_a_second_stage_from_another_first_stage_is_not_resumed(world, tmp_path):
    one, two = (
        train('camp-stage1', world, tmp_path / str(seed), seed=seed, **QUICK) for seed in (0, 1)
    )
    gates = QUICK | dict(criterion='bce', arguments=QUICK['arguments'] | dict(form='released'))
    train('camp', world, tmp_path / 'full', start=one, **gates)
    with pytest.raises(CheckpointError, match='start'):
        train('camp', world, tmp_path / 'full', start=two, resume=True, **gates)
