"What every matcher owes: a pair's score depends on that pair alone, however it was computed."

from functools import partial

import pytest
import torch

from imtm_lite.losses import HardestBCE, Triplet
from imtm_lite.scoring import KeptBytes, PeakBytes, encode, match_by_length, score, score_pairs
from tests.matchers import (
    changed,
    close,
    codes_of,
    each,
    gradients_of,
    make,
    one_by_one,
    padded,
    ragged,
    scores_of,
    without_padding,
)


def tolerance_of(name, arguments, dtype):
    "A refined vector has two roundings more; float64 says it is only that."
    if dtype == torch.float64:
        return 1e-12
    refined = name in ('cmsei', 'hire') and arguments.get('refine', True)
    return 3e-6 if refined else 1e-6


in_both_precisions = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)


@each
@in_both_precisions
def test_scores_ignore_padding_and_order(name, arguments, dtype):
    tolerance = tolerance_of(name, arguments, dtype)
    matcher = make(name, arguments, dtype)
    regions, captions = ragged(dtype)
    scores = scores_of(matcher, regions, captions)
    close(scores_of(matcher, *padded(regions, captions)), scores, atol=tolerance)

    def alone(b, c):
        return scores_of(matcher, regions[b], without_padding(captions, c))[0, 0]

    close(one_by_one(alone, *scores.shape), scores, atol=tolerance)
    b = torch.randperm(len(regions))
    c = torch.randperm(len(captions))
    close(scores_of(matcher, regions[b], captions[c]), scores[b][:, c], atol=tolerance)


@each
@in_both_precisions
def test_codes_are_scored_in_tiles_or_as_pairs(name, arguments, dtype):
    tolerance = max(1e-6, tolerance_of(name, arguments, dtype))  # results are float32
    matcher = make(name, arguments, dtype)
    regions, captions = ragged(dtype)
    scores = scores_of(matcher, regions, captions).float()
    images = encode(matcher.encode_images, [regions[:4], regions[4:]])
    sentences = encode(matcher.encode_captions, [captions[:2], captions[2:]])
    for memory in (1, 20_000, 2**30):
        close(score(matcher, images, sentences, memory=memory), scores, atol=tolerance)
    rows = torch.randint(len(regions), (len(captions),))
    pairs = score_pairs(matcher, images, sentences, rows)
    close(pairs, scores[rows, torch.arange(len(captions))], atol=tolerance)


@each
def test_pairs_are_the_diagonal_of_match(name, arguments):
    matcher = make(name, arguments, torch.float64)
    images, sentences = codes_of(matcher, *ragged(torch.float64, images=19, captions=19))
    for n in (1, 2, 8, 19):
        pairs = matcher.pairs(images[:n], sentences[:n])
        close(pairs, matcher.match(images[:n], sentences[:n]).diagonal())
    pairs = gradients_of(matcher, matcher.pairs(images, sentences).sum())
    diagonal = gradients_of(matcher, matcher.match(images, sentences).diagonal().sum())
    for a, b in zip(pairs, diagonal):
        close(a, b, atol=1e-10, rtol=1e-8)
    with pytest.raises(ValueError, match='as many images as captions, not 19 and 3'):
        matcher.pairs(images, sentences[:3])


# ---------------------------------------------------------------- regions


@each
def test_regions_in_any_order(name, arguments):
    matcher = make(name, arguments, torch.float64)
    regions, captions = ragged(torch.float64)
    order = torch.randperm(5)
    # the triples' rows move along
    rows = regions.triples[..., [0, 2]]
    rows = torch.where(rows < 0, -1, order.argsort()[rows])
    shuffled = changed(
        regions,
        features=regions.features[:, order],
        mask=regions.mask[:, order],
        boxes=regions.boxes[:, order],
        triples=torch.stack([rows[..., 0], regions.triples[..., 1], rows[..., 1]], -1),
    )
    close(scores_of(matcher, shuffled, captions), scores_of(matcher, regions, captions))


