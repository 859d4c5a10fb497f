"Semantic graphs, broken graphs, readers of detectors' triples, the relation prior: slow loops, invariances, faults."

import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from imtm_lite.data import Split
from imtm_lite.regions import Regions
from imtm_lite.semantic import corrupt_triples, semantic_graph
from imtm_lite.spatial import relation_labels
from imtm_lite.workshop.relations import (
    RelationPrior,
    detector_size,
    triples_from_detector,
    triples_from_names,
    write_triples,
)

P = 3
CLASSES = ['man', 'hat', 'dog', 'cup']
NAMES = ['on', 'wearing', 'near']


def ragged(seed, B=4, R=7, E=25):
    "Unequal numbers of regions and triples; self-loops, repeated triples, rows that are padding, two predicates a pair, unlabelled regions."
    g = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(high, shape, generator=g)
    mask = torch.arange(R) < draw(R, B, 1) + 1
    mask[0] = True
    triples = torch.stack([draw(R, B, E), draw(P, B, E), draw(R, B, E)], -1)
    triples[:, 1] = triples[:, 0]
    triples[torch.arange(E) >= draw(E + 1, B, 1)] = -1
    confidence = torch.rand(B, E, generator=g, dtype=torch.float64) * (triples[..., 0] >= 0)
    corners = torch.rand(B, R, 2, 2, generator=g, dtype=torch.float64).sort(2).values
    return Regions(
        features=torch.randn(B, R, 5, generator=g, dtype=torch.float64),
        mask=mask,
        boxes=corners.flatten(2),
        sizes=torch.tensor([[640.0, 480.0]] * B),
        labels=draw(len(CLASSES) + 1, B, R) - 1,
        triples=triples,
        confidence=confidence,
    )


def graph_loops(r, threshold=0.0, weighted=True):
    B, R = r.mask.shape
    graph = torch.zeros(B, R, R, 2 * P, dtype=torch.float64)
    for b in range(B):
        for (s, p, o), c in zip(r.triples[b].tolist(), r.confidence[b].tolist()):
            if p < 0 or s == o or not r.mask[b, s] or not r.mask[b, o] or c < threshold:
                continue
            for i, j, k in ((s, o, p), (o, s, P + p)):
                graph[b, i, j, k] = max(graph[b, i, j, k].item(), c if weighted else 1.0)
    return graph


def permuted(r, order):
    "The same pictures with their regions in another order: new row k is old row order[k]."
    new = order.argsort()
    moved = {name: getattr(r, name)[:, order] for name in ('features', 'mask', 'boxes', 'labels')}
    s, p, o = r.triples.unbind(-1)
    rename = lambda rows: torch.where(rows < 0, rows, new[rows.clamp(min=0)])
    return Regions(
        **dict(r.items()) | moved | dict(triples=torch.stack([rename(s), p, rename(o)], -1))
    )


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('threshold', [0.0, 0.4, 1.0])
@pytest.mark.parametrize('weighted', [True, False])
def test_graph_equals_loops(seed, threshold, weighted):
    r = ragged(seed)
    assert torch.equal(
        semantic_graph(r, predicates=P, threshold=threshold, weighted=weighted),
        graph_loops(r, threshold, weighted),
    )


def one(*triples, confidence=None, R=4, real=4):
    return Regions(
        features=torch.ones(1, R, 2, dtype=torch.float64),
        mask=torch.arange(R)[None] < real,
        triples=torch.tensor([triples], dtype=torch.long).view(1, -1, 3),
        confidence=torch.tensor([confidence or [0.5] * len(triples)], dtype=torch.float64),
    )


