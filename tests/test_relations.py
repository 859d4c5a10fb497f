"Readers of detectors' triples, and the relation prior: slow loops, invariances, faults."

import shutil
from collections import Counter
from itertools import permutations, product

import pytest
import torch
from safetensors.torch import save_file

from imtm_lite.data import Split
from imtm_lite.files import DataError, Mendable
from imtm_lite.regions import Regions
from imtm_lite.spatial import pairs, relation_labels
from imtm_lite.workshop.relations import (
    RelationPrior,
    Tally,
    detector_size,
    triples_from_detector,
    triples_from_names,
    write_triples,
)
from tests.test_semantic import CLASSES, SIZES, P, permuted, ragged, without_triples

NAMES = ['on', 'wearing', 'near']
TERMS = dict(classes=CLASSES, predicates=NAMES)


BBOX = [[0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30], [40, 40, 50, 50], [20, 1, 30, 10]]
OURS = [[0.0, 0, 0, 0], [0, 21, 10, 31], [1, 0, 11, 10], [20, 0, 30, 10], [26, 0, 36, 10]]


def detection(**change):
    made = dict(
        bbox=BBOX,
        rel_pairs=[[0, 1], [1, 2], [0, 3], [1, 4], [4, 2], [0, 2]],
        rel_labels=[1, 3, 2, 2, 3, 0],
        rel_scores=[0.9, 0.2, 0.8, 0.7, 0.1, 0.6],
    )
    return made | change


def test_triples_of_the_detectors_own_boxes():
    best = [[0, 0, 1, 0.9], [0, 1, 3, 0.8]]
    others = [[1, 1, 4, 0.7], [1, 2, 2, 0.2], [4, 2, 2, 0.1]]
    assert triples_from_detector(detection(), predicates=3) == best + others
    assert triples_from_detector(detection(), predicates=3, top=2) == best


def test_triples_of_our_boxes():
    lost = Counter()
    ours = dict(predicates=3, boxes=torch.tensor(OURS))
    want = [[2, 0, 3, 0.9], [3, 2, 1, 0.2]]
    assert triples_from_detector(detection(), **ours, lost=lost) == want
    assert lost == {'no region': 1, 'one region': 1, 'twice': 1, 'background': 1}
    real = ('bbox', 'rel_scores')
    tensors = {
        key: torch.tensor(value, dtype=torch.float64 if key in real else torch.long)
        for key, value in detection().items()
    }
    assert triples_from_detector(tensors, **ours) == want
    assert triples_from_detector(detection(), **ours, min_iou=0.99) == []


def test_nothing_to_carry_over():
    lost = Counter()
    none = dict(predicates=3, boxes=torch.zeros(0, 4), lost=lost)
    assert triples_from_detector(detection(), **none) == []
    assert lost == {'no region': 5, 'background': 1}
    empty = dict(bbox=[], rel_pairs=[], rel_labels=[], rel_scores=[])
    assert triples_from_detector(empty, predicates=3, boxes=torch.tensor(OURS)) == []
    assert triples_from_detector(empty, predicates=3) == []


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(rel_labels=[1]), '6 rel_pairs, 1 rel_labels and 6 rel_scores'),
        (dict(rel_labels=[1, 4, 1, 1, 1, 1]), r'rel_labels\[1\] is 4: expected 0'),
        (dict(rel_pairs=[[0, 1]] * 5 + [[0, 5]]), r'rel_pairs\[5\] is \[0, 5\]'),
        (dict(rel_pairs=[[-1, 1]] * 6), r'rel_pairs\[0\]'),
        (dict(rel_scores=[0.5] * 5 + [float('nan')]), r'rel_scores\[5\] is nan'),
        (dict(bbox=[[0, 0, 1]] * 5), r'bbox\[0\]'),
    ],
)
def test_faults_of_a_detection(change, message):
    with pytest.raises(Mendable, match=message) as fault:
        triples_from_detector(detection(**change), predicates=3, boxes=torch.zeros(2, 4))
    assert '\n' not in str(fault.value)


