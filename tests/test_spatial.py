"""Spatial graphs: loops, meaning of every label, exchange of a pair, invariances.

And padding, boxes without area, faults.
"""

import math
from functools import partial
from itertools import product

import pytest
import torch

from imtm_lite.regions import Regions, normalise_boxes
from imtm_lite.spatial import (
    ELEVEN,
    SPATIAL_GRAPHS,
    binary_graph,
    geometry,
    iou_graph,
    labelled_graph,
    pairs,
    polar_graph,
    relation_labels,
)

KINDS = pytest.mark.parametrize('kind', SPATIAL_GRAPHS)
CROSS = torch.tensor([[0.25, 0.5, 0.75, 0.625], [0.4375, 0.25, 0.5625, 0.875]])


def scene(*boxes, size=(100, 100), dtype=torch.float64):
    "One picture with these boxes, in pixels."
    size = torch.tensor([size])
    boxes = torch.tensor([boxes], dtype=dtype)
    return Regions(
        features=torch.ones(1, boxes.shape[1], 2, dtype=dtype),
        boxes=normalise_boxes(boxes, size),
        sizes=size,
    )


def ragged(seed, B=5, R=8, dtype=torch.float64):
    "Random boxes; equal ones, an empty one, a cross, one within another, padding full of NaN."
    g = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, B, R, 2, generator=g, dtype=torch.float64)
    boxes = torch.cat([torch.minimum(a, b), torch.maximum(a, b)], -1)
    boxes[:, 1] = boxes[:, 0]
    boxes[:, 2, 3] = boxes[:, 2, 1]
    boxes[:, 3:5] = CROSS
    mask = torch.arange(R) < torch.randint(5, R + 1, (B, 1), generator=g)
    boxes[~mask] = torch.nan
    return Regions(
        features=torch.ones(B, R, 1, dtype=dtype),
        mask=mask,
        boxes=boxes.to(dtype),
        sizes=torch.randint(50, 900, (B, 2), generator=g),
    )


def in_diagonals(r, b):
    "Boxes of picture b, in picture diagonals; None for a region that has no place."
    width, height = r.sizes[b].tolist()
    x_unit = width / math.hypot(width, height)
    y_unit = height / math.hypot(width, height)
    placed = []
    for exists, (x0, y0, x1, y1) in zip(r.mask[b].tolist(), r.boxes[b].tolist()):
        box = (x0 * x_unit, y0 * y_unit, x1 * x_unit, y1 * y_unit)
        has_place = exists and x1 > x0 and y1 > y0
        placed.append(box if has_place else None)
    return placed


def by_loops(edge, r, K):
    "A graph from `edge(a, b)` of two boxes in picture diagonals, one pair at a time."
    R = r.mask.shape[1]
    out = torch.zeros(len(r), R, R, K, dtype=torch.float64)
    for b in range(len(r)):
        boxes = in_diagonals(r, b)
        for i, j in product(range(R), repeat=2):
            if i != j and boxes[i] and boxes[j]:
                out[b, i, j] = out.new_tensor(edge(boxes[i], boxes[j]))
    return out


def apart(a, b):
    return (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(a, b, threshold=0.0):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    share = both / (area(a) + area(b) - both)
    return share if share > threshold else 0.0


def within(a, b):
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]


