"The data layout: what is read, in which order, and one clear line for every fault."

import json
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

import imtm_lite.data as data
from imtm_lite.data import (
    Batch,
    Split,
    batches,
    image_chunks,
    in_order,
    need,
    pair_instances,
    path_of,
    plan,
)
from imtm_lite.files import DataError
from imtm_lite.regions import Regions
from imtm_lite.text import Captions, Vocab
from imtm_lite.workshop.check import check

N = 6
R = 4
D = 8


def lines(path, items, end='\n'):
    path.write_text(''.join(f'{x}{end}' for x in items), encoding='utf-8', newline='')


def tiny(root, name='train', n=N, per=5, d=D):
    "A complete, sound split of n images."
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(name) + n)
    put = lambda key, a: np.save(path_of(root, name, key), a)
    put('features', rng.normal(size=(n, R, d)).astype(np.float16))
    corner = rng.uniform(0, 50, (n, R, 2))
    put(
        'boxes',
        np.concatenate([corner, corner + rng.uniform(1, 50, (n, R, 2))], -1).astype(np.float32),
    )
    put('sizes', np.tile(np.array([[100, 101]], np.int32), (n, 1)))
    put('labels', rng.integers(-1, 3, (n, R)).astype(np.int16))
    put('scores', rng.uniform(size=(n, R)).astype(np.float16))
    text = lambda key, items: lines(path_of(root, name, key), items)
    text(
        'captions',
        [f'a dog number {i} of {name} seen {j} times' for i in range(n) for j in range(per)],
    )
    text('ids', [f'{name}{i}' for i in range(n)])
    text('triples', [json.dumps([[0, 1, 2, 0.5], [3, 0, 1, 1]] if i else []) for i in range(n)])
    text(
        'phrases',
        [json.dumps({'phrases': [[[0, 2, 'animals', 1]]] * per, 'boxes': {'1': [[1, 2, 3, 4]]}})]
        * n,
    )
    text(
        'probes',
        [
            json.dumps({'image': i, 'kind': 'object', 'true': 'a dog', 'false': 'a cat'})
            for i in range(3)
        ],
    )
    lines(root / 'classes.txt', ['dog', 'cat', 'man'])
    lines(root / 'predicates.txt', ['on', 'near'])
    return root


@pytest.fixture
def root(tmp_path):
    return tiny(tiny(tmp_path / 'set'), 'dev', 3)


# What is read


def test_split(root):
    s = Split(root, 'train')
    assert (s.n_images, len(s.captions), s.ids[2], s.repeats) == (N, 5 * N, 'train2', 1)
    assert s.caption_image.dtype == np.int64 and s.caption_image.tolist() == [
        c // 5 for c in range(5 * N)
    ]
    assert isinstance(s.features, np.memmap) and s.captions_of(2).tolist() == list(range(10, 15))
    assert (
        s.triples[1] == [[0, 1, 2, 0.5], [3, 0, 1, 1]]
        and s.triples[-N] == []
        and len(s.triples) == N
    )
    assert (
        s.phrases[0]['boxes'] == {'1': [[1, 2, 3, 4]]}
        and s.probes[2]['image'] == 2
        and len(list(s.probes)) == 3
    )
    assert (
        s.classes == ['dog', 'cat', 'man']
        and s.predicates == ['on', 'near']
        and s.picture(0) is None
    )


def test_minimal_split(root):
    for f in root.iterdir():
        if not f.name.endswith(('_ims.npy', '_caps.txt', '_ids.txt')):
            f.unlink()
    s = Split(root, 'train')
    assert all(
        getattr(s, key) is None
        for key in (
            'boxes',
            'sizes',
            'labels',
            'scores',
            'classes',
            'triples',
            'predicates',
            'phrases',
            'probes',
        )
    )
    r = s.regions([0, 1])
    assert r.boxes is None and r.labels is None and r.mask.all()
    with pytest.raises(
        DataError,
        match=r'train_boxes.npy: this file is missing, and cmsei needs it; it holds x0 y0 x1 y1',
    ):
        need(s, 'boxes', 'cmsei')
    report = check(root)
    assert report.ok and any('triples' in a and 'cmsei' in a for a in report.absent)


