"The data layout: what is read, in which order, and one clear line for every fault."

import random
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imtm_lite.data import (
    Batch,
    Split,
    batch_plan,
    batches,
    image_chunks,
    in_order,
    need,
    pair_instances,
    path_of,
)
from imtm_lite.files import DataError
from imtm_lite.regions import Regions
from imtm_lite.text import Captions, Reader, Vocab
from tests.layout import (
    LINES,
    OPENING,
    READING,
    N,
    R,
    lines,
    one_line,
    put,
    save,
    store_copies,
    tiny,
)


@pytest.fixture
def root(tmp_path):
    return tiny(tiny(tmp_path / 'set'), 'dev', 3)


# What is read


def test_split(root):
    s = Split(root, 'train')
    assert (s.n_images, len(s.captions), s.ids[2], s.repeats) == (N, 5 * N, 'train2', 1)
    assert s.caption_image.dtype == np.int64
    assert s.caption_image.tolist() == [c // 5 for c in range(5 * N)]
    assert isinstance(s.features, np.memmap) and s.captions_of(2).tolist() == list(range(10, 15))
    assert s.triples[1] == [[0, 1, 2, 0.5], [3, 0, 1, 1]]
    assert s.triples[-N] == [] and len(s.triples) == N
    assert s.phrases[0]['boxes'] == {'1': [[1, 2, 3, 4]]}
    assert s.probes[2]['image'] == 2 and len(list(s.probes)) == 3
    assert s.classes == ['dog', 'cat', 'man'] and s.predicates == ['on', 'near']
    assert s.picture(0) is None


def test_minimal_split(root):
    for f in root.iterdir():
        if not f.name.endswith(('_ims.npy', '_caps.txt', '_ids.txt')):
            f.unlink()
    s = Split(root, 'train')
    optional = 'boxes sizes labels scores classes triples predicates phrases probes'
    assert all(getattr(s, key) is None for key in optional.split())
    r = s.regions([0, 1])
    assert r.boxes is None and r.labels is None and r.mask.all()
    says = 'train_boxes.npy: this file is missing, and cmsei needs it; it holds x0 y0 x1 y1'
    with pytest.raises(DataError, match=says):
        need(s, 'boxes', 'cmsei')


@pytest.mark.parametrize(
    'rows, index',
    [
        (2, [2]),
        ([4, 0, 0, 5], [4, 0, 0, 5]),
        (range(1, 4), [1, 2, 3]),
        (slice(None), list(range(N))),
        (slice(0, 2), [0, 1]),
        (np.array([3]), [3]),
        (torch.tensor([5, 1]), [5, 1]),
        ([], []),
    ],
    ids=str,
)
def test_regions(root, rows, index):
    def stored(key):
        return np.load(path_of(root, 'train', key))[index]

    r = Split(root, 'train').regions(rows)
    assert isinstance(r, Regions) and len(r) == len(index)
    if not index:
        return
    assert r.features.dtype == r.boxes.dtype == torch.float32 and r.labels.dtype == torch.int64
    assert np.array_equal(r.features.numpy(), stored('features').astype(np.float32))
    assert np.allclose(r.boxes.numpy(), stored('boxes') / [100, 101, 100, 101])
    assert r.labels.tolist() == stored('labels').tolist()
    assert r.sizes.tolist() == [[100, 101]] * len(index)


def test_padding_rows_and_other_types(root):
    x = np.load(root / 'train_ims.npy').astype('>f8')
    x[1, 2:] = 0
    np.save(root / 'train_ims.npy', np.asfortranarray(x))
    r = Split(root, 'train').regions(slice(None))
    assert r.mask.sum(1).tolist() == [4, 2, 4, 4, 4, 4]
    assert torch.allclose(r.features.double(), torch.from_numpy(x.astype('f8')))


@pytest.mark.parametrize('kind', ['<f2', '<f4', '<f8', '>f2', '>f4'])
def test_features_are_what_is_stored(root, kind):
    # a row of more numbers than one piece
    x = np.random.default_rng(0).normal(size=(N, R, 20_000)).astype(kind)
    x[0, 1:] = 0  # padding
    x[1, 2] = [1, -1] * 10_000  # a sum of 0
    x[2, 0] = -0.0  # padding
    x[3, 1] = 6e4  # a sum that no float16 holds
    if kind == '<f4':
        x[4, 1] = 3e38  # nor any float32
    np.save(root / 'train_ims.npy', x)
    (root / 'dev_ims.npy').unlink()
    rows = [4, 0, 1, 3, 2, 5]
    r = Split(root, 'train').regions(rows)
    assert np.array_equal(r.features.numpy(), x[rows].astype(np.float32))
    assert r.mask.equal(torch.from_numpy((x[rows] != 0).any(2))) and r.mask.sum() == 6 * R - 4
    assert r.features[2, 2].sum() == 0 and r.mask[2, 2]


@pytest.mark.parametrize('ids', ['repeated', 'fewer'])
@pytest.mark.parametrize('others', ['stored', 'images'])
def test_redundant_files_are_folded(root, ids, others):
    want = Split(root, 'train')
    regions = want.regions(slice(None))
    triples = list(want.triples)
    store_copies(root, others, ids)
    s = Split(root, 'train')
    assert (s.n_images, s.repeats, s.ids) == (N, 5, want.ids)
    assert s.caption_image.tolist() == want.caption_image.tolist()
    for (name, a), (_, b) in zip(s.regions(slice(None)).items(), regions.items()):
        assert a.equal(b), name
    assert list(s.triples) == triples


def test_broken_picture(root):
    (root / 'pictures').mkdir()
    (root / 'pictures' / 'train1.jpg').write_bytes(b'no picture')
    s = Split(root, 'train')
    assert s.picture(0) is None
    with pytest.raises(DataError) as e:
        s.picture(1)
    one_line(e.value, 'train1.jpg: not a readable picture')


def test_caption_map(root):
    image = np.array([5, 0, 1, 2, 3, 4] * 5, np.int32)
    np.save(root / 'train_cap_image.npy', image)
    (root / 'train_phrases.jsonl').unlink()
    s = Split(root, 'train')
    assert s.caption_image.tolist() == image.tolist()
    assert s.captions_of(5).tolist() == [0, 6, 12, 18, 24]


def test_text_files_as_they_come(root):
    want = Split(root, 'train').captions
    for content in ('\r\n'.join(want), '\n'.join(want), '\ufeff' + '\n'.join(want) + '\n'):
        (root / 'train_caps.txt').write_text(content, encoding='utf-8', newline='')
        assert Split(root, 'train').captions == want
    odd = [
        'a dog\u2028in the snow\x85\x0b!',
        'b is a letter',
        "b'one quote",
        "bob's 'b' sign",
        'café',
    ]
    lines(root / 'train_caps.txt', odd * N)
    assert Split(root, 'train').captions == odd * N


def test_fingerprint(root, tmp_path):
    s = Split(root, 'train')
    assert re.fullmatch('[0-9a-f]{12}', s.fingerprint())
    assert s.fingerprint() != Split(root, 'dev').fingerprint()
    copy = shutil.copytree(root, tmp_path / 'copy')
    assert Split(copy, 'train').fingerprint() == s.fingerprint()
    lines(copy / 'train_caps.txt', s.captions[::-1])
    assert Split(copy, 'train').fingerprint() != s.fingerprint()


# Batches


def ragged(seed=0):
    "Twenty images with one to eight captions, in any order."
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(20), rng.integers(1, 9, 20))
    return SimpleNamespace(caption_image=rng.permutation(image))


