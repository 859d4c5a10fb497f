"Runs that can be repeated, killed and resumed, and that learn something."

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import imtm_lite
from imtm_lite.data import Split, batches
from imtm_lite.files import CheckpointError, DataError, SettingError
from imtm_lite.gallery import split_recall, split_scores
from imtm_lite.losses import HardestBCE, Triplet
from imtm_lite.phrases import chunk
from imtm_lite.recipes import recipe, train_recipe
from imtm_lite.regions import Regions
from imtm_lite.runs import train
from imtm_lite.tasks import Task
from imtm_lite.text import UNK, Captions, Reader
from imtm_lite.training import drop_regions, drop_words, learning_rate, train_step
from tests.matchers import close
from tests.runs import QUICK, card_of, log_of, same_tensors, tensors_of


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'scan'
    train('scan', world, out, **QUICK)
    return out


# ---------------------------------------------------------------- again, killed, resumed


def test_the_same_seed_gives_the_same_run_and_another_seed_another(world, run, tmp_path):
    train('scan', world, tmp_path / 'again', **QUICK)
    train('scan', world, tmp_path / 'other', seed=1, **QUICK)
    assert same_tensors(run / 'last.safetensors', tmp_path / 'again/last.safetensors')
    assert log_of(run) == log_of(tmp_path / 'again')
    assert not same_tensors(run / 'last.safetensors', tmp_path / 'other/last.safetensors')


TO_BE_KILLED = """
import json
import sys

import torch

from imtm_lite.runs import train

world, out, threads, settings = sys.argv[1:]
torch.set_num_threads(int(threads))
train('camp-stage1', world, out, save_every=1, resume=True, **json.loads(settings))
print('finished')
"""


def modified(file):
    return file.stat().st_mtime_ns if file.exists() else 0


def kill_after(command, file, times):
    "Kill -9 once the file was written so many times; whether the process still ran."
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    written = 0
    before = modified(file)
    while child.poll() is None and written < times and time.time() < deadline:
        now = modified(file)
        written += now != before
        before = now
    running = child.poll() is None
    child.send_signal(signal.SIGKILL)  # nothing, where it has ended
    child.wait()
    return running


# everything that has a state or a count
RICH = dict(
    schedule='linear',
    warmup=3,
    accumulate=3,
    instances=160,
    drop_regions=0.2,
    drop_words=0.2,
    updates=13,
)


@pytest.mark.parametrize('more', [{}, RICH], ids=['plain', 'rich'])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(world, tmp_path, more):
    settings = QUICK | dict(epochs=4) | more
    whole = tmp_path / 'whole'
    killed = tmp_path / 'killed'
    train('camp-stage1', world, whole, **settings)
    arguments = [world, killed, torch.get_num_threads(), json.dumps(settings)]
    command = [sys.executable, '-c', TO_BE_KILLED, *map(str, arguments)]
    moments = (1, 5, 12)
    kills = [kill_after(command, killed / 'last.safetensors', times) for times in moments]
    assert sum(kills) >= 2
    end = subprocess.run(command, capture_output=True, text=True)
    assert 'finished' in end.stdout, end.stderr
    for name in ('last.safetensors', 'best.safetensors'):
        assert same_tensors(whole / name, killed / name)
    assert log_of(whole) == log_of(killed)


def test_resume_of_a_finished_run_changes_nothing_and_more_epochs_go_on(world, tmp_path):
    last = tmp_path / 'b/last.safetensors'
    train('vse', world, tmp_path / 'a', **QUICK | dict(epochs=3))
    train('vse', world, tmp_path / 'b', **QUICK | dict(epochs=1))
    before = last.read_bytes()
    train('vse', world, tmp_path / 'b', resume=True, **QUICK | dict(epochs=1))
    assert last.read_bytes() == before
    train('vse', world, tmp_path / 'b', resume=True, **QUICK | dict(epochs=3))
    assert same_tensors(tmp_path / 'a/last.safetensors', last)