@pytest.mark.parametrize(
    'rows',
    [
        2,
        [4, 0, 0, 5],
        range(1, 4),
        slice(None),
        slice(0, 2),
        np.array([3]),
        torch.tensor([5, 1]),
        [],
    ],
    ids=str,
)
def test_regions(root, rows):
    s = Split(root, 'train')
    r = s.regions(rows)
    index = np.atleast_1d(
        np.arange(N)[rows if not isinstance(rows, torch.Tensor) else rows.numpy()]
        if len(np.shape(rows)) == 0 or len(rows)
        else np.array([], int)
    )
    assert isinstance(r, Regions) and len(r) == len(index)
    if len(index) == 0:
        return
    assert r.features.dtype == r.boxes.dtype == torch.float32 and r.labels.dtype == torch.int64
    assert np.array_equal(
        r.features.numpy(), np.load(root / 'train_ims.npy')[index].astype(np.float32)
    )
    assert np.allclose(
        r.boxes.numpy(), np.load(root / 'train_boxes.npy')[index] / [100, 101, 100, 101]
    )
    assert r.labels.tolist() == np.load(root / 'train_labels.npy')[
        index
    ].tolist() and r.sizes.tolist() == [[100, 101]] * len(index)


def test_padding_rows_and_other_types(root):
    x = np.load(root / 'train_ims.npy').astype('>f8')
    x[1, 2:] = 0
    np.save(root / 'train_ims.npy', np.asfortranarray(x))
    r = Split(root, 'train').regions(slice(None))
    assert r.mask.sum(1).tolist() == [4, 2, 4, 4, 4, 4] and torch.allclose(
        r.features.double(), torch.from_numpy(x.astype('f8'))
    )


@pytest.mark.parametrize('kind', ['<f2', '<f4', '<f8', '>f2', '>f4'])
def test_features_are_what_is_stored(root, kind):
    # a row of more numbers than one piece
    x = np.random.default_rng(0).normal(size=(N, R, 20_000)).astype(kind)
    # padding; a sum of 0; padding; a sum that no float16 holds
    x[0, 1:], x[1, 2], x[2, 0], x[3, 1] = 0, [1, -1] * 10_000, -0.0, 6e4
    # nor any float32
    if kind == '<f4':
        x[4, 1] = 3e38
    np.save(root / 'train_ims.npy', x)
    (root / 'dev_ims.npy').unlink()
    r = Split(root, 'train').regions([4, 0, 1, 3, 2, 5])
    assert np.array_equal(r.features.numpy(), x[[4, 0, 1, 3, 2, 5]].astype(np.float32))
    assert (
        r.mask.equal(torch.from_numpy((x[[4, 0, 1, 3, 2, 5]] != 0).any(2)))
        and r.mask.sum() == 6 * R - 4
        and (r.features[2, 2].sum(), r.mask[2, 2]) == (0, True)
    )


@pytest.mark.parametrize('ids', ['repeated', 'fewer'])
@pytest.mark.parametrize('others', ['stored', 'images'])
def test_redundant_files_are_folded(root, ids, others):
    want = Split(root, 'train')
    regions = want.regions(slice(None))
    triples = list(want.triples)
    for key in (
        ('features', 'boxes', 'sizes', 'labels', 'scores') if others == 'stored' else ('features',)
    ):
        p = path_of(root, 'train', key)
        np.save(p, np.load(p).repeat(5, 0))
    if others == 'stored':
        lines(root / 'train_triples.jsonl', [json.dumps(t) for t in triples for _ in range(5)])
    if ids == 'repeated':
        lines(root / 'train_ids.txt', [f'train{i // 5}' for i in range(5 * N)])
    s = Split(root, 'train')
    assert (s.n_images, s.repeats, s.ids) == (
        N,
        5,
        want.ids,
    ) and s.caption_image.tolist() == want.caption_image.tolist()
    for (name, a), (_, b) in zip(s.regions(slice(None)).items(), regions.items()):
        assert a.equal(b), name
    assert list(s.triples) == triples
    assert check(root).ok


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
    assert s.caption_image.tolist() == image.tolist() and s.captions_of(5).tolist() == [
        0,
        6,
        12,
        18,
        24,
    ]


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
    ] * N
    lines(root / 'train_caps.txt', odd)
    assert Split(root, 'train').captions == odd


def test_fingerprint(root, tmp_path):
    s = Split(root, 'train')
    assert re.fullmatch('[0-9a-f]{12}', s.fingerprint())
    shutil.copytree(root, tmp_path / 'copy')
    assert (
        Split(tmp_path / 'copy', 'train').fingerprint()
        == s.fingerprint()
        != Split(root, 'dev').fingerprint()
    )
    lines(tmp_path / 'copy' / 'train_caps.txt', s.captions[::-1])
    assert Split(tmp_path / 'copy', 'train').fingerprint() != s.fingerprint()


# Batches


def ragged(seed=0):
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        caption_image=rng.permutation(np.repeat(np.arange(20), rng.integers(1, 9, 20)))
    )