def first_word(caption):
    return SimpleNamespace(units=[(0, [0])])


def every_word(caption):
    entities = [(0, [i]) for i in range(len(caption.split()))]
    return SimpleNamespace(units=[*entities, (1, [0, 1])])


def same_bundle(a, b):
    "The same tensors under the same names."
    assert [name for name, _ in a.items()] == [name for name, _ in b.items()]
    for (name, t), (_, u) in zip(a.items(), b.items()):
        assert t.equal(u), name


def test_phrases_come_along_and_each_parser_has_its_own(root):
    split = Split(root, 'train')
    v = Vocab.build(split.captions, 1)
    plain = split.encoded(v)
    for parser in (first_word, every_word):
        reader = Reader(v, parser)
        for rows in ([3, 0, 1], slice(1, 4), torch.tensor([2])):
            numbers = torch.arange(len(split.captions))[rows]
            want = Captions.from_text([split.captions[i] for i in numbers], reader)
            assert want.units is not None
            same_bundle(split.encoded(reader)[rows], want)
        assert split.encoded(reader) is split.encoded(Reader(v, parser))
    assert split.encoded(v) is plain and plain[[0]].units is None


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('size', [2, 3, 7, 64])
def test_rounds(size, seed):
    s = ragged(seed)
    order = dict(size=size, seed=seed, epoch=1)
    plan = batch_plan(s, **order)
    for batch in plan:
        assert 1 < len(set(s.caption_image[batch])) == len(batch) <= size
    dealt = np.concatenate(plan)
    assert len(set(dealt)) == len(dealt)
    counts = np.bincount(s.caption_image)
    rounds = [(counts > r).sum() for r in range(counts.max())]
    # only lonely last pairs are dropped
    assert len(dealt) == sum(n - (n % size == 1) for n in rounds)
    first = np.concatenate(batch_plan(s, per_image=1, **order))
    assert len(first) == len(set(s.caption_image[first])) == 20 - (20 % size == 1)
    plain = np.concatenate(batch_plan(s, distinct=False, **order))
    M = len(s.caption_image)
    assert len(plain) == M - (M % size == 1)