def test_stated_treatment():
    graph = lambda r, **kw: {
        tuple(at): round(semantic_graph(r, predicates=P, **kw)[tuple(at)].item(), 3)
        for at in semantic_graph(r, predicates=P, **kw).nonzero().tolist()
    }
    assert graph(one([0, 1, 2])) == {(0, 0, 2, 1): 0.5, (0, 2, 0, P + 1): 0.5}
    # self-loops
    assert graph(one([1, 1, 1], [0, 0, 0])) == {}
    # padding rows
    assert graph(one([0, 1, 3], [3, 1, 0], real=3)) == {}
    # no triples
    assert graph(one([-1, -1, -1])) == {} and graph(one()) == {}
    twice = {(0, 0, 2, 1): 0.8, (0, 2, 0, P + 1): 0.8}
    for c in ([0.3, 0.8], [0.8, 0.3]):
        assert graph(one([0, 1, 2], [0, 1, 2], confidence=c)) == twice
    assert set(graph(one([0, 1, 2], [0, 2, 2]))) == {
        (0, 0, 2, 1),
        (0, 2, 0, P + 1),
        (0, 0, 2, 2),
        (0, 2, 0, P + 2),
    }
    assert graph(one([0, 1, 2], confidence=[0.3]), threshold=0.3, weighted=False) == {
        (0, 0, 2, 1): 1.0,
        (0, 2, 0, P + 1): 1.0,
    }
    assert graph(one([0, 1, 2], confidence=[0.3]), threshold=0.31) == {}


@pytest.mark.parametrize('seed', range(5))
def test_graph_ignores_order_and_padding_and_permutes_with_regions(seed):
    r = ragged(seed)
    g = torch.Generator().manual_seed(seed)
    graph = semantic_graph(r, predicates=P)
    e = torch.randperm(25, generator=g)
    order = torch.randperm(7, generator=g)
    shuffled = Regions(
        **dict(r.items()) | dict(triples=r.triples[:, e], confidence=r.confidence[:, e])
    )
    assert torch.equal(semantic_graph(shuffled, predicates=P), graph)
    assert torch.equal(
        semantic_graph(permuted(r, order), predicates=P), graph[:, order][:, :, order]
    )
    # more regions, more triples: padding
    wide = Regions.cat([r, ragged(seed + 100, B=2, R=9, E=30)])
    assert torch.equal(semantic_graph(wide, predicates=P)[:4, :7, :7], graph)
    assert not semantic_graph(wide, predicates=P)[:4, 7:].any()
    assert torch.equal(semantic_graph(r[2:], predicates=P), graph[2:])
    assert semantic_graph(r.to(torch.bfloat16), predicates=P).dtype == torch.bfloat16


@pytest.mark.parametrize(
    'triple, said',
    [
        ([4, 0, 1], r'\[4, 0, 1\]'),
        ([0, 0, 4], 'rows of 0 to 3'),
        ([0, P, 1], 'predicate of 0 to 2'),
        ([0, -1, 1], 'triple 1'),
        ([-1, 0, 1], 'triple 1'),
        ([0, 0, -2], 'triple 1'),
    ],
)
def test_numbers_out_of_range(triple, said):
    r = one([0, 1, 2], triple)
    for f in (
        lambda: semantic_graph(r, predicates=P),
        lambda: corrupt_triples(r, rate=0, predicates=P, generator=torch.Generator()),
    ):
        with pytest.raises(ValueError, match=said) as fault:
            f()
        assert '\n' not in str(fault.value)


@pytest.mark.parametrize('B, R, E', [(0, 7, 25), (0, 0, 0), (3, 0, 0), (3, 7, 0), (3, 0, 4)])
def test_nothing_to_do(B, R, E):
    r = Regions(
        features=torch.ones(B, R, 5),
        mask=torch.ones(B, R, dtype=torch.bool),
        boxes=torch.rand(B, R, 4),
        sizes=torch.full((B, 2), 100.0),
        labels=torch.zeros(B, R, dtype=torch.long),
        triples=torch.full((B, E, 3), -1),
        confidence=torch.zeros(B, E),
    )
    broken = corrupt_triples(r, rate=1.0, predicates=P, generator=torch.Generator())
    prior = RelationPrior(classes=CLASSES, predicates=NAMES)
    assert (
        torch.equal(broken.triples, r.triples)
        and prior.context(r).shape == (B, R, R)
        and prior.triples(r) == [[]] * B
    )
    if R or not E:
        assert (
            semantic_graph(r, predicates=P).shape == (B, R, R, 2 * P)
            and not semantic_graph(r, predicates=P).any()
        )
        assert prior.count(r).triples(r) == [[]] * B