def test_phrases_come_along_and_each_parser_has_its_own(root):
    split = Split(root, 'train')
    v = Vocab.build(split.captions, 1)
    plain = split.encoded(v)
    first = lambda c: SimpleNamespace(units=[(0, [0])])
    every = lambda c: SimpleNamespace(
        units=[(0, [i]) for i in range(len(c.split()))] + [(1, [0, 1])]
    )
    for parser in (first, every):
        v.parser = parser
        for rows in ([3, 0, 1], slice(1, 4), torch.tensor([2])):
            got = split.encoded(v)[rows]
            want = Captions.from_text(
                [split.captions[i] for i in torch.arange(len(split.captions))[rows]], v
            )
            assert all(
                a.equal(b) for (_, a), (_, b) in zip(got.items(), want.items())
            ) and got._tensors.keys() == want._tensors.keys() >= {'units', 'kinds'}
    v.parser = None
    assert split.encoded(v) is plain and plain[[0]].units is None


@pytest.mark.parametrize('size', [2, 3, 7, 64])
def test_rounds(size):
    for seed in range(20):
        s = ragged(seed)
        got = plan(s, size=size, seed=seed, epoch=1)
        assert all(len(b) > 1 and len(set(s.caption_image[b])) == len(b) <= size for b in got)
        all_ = np.concatenate(got)
        assert len(set(all_)) == len(all_)
        counts = np.bincount(s.caption_image)
        rounds = [(counts > r).sum() for r in range(counts.max())]
        # only lonely last pairs are dropped
        assert len(all_) == sum(n - (n % size == 1) for n in rounds)
        first = np.concatenate(plan(s, size=size, seed=seed, epoch=1, per_image=1))
        assert len(first) == 20 - (20 % size == 1) and len(set(s.caption_image[first])) == len(
            first
        )
        plain = np.concatenate(plan(s, size=size, seed=seed, epoch=1, distinct=False))
        assert len(plain) == len(s.caption_image) - (len(s.caption_image) % size == 1)


def test_order_is_fixed_by_seed_and_epoch():
    s = ragged()
    flat = lambda **kw: np.concatenate(plan(ragged(), size=4, **kw)).tolist()
    assert flat(seed=0, epoch=0) == flat(seed=0, epoch=0)
    assert len({tuple(flat(seed=a, epoch=b)) for a in range(3) for b in range(3)}) == 9
    with pytest.raises(ValueError, match='at least 2'):
        plan(s, size=1, seed=0, epoch=0)
    drawn = np.stack(
        [
            np.bincount(
                np.concatenate(plan(s, size=4, seed=0, epoch=e, per_image=1)),
                minlength=len(s.caption_image),
            )
            for e in range(400)
        ]
    ).mean(0)
    share = 1 / np.bincount(s.caption_image)[s.caption_image]
    # every caption of an image has the same chance
    assert np.abs(drawn - share).max() < 0.12


@pytest.mark.parametrize('distinct', [True, False])
def test_batches_of_a_given_weight(distinct):
    "Filled pair by pair in the order of the epoch, never beyond the limit but for the second pair."
    for seed in range(20):
        s = ragged(seed)
        costs = np.random.default_rng(seed).integers(3, 30, 1000)
        how = dict(seed=seed, epoch=1, distinct=distinct)
        whole = plan(s, size=10**6, **how)  # the rounds
        for instances in (1, 40, 100, 10**6):
            want = []
            for r in whole:
                batch = []
                weight = 0
                for c in r:
                    if len(batch) >= 2 and weight + costs[c] > instances:
                        want.append(batch)
                        batch = []
                        weight = 0
                    batch.append(c)
                    weight += costs[c]
                want.append(batch)
            got = plan(s, size=2, instances=instances, costs=costs, **how)
            assert [b.tolist() for b in got] == [b for b in want if len(b) > 1]
    with pytest.raises(ValueError, match='needs the costs'):
        plan(s, size=2, instances=10, **how)


def test_instances_are_stored_regions_and_tokens(root):
    s = Split(root, 'train')
    vocab = Vocab.build(s.captions, 1)
    costs = pair_instances(s, vocab)
    assert costs.tolist() == [s.features.shape[1] + len(vocab.encode(c)) for c in s.captions]
    seen = list(batches(s, vocab, size=4, seed=0, epoch=0, instances=60))
    assert [b.caption.tolist() for b in seen] == [
        b.tolist() for b in plan(s, size=4, seed=0, epoch=0, instances=60, costs=costs)
    ]
    rest = list(batches(s, vocab, size=4, seed=0, epoch=0, instances=60, start=3))
    assert [b.caption.tolist() for b in rest] == [b.caption.tolist() for b in seen[3:]]