def test_an_unresumed_run_is_not_overwritten(world, run):
    with pytest.raises(CheckpointError, match='already holds a run'):
        train('scan', world, run, **QUICK)


@pytest.mark.parametrize(
    'change,name',
    [
        (dict(lr=1e-3), 'lr'),
        (dict(size=10), 'size'),
        (dict(epochs=1), 'epochs'),
        (dict(arguments=dict(width=8)), 'config'),
    ],
)
def test_resume_with_other_settings_is_refused(world, run, change, name):
    with pytest.raises(CheckpointError, match=f'the run has {name}') as fault:
        train('scan', world, run, resume=True, **QUICK | change)
    assert '\n' not in str(fault.value)


def test_a_run_that_died_before_its_first_checkpoint_starts_with_a_fresh_log(world, tmp_path):
    out = tmp_path / 'run'
    out.mkdir()
    (out / 'log.jsonl').write_text('{"step": 20, "epoch": 0, "loss": 1.0}\n{"step": 4')
    train('vse', world, out, resume=True, **QUICK)
    train('vse', world, tmp_path / 'other', **QUICK)
    assert log_of(out) == log_of(tmp_path / 'other')


# ---------------------------------------------------------------- stages


def test_staged_recipe_starts_from_the_stage_before_and_freezes(world, tmp_path):
    out = tmp_path / 'camp'
    changes = dict(epochs=1, size=20, per_image=1, min_freq=2)
    changes |= dict(arguments=dict(width=16, word_width=8))
    changes |= dict(frozen=[(), ('regions', 'words', 'messages')])
    how = dict(device='cpu', progress=False)
    train_recipe('camp', world, out, preset='demo-released', changes=changes, **how)
    first = tensors_of(out / 'stage1/best.safetensors')
    last = tensors_of(out / 'best.safetensors')
    passed_on = [name for name in first if name.startswith('model.')]
    assert all(torch.equal(first[name], last[name]) for name in passed_on)
    assert any(name.startswith('model.head') for name in last)


def test_what_is_frozen_must_exist(world, tmp_path):
    with pytest.raises(SettingError, match='nothing to freeze'):
        train('camp', world, tmp_path / 'run', frozen=('nothing',), **QUICK)


def test_a_second_stage_from_another_first_stage_is_not_resumed(world, tmp_path):
    first = train('camp-stage1', world, tmp_path / 'first', **QUICK)
    other = train('camp-stage1', world, tmp_path / 'other', seed=1, **QUICK)
    arguments = QUICK['arguments'] | dict(form='released')
    settings = QUICK | dict(criterion='bce', arguments=arguments)
    train('camp', world, tmp_path / 'full', start=first, **settings)
    with pytest.raises(CheckpointError, match='start'):
        train('camp', world, tmp_path / 'full', start=other, resume=True, **settings)


@pytest.mark.parametrize(
    'model,preset,changes',
    [('clip', 'demo', {}), ('camp', 'huge', {}), ('camp', 'demo', dict(epochs=[1, 2, 3, 4]))],
)
def test_recipes_name_their_faults(model, preset, changes):
    with pytest.raises(SettingError) as fault:
        recipe(model, preset, changes)
    assert '\n' not in str(fault.value)


def test_changes_of_a_recipe_reach_the_stages_they_are_for():
    one_each = recipe('camp', 'demo-released', dict(epochs=[7, 8]))
    assert [stage['epochs'] for stage in one_each] == [7, 8]
    # the first stage has no gates
    without_gates = recipe('camp', 'demo-released', dict(arguments=dict(gate='none')))
    assert [stage['arguments'].get('gate') for stage in without_gates] == [None, 'none']


CANNOT_BE = [
    dict(epochs='abc'),
    dict(lr='x'),
    dict(lr=0.0),
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
]


@pytest.mark.parametrize('change', CANNOT_BE, ids=str)
def test_settings_that_cannot_be_are_refused_in_one_line(change, world, tmp_path):
    (name,) = change
    with pytest.raises(SettingError, match=name) as by_recipe:
        recipe('camp', 'demo', change)
    with pytest.raises(SettingError, match=name) as by_train:
        train('scan', world, tmp_path / 'x', **QUICK | change)
    for fault in (by_recipe, by_train):
        assert '\n' not in str(fault.value)
    assert not (tmp_path / 'x').exists()


