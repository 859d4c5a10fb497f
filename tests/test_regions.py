"Boxes, RoIAlign, bundles and the committed detector: properties, slow loops, committed weights."

import pytest
import torch
from safetensors.torch import save_file

from imtm_lite.regions import Bundle, Regions, box_area, clip_boxes, iou, normalise_boxes
from imtm_lite.world.detector import (
    box_labels,
    detector_accuracy,
    load_detector,
    roi_align,
    save_detector,
    train_detector,
)
from imtm_lite.world.scenes import CATEGORIES, detect, draw, make_scene


def ragged_boxes(g, *shape, span=12.0, dtype=torch.float64):
    "Inside, over the border, wholly outside, empty and inside out."
    boxes = torch.rand(*shape, 4, generator=g, dtype=dtype) * span - span / 4
    boxes[..., 0, 2:] = boxes[..., 0, :2]
    return boxes


def roi_align_loops(maps, boxes, size, samples):
    B, C, H, W = maps.shape
    out = maps.new_zeros(B, boxes.shape[1], C, size, size)
    n = size * samples
    for b in range(B):
        for r, (x0, y0, x1, y1) in enumerate(boxes[b].tolist()):
            for p in range(n):
                for q in range(n):
                    u = min(max(x0 + (q + 0.5) * (x1 - x0) / n - 0.5, 0), W - 1)
                    v = min(max(y0 + (p + 0.5) * (y1 - y0) / n - 0.5, 0), H - 1)
                    i = int(u)
                    j = int(v)
                    s = u - i
                    t = v - j
                    k = min(i + 1, W - 1)
                    l = min(j + 1, H - 1)
                    m = maps[b]
                    value = (1 - t) * ((1 - s) * m[:, j, i] + s * m[:, j, k]) + t * (
                        (1 - s) * m[:, l, i] + s * m[:, l, k]
                    )
                    out[b, r, :, p // samples, q // samples] += value / samples**2
    return out


@pytest.mark.parametrize('seed', range(8))
def test_roi_align_equals_loops(seed):
    g = torch.Generator().manual_seed(seed)
    B, C, H, W, R, size, samples = (
        int(torch.randint(lo, hi, (), generator=g))
        for lo, hi in [(1, 4), (1, 4), (1, 9), (1, 9), (1, 5), (1, 5), (1, 4)]
    )
    maps = torch.randn(B, C, H, W, generator=g, dtype=torch.float64, requires_grad=True)
    boxes = ragged_boxes(g, B, R)
    got = roi_align(maps, boxes, size, samples=samples)
    want = roi_align_loops(maps, boxes, size, samples)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    weight = torch.randn(got.shape, generator=g, dtype=torch.float64)
    slopes = [
        torch.autograd.grad((out * weight).sum(), maps, retain_graph=True)[0] for out in (got, want)
    ]
    torch.testing.assert_close(*slopes, atol=1e-10, rtol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.int64])
def test_iou_properties(dtype):
    g = torch.Generator().manual_seed(0)
    boxes = (torch.rand(3, 30, 4, generator=g) * 300 - 20).round().to(dtype)
    boxes[:, 0] = 0
    full = box_area(boxes.double()) > 0
    overlap = iou(boxes, boxes)
    assert overlap.shape == (3, 30, 30) and overlap.isfinite().all()
    assert (overlap >= 0).all() and (overlap <= 1 + 1e-6).all()
    torch.testing.assert_close(overlap, overlap.mT)
    # 1 on itself, 0 where empty
    torch.testing.assert_close(overlap.diagonal(dim1=1, dim2=2), full.to(overlap.dtype))
    assert not overlap[~full].any() and not overlap.mT[~full].any()
    assert iou(boxes[0, :2], boxes[0, :5]).shape == (2, 5)
    assert iou(boxes[0, :0], boxes[0]).shape == (0, 30)