def test_batches(root):
    s = Split(root, 'train')
    vocab = Vocab.build(s.captions, 1)
    seen = list(batches(s, vocab, size=4, seed=0, epoch=0))
    assert len(seen) == len(plan(s, size=4, seed=0, epoch=0)) == 10
    for b in seen:
        assert (
            isinstance(b, Batch)
            and len(b) == len(b.regions) == len(b.captions)
            and b.image.equal(b.caption_image)
        )
        assert b.regions.features.equal(s.regions(b.image).features)
        assert b.image.tolist() == [s.caption_image[c] for c in b.caption]
        want = Captions.from_text([s.captions[c] for c in b.caption], vocab)
        assert b.captions.tokens.equal(want.tokens) and b.captions.lengths.equal(want.lengths)
    rest = list(batches(s, vocab, size=4, seed=0, epoch=0, start=7))
    assert [b.caption.tolist() for b in rest] == [b.caption.tolist() for b in seen[7:]]
    assert seen[0].to('cpu').captions.tokens.equal(seen[0].captions.tokens)
    # tokenized once
    assert s.encoded(vocab) is s.encoded(Vocab(vocab.words))


def same(a: Batch, b: Batch):
    for x, y in ((a.image, b.image), (a.caption_image, b.caption_image), (a.caption, b.caption)):
        assert x.equal(y)
    for x, y in ((a.regions, b.regions), (a.captions, b.captions)):
        assert [n for n, _ in x.items()] == [n for n, _ in y.items()] and all(
            t.equal(u) for (_, t), (_, u) in zip(x.items(), y.items())
        )


def readers():
    return [t for t in threading.enumerate() if t.name.startswith('batches')]


@pytest.mark.parametrize('workers', [1, 2, 5])
def test_workers_change_nothing(root, workers, monkeypatch):
    s = Split(root, 'train')
    vocab = Vocab.build(s.captions, 1)
    read = Split.regions
    # some take longer
    monkeypatch.setattr(
        Split,
        'regions',
        lambda self, rows: (time.sleep(random.random() / 200), read(self, rows))[1],
    )
    for start in (0, 7):
        want, got = (
            list(batches(s, vocab, size=4, seed=0, epoch=2, start=start, workers=w))
            for w in (0, workers)
        )
        assert len(got) == len(want) == 10 - start
        for a, b in zip(got, want):
            same(a, b)
    assert not readers()


def test_workers_read_a_bounded_number_ahead(root, monkeypatch):
    s = Split(root, 'train')
    count = []
    read = Split.regions
    monkeypatch.setattr(Split, 'regions', lambda self, rows: (count.append(1), read(self, rows))[1])
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
    seen = []
    s = Split(root, 'train')
    # six images, so not in the first two batches
    row = s.caption_image[plan(s, size=2, seed=1, epoch=0)[2][0]]
    save('features', put((row, 1, 2), np.nan))(root)
    s = Split(root, 'train')
    with pytest.raises(DataError) as e:
        for b in batches(s, Vocab.build(s.captions, 1), size=2, seed=1, epoch=0, workers=workers):
            seen.append(b)
    one_line(
        e.value, rf'train_ims.npy: row {row} \(image train{row}\): region 1, dimension 2 is nan'
    )
    # the sound batches before it came first
    assert len(seen) == 2
    del e
    assert not readers()


def test_settings_of_batches_that_cannot_be(root):
    s = Split(root, 'train')
    with pytest.raises(ValueError, match='workers=-1'):
        next(batches(s, Vocab.build(s.captions), size=4, seed=0, epoch=0, workers=-1))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='pin=True is for copying to a GPU'):
            next(batches(s, Vocab.build(s.captions), size=4, seed=0, epoch=0, pin=True))


def test_every_tensor_of_a_batch_is_pinned(root, monkeypatch):
    s = Split(root, 'train')
    b = next(batches(s, Vocab.build(s.captions, 1), size=4, seed=0, epoch=0))
    if torch.cuda.is_available():
        pinned = next(
            batches(s, Vocab.build(s.captions, 1), size=4, seed=0, epoch=0, pin=True, workers=1)
        )
        moved = b.to('cuda', non_blocking=True).to('cpu')
        for _, t in (*pinned.regions.items(), *pinned.captions.items(), ('', pinned.caption)):
            assert t.is_pinned()
        same(pinned, b)
        same(moved, b)
    else:
        count = []
        monkeypatch.setattr(
            torch.Tensor, 'pin_memory', lambda t: (count.append(t.shape), t.clone())[1]
        )
        same(b.pinned(), b)
        assert len(count) == len(b.regions.items()) + len(b.captions.items()) + 3


def test_results_come_in_the_order_of_the_jobs():
    def f(n):
        time.sleep(random.random() / 100)
        if n == 13:
            raise KeyError(n)
        return n

    assert (
        list(in_order(f, range(12)))
        == list(in_order(f, iter(range(12)), ThreadPoolExecutor(4), 3))
        == list(range(12))
    )
    assert list(in_order(f, [], ThreadPoolExecutor(4), 3)) == []
    seen = []
    with pytest.raises(KeyError):
        for n in in_order(f, range(30), ThreadPoolExecutor(4), 6):
            seen.append(n)
    assert seen == list(range(13))