def test_bad_arguments():
    r = one([0, 1, 2])
    with pytest.raises(ValueError, match='triples and confidence'):
        semantic_graph(Regions(features=r.features), predicates=P)
    with pytest.raises(ValueError, match='at least 1'):
        semantic_graph(r, predicates=0)
    for t in (-0.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='0 to 1'):
            semantic_graph(r, predicates=P, threshold=t)
        with pytest.raises(ValueError, match='0 to 1'):
            corrupt_triples(r, rate=t, predicates=P, generator=torch.Generator())
    with pytest.raises(ValueError, match='at least 2'):
        corrupt_triples(r, rate=0.5, predicates=1, generator=torch.Generator())


@pytest.mark.parametrize('seed', range(5))
def test_corruption(seed):
    r = ragged(seed, B=40)
    broken = {
        rate: corrupt_triples(
            r, rate=rate, predicates=P, generator=torch.Generator().manual_seed(seed)
        )
        for rate in (0.0, 0.2, 0.6, 1.0)
    }
    real = r.triples[..., 0] >= 0
    hit = {rate: (b.triples != r.triples).any(-1) for rate, b in broken.items()}
    for rate, b in broken.items():
        for name, t in r.items():
            assert name == 'triples' or torch.equal(getattr(b, name), t)
        assert torch.equal(b.triples[..., 0], r.triples[..., 0]) and not hit[rate][~real].any()
        assert (
            abs(hit[rate][real].double().mean() - rate)
            < 4 * (rate * (1 - rate) / real.sum()) ** 0.5 + 1e-9
        )
    assert not (hit[0.2] & ~hit[0.6]).any() and torch.equal(
        broken[1.0].triples[hit[0.2]], broken[0.2].triples[hit[0.2]]
    )
    again = corrupt_triples(
        r, rate=0.6, predicates=P, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(again.triples, broken[0.6].triples)
    for b, e in real.nonzero().tolist():
        (s, p, o), (_, q, to) = r.triples[b, e].tolist(), broken[1.0].triples[b, e].tolist()
        others = [x for x in range(7) if r.mask[b, x] and x not in (s, o)]
        assert q != p and 0 <= q < P and (to in others if others else to == o)


def test_corruption_reaches_every_predicate_and_object():
    r = Regions(
        features=torch.ones(1, 6, 2),
        mask=torch.arange(6)[None] < 5,
        triples=torch.tensor([[[0, 1, 2]] * 2000]),
        confidence=torch.ones(1, 2000),
    )
    _, q, to = (
        corrupt_triples(r, rate=1.0, predicates=4, generator=torch.Generator().manual_seed(0))
        .triples[0]
        .T
    )
    assert all(abs((q == k).sum() - 2000 / 3) < 100 for k in (0, 2, 3)) and all(
        abs((to == k).sum() - 2000 / 3) < 100 for k in (1, 3, 4)
    )


def detection(**change):
    return (
        dict(
            bbox=[
                [0, 0, 10, 10],
                [20, 0, 30, 10],
                [0, 20, 10, 30],
                [40, 40, 50, 50],
                [20, 1, 30, 10],
            ],
            rel_pairs=[[0, 1], [1, 2], [0, 3], [1, 4], [4, 2], [0, 2]],
            rel_labels=[1, 3, 2, 2, 3, 0],
            rel_scores=[0.9, 0.2, 0.8, 0.7, 0.1, 0.6],
        )
        | change
    )


def test_triples_from_detector():
    found = detection()
    assert triples_from_detector(found, predicates=3) == [
        [0, 0, 1, 0.9],
        [0, 1, 3, 0.8],
        [1, 1, 4, 0.7],
        [1, 2, 2, 0.2],
        [4, 2, 2, 0.1],
    ]
    assert triples_from_detector(found, predicates=3, top=2) == [[0, 0, 1, 0.9], [0, 1, 3, 0.8]]
    boxes = torch.tensor(
        [[0.0, 0, 0, 0], [0, 21, 10, 31], [1, 0, 11, 10], [20, 0, 30, 10], [26, 0, 36, 10]]
    )
    lost = Counter()
    assert triples_from_detector(found, predicates=3, boxes=boxes, lost=lost) == [
        [2, 0, 3, 0.9],
        [3, 2, 1, 0.2],
    ]
    assert lost == {'no region': 1, 'one region': 1, 'twice': 1, 'background': 1}
    tensors = {
        key: torch.tensor(
            value, dtype=torch.float64 if key in ('bbox', 'rel_scores') else torch.long
        )
        for key, value in found.items()
    }
    assert triples_from_detector(tensors, predicates=3, boxes=boxes) == [
        [2, 0, 3, 0.9],
        [3, 2, 1, 0.2],
    ]
    assert triples_from_detector(found, predicates=3, boxes=boxes, min_iou=0.99) == []
    empty = dict(bbox=[], rel_pairs=[], rel_labels=[], rel_scores=[])
    lost = Counter()
    # no regions of ours
    assert triples_from_detector(
        found, predicates=3, boxes=torch.zeros(0, 4), lost=lost
    ) == [] and lost == {'no region': 5, 'background': 1}
    assert (
        triples_from_detector(empty, predicates=3, boxes=boxes)
        == triples_from_detector(empty, predicates=3)
        == []
    )


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(rel_labels=[1]), '6 rel_pairs, 1 rel_labels and 6 rel_scores'),
        (dict(rel_labels=[1, 4, 1, 1, 1, 1]), r'rel_labels\[1\] is 4: expected 0'),
        (dict(rel_pairs=[[0, 1]] * 5 + [[0, 5]]), r'rel_pairs\[5\] is \[0, 5\]'),
        (dict(rel_pairs=[[-1, 1]] * 6), r'rel_pairs\[0\]'),
        (dict(rel_scores=[0.5] * 5 + [float('nan')]), r'rel_scores\[5\] is nan'),
        (dict(bbox=[[0, 0, 1]] * 5), r'bbox\[0\]'),
    ],
)
def test_faults_of_a_detection(change, said):
    with pytest.raises(ValueError, match=said) as fault:
        triples_from_detector(detection(**change), predicates=3, boxes=torch.zeros(2, 4))
    assert '\n' not in str(fault.value)


