"Losses and ranks against slow loops on random input."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imtm_lite.losses import HardestBCE, Triplet, collapsed
from imtm_lite.recall import PROTOCOLS, evaluate, ranks, recall


def rivals(cost, same, i):
    "Costs of the wrong sentences for picture i, and of the wrong pictures for sentence i."
    size = len(same)
    sentences = [float(cost[i, j]) for j in range(size) if not same[i, j]]
    pictures = [float(cost[j, i]) for j in range(size) if not same[j, i]]
    return sentences, pictures


def triplet_by_loops(scores, same, margin, hardest):
    total = 0.0
    for i in range(len(scores)):
        cost = margin + scores - scores[i, i]
        for wrong in rivals(cost, same, i):
            positive = [max(0.0, c) for c in wrong]
            total += max(positive, default=0.0) if hardest else sum(positive)
    return total


def bce_by_loops(m, same):
    total = 0.0
    for i in range(len(m)):
        total -= 2 * math.log(m[i, i])
        for wrong in rivals(m, same, i):
            total += max([-math.log(1 - probability) for probability in wrong], default=0.0)
    return total


def bce_of_all_by_loops(m, same):
    size = len(m)
    right = 0.0
    wrong = 0.0
    for i in range(size):
        right -= math.log(m[i, i])
        sentences, _ = rivals(m, same, i)
        wrong -= sum(math.log(1 - probability) for probability in sentences)
    return right / size + wrong / size**2


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9),
    pictures=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    hardest=st.booleans(),
    margin=st.floats(0, 1),
)
def test_triplet_equals_loops(size, pictures, seed, hardest, margin):
    g = torch.Generator().manual_seed(seed)
    s = torch.rand(size, size, dtype=torch.float64, generator=g)
    image = torch.randint(pictures, (size,), generator=g)
    same = image[:, None] == image
    loss = float(Triplet(margin=margin, hardest=hardest)(s, same))
    assert loss == pytest.approx(triplet_by_loops(s, same, margin, hardest), abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), pictures=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_bce_equals_loops(size, pictures, seed):
    g = torch.Generator().manual_seed(seed)
    m = torch.rand(size, size, dtype=torch.float64, generator=g)
    image = torch.randint(pictures, (size,), generator=g)
    # clamped, not infinite
    m[0, 0] = 0.0
    same = image[:, None] == image
    c = m.clamp(1e-6, 1 - 1e-6)
    assert float(HardestBCE()(m, same)) == pytest.approx(bce_by_loops(c, same), abs=1e-9)
    every = float(HardestBCE(hardest=False)(m, same))
    assert every == pytest.approx(bce_of_all_by_loops(c, same), abs=1e-9)


@pytest.mark.parametrize('criterion', [Triplet(), HardestBCE()])
def test_pairs_of_one_picture_are_never_pushed_apart(criterion):
    s = torch.rand(6, 6, dtype=torch.float64, requires_grad=True)
    image = torch.tensor([0, 0, 1, 2, 2, 2])
    same = image[:, None] == image
    criterion(s, same).backward()
    assert not s.grad[same & ~torch.eye(6, dtype=torch.bool)].any()


@pytest.mark.parametrize('criterion,reported', [(HardestBCE(), 177.4), (Triplet(margin=0.2), 25.6)])
def test_collapse_values_are_those_reported_for_a_batch_of_64(criterion, reported):
    same = torch.eye(64, dtype=torch.bool)
    equal = criterion(torch.full((64, 64), 0.5, dtype=torch.float64), same)
    assert round(float(equal), 1) == reported
    assert criterion.collapse(64) == pytest.approx(float(equal))
    assert collapsed([float(equal) / 64] * 50, criterion)
    assert not collapsed([float(equal) / 64] * 49, criterion)
    assert not collapsed([float(equal) / 64 * 1.02] * 50, criterion)


@settings(max_examples=80, deadline=None)
@given(
    images=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 15),
    levels=st.integers(1, 20),
)
def test_ranks_equal_brute_force_with_ties_and_one_to_nine_captions(images, seed, rows, levels):
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 10, (images,), generator=g)
    of = torch.arange(images).repeat_interleave(counts)
    of = of[torch.randperm(len(of), generator=g)]
    s = (torch.rand(images, len(of), generator=g) * levels).round()
    i2t, t2i = ranks(s, of, rows=rows)
    for b in range(images):
        best = s[b, of == b].max()
        assert i2t[b] == sum(bool(score >= best) for score in s[b, of != b])
    for c in range(len(of)):
        right = s[of[c], c]
        others = torch.arange(images) != of[c]
        assert t2i[c] == sum(bool(score >= right) for score in s[others, c])


def test_a_tie_never_flatters():
    assert recall(torch.zeros(20, 100), torch.arange(20).repeat_interleave(5)).rsum == 0


def test_nan_and_silent_images_are_refused():
    with pytest.raises(ValueError, match='NaN'):
        recall(torch.tensor([[float('nan'), 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match='without a caption'):
        recall(torch.zeros(2, 2), torch.tensor([0, 0]))


def test_five_folds_are_the_mean_of_five_galleries():
    of = torch.arange(5000).repeat_interleave(5)
    s = torch.rand(5000, 25000)
    s[of, torch.arange(25000)] += 0.5
    folds = []
    for k in range(0, 5000, 1000):
        block = s[k : k + 1000, 5 * k : 5 * k + 5000]
        folds.append(recall(block, of[:5000]).rsum)
    folded = evaluate(s, of, 'coco-1k-5fold')
    assert folded.rsum == pytest.approx(sum(folds) / 5)
    assert 'coco-1k-5fold' in str(folded)


@pytest.mark.parametrize('name', [n for n, p in PROTOCOLS.items() if p.images])
def test_protocols_refuse_other_sizes(name):
    with pytest.raises(ValueError, match='is defined on'):
        evaluate(torch.zeros(4, 8), torch.arange(4).repeat_interleave(2), name)


@pytest.mark.parametrize('criterion', [HardestBCE(), HardestBCE(hardest=False), Triplet()])
def test_half_precision_scores_give_finite_losses_and_gradients(criterion):
    # saturated, right and wrong
    s = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = criterion(s, torch.eye(2, dtype=torch.bool))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and s.grad.isfinite().all()