@pytest.mark.parametrize('size', [1, 4, 100])
def test_chunks(root, size):
    s = Split(root, 'train')
    assert Regions.cat(list(image_chunks(s, size=size))).features.equal(
        s.regions(slice(None)).features
    )
    assert Regions.cat(list(image_chunks(s, range(1, s.n_images), size=size))).features.equal(
        s.regions(range(1, s.n_images)).features
    )


# Faults: (what is broken, how, what the line must say)


def save(key, change):
    def breaks(root):
        path = path_of(root, 'train', key)
        a = change(np.load(path))
        np.save(path, a)

    return breaks


def put(index, value):
    def change(a):
        a[index] = value
        return a

    return change


def text(key, change):
    def breaks(root):
        path = path_of(root, 'train', key)
        lines(path, change(path.read_text(encoding='utf-8').split('\n')[:-1]))

    return breaks


def raw(key, change):
    def breaks(root):
        path = path_of(root, 'train', key)
        path.write_bytes(change(path.read_bytes()))

    return breaks


def remove(key):
    return lambda root: path_of(root, 'train', key).unlink()


def line(n, value):
    return lambda x: x[:n] + [value] + x[n + 1 :]


def phrase(**kw):
    return text('phrases', line(1, json.dumps({'phrases': [[]] * 5, 'boxes': {}} | kw)))


def probe(**kw):
    return text(
        'probes',
        line(1, json.dumps({'image': 0, 'kind': 'object', 'true': 'a dog', 'false': 'a cat'} | kw)),
    )