# ---------------------------------------------------------------- rates


def test_learning_rate_warms_up_and_falls():
    def rate(step, epoch):
        return learning_rate(step, epoch, lr=1.0, warmup=10, decay_at=(2, 4), decay=0.1)

    assert [rate(0, 0), rate(9, 0), rate(50, 1)] == [0.1, 1.0, 1.0]
    assert rate(100, 2) == pytest.approx(0.1)
    assert rate(200, 4) == pytest.approx(0.01)


def test_a_linear_rate_ends_at_zero_with_the_run():
    def rate(step, decay_at):
        how = dict(decay_at=decay_at, decay=0.1, schedule='linear', total=110)
        return learning_rate(step, 0, lr=2.0, warmup=10, **how)

    rates = [rate(step, (0,)) for step in (0, 9, 10, 60, 109)]
    assert rates == pytest.approx([0.2, 2.0, 2.0, 1.0, 0.02])
    assert rate(110, ()) == 0


def rates_of(run):
    return [line['lr'] for line in log_of(run) if 'lr' in line]


def test_a_run_of_so_many_updates_ends_there_and_its_rate_at_zero(world, tmp_path):
    # 40 batches an epoch
    settings = QUICK | dict(size=4, epochs=1, schedule='linear', warmup=4, updates=60)
    out = tmp_path / 'a'
    last = out / 'last.safetensors'
    train('vse', world, out, **settings)
    card = card_of(last)
    assert (card['step'], card['epoch'], card['skip']) == (60, 2, 0)
    assert rates_of(out) == pytest.approx([2e-3 * (60 - step) / 56 for step in (19, 39, 59)])
    before = last.read_bytes()
    # it has ended
    train('vse', world, out, resume=True, **settings)
    assert last.read_bytes() == before
    with pytest.raises(CheckpointError, match='the run has updates 60'):
        train('vse', world, out, resume=True, **settings | dict(updates=80))


def test_a_linear_run_cannot_be_made_longer_and_counts_its_steps(world, tmp_path):
    # 14 steps an epoch, the last of one batch
    settings = QUICK | dict(size=4, epochs=2, schedule='linear', accumulate=3)
    out = tmp_path / 'a'
    train('vse', world, out, **settings)
    assert card_of(out / 'last.safetensors')['step'] == 28
    assert rates_of(out) == pytest.approx([2e-3 * (28 - 19) / 28])
    with pytest.raises(CheckpointError, match='the run has epochs 2'):
        train('vse', world, out, resume=True, **settings | dict(epochs=3))
    with pytest.raises(SettingError, match='warmup is 90 steps, and the run has 28'):
        train('vse', world, tmp_path / 'b', **settings | dict(warmup=90))


# ---------------------------------------------------------------- a step


def take_step(task, parts, items, lr=0.0, clip=1e9):
    "One step of plain gradient descent; with a rate of 0 nothing moves."
    optimizer = torch.optim.SGD(task.matcher.parameters(), lr=lr)
    return train_step(task, parts, optimizer, Accelerator(cpu=True), clip, items=items)


def gradient_of(task, parts, items):
    "What a step leaves in the gradients."
    take_step(task, parts, items)
    gradients = [each.grad for each in task.matcher.parameters() if each.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])


class OwnPairs(torch.nn.Module):
    "A loss of matching pairs alone, so that parts and whole agree."

    hardest = True

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, scores, same):
        costs = (1 - scores.diagonal()).square()
        return costs.mean() if self.mean else costs.sum()


class OwnTask(Task):
    @property
    def mean(self):
        return self.criterion.mean