def test_a_detection_that_lacks_something():
    found = detection()
    del found['rel_scores']
    with pytest.raises(ValueError, match='without rel_scores'):
        triples_from_detector(found, predicates=3)


def test_detector_size():
    assert [
        detector_size(*size)
        for size in ((500, 375), (375, 500), (1000, 400), (600, 600), (500, 100))
    ] == [(800, 600), (600, 800), (1000, 400), (600, 600), (1000, 200)]
    for width in range(100, 1200, 37):
        for height in range(100, 1200, 41):
            w, h = detector_size(width, height)
            assert (
                min(w, h) <= 600
                and max(w, h) < 1000 + max(w, h) / min(w, h)
                and (min(w, h) == 600 or max(w, h) > 990)
            )
            assert abs(w / h - width / height) < 1.01 * (w / h) / min(w, h) + 1e-9


def test_triples_from_names():
    assert triples_from_names(
        ['hat', 'man', 'a:b'], [['man:1', 'wearing', 'hat:0'], ['a:b:2', 'on', 'man:1']], NAMES
    ) == [[1, 1, 0, 1.0], [2, 0, 1, 1.0]]
    for rel, said in (
        (['man:0', 'on', 'hat:0'], "region 0 is 'hat'"),
        (['man:7', 'on', 'hat:0'], 'row of 0 to 1'),
        (['man', 'on', 'hat:0'], 'names no region'),
        (['man:1', 'likes', 'hat:0'], "'likes' is not among the 3"),
        (['man:-1', 'on', 'hat:0'], 'names no region'),
        (['man:1', 'on'], 'expected'),
    ):
        with pytest.raises(ValueError, match=said):
            triples_from_names(['hat', 'man'], [['man:1', 'on', 'hat:0'], rel], NAMES)


