"Boxes, RoIAlign, bundles and the committed detector: properties, slow loops, committed weights."

import pytest
import torch

from imtm_lite.regions import Bundle, Regions, box_area, clip_boxes, iou, normalise_boxes


def ragged_boxes(g, *shape, span=12.0, dtype=torch.float64):
    "Inside, over the border, wholly outside, empty and inside out."
    boxes = torch.rand(*shape, 4, generator=g, dtype=dtype) * span - span / 4
    boxes[..., 0, 2:] = boxes[..., 0, :2]
    return boxes


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