def test_a_detection_that_lacks_something():
    poor = detection()
    del poor['rel_scores']
    with pytest.raises(Mendable, match='without rel_scores'):
        triples_from_detector(poor, predicates=3)


@pytest.mark.parametrize(
    'size, want',
    [
        ((500, 375), (800, 600)),
        ((375, 500), (600, 800)),
        ((1000, 400), (1000, 400)),
        ((600, 600), (600, 600)),
        ((500, 100), (1000, 200)),
    ],
)
def test_detector_size(size, want):
    assert detector_size(*size) == want


def test_the_limits_of_a_detectors_size():
    for width, height in product(range(100, 1200, 37), range(100, 1200, 41)):
        w, h = detector_size(width, height)
        low, high = sorted((w, h))
        assert low <= 600
        assert high < 1000 + high / low
        assert low == 600 or high > 990
        assert abs(w / h - width / height) < 1.01 * (w / h) / low + 1e-9


def test_triples_from_names():
    rels = [['man:1', 'wearing', 'hat:0'], ['a:b:2', 'on', 'man:1']]
    triples = triples_from_names(['hat', 'man', 'a:b'], rels, NAMES)
    assert triples == [[1, 1, 0, 1.0], [2, 0, 1, 1.0]]


@pytest.mark.parametrize(
    'rel, message',
    [
        (['man:0', 'on', 'hat:0'], "region 0 is 'hat'"),
        (['man:7', 'on', 'hat:0'], 'row of 0 to 1'),
        (['man', 'on', 'hat:0'], 'names no region'),
        (['man:1', 'likes', 'hat:0'], "'likes' is not among the 3"),
        (['man:-1', 'on', 'hat:0'], 'names no region'),
        (['man:1', 'on'], 'expected'),
    ],
)
def test_faults_of_names(rel, message):
    with pytest.raises(Mendable, match=message) as fault:
        triples_from_names(['hat', 'man'], [['man:1', 'on', 'hat:0'], rel], NAMES)
    assert 'rels[1]' in str(fault.value)


def test_written_triples_are_read_and_a_fault_leaves_the_old_file(world, tmp_path):
    root = shutil.copytree(world, tmp_path / 'w')
    lines = [[[1, 2, 0, 0.25], [0, 12, 3, 1.0]] if k % 2 else [] for k in range(24)]
    path = root / 'dev_triples.jsonl'
    assert write_triples(path, iter(lines)) == 24
    assert list(Split(root, 'dev').triples) == lines
    with pytest.raises(DataError, match='dev_triples.jsonl: picture 1: triple'):
        write_triples(path, [[], [[1, 2, 3]]])
    assert list(Split(root, 'dev').triples) == lines
    assert not list(root.glob('*.partial'))


def seen_in(r):
    """What the prior should have seen, by loops.

    Class, arrangement, class and predicate of each triple; and class, arrangement, class and
    whether they are related of each pair.
    """
    triples = []
    related = []
    arrangement = relation_labels(r)
    for b in range(len(r)):
        rows = r.mask[b].nonzero().flatten().tolist()
        stated = {tuple(triple) for triple in r.triples[b].tolist()}
        for s, o in permutations(rows, 2):
            pair = (int(r.labels[b, s]), int(arrangement[b, s, o]), int(r.labels[b, o]))
            predicates = [p for p in range(P) if (s, p, o) in stated]
            triples += [(*pair, p) for p in predicates]
            related.append((*pair, bool(predicates)))
    return triples, related


