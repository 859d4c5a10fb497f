"Runs that can be repeated, killed and resumed; checkpoints that say what they are."
import os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accelerate import Accelerator

import imtm_lite

from imtm_lite.data import DataError, Split, batches
from imtm_lite.losses import Triplet
from imtm_lite.phrases import chunk
from imtm_lite.train import (FORMAT, CheckpointError, Log, SettingError, check_fits, learning_rate, probe_accuracy, read_checkpoint, recipe, split_recall,
                             split_scores, train, train_recipe, train_step, write_checkpoint)

QUICK = dict(arguments=dict(width=16, word_width=8), epochs=2, size=20, lr=2e-3, per_image=2, min_freq=2, decay_at=(1,), device='cpu', progress=False)


def same(a: Path, b: Path, keys=lambda k: True):
    a, b = (read_checkpoint(p)[1] for p in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if keys(k))


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'scan'
    train('scan', world, out, **QUICK)
    return out


def test_reloaded_checkpoint_scores_bit_for_bit(world, tmp_path, monkeypatch):
    import imtm_lite.train as module
    seen, keep = {}, module.save_run
    def spy(run, path, **more):                                             # the matcher in memory, as it is saved
        keep(run, path, **more)
        seen[path.name] = split_scores(run.matcher, run.dev, run.vocab)
    monkeypatch.setattr(module, 'save_run', spy)
    best = train('camp', world, tmp_path / 'camp', criterion='bce', **QUICK)
    matcher = imtm_lite.load(best)
    assert torch.equal(split_scores(matcher, Split(world, 'dev'), matcher.vocab), seen['best.safetensors'])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(world, run, tmp_path):
    train('scan', world, tmp_path / 'again', **QUICK)
    train('scan', world, tmp_path / 'other', seed=1, **QUICK)
    assert same(run / 'last.safetensors', tmp_path / 'again/last.safetensors')
    assert Log(run / 'log.jsonl').lines() == Log(tmp_path / 'again/log.jsonl').lines()
    assert not same(run / 'last.safetensors', tmp_path / 'other/last.safetensors')


RICH = dict(schedule='linear', warmup=3, accumulate=3, instances=160, drop_regions=.2, drop_words=.2) # everything that has a state or a count


@pytest.mark.parametrize('more', [{}, RICH, RICH | dict(updates=13, schedule='steps')], ids=['plain', 'rich', 'updates'])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(world, tmp_path, more):
    settings = QUICK | dict(epochs=4) | more
    train('camp-stage1', world, tmp_path / 'whole', **settings)
    code = f'''
import torch; torch.set_num_threads({torch.get_num_threads()})
from imtm_lite.train import train
train('camp-stage1', {str(world)!r}, {str(tmp_path / 'killed')!r}, save_every=1, resume=True, **{settings!r})
print('finished')'''
    last, kills = tmp_path / 'killed/last.safetensors', 0
    for moment in (1, 5, 12):                                               # after so many checkpoints, kill -9
        child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        seen, stamp, deadline = 0, last.stat().st_mtime_ns if last.exists() else 0, time.time() + 120
        while child.poll() is None and seen < moment and time.time() < deadline:
            now = last.stat().st_mtime_ns if last.exists() else 0
            seen, stamp = seen + (now != stamp), now
        if child.poll() is None: child.send_signal(signal.SIGKILL); kills += 1
        child.wait(); child.stderr.close()
    assert kills >= 2
    end = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'finished' in end.stdout, end.stderr
    assert same(tmp_path / 'whole/last.safetensors', last) and same(tmp_path / 'whole/best.safetensors', tmp_path / 'killed/best.safetensors')
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
    with pytest.raises(CheckpointError, match='already holds a run'): train('scan', world, run, **QUICK)


@pytest.mark.parametrize('change,said', [(dict(lr=1e-3), 'lr'), (dict(size=10), 'size'), (dict(epochs=1), 'epochs'), (dict(arguments=dict(width=8)), 'config')])
def test_resume_with_other_settings_is_refused(world, run, change, said):
    with pytest.raises(CheckpointError, match=f'the run has {said}') as fault: train('scan', world, run, resume=True, **QUICK | change)
    assert '\n' not in str(fault.value)


def test_a_full_disk_leaves_the_old_checkpoint_good(tmp_path):
    path, before = tmp_path / 'a.safetensors', {'model.w': torch.ones(10)}
    write_checkpoint(path, before, {'format': FORMAT})
    child = f'''
import resource, signal, torch
from pathlib import Path
from imtm_lite.train import CheckpointError, write_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))              # no file may grow beyond this: the disk is full
try: write_checkpoint(Path({str(path)!r}), {{'model.w': torch.ones(1_000_000)}}, {{'format': 1}})
except CheckpointError as fault: print('refused:', fault)'''
    out = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True)
    assert 'refused:' in out.stdout and 'untouched' in out.stdout and out.stdout.count('\n') == 1, out.stdout + out.stderr
    assert os.listdir(tmp_path) == ['a.safetensors'] and torch.equal(read_checkpoint(path)[1]['model.w'], before['model.w'])