def test_iou_equals_counting_cells():
    g = torch.Generator().manual_seed(1)
    boxes = torch.randint(0, 12, (25, 4), generator=g)
    x = torch.arange(12)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    columns = (x >= x0) & (x < x1)
    rows = (x >= y0) & (x < y1)
    cells = (rows[:, :, None] & columns[:, None]).flatten(1).double()
    shared = cells @ cells.T
    union = cells.sum(1)[:, None] + cells.sum(1) - shared
    torch.testing.assert_close(iou(boxes.double(), boxes.double()), shared / union.clamp(min=1))


def test_iou_gradient_is_finite_where_empty():
    boxes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 3.0, 4.0]], requires_grad=True)
    iou(boxes, boxes.detach() + 0.5).sum().backward()
    assert boxes.grad.isfinite().all()


def test_clipping_and_normalising():
    g = torch.Generator().manual_seed(2)
    boxes = ragged_boxes(g, 4, 7, span=300.0, dtype=torch.float32)
    sizes = torch.tensor([[100, 50], [50, 100], [128, 128], [7, 9]])
    clipped = clip_boxes(boxes, sizes)
    norm = normalise_boxes(boxes, sizes)
    assert (norm >= 0).all() and (norm <= 1).all()
    torch.testing.assert_close(norm * torch.cat([sizes, sizes], -1)[:, None], clipped)
    for b in range(4):
        torch.testing.assert_close(normalise_boxes(boxes[b], sizes[b]), norm[b])
    with pytest.raises(ValueError, match='above 0'):
        normalise_boxes(boxes, sizes * 0)


def test_bundle_takes_items():
    b = Bundle(a=torch.arange(12.0).view(4, 3), label=torch.arange(4), none=None)
    assert len(b) == 4 and dict(b.items()).keys() == {'a', 'label'}
    assert b[1:3].label.tolist() == [1, 2]
    assert b[-1].label.tolist() == [3]
    assert b[torch.tensor(2)].a.shape == (1, 3)
    assert b[torch.tensor([3, 0])].label.tolist() == [3, 0]
    assert b[b.label > 1].label.tolist() == [2, 3]
    assert [len(one) for one in b] == [1] * 4 and len(b[4:]) == 0
    with pytest.raises(IndexError):
        b[4]
    with pytest.raises(AttributeError, match="no 'lable', only a, label"):
        b.lable
    with pytest.raises(ValueError, match='numbers of items differ'):
        Bundle(a=torch.ones(2), b=torch.ones(3))
    with pytest.raises(ValueError, match="'items'"):
        Bundle(items=torch.ones(2))


def test_bundle_to():
    mask = torch.ones(2, dtype=torch.bool)
    b = Bundle(a=torch.ones(2), mask=mask, label=torch.ones(2, dtype=torch.long))
    for half in (
        b.to(torch.float16),
        b.to('cpu', torch.float16),
        b.to(torch.device('cpu'), non_blocking=True).to(torch.float16),
    ):
        assert [t.dtype for _, t in half.items()] == [torch.float16, torch.bool, torch.long]


def test_bundle_cat_pads_every_other_dimension():
    sizes = [(2, 3, 1), (1, 5, 4), (3, 1, 2)]
    bundles = []
    for n, t, w in sizes:
        mask = torch.ones(n, t, dtype=torch.bool)
        bundles.append(Bundle(words=torch.ones(n, t, w), mask=mask))
    joined = Bundle.cat(bundles)
    assert joined.words.shape == (6, 5, 4) and joined.mask.sum(1).tolist() == [3, 3, 5, 1, 1, 1]
    start = 0
    for n, t, w in sizes:
        words = joined[start : start + n].words
        assert words[:, :t, :w].eq(1).all() and words.sum() == n * t * w
        start += n
    with pytest.raises(ValueError, match='fields differ'):
        Bundle.cat([bundles[0], Bundle(words=torch.ones(1, 2, 2))])