def levels(seen, s, g, o):
    "What was seen at every level of backing off, the most general first."
    everything = [t[3] for t in seen]
    arrangement = [t[3] for t in seen if t[1] == g]
    subject = [t[3] for t in seen if t[:2] == (s, g)]
    object = [t[3] for t in seen if t[1:3] == (g, o)]
    classes = [t[3] for t in seen if (t[0], t[2]) == (s, o)]
    all_three = [t[3] for t in seen if t[:3] == (s, g, o)]
    levels = (everything, arrangement, subject + object, classes, all_three)
    return [Counter(level) for level in levels]


def predicate_by_loops(triples, s, g, o, strength):
    p = [1 / P] * P
    for n in levels(triples, s, g, o):
        k = strength * max(len(n), 1)
        p = [(n[x] + k * p[x]) / (n.total() + k) for x in range(P)]
    return p


def related_by_loops(related, s, g, o, strength):
    q = 0.0
    for n in levels(related, s, g, o):
        q = (n[True] + strength * q) / (n.total() + strength)
    return q


@pytest.mark.parametrize('seed, strength', [(0, 4.0), (1, 0.5), (2, 20.0)])
def test_prior_equals_loops(seed, strength):
    r = ragged(seed, B=12)
    prior = RelationPrior(**TERMS, strength=strength).count(r[:5]).count(r[5:])
    triples, related = seen_in(r)
    new = ragged(seed + 50)
    arrangement = relation_labels(new)
    context = prior.context(new)
    for b, i, j in pairs(new.mask).nonzero().tolist():
        pair = (int(new.labels[b, i]), int(arrangement[b, i, j]), int(new.labels[b, j]))
        asked = context[b, i, j][None]
        want = related_by_loops(related, *pair, strength)
        assert prior.related(asked).item() == pytest.approx(want, abs=1e-12)
        want = predicate_by_loops(triples, *pair, strength)
        assert prior.predicate(asked)[0].tolist() == pytest.approx(want, abs=1e-12)


def test_many_contexts_are_asked_at_once():
    prior = RelationPrior(**TERMS).count(ragged(0, B=12))
    new = ragged(50)
    context = prior.context(new)[pairs(new.mask)]
    together = prior.predicate(context)
    for k, one in enumerate(context.split(1)):
        assert torch.equal(prior.predicate(one)[0], together[k])
        assert torch.equal(prior.related(one)[0], prior.related(context)[k])


@pytest.fixture
def taught():
    "A prior, the pictures that it has seen, and all its guesses about them."
    r = ragged(3, B=8)
    prior = RelationPrior(**TERMS).count(r)
    return prior, r, prior.triples(r, threshold=0.0, top=100)


def test_the_prior_guesses_a_triple_for_every_pair(taught):
    prior, r, everything = taught
    contexts = prior.context(r)
    for context, exists, line in zip(contexts, r.mask, everything):
        n = int(exists.sum())
        assert len(line) == len({(s, o) for s, _, o, _ in line}) == n * (n - 1)
        confidences = [c for *_, c in line]
        assert confidences == sorted(confidences, reverse=True)
        for s, p, o, c in line:
            assert exists[s] and exists[o]
            asked = context[s, o][None]
            both = prior.related(asked) * prior.predicate(asked)[0]
            assert p == both.argmax()
            assert c == pytest.approx(both.max().item(), abs=6e-5)


def test_a_threshold_and_a_number_of_guesses(taught):
    prior, r, everything = taught
    few = prior.triples(r, threshold=0.2, top=3)
    assert any(few)
    assert few == [[t for t in line if t[3] >= 0.2][:3] for line in everything]
    # nothing counted, nothing guessed
    assert RelationPrior(**TERMS).triples(r) == [[]] * 8


def test_guesses_move_with_the_regions(taught):
    prior, r, everything = taught
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = prior.triples(permuted(r, order), threshold=0.0, top=100)
    for line, there in zip(moved, everything):
        back = {(int(order[s]), p, int(order[o]), c) for s, p, o, c in line}
        assert back == {tuple(triple) for triple in there}