OPENING = {  # found when a split is opened
    'no features': (remove('features'), 'train_ims.npy: this file is missing'),
    'no captions': (remove('captions'), 'train_caps.txt: this file is missing'),
    'no ids': (remove('ids'), 'train_ids.txt: this file is missing'),
    'no sizes': (
        remove('sizes'),
        'train_img_sizes.npy: this file is missing, and train_boxes.npy needs it',
    ),
    'no predicates': (
        remove('predicates'),
        'predicates.txt: this file is missing, and train_triples.jsonl needs it',
    ),
    'truncated': (
        raw('features', lambda b: b[:-10]),
        r'train_ims.npy: is cut off: 502 of 512 bytes; copy',
    ),
    'header only': (raw('features', lambda b: b[:70]), 'train_ims.npy: not an .npy array'),
    'empty file': (raw('features', lambda b: b''), 'train_ims.npy: not an .npy array'),
    'a pickle': (
        raw('features', lambda b: b'\x80\x04K\x01.' + b),
        'train_ims.npy: not an .npy array',
    ),
    'objects': (
        lambda root: np.save(root / 'train_ims.npy', np.full((N, R, D), None, dtype=object)),
        'train_ims.npy: holds pickled Python objects, which are never loaded',
    ),
    'rank': (
        save('features', lambda a: a[:, 0]),
        r'train_ims.npy: has shape \(6, 8\); expected floating-point numbers of shape \(N, R, D\)',
    ),
    'whole numbers': (
        save('features', lambda a: a.astype(np.int32)),
        'train_ims.npy: has type int32; expected floating',
    ),
    'no images': (save('features', lambda a: a[:0]), 'train_ims.npy: is empty, with shape'),
    'labels shape': (
        save('labels', lambda a: a[:, :3]),
        r'train_labels.npy: has shape \(6, 3\); expected integers of shape \(N, 4\)',
    ),
    'labels type': (
        save('labels', lambda a: a * 0.5),
        'train_labels.npy: has type float64; expected integers',
    ),
    'boxes rows': (
        save('boxes', lambda a: a[:5]),
        r'train_boxes.npy: has shape \(5, 4, 4\); expected numbers of shape \(6, 4, 4\)',
    ),
    'sizes width': (save('sizes', lambda a: a[:, :1]), r'train_img_sizes.npy: has shape'),
    'caption missing': (
        text('captions', lambda x: x[1:]),
        'train_caps.txt: 29 captions do not divide by 6 images; find the missing or surplus line, or write .* train_cap_image.npy',
    ),
    'not utf-8': (
        raw('captions', lambda b: b.replace(b'dog number 1', b'caf\xe9 number 1', 1)),
        'train_caps.txt: line 6: byte 0xe9 is not UTF-8; save',
    ),
    'empty caption': (text('captions', line(7, '  ')), 'train_caps.txt: line 8 is empty'),
    'blank at the end': (
        text('captions', lambda x: x + ['']),
        'train_caps.txt: line 31 is empty; .* blank line at the end',
    ),
    'empty captions': (raw('captions', lambda b: b''), 'train_caps.txt: is empty'),
    'bytes literal': (
        text('captions', line(3, "b'a dog in the snow'")),
        "train_caps.txt: line 4 is a printed Python bytes object, b'a dog in the snow'...; decode",
    ),
    'bytes literal 2': (
        text('captions', line(29, 'B"a dog\'s hat"')),
        'train_caps.txt: line 30 is a printed Python bytes object',
    ),
    'ids number': (text('ids', lambda x: x[:-1]), 'train_ids.txt: 5 ids for 6 feature rows'),
    'ids twice': (
        text('ids', line(4, 'train1')),
        "train_ids.txt: line 5 repeats the id 'train1' of line 2",
    ),
    'ids empty': (text('ids', line(4, '')), 'train_ids.txt: line 5 is empty'),
    'map range': (
        lambda root: np.save(root / 'train_cap_image.npy', np.arange(30) % 7),
        'train_cap_image.npy: row 6: there is no image 6; expected 0 to 5',
    ),
    'map negative': (
        lambda root: np.save(root / 'train_cap_image.npy', np.arange(30) % 6 - 1),
        'train_cap_image.npy: row 0: there is no image -1',
    ),
    'map length': (
        lambda root: np.save(root / 'train_cap_image.npy', np.arange(6)),
        r'train_cap_image.npy: has shape \(6,\); expected integers of shape \(30\)',
    ),
    'silent image': (
        lambda root: np.save(root / 'train_cap_image.npy', np.arange(30) % 5),
        'train_cap_image.npy: image 5 has no caption',
    ),
    'triples lines': (
        text('triples', lambda x: x[:-1]),
        'train_triples.jsonl: 5 lines for 6 images',
    ),
    'phrases lines': (
        text('phrases', lambda x: x * 2),
        'train_phrases.jsonl: 12 lines for 6 images',
    ),
}
READING = {  # found when it is read, and by check
    'nan': (
        save('features', put((4, 2, 3), np.nan)),
        r'train_ims.npy: row 4 \(image train4\): region 2, dimension 3 is nan; features must be finite',
    ),
    'inf': (
        save('features', put((5, 0, 0), -np.inf)),
        r'train_ims.npy: row 5 \(image train5\): region 0, dimension 0 is -inf',
    ),
    'no region': (
        save('features', put(3, 0)),
        r'train_ims.npy: row 3 \(image train3\) is all zeros: it has no region',
    ),
    'inside out': (
        save('boxes', put((2, 1), (50, 10, 40, 60))),
        r'train_boxes.npy: row 2 \(image train2\), region 1: box \[50.0, 10.0, 40.0, 60.0\] is inside out',
    ),
    'outside': (
        save('boxes', put((2, 1), (50, 10, 101.5, 60))),
        r'train_boxes.npy: row 2 .* leaves its picture; expected x0 <= x1 <= 100, y0 <= y1 <= 101',
    ),
    'above the top': (
        save('boxes', put((0, 0), (5, -2, 10, 60))),
        'train_boxes.npy: row 0 .* leaves its picture',
    ),
    'box nan': (save('boxes', put((0, 0, 2), np.nan)), 'train_boxes.npy: row 0 .* is inside out'),
    'size zero': (
        save('sizes', put((1, 0), 0)),
        r'train_img_sizes.npy: row 1: width and height are \[0.0, 101.0\]',
    ),
    'class': (
        save('labels', put((1, 0), 3)),
        'train_labels.npy: row 1, region 0: there is no class 3; expected -1 to 2',
    ),
    'class -2': (
        save('labels', put((1, 0), -2)),
        'train_labels.npy: row 1, region 0: there is no class -2',
    ),
}
LINES = {  # found when the line is asked for, and by check
    'triples json': (
        text('triples', line(2, '[[0, 1, 2')),
        'train_triples.jsonl: line 3 is not JSON',
    ),
    'triples blank': (text('triples', line(2, '')), 'train_triples.jsonl: line 3 is not JSON'),
    'triples form': (
        text('triples', line(2, '[[0, 1, 2]]')),
        r'train_triples.jsonl: line 3: triple \[0, 1, 2\]; expected \[\[subject row',
    ),
    'triples row': (
        text('triples', line(2, '[[0, 1, 4, 0.5]]')),
        'train_triples.jsonl: line 3: triple .* points outside the regions; rows go from 0 to 3',
    ),
    'triples float row': (
        text('triples', line(2, '[[0.0, 1, 3, 0.5]]')),
        'train_triples.jsonl: line 3: triple .* points outside',
    ),
    'predicate': (
        text('triples', line(2, '[[0, 2, 1, 0.5]]')),
        'train_triples.jsonl: line 3: .* there is no predicate 2; predicates.txt has 2 lines',
    ),
    'predicate name': (
        text('triples', line(2, '[[0, "on", 1, 0.5]]')),
        'train_triples.jsonl: line 3: .* there is no predicate on',
    ),
    'confidence': (
        text('triples', line(2, '[[0, 1, 1, NaN]]')),
        'train_triples.jsonl: line 3: .* confidence nan',
    ),
    'triples no list': (
        text('triples', line(2, '{}')),
        r'train_triples.jsonl: line 3: \{\}; expected',
    ),
    'phrases form': (
        text('phrases', line(1, '[]')),
        r'train_phrases.jsonl: line 2: \[\]; expected \{"phrases"',
    ),
    'phrases captions': (
        phrase(phrases=[[]] * 4),
        'train_phrases.jsonl: line 2: spans for 4 captions, but the image has 5',
    ),
    'span': (
        phrase(phrases=[[], [], [[3, 10, 'x', 1]], [], []]),
        r'train_phrases.jsonl: line 2: span .* in caption line 8, which has 9 words',
    ),
    'span backwards': (
        phrase(phrases=[[[3, 3, 'x', 1]], [], [], [], []]),
        'train_phrases.jsonl: line 2: span .* expected 0 <= start < end',
    ),
    'span form': (
        phrase(phrases=[[[3, 4]], [], [], [], []]),
        r'train_phrases.jsonl: line 2: span \[3, 4\]; expected \[start, end, type, chain\]',
    ),
    'span no list': (phrase(phrases=[7, [], [], [], []]), 'train_phrases.jsonl: line 2: span 7'),
    'phrase box': (
        phrase(boxes={'3': [[5, 5, 4, 9]]}),
        'train_phrases.jsonl: line 2: boxes of chain 3',
    ),
    'phrase box text': (
        phrase(boxes={'3': [[5, None, 4, 9]]}),
        'train_phrases.jsonl: line 2: boxes of chain 3',
    ),
    'phrase box form': (phrase(boxes={'3': 7}), 'train_phrases.jsonl: line 2: boxes of chain 3: 7'),
    'probes json': (
        text('probes', line(1, '{"image": 0, "kind": "obj')),
        'train_probes.jsonl: line 2 is not JSON',
    ),
    'probes key': (probe(extra=1), 'train_probes.jsonl: line 2: .*; expected .*"image": row'),
    'probes lack': (
        text('probes', line(1, '{"image": 0}')),
        r'train_probes.jsonl: line 2: \{\'image\': 0\}; expected',
    ),
    'probes image': (
        probe(image=6),
        'train_probes.jsonl: line 2: there is no image 6; rows go from 0 to 5',
    ),
    'probes empty': (probe(false=' '), 'train_probes.jsonl: line 2: .*; expected'),
    'probes same': (
        probe(false='a dog'),
        'train_probes.jsonl: line 2: the true and the false sentence are the same',
    ),
}