@pytest.fixture
def parts(run, world):
    "A matcher in double precision, and three batches for it of 8, 8 and 5 pairs."
    matcher, vocab, _ = imtm_lite.load(run)
    feed = batches(Split(world, 'train'), vocab, size=8, seed=0, epoch=0)
    double = [replace(b, regions=b.regions.to(torch.float64)) for b in islice(feed, 3)]
    double[2] = double[2].each(lambda tensor: tensor[:5])
    return matcher.double(), double


@pytest.mark.parametrize('mean', [False, True])
def test_parts_of_a_batch_are_added_where_the_loss_is_a_sum_and_averaged_where_not(parts, mean):
    matcher, batches_of_step = parts
    task = OwnTask(matcher, OwnPairs(mean))
    want = 0.0
    gradient = 0.0
    for batch in batches_of_step:
        share = len(batch) / 21 if mean else 1.0
        want += share * float(task(batch)['total'].detach())
        gradient = gradient + share * gradient_of(task, [batch], len(batch))
    per_item, norm = take_step(task, batches_of_step, items=21)
    assert per_item == pytest.approx(want if mean else want / 21)
    assert norm == pytest.approx(float(gradient.norm()))
    close(gradient_of(task, batches_of_step, 21), gradient, rtol=1e-9)


def test_a_task_is_a_mean_as_long_as_its_criterion_is_soft(run):
    matcher, _, _ = imtm_lite.load(run)
    criterion = HardestBCE(hardest=False)
    task = Task(matcher, criterion)
    assert task.mean
    criterion.hardest = True
    assert not task.mean


def test_a_step_of_several_batches_is_the_run_of_their_sum(world, tmp_path):
    "Steps of 3 x 7 pairs are as many as those of 21."
    settings = QUICK | dict(epochs=2, decay_at=())
    train('vse', world, tmp_path / 'parts', **settings | dict(size=7, accumulate=3))
    train('vse', world, tmp_path / 'whole', **settings | dict(size=21))
    for name in ('parts', 'whole'):
        assert card_of(tmp_path / name / 'last.safetensors')['step'] == 16


def test_a_loss_that_is_not_a_number_stops_the_run(run, world):
    matcher, vocab, _ = imtm_lite.load(run)
    with torch.no_grad():
        matcher.regions.linear.weight[0, 0] = torch.nan
    batch = next(batches(Split(world, 'train'), vocab, size=8, seed=0, epoch=0))
    with pytest.raises(FloatingPointError, match='lower the learning rate'):
        take_step(Task(matcher, Triplet()), [batch], items=8, lr=0.1, clip=2.0)


class WithPenalty(Task):
    "The matching loss is a quarter of the whole."

    def losses(self, *arguments):
        match = super().losses(*arguments)['total']
        return {'match': match, 'phrase': 3 * match, 'total': 4 * match}


def test_the_step_tells_the_matching_loss_apart_from_others(run, world):
    matcher, vocab, _ = imtm_lite.load(run)
    batch = next(batches(Split(world, 'train'), vocab, size=8, seed=0, epoch=0))
    matching = float(Task(matcher, Triplet())(batch)['total'].detach()) / 8
    per_item, norm = take_step(WithPenalty(matcher, Triplet()), [batch], items=8, clip=2.0)
    assert per_item == pytest.approx(matching)
    assert norm > 0


# ---------------------------------------------------------------- what is dropped


@pytest.mark.parametrize('share', [0.0, 0.2, 0.999])
def test_dropped_regions_are_as_if_they_had_never_been(share):
    there = torch.arange(9) < torch.randint(1, 10, (2000, 1))
    regions = Regions(features=torch.rand(2000, 9, 3), mask=there)
    dropped = drop_regions(regions, share)
    assert dropped.features is regions.features
    assert not (dropped.mask & ~there).any()
    assert (dropped.mask.sum(1) >= 1).all()
    several = there.sum(1) > 4
    before = float(there[several].sum())
    # one of each picture stays
    at_least = float(several.sum()) / before
    stay = float(dropped.mask[several].sum()) / before
    assert stay == pytest.approx(max(1 - share, at_least), abs=0.03)