@pytest.mark.parametrize('B, R, E', SIZES)
def test_nothing_to_count(B, R, E):
    r = without_triples(B, R, E)
    prior = RelationPrior(**TERMS)
    assert prior.context(r).shape == (B, R, R)
    assert prior.triples(r) == [[]] * B
    if R or not E:
        assert prior.count(r).triples(r) == [[]] * B


def fitted(split, **how):
    return RelationPrior(classes=split.classes, predicates=split.predicates).fit(split, **how)


def test_a_split_is_counted_in_pieces_of_any_size(world):
    train = Split(world, 'train')
    small = fitted(train, size=7).tally
    large = fitted(train).tally
    assert torch.equal(small.keys, large.keys)
    assert torch.equal(small.counts, large.counts)


def test_prior_beats_the_most_frequent_predicate(world):
    train = Split(world, 'train')
    prior = fitted(train)
    r = Split(world, 'dev').regions(range(24))
    b, e = (r.triples[..., 0] >= 0).nonzero().T
    s, p, o = r.triples[b, e].T
    often = train.regions(range(train.n_images)).triples[..., 1]
    often = often[often >= 0].bincount().argmax()
    right = prior.predicate(prior.context(r)[b, s, o]).argmax(1) == p
    assert right.double().mean() > (p == often).double().mean() + 0.2
    assert right[p < 4].double().mean() > 0.6


def test_a_tally():
    nothing = torch.zeros(0, dtype=torch.long)
    tally = Tally(nothing, nothing)
    assert tally.look_up(torch.tensor([[3, 5]])).tolist() == [[0, 0]]
    tally = tally.plus(torch.tensor([5, 3, 5])).plus(torch.tensor([9, 3]))
    assert tally.keys.tolist() == [3, 5, 9]
    assert tally.counts.tolist() == [2, 2, 1]
    assert tally.look_up(torch.tensor([2, 3, 5, 10])).tolist() == [0, 2, 2, 0]


def test_prior_is_stored(tmp_path):
    r = ragged(4)
    path = tmp_path / 'prior.safetensors'
    prior = RelationPrior(**TERMS, strength=2.0).count(r)
    prior.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = RelationPrior.load(path)
    assert loaded.classes == CLASSES
    assert loaded.predicates == NAMES
    assert loaded.strength == 2.0
    assert loaded.triples(r) == prior.triples(r)
    # counting goes on after asking
    twice = RelationPrior(**TERMS, strength=2.0).count(r).count(r)
    assert loaded.count(r).triples(r) == twice.triples(r) != prior.triples(r)


def test_what_is_no_prior_is_refused(tmp_path):
    path = tmp_path / 'prior.safetensors'
    with pytest.raises(DataError, match='no relation prior there'):
        RelationPrior.load(path)
    for write in (
        lambda: path.write_bytes(b'nothing'),
        lambda: save_file({'a': torch.ones(1)}, path),
        lambda: save_file({'a': torch.ones(1)}, path, metadata=dict(prior='{}')),
    ):
        write()
        with pytest.raises(Mendable, match='not a relation prior') as fault:
            RelationPrior.load(path)
        assert '\n' not in str(fault.value)


def test_bad_arguments_of_a_prior(world):
    r = ragged(4)
    prior = RelationPrior(**TERMS)
    with pytest.raises(ValueError, match='at least one predicate'):
        RelationPrior(classes=CLASSES, predicates=[])
    with pytest.raises(ValueError, match='above 0'):
        RelationPrior(**TERMS, strength=0)
    with pytest.raises(DataError, match='differs from the classes'):
        prior.fit(Split(world, 'train'))
    with pytest.raises(ValueError, match='expected -1 to 3'):
        prior.count(Regions(**dict(r.items()) | dict(labels=r.labels + 4)))
    with pytest.raises(ValueError, match='labels'):
        prior.triples(Regions(**{k: t for k, t in r.items() if k != 'labels'}))