def spoiled(run, tmp_path, **card_changes):
    card, tensors = read_checkpoint(run / 'best.safetensors')
    write_checkpoint(tmp_path / 'best.safetensors', tensors, card | card_changes)
    return tmp_path


def test_faulty_checkpoints_are_refused_in_one_line(run, world, tmp_path):
    card, _ = read_checkpoint(run / 'best.safetensors')
    faults = {'newer': (dict(format=FORMAT + 1, library='9.0'), 'format 2, written by version 9.0'),
              'words': (dict(vocabulary=card['vocabulary'][:-1]), 'a vocabulary of'),
              'width': (dict(config=card['config'] | dict(width=8)), 'weights do not fit'),
              'model': (dict(model='camp', config=card['config']), 'weights do not fit')}
    for name, (change, said) in faults.items():
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match=said) as fault: imtm_lite.load(spoiled(run, tmp_path / name, **change))
        assert '\n' not in str(fault.value) and 'best.safetensors' in str(fault.value)
    (tmp_path / 'cut.safetensors').write_bytes((run / 'best.safetensors').read_bytes()[:-100])
    (tmp_path / 'text.safetensors').write_text('not a checkpoint')
    for name in ('cut', 'text', 'absent'):
        with pytest.raises(CheckpointError, match='not a readable checkpoint'): imtm_lite.load(tmp_path / f'{name}.safetensors')


def test_warm_start_needs_the_same_vocabulary(run, world, tmp_path):
    words = read_checkpoint(run / 'best.safetensors')[0]['vocabulary']
    other = spoiled(run, tmp_path, vocabulary=words[:4] + words[5:] + ['zebra'])
    with pytest.raises(CheckpointError, match='another vocabulary'): train('scan', world, tmp_path / 'x', start=other / 'best.safetensors', **QUICK)


def test_data_of_another_width_is_refused(run, world):
    matcher, split = imtm_lite.load(run), Split(world, 'test')
    check_fits(matcher, split)
    matcher.config['region_width'] = 2048
    with pytest.raises(CheckpointError, match='features are 128 wide, the checkpoint was trained on 2048'): check_fits(matcher, split)


def test_staged_recipe_starts_from_the_stage_before_and_freezes(world, tmp_path):
    changes = dict(epochs=1, size=20, per_image=1, min_freq=2, arguments=dict(width=16, word_width=8), frozen=[(), ('regions', 'words', 'image_side', 'word_side')])
    train_recipe('camp', world, tmp_path / 'camp', changes=changes, device='cpu', progress=False)
    first, last = (read_checkpoint(tmp_path / 'camp' / p)[1] for p in ('stage1/best.safetensors', 'best.safetensors'))
    moved = {k for k in first if k.startswith('model.') and not torch.equal(first[k], last[k])}
    assert not moved and any(k.startswith('model.head') for k in last)
    with pytest.raises(SettingError, match='nothing to freeze'):
        train('camp', world, tmp_path / 'y', **QUICK | dict(frozen=('nothing',)))


def test_recipes_name_their_faults():
    for wrong in (lambda: recipe('clip', 'demo'), lambda: recipe('camp', 'huge'), lambda: recipe('camp', 'demo', dict(epochs=[1, 2, 3, 4]))):
        with pytest.raises(SettingError): wrong()
    assert [s['epochs'] for s in recipe('camp', 'demo', dict(epochs=[7, 8]))] == [7, 8]
    assert [s['arguments'].get('gate') for s in recipe('camp', 'demo', dict(arguments=dict(gate='none')))] == [None, 'none']


def test_learning_rate_warms_up_and_falls():
    at = lambda step, epoch: learning_rate(step, epoch, lr=1., warmup=10, decay_at=(2, 4), decay=.1)
    assert [at(0, 0), at(9, 0), at(50, 1)] == [.1, 1., 1.]
    assert at(100, 2) == pytest.approx(.1) and at(200, 4) == pytest.approx(.01)


def test_training_learns(world, tmp_path):
    "On its own training pictures, ten epochs lift the recall far above what an untrained model has."
    first = imtm_lite.load(train('scan', world, tmp_path / 'a', **QUICK | dict(epochs=1, lr=0.)))
    after = imtm_lite.load(train('scan', world, tmp_path / 'b', **QUICK | dict(epochs=10, per_image=None, arguments=dict(width=32, word_width=16), decay_at=())))
    own = Split(world, 'train')
    assert split_recall(after, own, after.vocab).rsum > 2 * split_recall(first, own, first.vocab).rsum


