"Checkpoints that say what they are, and that are whole or not there."

import subprocess
import sys

import pytest
import torch

import imtm_lite
from imtm_lite import runs
from imtm_lite.checkpoints import FORMAT, Loaded, check_fits, read_checkpoint, write_checkpoint
from imtm_lite.data import Split
from imtm_lite.files import CheckpointError
from imtm_lite.gallery import split_scores
from imtm_lite.runs import train
from tests.runs import QUICK, card_of, tensors_of


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'scan'
    train('scan', world, out, **QUICK)
    return out


def test_reloaded_checkpoint_scores_bit_for_bit(world, tmp_path, monkeypatch):
    seen = {}
    save_run = runs.save_run

    # the matcher in memory, as it is saved
    def save_and_score(run, path, **more):
        save_run(run, path, **more)
        seen[path.name] = split_scores(run.matcher, run.dev, run.vocab)

    monkeypatch.setattr(runs, 'save_run', save_and_score)
    best = train('camp', world, tmp_path / 'camp', criterion='bce', **QUICK)
    matcher, vocab, _ = imtm_lite.load(best)
    scores = split_scores(matcher, Split(world, 'dev'), vocab)
    assert torch.equal(scores, seen['best.safetensors'])


ON_A_FULL_DISK = """
import resource
import signal
import sys
from pathlib import Path

import torch

from imtm_lite.checkpoints import write_checkpoint
from imtm_lite.files import CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
# no file may grow beyond this: the disk is full
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_checkpoint(Path(sys.argv[1]), {'model.w': torch.ones(1_000_000)}, {'format': 1})
except CheckpointError as fault:
    print('refused:', fault)
"""


def test_a_full_disk_leaves_the_old_checkpoint_good(tmp_path):
    path = tmp_path / 'a.safetensors'
    write_checkpoint(path, {'model.w': torch.ones(10)}, {'format': FORMAT})
    command = [sys.executable, '-c', ON_A_FULL_DISK, str(path)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.stdout.startswith('refused:'), out.stderr
    assert 'untouched' in out.stdout
    assert out.stdout.count('\n') == 1
    assert list(tmp_path.iterdir()) == [path]
    assert tensors_of(path)['model.w'].equal(torch.ones(10))


def spoiled(run, folder, **changes):
    "A copy of a run's best checkpoint with other things on its card."
    card, tensors = read_checkpoint(run / 'best.safetensors')
    write_checkpoint(folder / 'best.safetensors', tensors, card | changes)
    return folder


def test_faulty_cards_are_refused_in_one_line(run, tmp_path):
    card = card_of(run / 'best.safetensors')
    newer = dict(format=FORMAT + 1, library='9.0')
    words = dict(vocabulary=card['vocabulary'][:-1])
    width = dict(config=card['config'] | dict(width=8))
    faults = [
        (newer, f'format {FORMAT + 1}, written by version 9.0'),
        (words, 'a vocabulary of'),
        (width, 'weights do not fit'),
        (dict(model='camp'), 'weights do not fit'),
    ]
    for change, message in faults:
        with pytest.raises(CheckpointError, match=message) as fault:
            imtm_lite.load(spoiled(run, tmp_path, **change))
        assert '\n' not in str(fault.value)
        assert 'best.safetensors' in str(fault.value)


@pytest.mark.parametrize('content', ['cut off', 'text', 'nothing'])
def test_what_is_no_checkpoint_is_refused(run, tmp_path, content):
    path = tmp_path / 'a.safetensors'
    if content == 'cut off':
        path.write_bytes((run / 'best.safetensors').read_bytes()[:-100])
    if content == 'text':
        path.write_text('not a checkpoint')
    with pytest.raises(CheckpointError, match='not a readable checkpoint'):
        imtm_lite.load(path)


def test_warm_start_needs_the_same_vocabulary(run, world, tmp_path):
    words = card_of(run / 'best.safetensors')['vocabulary']
    other = spoiled(run, tmp_path, vocabulary=[*words[:4], *words[5:], 'zebra'])
    with pytest.raises(CheckpointError, match='another vocabulary'):
        train('scan', world, tmp_path / 'x', start=other / 'best.safetensors', **QUICK)


def test_data_of_another_width_is_refused(run, world):
    loaded = imtm_lite.load(run)
    assert isinstance(loaded, Loaded)
    split = Split(world, 'test')
    check_fits(loaded, split)
    loaded.matcher.config['region_width'] = 2048
    message = 'features are 128 wide, the checkpoint was trained on 2048'
    with pytest.raises(CheckpointError, match=message):
        check_fits(loaded, split)
