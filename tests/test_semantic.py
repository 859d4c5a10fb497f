"Semantic graphs and broken graphs: slow loops, invariances, faults."

import pytest
import torch

from imtm_lite.regions import Regions
from imtm_lite.semantic import corrupt_triples, semantic_graph

P = 3
CLASSES = ['man', 'hat', 'dog', 'cup']


def ragged(seed, B=4, R=7, E=25):
    """Unequal numbers of regions and triples.

    With self-loops, repeated triples, rows that are padding, two predicates a pair, unlabelled
    regions.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=g)

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
            if p < 0 or s == o or c < threshold:
                continue
            if not (r.mask[b, s] and r.mask[b, o]):
                continue
            weight = c if weighted else 1.0
            for i, j, k in ((s, o, p), (o, s, P + p)):
                graph[b, i, j, k] = max(graph[b, i, j, k].item(), weight)
    return graph


def permuted(r, order):
    "The same pictures with their regions in another order: new row k is old row order[k]."
    new = order.argsort()
    moved = {name: getattr(r, name)[:, order] for name in ('features', 'mask', 'boxes', 'labels')}

    def rename(rows):
        return torch.where(rows < 0, rows, new[rows.clamp(min=0)])

    s, p, o = r.triples.unbind(-1)
    moved['triples'] = torch.stack([rename(s), p, rename(o)], -1)
    return Regions(**dict(r.items()) | moved)


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('threshold', [0.0, 0.4, 1.0])
@pytest.mark.parametrize('weighted', [True, False])
def test_graph_equals_loops(seed, threshold, weighted):
    r = ragged(seed)
    graph = semantic_graph(r, predicates=P, threshold=threshold, weighted=weighted)
    assert torch.equal(graph, graph_loops(r, threshold, weighted))


def one(*triples, confidence=None, R=4, real=4):
    return Regions(
        features=torch.ones(1, R, 2, dtype=torch.float64),
        mask=torch.arange(R)[None] < real,
        triples=torch.tensor([triples], dtype=torch.long).view(1, -1, 3),
        confidence=torch.tensor([confidence or [0.5] * len(triples)], dtype=torch.float64),
    )


def cells(r, **how):
    "What is not zero in a graph: (picture, i, j, channel) -> weight."
    graph = semantic_graph(r, predicates=P, **how)
    return {
        tuple(place): round(graph[tuple(place)].item(), 3) for place in graph.nonzero().tolist()
    }


def test_a_triple_and_its_reverse():
    assert cells(one([0, 1, 2])) == {(0, 0, 2, 1): 0.5, (0, 2, 0, P + 1): 0.5}


def test_what_makes_no_edge():
    self_loops = one([1, 1, 1], [0, 0, 0])
    padding_rows = one([0, 1, 3], [3, 1, 0], real=3)
    for nothing in (self_loops, padding_rows, one([-1, -1, -1]), one()):
        assert cells(nothing) == {}


@pytest.mark.parametrize('confidence', [[0.3, 0.8], [0.8, 0.3]])
def test_said_twice_counts_once_with_the_larger_confidence(confidence):
    twice = one([0, 1, 2], [0, 1, 2], confidence=confidence)
    assert cells(twice) == {(0, 0, 2, 1): 0.8, (0, 2, 0, P + 1): 0.8}


def test_two_predicates_of_a_pair_both_count():
    first = {(0, 0, 2, 1), (0, 2, 0, P + 1)}
    second = {(0, 0, 2, 2), (0, 2, 0, P + 2)}
    assert set(cells(one([0, 1, 2], [0, 2, 2]))) == first | second


def test_a_threshold_is_inclusive():
    r = one([0, 1, 2], confidence=[0.3])
    yes = {(0, 0, 2, 1): 1.0, (0, 2, 0, P + 1): 1.0}
    assert cells(r, threshold=0.3, weighted=False) == yes
    assert cells(r, threshold=0.31) == {}


@pytest.mark.parametrize('seed', range(5))
def test_graph_ignores_the_order_of_triples_and_permutes_with_regions(seed):
    r = ragged(seed)
    g = torch.Generator().manual_seed(seed)
    graph = semantic_graph(r, predicates=P)
    e = torch.randperm(25, generator=g)
    order = torch.randperm(7, generator=g)
    shuffled = dict(triples=r.triples[:, e], confidence=r.confidence[:, e])
    shuffled = Regions(**dict(r.items()) | shuffled)
    assert torch.equal(semantic_graph(shuffled, predicates=P), graph)
    mixed = semantic_graph(permuted(r, order), predicates=P)
    assert torch.equal(mixed, graph[:, order][:, :, order])


@pytest.mark.parametrize('seed', range(5))
def test_padding_changes_nothing(seed):
    r = ragged(seed)
    graph = semantic_graph(r, predicates=P)
    # more regions, more triples
    wide = Regions.cat([r, ragged(seed + 100, B=2, R=9, E=30)])
    padded = semantic_graph(wide, predicates=P)[:4]
    assert torch.equal(padded[:, :7, :7], graph)
    assert not padded[:, 7:].any()
    assert torch.equal(semantic_graph(r[2:], predicates=P), graph[2:])
    assert semantic_graph(r.to(torch.bfloat16), predicates=P).dtype == torch.bfloat16


@pytest.mark.parametrize(
    'triple, message',
    [
        ([4, 0, 1], r'\[4, 0, 1\]'),
        ([0, 0, 4], 'rows of 0 to 3'),
        ([0, P, 1], 'predicate of 0 to 2'),
        ([0, -1, 1], 'triple 1'),
        ([-1, 0, 1], 'triple 1'),
        ([0, 0, -2], 'triple 1'),
    ],
)
def test_numbers_out_of_range(triple, message):
    r = one([0, 1, 2], triple)
    for refused in (
        lambda: semantic_graph(r, predicates=P),
        lambda: corrupt_triples(r, rate=0, predicates=P, generator=torch.Generator()),
    ):
        with pytest.raises(ValueError, match=message) as fault:
            refused()
        assert '\n' not in str(fault.value)


SIZES = [(0, 7, 25), (0, 0, 0), (3, 0, 0), (3, 7, 0), (3, 0, 4)]  # B, R, E


def without_triples(B, R, E):
    return Regions(
        features=torch.ones(B, R, 5),
        mask=torch.ones(B, R, dtype=torch.bool),
        boxes=torch.rand(B, R, 4),
        sizes=torch.full((B, 2), 100.0),
        labels=torch.zeros(B, R, dtype=torch.long),
        triples=torch.full((B, E, 3), -1),
        confidence=torch.zeros(B, E),
    )


@pytest.mark.parametrize('B, R, E', SIZES)
def test_nothing_to_do(B, R, E):
    r = without_triples(B, R, E)
    broken = corrupt_triples(r, rate=1.0, predicates=P, generator=torch.Generator())
    assert torch.equal(broken.triples, r.triples)
    if R or not E:
        graph = semantic_graph(r, predicates=P)
        assert graph.shape == (B, R, R, 2 * P)
        assert not graph.any()


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


def corrupted(r, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    return corrupt_triples(r, rate=rate, predicates=P, generator=generator)


@pytest.mark.parametrize('rate', [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize('seed', range(5))
def test_corruption_hits_as_many_as_it_says_and_nothing_else(seed, rate):
    r = ragged(seed, B=40)
    broken = corrupted(r, rate, seed)
    for name, tensor in r.items():
        assert name == 'triples' or torch.equal(getattr(broken, name), tensor)
    assert torch.equal(broken.triples[..., 0], r.triples[..., 0])
    real = r.triples[..., 0] >= 0
    hit = (broken.triples != r.triples).any(-1)
    assert not hit[~real].any()
    spread = (rate * (1 - rate) / real.sum()) ** 0.5
    assert abs(hit[real].double().mean() - rate) < 4 * spread + 1e-9
    assert torch.equal(corrupted(r, rate, seed).triples, broken.triples)


@pytest.mark.parametrize('seed', range(5))
def test_what_is_hit_at_a_low_rate_is_hit_in_the_same_way_at_a_high_one(seed):
    r = ragged(seed, B=40)
    broken = {rate: corrupted(r, rate, seed).triples for rate in (0.2, 0.6, 1.0)}
    hit = {rate: (triples != r.triples).any(-1) for rate, triples in broken.items()}
    assert not (hit[0.2] & ~hit[0.6]).any()
    assert torch.equal(broken[1.0][hit[0.2]], broken[0.2][hit[0.2]])


@pytest.mark.parametrize('seed', range(5))
def test_a_hit_triple_has_another_predicate_and_another_real_object(seed):
    r = ragged(seed, B=40)
    broken = corrupted(r, 1.0, seed)
    for b, e in (r.triples[..., 0] >= 0).nonzero().tolist():
        s, p, o = r.triples[b, e].tolist()
        _, predicate, object = broken.triples[b, e].tolist()
        assert predicate != p
        assert 0 <= predicate < P
        others = [x for x in range(7) if r.mask[b, x] and x not in (s, o)]
        assert object in (others or [o])


def test_corruption_reaches_every_predicate_and_object():
    r = Regions(
        features=torch.ones(1, 6, 2),
        mask=torch.arange(6)[None] < 5,
        triples=torch.tensor([[[0, 1, 2]] * 2000]),
        confidence=torch.ones(1, 2000),
    )
    generator = torch.Generator().manual_seed(0)
    broken = corrupt_triples(r, rate=1.0, predicates=4, generator=generator)
    _, predicates, objects = broken.triples[0].T
    for k in (0, 2, 3):
        assert abs((predicates == k).sum() - 2000 / 3) < 100
    for k in (1, 3, 4):
        assert abs((objects == k).sum() - 2000 / 3) < 100