@each
def test_a_hidden_region_is_as_if_it_had_never_been(name, arguments):
    "What `drop_regions` relies on."
    matcher = make(name, arguments, torch.float64)
    regions, captions = ragged(torch.float64)
    hidden = changed(regions, mask=regions.mask & (torch.arange(5) != 1))
    # without region 1, and without its triples
    rows = torch.tensor([0, 2, 3, 4])
    place = torch.tensor([0, -1, 1, 2, 3])
    ends = regions.triples[..., [0, 2]]
    ends = torch.where(ends < 0, -1, place[ends])
    triples = torch.stack([ends[..., 0], regions.triples[..., 1], ends[..., 1]], -1)
    triples[(ends < 0).any(-1)] = -1
    fewer = changed(
        regions,
        features=regions.features[:, rows],
        mask=regions.mask[:, rows],
        boxes=regions.boxes[:, rows],
        triples=triples,
    )
    have = hidden.mask.any(1)
    close(scores_of(matcher, hidden, captions)[have], scores_of(matcher, fewer, captions)[have])


# ---------------------------------------------------------------- gradients and memory


@each
def test_gradients_are_finite_and_reach_every_parameter(name, arguments):
    matcher = make(name, arguments, torch.float64).train()
    regions, captions = ragged(torch.float64, images=6, captions=6)
    in_bce = name == 'camp' and arguments.get('head') != 'cosine'
    criterion = HardestBCE() if in_bce else Triplet()
    scores = matcher.match(*codes_of(matcher, regions, captions))
    criterion(scores, torch.eye(6, dtype=torch.bool)).backward()
    still = []
    for parameter_name, parameter in matcher.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        if not parameter.grad.any():
            still.append(parameter_name)
    assert all(parameter_name.startswith('words.embed') for parameter_name in still)


@each
def test_score_stays_within_its_memory_budget(name, arguments):
    matcher = make(name, arguments, torch.float32)
    with torch.no_grad():
        images, sentences = codes_of(matcher, *ragged(torch.float32, images=40, captions=60))
    budget = 2**21
    with PeakBytes() as counter:
        score(matcher, images, sentences, memory=budget)
    result = 4 * 40 * 60
    assert counter.peak <= 1.15 * budget + result


@each
def test_what_is_recomputed_changes_neither_score_nor_gradient(name, arguments):
    matcher = make(name, arguments, torch.float64)
    regions, captions = ragged(torch.float64, images=40, captions=20)
    weight = torch.randn(40, 20, dtype=torch.float64)

    def scores_and_gradients(match):
        scores = match(*codes_of(matcher, regions, captions))
        return scores.detach(), *gradients_of(matcher, (scores * weight).sum())

    whole = scores_and_gradients(matcher.match)
    kept, some_kept, none_kept = (
        scores_and_gradients(partial(match_by_length, matcher, memory=memory))
        for memory in (None, 100_000, 0)
    )
    for a, b, c, d in zip(whole, kept, some_kept, none_kept):
        # the very same operations, once or twice
        assert b.equal(c)
        assert b.equal(d)
        close(a, b, atol=1e-11)


def test_recomputation_stays_within_its_budget():
    camp = make('camp', {}, torch.float32)
    images, sentences = codes_of(camp, *ragged(torch.float32, images=128, captions=64))
    peaks = []
    for memory in (2**40, 2**21, 0):
        with PeakBytes() as counter:
            scores = match_by_length(camp, images, sentences, memory=memory)
            scores.sum().backward(retain_graph=True)
        peaks.append(counter.peak)
    assert peaks[0] > 3 * peaks[1] > 3 * 2**21
    assert peaks[1] > peaks[2]


def test_a_tensor_changed_in_place_is_noticed_where_bytes_are_counted():
    x = torch.ones(3, requires_grad=True)
    with KeptBytes([x]) as counter:
        y = x.exp()
        squares = y.square()
    # y, kept twice, counts once
    assert counter.bytes == 4 * 3
    squares.sum().backward()
    with KeptBytes([x]):
        y = x.exp()
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match='changed in place'):
        y.sum().backward()