def test_probe_accuracy_counts_by_kind(run, world):
    matcher, split = imtm_lite.load(run), Split(world, 'test')
    accuracy = probe_accuracy(matcher, split, matcher.vocab)
    assert set(accuracy) == {p['kind'] for p in split.probes} and all(0 <= a <= 100 for a in accuracy.values())
    matcher.match = lambda images, captions: torch.zeros(len(images), len(captions))
    assert set(probe_accuracy(matcher, split, matcher.vocab).values()) == {0.}        # a tie is a miss


def test_a_loss_that_is_not_a_number_stops_the_run(run, world):
    matcher, split = imtm_lite.load(run), Split(world, 'train')
    matcher.criterion = Triplet()
    with torch.no_grad(): matcher.regions.linear.weight[0, 0] = torch.nan
    batch = next(iter(batches(split, matcher.vocab, size=8, seed=0, epoch=0)))
    with pytest.raises(FloatingPointError, match='lower the learning rate'):
        train_step(matcher, [batch], torch.optim.SGD(matcher.parameters(), lr=.1), Accelerator(cpu=True), 2., items=8)


def test_the_step_tells_the_matching_loss_apart_from_others(run, world):
    matcher, split = imtm_lite.load(run), Split(world, 'train')
    matcher.criterion = Triplet()
    batch = next(iter(batches(split, matcher.vocab, size=8, seed=0, epoch=0)))
    plain = float(matcher(batch)['total'].detach()) / 8
    loss = matcher.loss
    matcher.loss = lambda *a: (found := loss(*a)) and {'match': found['total'], 'phrase': 3 * found['total'], 'total': 4 * found['total']}
    step, norm = train_step(matcher, [batch], torch.optim.SGD(matcher.parameters(), lr=0.), Accelerator(cpu=True), 2., items=8)
    assert step == pytest.approx(plain) and norm > 0


def test_ssamt_trains_resumes_and_comes_back_with_its_parser(world, tmp_path):
    quick = QUICK | dict(arguments=dict(width=8, word_width=8, parser='gold'))
    best = train('ssamt', world, tmp_path / 'run', **quick)
    matcher, dev = imtm_lite.load(best), Split(world, 'dev')
    assert matcher.labels is None and matcher.vocab.parser(dev.captions[0]) == chunk(dev.captions[0])      # an annotated split is for training alone
    scores = split_scores(matcher, dev, matcher.vocab)
    matcher.vocab.parser = lambda caption: SimpleNamespace(units=[])
    assert not torch.equal(scores, split_scores(matcher, dev, matcher.vocab))                              # phrases take part in the words
    with pytest.raises(SettingError, match='spacy download no_such_model|needs spaCy'): train('ssamt', world, tmp_path / 'x', **quick | dict(arguments=dict(width=8, word_width=8, parser='no_such_model')))
    bare = shutil.copytree(world, tmp_path / 'bare', ignore=shutil.ignore_patterns('*_phrases*', 'pictures'))
    with pytest.raises((SettingError, DataError), match='train_phrases.jsonl: this file is missing, and the gold parser needs it'): train('ssamt', bare, tmp_path / 'y', **quick)


@pytest.mark.parametrize('change', [dict(epochs='abc'), dict(lr='x'), dict(size=1), dict(criterion='foo'), dict(distinct='no'), dict(precision='half'),
                                    dict(per_image='all'), dict(epochs=2.5), dict(margin=True)])
def test_settings_that_cannot_be_are_refused_in_one_line(change, world, tmp_path):
    for wrong in (lambda: recipe('camp', 'demo', change), lambda: train('scan', world, tmp_path / 'x', **QUICK | change)):
        with pytest.raises(SettingError, match=next(iter(change))) as fault: wrong()
        assert '\n' not in str(fault.value)
    assert not (tmp_path / 'x').exists()


def test_a_run_that_died_before_its_first_checkpoint_starts_with_a_fresh_log(world, tmp_path):
    out = tmp_path / 'run'; out.mkdir()
    (out / 'log.jsonl').write_text('{"step": 20, "epoch": 0, "loss": 1.0}\n{"step": 4')
    train('vse', world, out, resume=True, **QUICK)
    train('vse', world, tmp_path / 'other', **QUICK)
    assert Log(out / 'log.jsonl').lines() == Log(tmp_path / 'other/log.jsonl').lines()


def test_a_second_stage_from_another_first_stage_is_not_resumed(world, tmp_path):
    one, two = (train('camp-stage1', world, tmp_path / str(seed), seed=seed, **QUICK) for seed in (0, 1))
    train('camp', world, tmp_path / 'full', start=one, criterion='bce', **QUICK)
    with pytest.raises(CheckpointError, match='start'): train('camp', world, tmp_path / 'full', start=two, criterion='bce', resume=True, **QUICK)