def label_number(a, b, reach):
    "0 to 10, or None."
    x, y = apart(a, b)
    if within(a, b) != within(b, a):
        return 0 if within(a, b) else 1
    if overlap(a, b) >= 0.5 or math.hypot(x, y) < 1e-6:
        return 2
    if math.hypot(x, y) >= reach:
        return None
    return 3 + int(math.degrees(math.atan2(y, x)) % 360 // 45)


def label(a, b, reach):
    k = label_number(a, b, reach)
    return [float(k == n) for n in range(11)]


def angular(x, y, turn, directions):
    "The gap as the angle between two arrows."
    distance = math.hypot(x, y)
    if distance <= 1e-6:
        return math.sqrt(math.pi / 2) / directions
    cosine = (x * math.cos(turn) + y * math.sin(turn)) / distance
    gap = math.acos(max(-1, min(1, cosine)))
    return math.exp(-((gap * directions / math.pi) ** 2) / 2)


def polar(a, b, directions, rings, width):
    x, y = apart(a, b)
    out = []
    for k in range(directions):
        towards = angular(x, y, 2 * math.pi * k / directions, directions)
        for ring in rings:
            out.append(towards * math.exp(-(((math.hypot(x, y) - ring) / width) ** 2) / 2))
    return out


@pytest.mark.parametrize('seed', range(6))
def test_graphs_equal_loops(seed):
    r = ragged(seed)
    for t in (0.0, 0.15):
        loops = by_loops(lambda a, b: [overlap(a, b, t)], r, 1)
        torch.testing.assert_close(iou_graph(r, threshold=t), loops, atol=1e-12, rtol=0)
    for t in (0.1, 0.3):
        yes = by_loops(lambda a, b: [float(overlap(a, b) > t)], r, 1)
        assert torch.equal(binary_graph(r, threshold=t), yes)
    for reach in (0.5, 0.2):
        loops = by_loops(partial(label, reach=reach), r, 11)
        assert torch.equal(labelled_graph(r, reach=reach), loops)
    for how in (
        dict(directions=8, rings=(0.1, 0.3), width=0.12),
        dict(directions=5, rings=(0.2, 0.4, 0.9), width=0.3),
    ):
        loops = by_loops(partial(polar, **how), r, how['directions'] * len(how['rings']))
        # acos loses digits
        torch.testing.assert_close(polar_graph(r, **how), loops, atol=1e-7, rtol=0)


def test_geometry_is_in_diagonals_of_the_true_picture():
    # centres (10, 30), (80, 70)
    r = scene((0, 20, 20, 40), (60, 60, 100, 80), size=(400, 300))
    distance, angle = geometry(r.boxes, r.sizes)
    assert distance[0, 0, 1] == pytest.approx(math.hypot(70, 40) / 500)
    assert distance[0, 0, 0] == 0
    assert angle[0, 1, 0] == pytest.approx(math.atan2(40, 70))
    assert angle[0, 0, 1] == pytest.approx(math.atan2(-40, -70))
    r = scene((0, 0, 10, 10), (50, 0, 60, 10))
    # exactly left: pi, not -pi
    assert geometry(r.boxes, r.sizes)[1][0, 0, 1] == pytest.approx(math.pi)


@pytest.mark.parametrize(
    'x, y, want',
    [
        (10, 3, 'right, below'),
        (3, 10, 'below, right'),
        (-3, 10, 'below, left'),
        (-10, 3, 'left, below'),
        (-10, -3, 'left, above'),
        (-3, -10, 'above, left'),
        (3, -10, 'above, right'),
        (10, -3, 'right, above'),
        # sectors begin at the axes
        (10, 0, 'right, below'),
        (0, 10, 'below, left'),
        (-10, 0, 'left, above'),
        (0, -10, 'above, right'),
    ],
)
def test_directions_mean_what_they_say(x, y, want):
    r = scene((48 + x, 48 + y, 52 + x, 52 + y), (48, 48, 52, 52))
    assert ELEVEN[relation_labels(r)[0, 0, 1] - 1] == want


def test_borders_of_sectors_on_a_grid():
    # exact binary fractions: axes and diagonals only, and knight's moves
    step = torch.arange(3).double() / 4 + 0.25
    centre = torch.cartesian_prod(step, step)
    r = Regions(
        features=torch.ones(1, 9, 1).double(),
        boxes=torch.cat([centre - 0.0625, centre + 0.0625], -1)[None],
        sizes=torch.tensor([[128, 128]]),
    )
    labels = relation_labels(r, reach=1.0)[0]
    names = {}
    for i, j in product(range(9), repeat=2):
        if i != j:
            step = (8 * (centre[i] - centre[j])).int().tolist()
            names[tuple(step)] = ELEVEN[labels[i, j] - 1]
    begins = {
        (1, 0): 'right, below',
        (1, 1): 'below, right',
        (0, 1): 'below, left',
        (-1, 1): 'left, below',
        (-1, 0): 'left, above',
        (-1, -1): 'above, left',
        (0, -1): 'above, right',
        (1, -1): 'right, above',
    }
    for (x, y), name in begins.items():
        for k in (2, 4):
            assert names[k * x, k * y] == name
    assert torch.equal(labelled_graph(r, reach=1.0), by_loops(partial(label, reach=1.0), r, 11))


def test_inside_cover_overlap():
    big = (10, 10, 60, 60)
    small = (20, 20, 30, 30)
    shifted = (15, 10, 65, 60)
    labels = relation_labels(scene(big, small, shifted, big))[0]

    def name(i, j):
        return ELEVEN[labels[i, j] - 1]

    assert name(1, 0) == 'inside'
    assert name(0, 1) == 'cover'
    assert name(0, 2) == name(2, 0) == 'overlap'  # IoU .82
    assert name(0, 3) == name(3, 0) == 'overlap'  # equal
    assert not labels.diagonal().any()
    border = relation_labels(scene((0, 0, 100, 100), (50, 0, 100, 30)))[0]
    # a shared border does not count against it
    assert ELEVEN[border[1, 0] - 1] == 'inside'


def test_threshold_is_exclusive():
    r = scene((0, 0, 50, 50), (0, 0, 25, 25))  # IoU 1/4, exactly
    assert iou_graph(r, threshold=0.25).count_nonzero() == 0
    assert iou_graph(r, threshold=0.24)[0, :, :, 0].tolist() == [[0, 0.25], [0.25, 0]]


def test_reach_is_half_a_diagonal():
    # 50 of 100 pixels apart
    r = scene((0, 0, 4, 4), (30, 40, 34, 44), size=(60, 80))
    assert relation_labels(r).count_nonzero() == 0
    assert relation_labels(r, reach=0.51).count_nonzero() == 2
    nearer = scene((0, 0, 4, 4), (29, 40, 33, 44), size=(60, 80))
    assert relation_labels(nearer).count_nonzero() == 2


def test_coincident_centres_have_no_direction():
    r = scene((10, 45, 90, 55), (45, 10, 55, 90))
    assert relation_labels(r)[0].tolist() == [[0, 3], [3, 0]]
    weight = polar_graph(r).view(2, 2, 8, 2)
    assert weight[0, 1].std(0).max() == 0
    assert torch.equal(weight[0, 1], weight[1, 0])
    round_it = []
    for turn in torch.arange(360).deg2rad().tolist():
        x = 20 * math.cos(turn)
        y = 20 * math.sin(turn)
        round_it.append((49 + x, 49 + y, 51 + x, 51 + y))
    kernels = polar_graph(scene((49, 49, 51, 51), *round_it), rings=(0.2,))[0, 1:, 0]
    mean_over_the_circle = (kernels / kernels[0, 0]).mean(0)
    want = [math.sqrt(math.pi / 2) / 8] * 8
    assert mean_over_the_circle.tolist() == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_exchanging_a_pair_turns_its_relation_round(dtype):
    # on a grid: exact diagonals and axes, equal and nested boxes
    g = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 24, (40, 12, 2), generator=g)
    side = torch.randint(1, 9, (40, 12, 2), generator=g)
    sizes = torch.tensor([[32, 32]] * 20 + [[48, 32]] * 20)
    r = Regions(
        features=torch.ones(40, 12, 1, dtype=dtype),
        boxes=normalise_boxes(torch.cat([corner, corner + side], -1).to(dtype), sizes),
        sizes=sizes,
    )
    labels = relation_labels(r)
    turned = torch.tensor([0, 2, 1, 3] + [4 + (k + 4) % 8 for k in range(8)])
    assert torch.equal(labels.mT, turned[labels])
    assert labels.unique().tolist() == list(range(12))
    assert torch.equal(iou_graph(r).transpose(1, 2), iou_graph(r))
    opposite = polar_graph(r).view(40, 12, 12, 8, 2).roll(4, 3).flatten(3)
    torch.testing.assert_close(polar_graph(r).transpose(1, 2), opposite, atol=1e-5, rtol=0)