def test_written_triples_are_read_and_a_fault_leaves_the_old_file(world, tmp_path):
    root = shutil.copytree(world, tmp_path / 'w')
    lines = [[[1, 2, 0, 0.25], [0, 12, 3, 1.0]] if k % 2 else [] for k in range(24)]
    path = root / 'dev_triples.jsonl'
    assert write_triples(path, iter(lines)) == 24
    assert list(Split(root, 'dev').triples) == lines
    with pytest.raises(ValueError, match='picture 1: triple'):
        write_triples(path, [[], [[1, 2, 3]]])
    assert list(Split(root, 'dev').triples) == lines and not list(root.glob('*.partial'))


def counted(r):
    "What the prior should have seen: class, arrangement, class and predicate of each triple; class, arrangement, class and relatedness of each pair."
    triples = []
    pairs = []
    g = relation_labels(r)
    for b in range(len(r)):
        edges = {
            (s, p, o)
            for s, p, o in r.triples[b].tolist()
            if p >= 0 and s != o and r.mask[b, s] and r.mask[b, o]
        }
        key = lambda s, o: (int(r.labels[b, s]), int(g[b, s, o]), int(r.labels[b, o]))
        triples += [(*key(s, o), p) for s, p, o in edges]
        rows = r.mask[b].nonzero().flatten().tolist()
        pairs += [
            (*key(s, o), any((s, p, o) in edges for p in range(P)))
            for s in rows
            for o in rows
            if s != o
        ]
    return triples, pairs


def levels(s, g, o):
    return (
        [lambda t: True],
        [lambda t: t[1] == g],
        [lambda t: t[:2] == (s, g), lambda t: t[1:3] == (g, o)],
        [lambda t: (t[0], t[2]) == (s, o)],
        [lambda t: t[:3] == (s, g, o)],
    )


@pytest.mark.parametrize('seed, strength', [(0, 4.0), (1, 0.5), (2, 20.0)])
def test_prior_equals_loops(seed, strength):
    r = ragged(seed, B=12)
    prior = (
        RelationPrior(classes=CLASSES, predicates=NAMES, strength=strength)
        .count(r[:5])
        .count(r[5:])
    )
    triples, pairs = counted(r)
    new = ragged(seed + 50)
    at = new.mask[:, :, None] & new.mask[:, None] & ~torch.eye(7, dtype=torch.bool)
    context = prior.context(new)[at]
    g = relation_labels(new)
    for (b, i, j), q, p in zip(
        at.nonzero().tolist(), prior.related(context).tolist(), prior.predicate(context).tolist()
    ):
        want_p = [1 / P] * P
        want_q = 0.0
        for level in levels(int(new.labels[b, i]), int(g[b, i, j]), int(new.labels[b, j])):
            n = Counter(t[3] for fits in level for t in triples if fits(t))
            k = strength * max(len(n), 1)
            want_p = [(n[x] + k * want_p[x]) / (n.total() + k) for x in range(P)]
            m = Counter(t[3] for fits in level for t in pairs if fits(t))
            want_q = (m[True] + strength * want_q) / (m.total() + strength)
        assert q == pytest.approx(want_q, abs=1e-12) and p == pytest.approx(want_p, abs=1e-12)