def test_order_is_fixed_by_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(batch_plan(ragged(), size=4, seed=seed, epoch=epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    with pytest.raises(ValueError, match='at least 2'):
        batch_plan(ragged(), size=1, seed=0, epoch=0)


def test_every_caption_of_an_image_has_the_same_chance():
    s = ragged()
    M = len(s.caption_image)
    drawn = np.zeros(M)
    for epoch in range(400):
        plan = batch_plan(s, size=4, seed=0, epoch=epoch, per_image=1)
        drawn += np.bincount(np.concatenate(plan), minlength=M)
    share = 1 / np.bincount(s.caption_image)[s.caption_image]
    assert np.abs(drawn / 400 - share).max() < 0.12


def filled(order, costs, instances):
    "Batches pair by pair, never beyond the limit but for the second pair."
    pieces = []
    piece = []
    for c in order.tolist():
        if len(piece) >= 2 and costs[piece].sum() + costs[c] > instances:
            pieces.append(piece)
            piece = []
        piece.append(c)
    return [*pieces, piece]


@pytest.mark.parametrize('distinct', [True, False])
def test_batches_of_a_given_weight(distinct):
    "Filled in the order of the epoch."
    for seed in range(20):
        s = ragged(seed)
        costs = np.random.default_rng(seed).integers(3, 30, 1000)
        how = dict(seed=seed, epoch=1, distinct=distinct)
        rounds = batch_plan(s, size=10**6, **how)
        for instances in (1, 40, 100, 10**6):
            want = []
            for order in rounds:
                want += [b for b in filled(order, costs, instances) if len(b) > 1]
            plan = batch_plan(s, size=2, instances=instances, costs=costs, **how)
            assert [batch.tolist() for batch in plan] == want
    with pytest.raises(ValueError, match='needs the costs'):
        batch_plan(s, size=2, instances=10, **how)


def test_instances_are_stored_regions_and_tokens(root):
    s = Split(root, 'train')
    vocab = Vocab.build(s.captions, 1)
    costs = pair_instances(s, vocab)
    assert costs.tolist() == [s.features.shape[1] + len(vocab.encode(c)) for c in s.captions]
    order = dict(size=4, seed=0, epoch=0, instances=60)
    plan = [batch.tolist() for batch in batch_plan(s, costs=costs, **order)]
    assert [b.caption.tolist() for b in batches(s, vocab, **order)] == plan
    assert [b.caption.tolist() for b in batches(s, vocab, start=3, **order)] == plan[3:]


def test_batches(root):
    s = Split(root, 'train')
    vocab = Vocab.build(s.captions, 1)
    order = dict(size=4, seed=0, epoch=0)
    seen = list(batches(s, vocab, **order))
    assert len(seen) == len(batch_plan(s, **order)) == 10
    for b in seen:
        assert isinstance(b, Batch) and len(b) == len(b.regions) == len(b.captions)
        assert b.image.equal(b.caption_image)
        assert b.regions.features.equal(s.regions(b.image).features)
        assert b.image.tolist() == [s.caption_image[c] for c in b.caption]
        same_bundle(b.captions, Captions.from_text([s.captions[c] for c in b.caption], vocab))
    rest = batches(s, vocab, start=7, **order)
    assert [b.caption.tolist() for b in rest] == [b.caption.tolist() for b in seen[7:]]
    assert seen[0].to('cpu').captions.tokens.equal(seen[0].captions.tokens)
    # tokenized once
    assert s.encoded(vocab) is s.encoded(Vocab(vocab.words))


def same(a: Batch, b: Batch):
    assert a.image.equal(b.image)
    assert a.caption_image.equal(b.caption_image)
    assert a.caption.equal(b.caption)
    same_bundle(a.regions, b.regions)
    same_bundle(a.captions, b.captions)


def readers():
    return [t for t in threading.enumerate() if t.name.startswith('batches')]


@pytest.mark.parametrize('workers', [1, 2, 5])
def test_workers_change_nothing(root, workers, monkeypatch):
    s = Split(root, 'train')
    vocab = Vocab.build(s.captions, 1)
    read = Split.regions

    def read_slowly(self, rows):
        time.sleep(random.random() / 200)
        return read(self, rows)

    monkeypatch.setattr(Split, 'regions', read_slowly)
    for start in (0, 7):
        order = dict(size=4, seed=0, epoch=2, start=start)
        plain = list(batches(s, vocab, **order))
        ahead = list(batches(s, vocab, workers=workers, **order))
        assert len(ahead) == len(plain) == 10 - start
        for a, b in zip(ahead, plain):
            same(a, b)
    assert not readers()


def test_workers_read_a_bounded_number_ahead(root, monkeypatch):
    s = Split(root, 'train')
    count = []
    read = Split.regions

    def read_and_count(self, rows):
        count.append(1)
        return read(self, rows)

    monkeypatch.setattr(Split, 'regions', read_and_count)
    running = batches(s, Vocab.build(s.captions, 1), size=2, seed=0, epoch=0, workers=2)
    for k in range(1, 4):
        next(running)
        end = time.time() + 5
        while len(count) < k + 4 and time.time() < end:
            time.sleep(0.001)
        time.sleep(0.05)
        # those used, and two a worker
        assert len(count) == k + 4
    assert readers()
    running.close()
    assert not readers()


@pytest.mark.parametrize('way', ['break', 'exception', 'end'])
def test_no_thread_stays_behind(root, way):
    s = Split(root, 'train')
    vocab = Vocab.build(s.captions, 1)
    try:
        for b in batches(s, vocab, size=2, seed=0, epoch=0, workers=3):
            assert readers()
            if way == 'break':
                break
            if way == 'exception':
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not readers()


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_a_fault_in_a_worker_is_told(root, workers):
    order = dict(size=2, seed=1, epoch=0)
    s = Split(root, 'train')
    # six images, so not in the first two batches
    row = s.caption_image[batch_plan(s, **order)[2][0]]
    save('features', put((row, 1, 2), np.nan))(root)
    s = Split(root, 'train')
    seen = []
    with pytest.raises(DataError) as fault:
        for b in batches(s, Vocab.build(s.captions, 1), workers=workers, **order):
            seen.append(b)
    says = rf'train_ims.npy: row {row} \(image train{row}\): region 1, dimension 2 is nan'
    one_line(fault.value, says)
    # the sound batches before it came first
    assert len(seen) == 2
    del fault
    assert not readers()


def test_settings_of_batches_that_cannot_be(root):
    s = Split(root, 'train')
    vocab = Vocab.build(s.captions)
    order = dict(size=4, seed=0, epoch=0)
    with pytest.raises(ValueError, match='workers=-1'):
        next(batches(s, vocab, workers=-1, **order))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='pin=True is for copying to a GPU'):
            next(batches(s, vocab, pin=True, **order))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_batches_are_pinned_and_moved(root):
    s = Split(root, 'train')
    vocab = Vocab.build(s.captions, 1)
    order = dict(size=4, seed=0, epoch=0)
    b = next(batches(s, vocab, **order))
    pinned = next(batches(s, vocab, pin=True, workers=1, **order))
    for _, t in (*pinned.regions.items(), *pinned.captions.items(), ('', pinned.caption)):
        assert t.is_pinned()
    same(pinned, b)
    same(b.to('cuda', non_blocking=True).to('cpu'), b)


def test_every_tensor_of_a_batch_is_pinned(root, monkeypatch):
    s = Split(root, 'train')
    b = next(batches(s, Vocab.build(s.captions, 1), size=4, seed=0, epoch=0))
    count = []

    def pin(t):
        count.append(t.shape)
        return t.clone()

    monkeypatch.setattr(torch.Tensor, 'pin_memory', pin)
    same(b.pinned(), b)
    assert len(count) == len(b.regions.items()) + len(b.captions.items()) + 3


def test_results_come_in_the_order_of_the_jobs():
    def f(n):
        time.sleep(random.random() / 100)
        if n == 13:
            raise KeyError(n)
        return n

    assert list(in_order(f, range(12))) == list(range(12))
    assert list(in_order(f, iter(range(12)), ThreadPoolExecutor(4), 3)) == list(range(12))
    assert list(in_order(f, [], ThreadPoolExecutor(4), 3)) == []
    seen = []
    with pytest.raises(KeyError):
        for n in in_order(f, range(30), ThreadPoolExecutor(4), 6):
            seen.append(n)
    assert seen == list(range(13))


@pytest.mark.parametrize('size', [1, 4, 100])
def test_chunks(root, size):
    s = Split(root, 'train')

    def features(*rows):
        return Regions.cat(list(image_chunks(s, *rows, size=size))).features

    assert features().equal(s.regions(slice(None)).features)
    assert features(range(1, N)).equal(s.regions(range(1, N)).features)


# Faults


@pytest.mark.parametrize('case', OPENING)
def test_fault_on_opening(root, case):
    breaks, says = OPENING[case]
    breaks(root)
    with pytest.raises(DataError) as fault:
        Split(root, 'train')
    one_line(fault.value, says)


@pytest.mark.parametrize('case', READING)
def test_fault_on_reading(root, case):
    breaks, says = READING[case]
    breaks(root)
    s = Split(root, 'train')
    with pytest.raises(DataError) as fault:
        list(batches(s, Vocab.build(s.captions), size=4, seed=0, epoch=0))
    one_line(fault.value, says)


@pytest.mark.parametrize('case', LINES)
def test_fault_in_a_line(root, case):
    breaks, says = LINES[case]
    breaks(root)
    s = Split(root, 'train')
    key = says.split('.')[0].split('_')[1]
    with pytest.raises(DataError) as fault:
        list(getattr(s, key))
    one_line(fault.value, says)


def test_widths_differ(root):
    tiny(root, 'dev', 3, d=7)
    says = 'dev_ims.npy: features are 7 wide, but those of train_ims.npy 8; extract'
    with pytest.raises(DataError) as fault:
        Split(root, 'dev')
    one_line(fault.value, says)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match='there is no such folder'):
        Split(tmp_path / 'x', 'train')


def test_copies_that_differ(root):
    store_copies(root, 'images')
    x = np.load(root / 'train_ims.npy')
    x[12] += 1
    np.save(root / 'train_ims.npy', x)
    # the first and the last image are fine
    Split(root, 'train')
    x[1] += 1
    np.save(root / 'train_ims.npy', x)
    with pytest.raises(DataError, match='rows 0 and 1 should be copies'):
        Split(root, 'train')


def test_tolerance_of_boxes(root):
    save('boxes', put((2, 1), (50, -0.9, 100.9, 60)))(root)
    boxes = Split(root, 'train').regions(slice(None)).boxes
    assert boxes.min() >= 0 and boxes.max() <= 1