def test_a_mirror_changes_directions_but_no_overlap():
    r = ragged(7)
    flip = r.boxes[..., [2, 1, 0, 3]].clone()
    flip[..., [0, 2]] = 1 - flip[..., [0, 2]]
    m = Regions(features=r.features, mask=r.mask, boxes=flip, sizes=r.sizes)
    torch.testing.assert_close(iou_graph(m), iou_graph(r), atol=1e-12, rtol=0)
    mirrored = torch.tensor([0, 1, 2, 3] + [4 + (3 - k) % 8 for k in range(8)])
    labels = relation_labels(r)
    assert torch.equal(relation_labels(m), mirrored[labels])
    assert (mirrored[labels] != labels).any()
    # polar direction k is seen in this one's channel
    left_right = torch.tensor([(4 - k) % 8 for k in range(8)])
    want = polar_graph(r).unflatten(-1, (8, 2))[..., left_right, :]
    got = polar_graph(m).unflatten(-1, (8, 2))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@KINDS
@pytest.mark.parametrize('seed', range(3))
def test_scale_and_order(kind, seed):
    build, relations = SPATIAL_GRAPHS[kind]
    r = ragged(seed)
    graph = build(r)
    assert graph.shape == (5, 8, 8, relations)
    assert graph.isfinite().all()
    assert (graph >= 0).all()
    assert graph.count_nonzero() > 0
    same = Regions(features=r.features, mask=r.mask, boxes=r.boxes, sizes=r.sizes * 7)
    torch.testing.assert_close(build(same), graph, atol=1e-12, rtol=0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    mixed = Regions(
        features=r.features[:, order], mask=r.mask[:, order], boxes=r.boxes[:, order], sizes=r.sizes
    )
    assert torch.equal(build(mixed), graph[:, order][:, :, order])


@KINDS
@pytest.mark.parametrize('seed', range(3))
def test_padding_changes_nothing(kind, seed):
    build, _ = SPATIAL_GRAPHS[kind]
    r = ragged(seed)
    graph = build(r)
    for b in range(5):
        n = int(r.mask[b].sum())
        alone = Regions(
            features=r.features[b : b + 1, :n],
            boxes=r.boxes[b : b + 1, :n],
            sizes=r.sizes[b : b + 1],
        )
        torch.testing.assert_close(graph[b, :n, :n], build(alone)[0], atol=1e-12, rtol=0)
        assert graph[b].count_nonzero() == build(alone).count_nonzero()


def test_stretching_moves_directions_only():
    r = ragged(3)
    tall = Regions(
        features=r.features, mask=r.mask, boxes=r.boxes, sizes=r.sizes * torch.tensor([1, 5])
    )
    assert torch.equal(iou_graph(tall), iou_graph(r))
    assert torch.equal(labelled_graph(tall)[..., :3], labelled_graph(r)[..., :3])
    assert not torch.equal(labelled_graph(tall), labelled_graph(r))
    assert (polar_graph(tall) - polar_graph(r)).abs().max() > 0.1


@KINDS
def test_who_has_no_edge(kind):
    graph = SPATIAL_GRAPHS[kind][0](ragged(1))
    r = ragged(1)
    assert not graph.diagonal(dim1=1, dim2=2).any()
    assert not graph[:, 2].any()  # the box without area
    assert not graph[:, :, 2].any()
    assert not graph[~r.mask].any()
    assert not graph.transpose(1, 2)[~r.mask].any()
    assert not graph[~pairs(r.mask, r.boxes)].any()


def test_pairs():
    r = ragged(1)
    placed = pairs(r.mask, r.boxes)
    for may in (placed, pairs(r.mask)):
        assert may.dtype == torch.bool
        assert torch.equal(may, may.mT)
        assert not may.diagonal(dim1=1, dim2=2).any()
        assert may[0, 0, 1]
    # without boxes, only padding is left out
    n = r.mask.sum(1)
    assert torch.equal(pairs(r.mask).sum((1, 2)), n * (n - 1))
    assert torch.equal(placed.sum((1, 2)), (n - 1) * (n - 2))


@KINDS
def test_weights_have_the_type_of_the_features(kind):
    build = SPATIAL_GRAPHS[kind][0]
    wide = ragged(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        graph = build(
            Regions(
                features=wide.features.to(dtype),
                mask=wide.mask,
                boxes=wide.boxes.float(),
                sizes=wide.sizes.float(),
            )
        )
        assert graph.dtype == dtype
        torch.testing.assert_close(graph.double(), build(wide), atol=1e-2, rtol=0)


def test_faults_are_one_line():
    r = ragged(0)
    none = Regions(features=torch.ones(1, 3, 2))
    bare = Regions(features=r.features, mask=r.mask, boxes=r.boxes)
    # overlap needs no picture size
    torch.testing.assert_close(iou_graph(bare), iou_graph(r))
    for call, what in [
        (lambda: iou_graph(none), 'without boxes'),
        (lambda: labelled_graph(none), 'without boxes and sizes'),
        (lambda: relation_labels(bare), 'without sizes .*_img_sizes.npy'),
        (lambda: polar_graph(bare), 'without sizes'),
        (lambda: iou_graph(r, threshold=1.0), 'threshold'),
        (lambda: iou_graph(r, threshold=-0.1), 'threshold'),
        (lambda: labelled_graph(r, reach=0.0), 'reach'),
        (lambda: polar_graph(r, width=0.0), 'width'),
        (lambda: polar_graph(r, rings=()), 'polar'),
        (lambda: polar_graph(r, directions=1), 'polar'),
    ]:
        with pytest.raises(ValueError, match=what) as fault:
            call()
        assert '\n' not in str(fault.value)


@KINDS
def test_nothing_is_made_on_another_device(kind):
    # mixing meta and CPU tensors is an error
    r = ragged(2).to('meta')
    graph = SPATIAL_GRAPHS[kind][0](r)
    assert graph.device.type == 'meta' and graph.shape[:3] == (5, 8, 8)