def test_regions_mask_and_optional_fields():
    features = torch.rand(3, 4, 5) + 0.1
    features[1, 2:] = 0
    r = Regions(features=features, labels=torch.ones(3, 4, dtype=torch.long))
    assert r.mask.sum(1).tolist() == [4, 2, 4] and r.boxes is None and r.sizes is None
    assert isinstance(r[1:], Regions) and torch.equal(r[1:].mask, r.mask[1:])
    wide = Regions(features=torch.rand(1, 6, 5), labels=torch.ones(1, 6, dtype=torch.long))
    joined = Regions.cat([r, wide])
    assert isinstance(joined, Regions)
    assert joined.mask.sum(1).tolist() == [4, 2, 4, 6]
    assert joined.labels[0].tolist() == [1] * 4 + [-1] * 2
    with pytest.raises(AttributeError):
        r.label


@pytest.fixture(scope='module')
def looks():
    "Forty scenes that the detector was not trained on."
    scenes = [make_scene(50_000_000 + k) for k in range(40)]
    seen = [detect(s, k) for k, s in enumerate(scenes)]
    return (
        scenes,
        torch.stack([torch.tensor(draw(s)) for s in scenes]),
        torch.stack([torch.tensor(d.boxes) for d in seen]),
        seen,
    )


def test_committed_detector_reaches_its_accuracy():
    right = detector_accuracy(load_detector(), pictures=40, seed=50_000_000)
    floor = dict(object=0.96, colour=0.97, size=0.80, pose=0.93, facing=0.93)
    assert all(right[name] >= floor[name] for name in floor), right


def test_labels_are_of_the_thing_in_the_box(looks):
    scenes, pictures, boxes, seen = looks
    features, labels, scores = load_detector().regions(pictures, boxes)
    want = torch.stack([box_labels(s, d.thing)[:, 0] for s, d in zip(scenes, seen)])
    assert (labels == want.masked_fill(want == len(CATEGORIES), -1)).float().mean() > 0.96
    assert (
        labels.min() == -1
        and labels.max() < len(CATEGORIES)
        and (scores > 0).all()
        and (scores <= 1).all()
    )
    # a region's feature is never mistaken for padding
    assert features.ne(0).any(-1).all()


def test_features_do_not_depend_on_the_batch(looks):
    _, pictures, boxes, _ = looks
    detector = load_detector()
    all_at_once = detector.regions(pictures, boxes)[0]
    for features, order in [
        (detector.regions(pictures, boxes, batch=7)[0], torch.arange(40)),
        (
            detector.regions(pictures.flip(0), boxes.flip(0).flip(1))[0].flip(1),
            torch.arange(40).flip(0),
        ),
        (detector.regions(pictures[5:6], boxes[5:6])[0], torch.tensor([5])),
    ]:
        torch.testing.assert_close(features, all_at_once[order], atol=1e-5, rtol=0)


def test_boxes_without_area_are_padding(looks):
    _, pictures, boxes, _ = looks
    boxes = boxes[:3].clone()
    boxes[1, 4:] = 0
    features, labels, scores = load_detector().regions(pictures[:3], boxes)
    assert Regions(features=features).mask.sum(1).tolist() == [12, 4, 12]
    assert (labels[1, 4:] == -1).all() and not scores[1, 4:].any() and features.isfinite().all()


def test_training_is_deterministic_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    a, b = (train_detector(pictures=16, epochs=1, progress=False).state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_weights_on_disk(tmp_path):
    path = tmp_path / 'd.safetensors'
    detector = load_detector()
    save_detector(detector, path)
    again = load_detector(path).state_dict()
    # half precision already
    assert all(torch.equal(again[name], t) for name, t in detector.state_dict().items())
    assert path.stat().st_size < 500_000 and [p.name for p in tmp_path.iterdir()] == [
        'd.safetensors'
    ]
    with pytest.raises(FileNotFoundError, match='python -m imtm_lite.regions'):
        load_detector(tmp_path / 'none.safetensors')
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match='not a detector of this version') as error:
        load_detector(path)
    assert '\n' not in str(error.value)
    save_file({'a': torch.ones(2)}, path)
    with pytest.raises(ValueError, match='other questions'):
        load_detector(path)
