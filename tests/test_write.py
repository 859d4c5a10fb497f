"The generated world on disk: deterministic, whole or not there, in bounded memory, and how it ends."

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import imtm_lite.world.write as write
from imtm_lite.data import Split
from imtm_lite.files import DataError, SettingError, make_room, shipped
from imtm_lite.workshop.check import check
from imtm_lite.world.scenes import draw, make_scene
from imtm_lite.world.write import SHAPES, scene_numbers, widen, world_bytes, write_world

quietly = partial(write_world, progress=False)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp('w') / 'world'
    return quietly(root, train=10, dev=4, test=3, seed=3, regions=9)


def files(root):
    "What each file of a folder holds."
    paths = [path for path in sorted(root.rglob('*')) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def check_line(fault, says):
    "One line, which says also how to mend it."
    line = str(fault)
    assert '\n' not in line and '; ' in line and re.search(says, line), line


def test_world(world):
    report = check(world)
    assert report.ok and not report.absent, report
    split = Split(world, 'train')
    assert split.n_images == 10
    assert (split.features.shape, split.features.dtype) == ((10, 9, 128), np.float16)
    assert np.array_equal(np.asarray(split.picture(4)), draw(make_scene(int(split.ids[4]))))
    for row in range(10):
        for caption, spans in zip(split.captions_of(row), split.phrases[row]['phrases']):
            assert 6 <= len(split.captions[caption].split()) <= 16 and spans
    assert json.loads((world / 'meta.json').read_text())['seed'] == 3


def test_the_same_arguments_write_the_same_files(world, tmp_path):
    again = quietly(tmp_path / 'a', train=10, dev=4, test=3, seed=3, regions=9)
    assert files(again) == files(world)


def test_a_larger_training_set_leaves_the_rest_alone(world, tmp_path):
    more = quietly(tmp_path / 'b', train=12, dev=4, test=0, seed=3, regions=9, pictures=False)
    assert not (more / 'pictures').exists() and not (more / 'test_ims.npy').exists()
    assert Split(more, 'dev').fingerprint() == Split(world, 'dev').fingerprint()
    assert Split(more, 'train').ids[:10] == Split(world, 'train').ids


def test_splits_and_seeds_share_no_scene():
    largest = dict(train=800_000, dev=100_000, test=100_000)
    numbers = []
    for seed in (0, 1):
        numbers += [set(scene_numbers(split, n, seed)) for split, n in largest.items()]
    assert len(set().union(*numbers)) == sum(map(len, numbers)) == 2_000_000
    with pytest.raises(SettingError, match='dev: 100001 scenes'):
        scene_numbers('dev', 100_001, 0)


def test_what_is_there_stays(world):
    before = files(world)
    with pytest.raises(DataError) as fault:
        quietly(world, train=1, dev=1, test=1, seed=0)
    check_line(fault.value, 'world: there is something of that name already; choose')
    assert files(world) == before


def test_a_world_that_fails_is_gone(tmp_path, monkeypatch):
    def fail(scene):
        raise OSError('No space left on device')

    monkeypatch.setattr(write, 'draw', fail)
    with pytest.raises(OSError):
        quietly(tmp_path / 'new', train=4, dev=1, test=1, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('fault', [KeyboardInterrupt, OSError])
def test_a_world_interrupted_while_writing_is_gone(tmp_path, monkeypatch, fault):
    add = write.SplitWriter.add
    chunks = []

    def add_until_the_third(self, *chunk):
        chunks.append(add(self, *chunk))
        if len(chunks) == 3:
            assert any(path.stat().st_size for path in tmp_path.rglob('train_ims.npy'))
            raise fault

    monkeypatch.setattr(write.SplitWriter, 'add', add_until_the_third)
    monkeypatch.setattr(write, 'TOGETHER', 2)
    with pytest.raises(fault):
        quietly(tmp_path / 'new', train=10, dev=1, test=1, seed=0)
    assert list(tmp_path.iterdir()) == []


COMMAND = '''
import signal
# a shell's background jobs are born deaf to Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
from imtm_lite.world.write import SHAPES, write_world
write_world('new', seed=0, workers=1, progress=False, **SHAPES['f30k'])
'''


def wait(done):
    "Whether something is done within a minute and a half."
    end = time.time() + 90
    while not done() and time.time() < end:
        time.sleep(0.05)
    return done()


def is_gone(group):
    "Whether no process of a group is left."
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize('kill', [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_run(tmp_path, kill):
    """Ctrl-C, which all processes of a terminal get, leaves nothing.

    After a kill nothing looks like a data set, and no process stays."""
    run = subprocess.Popen(
        [sys.executable, '-c', COMMAND],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert wait(lambda: any(path.stat().st_size for path in tmp_path.rglob('train_ims.npy')))
    if kill == signal.SIGINT:
        os.killpg(run.pid, kill)
        left = []
    else:
        os.kill(run.pid, kill)
        left = [f'new.{run.pid}.partial']
    assert run.wait(90) != 0
    assert wait(lambda: is_gone(run.pid))
    assert [path.name for path in tmp_path.iterdir()] == left


def test_workers_write_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(write, 'TOGETHER', 3)
    shape = dict(train=8, dev=2, test=1, seed=1, regions=5, width=256)
    alone = quietly(tmp_path / 'alone', **shape, workers=0)
    together = quietly(tmp_path / 'together', **shape, workers=2)
    assert files(alone) == files(together) and len(files(alone)) > 11


def test_the_detector_has_one_thread(tmp_path, monkeypatch):
    detector = write.load_detector()
    threads = []

    def regions(*shots):
        threads.append(torch.get_num_threads())
        return detector.regions(*shots)

    monkeypatch.setattr(write, 'the_detector', lambda: SimpleNamespace(regions=regions))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        quietly(tmp_path / 'a', train=2, dev=1, test=0, seed=1)
        assert threads == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_wide_world_is_the_narrow_one(tmp_path):
    shape = dict(train=4, dev=0, test=0, seed=1, regions=7, pictures=False)
    narrow = quietly(tmp_path / 'narrow', **shape, width=128)
    wide = quietly(tmp_path / 'wide', **shape, width=2048)
    held = files(wide)
    differ = [name for name, content in files(narrow).items() if content != held[name]]
    assert differ == ['meta.json', 'train_ims.npy']
    assert json.loads(held['meta.json'])['width'] == 2048
    x, y = (np.load(root / 'train_ims.npy').astype(np.float64) for root in (narrow, wide))
    W = widen(np.eye(128), 2048)
    assert np.allclose(W @ W.T, np.eye(128), atol=1e-12)
    assert y.shape == (4, 7, 2048) and x.max() > 1
    assert np.abs(y @ W.T - x).max() < 1e-5
    assert np.linalg.matrix_rank(y.reshape(-1, 2048)) == np.linalg.matrix_rank(x.reshape(-1, 128))


@pytest.mark.parametrize(
    'wrong, says',
    [
        (dict(width=200), '128 wide, and 200 is not a multiple'),
        (dict(regions=0), 'regions 0'),
        (dict(workers=-1), 'workers -1'),
    ],
)
def test_sizes_that_cannot_be(tmp_path, wrong, says):
    with pytest.raises(SettingError, match=says):
        quietly(tmp_path / 'c', train=4, dev=0, test=0, seed=1, **wrong)
    assert not (tmp_path / 'c').exists()


def test_arrays_are_as_numpy_saves_them(world):
    for path in world.glob('*.npy'):
        saved = io.BytesIO()
        np.save(saved, np.load(path))
        assert saved.getvalue() == path.read_bytes(), path.name


def peak(folder, n):
    "The most memory that a world of n wide pictures takes while it is written."
    tracemalloc.start()
    shape = dict(regions=36, width=2048, pictures=False)
    quietly(folder / str(n), train=n, dev=0, test=0, seed=0, **shape)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_memory_holds_a_chunk_and_not_the_world(tmp_path, monkeypatch):
    monkeypatch.setattr(write, 'TOGETHER', 2)
    # what is loaded once
    peak(tmp_path, 1)
    row = 36 * 2048 * 2
    small = peak(tmp_path, 4)
    large = peak(tmp_path, 20)
    # 16 rows more in the file, not in memory
    assert 2 * row < small and large < small + 4 * row


@pytest.mark.parametrize('pictures', [False, True])
def test_the_size_on_disk_is_foretold(tmp_path, pictures):
    shape = dict(regions=36, width=256, pictures=pictures)
    root = quietly(tmp_path / 'set', train=20, dev=0, test=0, seed=0, **shape)
    assert 1 < world_bytes(20, **shape) / sum(map(len, files(root).values())) < 1.4


@pytest.mark.parametrize('lacking', [1, 0])
def test_room_on_the_disk_is_asked_for(tmp_path, monkeypatch, lacking):
    shape = dict(regions=36, width=256, pictures=True)
    free = world_bytes(20, **shape) - lacking
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=free))
    root = tmp_path / 'not/yet/there'
    ask = partial(quietly, root, train=12, dev=7, test=1, seed=0, **shape)
    if not lacking:
        assert check(ask()).ok
        return
    with pytest.raises(DataError) as fault:
        ask()
    check_line(fault.value, 'there: needs 0.00 GB, and the disk has 0.00 GB free; make room')
    assert not (tmp_path / 'not').exists()


def test_room_is_asked_of_the_disk_that_will_hold_it(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=10)

    monkeypatch.setattr(shutil, 'disk_usage', usage)
    make_room(tmp_path / 'a/b', 10)
    make_room(tmp_path, 10)
    assert asked == [tmp_path, tmp_path]


# Karpathy's split, bottom-up features
@pytest.mark.parametrize(
    'name, sizes', [('f30k', (29_000, 1_014, 1_000)), ('coco', (113_287, 5_000, 5_000))]
)
def test_shapes(name, sizes):
    shape = SHAPES[name]
    assert (shape['train'], shape['dev'], shape['test']) == sizes
    assert (shape['regions'], shape['width']) == (36, 2048)


def test_sample_is_what_its_command_makes(tmp_path):
    "The command in data/README.md; texts are the same, numbers the same but for rounding."
    sample = shipped('sample')
    again = quietly(tmp_path / 'sample', train=24, dev=8, test=4, seed=0, regions=8)
    made = files(again)
    kept = files(sample)
    assert kept.keys() == made.keys()
    for name, content in kept.items():
        if name.endswith(('.txt', '.jsonl')):
            assert content == made[name], name
        if name.endswith('.npy'):
            assert np.allclose(np.load(sample / name), np.load(again / name), atol=0.05), name
    about, now = (json.loads(names['meta.json']) for names in (kept, made))
    assert about | dict(made_by='') == now | dict(made_by='')  # any version of the library
    assert sum(map(len, kept.values())) < 300_000
    assert check(sample).ok