def one_line(e, says):
    assert '\n' not in str(e) and re.search(says, str(e)), e
    # and how to mend it
    assert '; ' in str(e)


@pytest.mark.parametrize('case', OPENING)
def test_fault_on_opening(root, case):
    breaks, says = OPENING[case]
    breaks(root)
    with pytest.raises(DataError) as e:
        Split(root, 'train')
    one_line(e.value, says)
    assert any(re.search(says, str(p)) for p in check(root).problems)


@pytest.mark.parametrize('case', READING)
def test_fault_on_reading(root, case):
    breaks, says = READING[case]
    breaks(root)
    s = Split(root, 'train')
    with pytest.raises(DataError) as e:
        list(batches(s, Vocab.build(s.captions), size=4, seed=0, epoch=0))
    one_line(e.value, says)
    assert [bool(re.search(says, str(p))) for p in check(root).problems] == [True]


@pytest.mark.parametrize('case', LINES)
def test_fault_in_a_line(root, case):
    breaks, says = LINES[case]
    breaks(root)
    s = Split(root, 'train')
    key = says.split('.')[0].split('_')[1]
    with pytest.raises(DataError) as e:
        list(getattr(s, key))
    one_line(e.value, says)
    assert [bool(re.search(says, str(p))) for p in check(root).problems] == [True]


def test_widths_differ(root):
    tiny(root, 'dev', 3, d=7)
    with pytest.raises(DataError) as e:
        Split(root, 'dev')
    one_line(e.value, 'dev_ims.npy: features are 7 wide, but those of train_ims.npy 8; extract')


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match='there is no such folder'):
        Split(tmp_path / 'x', 'train')
    with pytest.raises(DataError, match='there is no such folder'):
        check(tmp_path / 'x')
    with pytest.raises(DataError, match='no split found'):
        check(tmp_path)