def test_the_only_region_of_a_picture_stays():
    regions = Regions(features=torch.rand(100, 9, 3), mask=torch.arange(9).expand(100, 9) < 1)
    assert drop_regions(regions, 0.999).mask.equal(regions.mask)


def test_dropped_regions_follow_the_seed():
    regions = Regions(features=torch.rand(2000, 9, 3))
    torch.manual_seed(1)
    mask = drop_regions(regions, 0.5).mask
    torch.manual_seed(1)
    assert drop_regions(regions, 0.5).mask.equal(mask)


def test_dropped_words_are_unknown_and_the_frame_stays():
    lengths = torch.randint(1, 20, (500,)).tolist()
    captions = Captions.from_ids([[1, *range(10, 10 + n), 2] for n in lengths])
    dropped = drop_words(captions, 0.3, UNK)
    assert dropped.lengths.equal(captions.lengths)
    gone = dropped.tokens != captions.tokens
    assert (dropped.tokens[gone] == UNK).all()
    inside = captions.tokens >= 10
    assert not (gone & ~inside).any()
    assert float(gone.sum() / inside.sum()) == pytest.approx(0.3, abs=0.02)
    assert drop_words(captions, 0.0, UNK).tokens.equal(captions.tokens)


@pytest.mark.parametrize('change', [dict(drop_regions=0.2), dict(drop_words=0.2)], ids=str)
def test_what_is_dropped_changes_the_run(world, run, tmp_path, change):
    train('scan', world, tmp_path / 'run', **QUICK | change)
    assert not same_tensors(run / 'last.safetensors', tmp_path / 'run/last.safetensors')


# ---------------------------------------------------------------- learning


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


@pytest.fixture
def threads(request):
    "So many threads for PyTorch."
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize('threads,seed', [(1, 0), (1, 1), (2, 0)], indirect=['threads'])
def test_training_learns(world, tmp_path, threads, seed):
    "Recall on the training pictures rises far above an untrained model's."
    best = train('scan', world, tmp_path / 'run', seed=seed, **LEARNS)
    still = LEARNS | dict(epochs=1, lr=1e-12)
    untrained = train('scan', world, tmp_path / 'untrained', seed=seed, **still)
    own = Split(world, 'train')
    matcher, vocab, _ = imtm_lite.load(untrained)
    assert split_recall(matcher, own, vocab).rsum < 80
    matcher, vocab, _ = imtm_lite.load(best)
    # seen: 454 to 551 of 600, five seeds with one thread, three with two
    assert split_recall(matcher, own, vocab).rsum > 250
    assert log_of(tmp_path / 'run')[-1]['alarms'] == []


# ---------------------------------------------------------------- phrases

PHRASES = QUICK | dict(arguments=dict(width=8, heads=2, feedforward=16, parser='gold'))


def test_ssamt_comes_back_with_its_parser(world, tmp_path):
    matcher, vocab, _ = imtm_lite.load(train('ssamt', world, tmp_path / 'run', **PHRASES))
    dev = Split(world, 'dev')
    # an annotated split is for training alone
    assert vocab.parser(dev.captions[0]) == chunk(dev.captions[0])
    scores = split_scores(matcher, dev, vocab)
    without = Reader(vocab.vocab, lambda caption: SimpleNamespace(units=[]))
    # phrases take part in the words
    assert not torch.equal(scores, split_scores(matcher, dev, without))


def test_ssamt_says_what_its_parser_needs(world, tmp_path):
    settings = PHRASES | dict(arguments=dict(width=8, heads=2, parser='no_such_model'))
    with pytest.raises(SettingError, match='spacy download no_such_model|needs spaCy'):
        train('ssamt', world, tmp_path / 'x', **settings)
    ignored = shutil.ignore_patterns('*_phrases*', 'pictures')
    bare = shutil.copytree(world, tmp_path / 'bare', ignore=ignored)
    missing = 'train_phrases.jsonl: this file is missing, and the gold parser needs it'
    with pytest.raises((SettingError, DataError), match=missing):
        train('ssamt', bare, tmp_path / 'y', **PHRASES)