def test_triples_of_the_prior():
    r = ragged(3, B=8)
    prior = RelationPrior(classes=CLASSES, predicates=NAMES).count(r)
    everything = prior.triples(r, threshold=0.0, top=100)
    for b, line in enumerate(everything):
        n = int(r.mask[b].sum())
        assert len(line) == n * (n - 1) == len({(s, o) for s, _, o, _ in line}) and all(
            r.mask[b, s] and r.mask[b, o] for s, _, o, _ in line
        )
        assert [c for *_, c in line] == sorted((c for *_, c in line), reverse=True)
        context = prior.context(r)[b]
        for s, p, o, c in line:
            both = prior.related(context[s, o][None]) * prior.predicate(context[s, o][None])[0]
            assert p == both.argmax() and c == pytest.approx(both.max().item(), abs=6e-5)
    few = prior.triples(r, threshold=0.2, top=3)
    assert any(few) and few == [[t for t in line if t[3] >= 0.2][:3] for line in everything]
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = prior.triples(permuted(r, order), threshold=0.0, top=100)
    assert [{(int(order[s]), p, int(order[o]), c) for s, p, o, c in line} for line in moved] == [
        {tuple(t) for t in line} for line in everything
    ]
    # nothing counted, nothing guessed
    assert RelationPrior(classes=CLASSES, predicates=NAMES).triples(r) == [[]] * 8


def test_prior_beats_the_most_frequent_predicate(world):
    train = Split(world, 'train')
    dev = Split(world, 'dev')
    prior = RelationPrior(classes=train.classes, predicates=train.predicates).fit(train, size=7)
    r = dev.regions(range(24))
    assert torch.equal(
        prior.keys,
        RelationPrior(classes=train.classes, predicates=train.predicates).fit(train).keys,
    )
    b, e = (r.triples[..., 0] >= 0).nonzero().T
    s, p, o = r.triples[b, e].T
    often = torch.tensor([t[1] for line in train.triples for t in line]).bincount().argmax()
    right = prior.predicate(prior.context(r)[b, s, o]).argmax(1) == p
    assert (
        right.double().mean() > (p == often).double().mean() + 0.2
        and right[p < 4].double().mean() > 0.6
    )


def test_prior_is_stored_and_checked(world, tmp_path):
    r = ragged(4)
    path = tmp_path / 'prior.safetensors'
    prior = RelationPrior(classes=CLASSES, predicates=NAMES, strength=2.0).count(r)
    prior.save(path)
    loaded = RelationPrior.load(path)
    assert (loaded.classes, loaded.predicates, loaded.strength) == (
        CLASSES,
        NAMES,
        2.0,
    ) and loaded.triples(r) == prior.triples(r)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    twice = RelationPrior(classes=CLASSES, predicates=NAMES, strength=2.0).count(r).count(r)
    # counting goes on after asking
    assert loaded.count(r).triples(r) == twice.triples(r) != prior.triples(r)
    with pytest.raises(FileNotFoundError, match='no relation prior there'):
        RelationPrior.load(tmp_path / 'none')
    for write in (
        lambda: path.write_bytes(b'nothing'),
        lambda: save_file({'a': torch.ones(1)}, path),
    ):
        write()
        with pytest.raises(ValueError, match='not a relation prior') as fault:
            RelationPrior.load(path)
        assert '\n' not in str(fault.value)
    with pytest.raises(ValueError, match='at least one predicate'):
        RelationPrior(classes=CLASSES, predicates=[])
    with pytest.raises(ValueError, match='above 0'):
        RelationPrior(classes=CLASSES, predicates=NAMES, strength=0)
    with pytest.raises(ValueError, match='differs from the classes'):
        prior.fit(Split(world, 'train'))
    with pytest.raises(ValueError, match='expected -1 to 3'):
        prior.count(Regions(**dict(r.items()) | dict(labels=r.labels + 4)))
    with pytest.raises(ValueError, match='labels'):
        prior.triples(Regions(**{k: t for k, t in r.items() if k != 'labels'}))