def test_copies_that_differ(root):
    x = np.load(root / 'train_ims.npy').repeat(5, 0)
    lines(root / 'train_ids.txt', [f'train{i // 5}' for i in range(5 * N)])
    x[12] += 1
    np.save(root / 'train_ims.npy', x)
    # the first and the last image are fine
    Split(root, 'train')
    assert 'rows 10 and 12 should be copies of image train2, but differ' in str(
        check(root).problems[0]
    )
    x[1] += 1
    np.save(root / 'train_ims.npy', x)
    with pytest.raises(DataError, match='rows 0 and 1 should be copies'):
        Split(root, 'train')


def test_undeclared_copies(tmp_path):
    tiny(tmp_path / 'set', n=30, per=1)
    x = np.load(tmp_path / 'set' / 'train_ims.npy')
    np.save(tmp_path / 'set' / 'train_ims.npy', x[:6].repeat(5, 0))
    report = check(tmp_path / 'set')
    assert 'seem to be the same as the one before' in str(report.problems[0])


def test_tolerance_of_boxes(root):
    save('boxes', put((2, 1), (50, -0.9, 100.9, 60)))(root)
    boxes = Split(root, 'train').regions(slice(None)).boxes
    assert boxes.min() >= 0 and boxes.max() <= 1 and check(root).ok


def test_check(root):
    report = check(root)
    assert (
        report.ok and list(report.table) == ['train', 'dev'] and 'no problems found' in str(report)
    )
    assert (
        report.table['train']['regions x width'] == '4 x 8'
        and report.table['dev']['triples an image'] == '1.3'
    )
    # "dev", one word of nine
    assert (
        report.table['train']['unknown words'] == '0.00 %'
        and report.table['dev']['unknown words'] == '11.11 %'
    )
    lines(root / 'dev_ids.txt', ['train1', 'x', 'y'])
    assert '1 ids of dev occur in train too, for example train1' in str(check(root))


def test_check_lists_all(root):
    for case in ('nan', 'inside out', 'class'):
        READING[case][0](root)
    for case in ('triples row', 'span', 'probes same'):
        LINES[case][0](root)
    (root / 'dev_caps.txt').write_bytes(b'\xff')
    report = check(root)
    assert len(report.problems) == 7 and not report.ok and str(report).count('train_') == 6
    assert 'no problems' not in str(report)


def test_check_tells_of_copies(root):
    "Features stored once a caption are read once, and the report says how much of the file is copies."
    assert 'are copies' not in str(check(root))
    rows = np.load(root / 'train_ims.npy')
    per = len(Split(root, 'train').captions) // Split(root, 'train').n_images
    assert per > 1
    np.save(root / 'train_ims.npy', rows.repeat(per, 0))
    report = check(root)
    assert (
        report.ok
        and report.table['train']['images'] == str(len(rows))
        and report.table['train']['stored as'].endswith(f'x{per}')
    )
    assert f'train_ims.npy stores each image {per} times' in str(report)


@pytest.mark.parametrize(
    'size, ok',
    [((20, 10), True), ((10, 5), True), ((41, 20), True), ((10, 20), False), ((15, 10), False)],
)
def test_check_compares_sizes_with_the_pictures(root, size, ok):
    "Another scale is fine, other proportions are not; pictures that are not there are not missed."
    Image = pytest.importorskip('PIL.Image')
    s = Split(root, 'train')
    sizes = np.array(s.sizes)
    sizes[1] = 40, 20
    np.save(root / 'train_img_sizes.npy', sizes)
    boxes = np.array(s.boxes)
    boxes[1] = [0, 0, 9, 9]
    np.save(root / 'train_boxes.npy', boxes)
    (root / 'pictures').mkdir(exist_ok=True)
    Image.new('RGB', size).save(root / 'pictures' / f'{s.ids[1]}.png')
    report = check(root)
    assert report.ok == ok
    if ok:
        assert report.table['train']['sizes fit'] == '1 pictures'
    else:
        one_line(
            report.problems[0],
            rf'train_img_sizes.npy: row 1 \(image {s.ids[1]}\): 40 x 20, but its picture is {size[0]} x {size[1]}; the proportions of 1 of 1 pictures differ',
        )


def test_check_in_pieces(root, monkeypatch):
    "However small the pieces, the report is the same."
    want = str(check(root))
    monkeypatch.setattr(
        data,
        'rows_in_chunks',
        lambda s: (np.arange(i, min(i + 2, s.n_images)) for i in range(0, s.n_images, 2)),
    )
    assert str(check(root)) == want
