"RoIAlign and the shipped detector: slow loops, committed weights, padding, faults."

import pytest
import torch
from safetensors.torch import save_file

from imtm_lite.files import CheckpointError, DataError
from imtm_lite.regions import Regions
from imtm_lite.world.detector import (
    box_labels,
    detector_accuracy,
    load_detector,
    roi_align,
    save_detector,
    train_detector,
)
from imtm_lite.world.scenes import CATEGORIES, detect, draw, make_scene


def ragged_boxes(g, *shape):
    "Inside, over the border, wholly outside, empty and inside out."
    boxes = torch.rand(*shape, 4, generator=g, dtype=torch.float64) * 12 - 3
    boxes[..., 0, 2:] = boxes[..., 0, :2]
    return boxes


def reading(maps, x, y):  # (C, H, W) -> (C,)
    "A map at one point, by bilinear interpolation; outside: the nearest edge."
    _, H, W = maps.shape
    u = min(max(x - 0.5, 0), W - 1)
    v = min(max(y - 0.5, 0), H - 1)
    i = int(u)
    j = int(v)
    right = min(i + 1, W - 1)
    below = min(j + 1, H - 1)
    upper = (1 - u + i) * maps[:, j, i] + (u - i) * maps[:, j, right]
    lower = (1 - u + i) * maps[:, below, i] + (u - i) * maps[:, below, right]
    return (1 - v + j) * upper + (v - j) * lower


def roi_align_loops(maps, boxes, size, samples):
    B, C = maps.shape[:2]
    blocks = maps.new_zeros(B, boxes.shape[1], C, size, size)
    n = size * samples
    for b in range(B):
        for r, (x0, y0, x1, y1) in enumerate(boxes[b].tolist()):
            for p in range(n):
                y = y0 + (p + 0.5) * (y1 - y0) / n
                for q in range(n):
                    x = x0 + (q + 0.5) * (x1 - x0) / n
                    share = reading(maps[b], x, y) / samples**2
                    blocks[b, r, :, p // samples, q // samples] += share
    return blocks


@pytest.mark.parametrize('seed', range(8))
def test_roi_align_equals_loops(seed):
    g = torch.Generator().manual_seed(seed)
    limits = [(1, 4), (1, 4), (1, 9), (1, 9), (1, 5), (1, 5), (1, 4)]
    numbers = [int(torch.randint(low, high, (), generator=g)) for low, high in limits]
    B, C, H, W, R, size, samples = numbers
    maps = torch.randn(B, C, H, W, generator=g, dtype=torch.float64, requires_grad=True)
    boxes = ragged_boxes(g, B, R)
    got = roi_align(maps, boxes, size, samples=samples)
    want = roi_align_loops(maps, boxes, size, samples)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    weight = torch.randn(got.shape, generator=g, dtype=torch.float64)
    slopes = []
    for blocks in (got, want):
        slopes += torch.autograd.grad((blocks * weight).sum(), maps, retain_graph=True)
    torch.testing.assert_close(*slopes, atol=1e-10, rtol=0)


@pytest.fixture(scope='module')
def scenes():
    "Forty scenes that the detector was not trained on."
    return [make_scene(50_000_000 + k) for k in range(40)]


@pytest.fixture(scope='module')
def pictures(scenes):
    return torch.stack([torch.tensor(draw(scene)) for scene in scenes])


@pytest.fixture(scope='module')
def looks(scenes):
    return [detect(scene, k) for k, scene in enumerate(scenes)]


@pytest.fixture(scope='module')
def boxes(looks):
    return torch.stack([torch.tensor(look.boxes) for look in looks])


def test_committed_detector_reaches_its_accuracy():
    right = detector_accuracy(load_detector(), pictures=40, seed=50_000_000)
    floor = dict(object=0.96, colour=0.97, size=0.80, pose=0.93, facing=0.93)
    assert all(right[name] >= floor[name] for name in floor), right


def test_labels_are_of_the_thing_in_the_box(scenes, pictures, looks, boxes):
    features, labels, scores = load_detector().regions(pictures, boxes)
    told = [box_labels(scene, look.thing)[:, 0] for scene, look in zip(scenes, looks)]
    want = torch.stack(told)
    want = want.masked_fill(want == len(CATEGORIES), -1)
    assert (labels == want).float().mean() > 0.96
    assert labels.min() == -1 and labels.max() < len(CATEGORIES)
    assert (scores > 0).all() and (scores <= 1).all()
    # a region's feature is never mistaken for padding
    assert features.ne(0).any(-1).all()


def test_features_do_not_depend_on_the_batch(pictures, boxes):
    detector = load_detector()
    at_once, _, _ = detector.regions(pictures, boxes)

    def same(features, order=slice(None)):
        torch.testing.assert_close(features, at_once[order], atol=1e-5, rtol=0)

    same(detector.regions(pictures, boxes, batch=7)[0])
    same(detector.regions(pictures[5:6], boxes[5:6])[0], slice(5, 6))
    # pictures and rows the other way round
    turned, _, _ = detector.regions(pictures.flip(0), boxes.flip(0, 1))
    same(turned.flip(0, 1))


def test_boxes_without_area_are_padding(pictures, boxes):
    boxes = boxes[:3].clone()
    boxes[1, 4:] = 0
    features, labels, scores = load_detector().regions(pictures[:3], boxes)
    assert Regions(features=features).mask.sum(1).tolist() == [12, 4, 12]
    assert (labels[1, 4:] == -1).all() and not scores[1, 4:].any() and features.isfinite().all()


def test_training_is_deterministic_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    one = train_detector(pictures=16, epochs=1, progress=False).state_dict()
    other = train_detector(pictures=16, epochs=1, progress=False).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_on_disk(tmp_path):
    path = tmp_path / 'd.safetensors'
    detector = load_detector()
    save_detector(detector, path)
    again = load_detector(path).state_dict()
    # half precision already
    for name, weight in detector.state_dict().items():
        assert torch.equal(again[name], weight)
    assert path.stat().st_size < 500_000
    assert [p.name for p in tmp_path.iterdir()] == ['d.safetensors']


def test_weights_that_are_missing_or_broken(tmp_path):
    path = tmp_path / 'd.safetensors'
    with pytest.raises(DataError, match='python -m imtm_lite.world.detector'):
        load_detector(path)
    save_detector(load_detector(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='not a detector of this version') as fault:
        load_detector(path)
    assert '\n' not in str(fault.value)
    save_file({'a': torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match='other questions'):
        load_detector(path)
