"What every matcher owes: scores of a pair depend on that pair alone, however it is padded, tiled, ordered or encoded."

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imtm_lite.checkpoints import MODELS
from imtm_lite.gallery import chosen_pairs, put_below, rerank, rerank_agreement, score_chosen
from imtm_lite.losses import HardestBCE, Triplet
from imtm_lite.models.camp import CAMP, CAMPStage1, load_released
from imtm_lite.regions import Regions
from imtm_lite.scoring import KeptBytes, PeakBytes, encode, match_by_length, score, score_pairs
from imtm_lite.text import Captions

PREDICATES = 4
CAMPS = (
    dict(gate='scalar'),
    dict(gate='none'),
    dict(fusion='concat'),
    dict(fusion='product'),
    dict(fusion='none'),
    dict(messages='mean'),
    dict(messages='none'),
    dict(messages='none', head='cosine'),
    dict(residual=False),
    dict(pool='mean'),
    dict(head='cosine'),
    dict(codes='raw'),
    dict(start='uniform'),
    dict(form='released'),
    dict(form='released', gate='elementwise'),
    dict(form='released', gate='none'),
    dict(form='released', fusion='sum'),
    dict(form='released', residual=False),
    dict(form='released', pool='mean'),
    dict(form='released', start='similarity'),
    dict(form='released', codes='unit'),
)
VARIANTS = [(name, {}) for name in MODELS] + [
    ('scan', dict(direction='i2t')),
    ('scan', dict(direction='both')),
    ('scan', dict(lse=6.0)),
    *(('camp', a) for a in CAMPS),
    *(
        ('cmsei', a)
        for a in (
            dict(spatial='labels', layers=2),
            dict(spatial='iou', semantic=False),
            dict(spatial='none', threshold=0.5),
            dict(reasoning='gated'),
            dict(object_word=False),
            dict(object_sentence=False),
            dict(word_image=False),
            dict(object_word=False, object_sentence=False, word_image=False),
            dict(spatial='binary', weighted=False, combined=True),
            dict(refine=False),
            dict(refine=False, object_word=False),
        )
    ),
    *(('ssamt', a) for a in (dict(phrases=False), dict(local=False), dict(layers=1))),
    *(
        ('hire', a)
        for a in (
            dict(order='explicit-implicit'),
            dict(order='parallel'),
            dict(spatial='none', semantic=False),
        )
    ),
]
each = pytest.mark.parametrize(
    'name,arguments',
    VARIANTS,
    ids=lambda v: v if isinstance(v, str) else '-'.join(map(str, v.values())),
)


def ragged(dtype, images=6, captions=9, regions=5, words=8):
    "Pictures with 1 to R regions, sentences of 3 to T words, and a bundle of each."
    have = torch.randint(1, regions + 1, (images,))
    have[0] = regions
    features = (
        torch.rand(images, regions, 7, dtype=dtype)
        * (torch.arange(regions) < have[:, None])[..., None]
    )
    lengths = torch.randint(3, words + 1, (captions,))
    lengths[0] = words
    tokens = torch.randint(4, 30, (captions, words)) * (torch.arange(words) < lengths[:, None])
    corner = torch.rand(images, regions, 2, 2, dtype=dtype).sort(-1).values.unbind(2)
    wide = torch.tensor([640.0, 480.0], dtype=dtype).repeat(images, 1)
    triples = torch.stack(
        [torch.randint(0, n, (images, 6)) for n in (regions, PREDICATES, regions)], -1
    )
    triples[torch.rand(images, 6) < 0.3] = -1
    boxes = torch.stack(
        [corner[0][..., 0], corner[1][..., 0], corner[0][..., 1], corner[1][..., 1]], -1
    )
    return Regions(
        features=features,
        boxes=boxes,
        sizes=wide,
        triples=triples,
        confidence=torch.rand(images, 6, dtype=dtype),
    ), with_phrases(Captions(tokens=tokens, lengths=lengths))


def with_phrases(captions, phrases=4):
    "Some phrases for every caption but the last, which has none."
    kinds = torch.randint(-1, 3, (len(captions), phrases))
    kinds[-1] = -1
    units = (
        (torch.rand(len(captions), phrases, captions.tokens.shape[1]) < 0.3)
        & captions.mask[:, None]
        & (kinds >= 0)[..., None]
    )
    return Captions(
        tokens=captions.tokens,
        lengths=captions.lengths,
        units=units,
        kinds=kinds.where(units.any(2), -1),
    )


def changed(regions, **new):
    "The same regions with some tensors replaced."
    return Regions(**(dict(regions.items()) | new))


def make(name, arguments, dtype):
    facts = dict(region_width=7, words=30, predicates=PREDICATES, width=16, word_width=6)
    if name.startswith('ssamt'):
        facts |= dict(heads=4, feedforward=24)
    matcher = MODELS[name](
        **{k: v for k, v in facts.items() if k in inspect.signature(MODELS[name]).parameters},
        **arguments,
    )
    # no layer that starts as zeros may hide
    for p in matcher.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return matcher.to(dtype).eval()


@torch.no_grad()
def scores_of(matcher, regions, captions):
    return matcher.match(matcher.encode_images(regions), matcher.encode_captions(captions))


@each
@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_scores_ignore_padding_tiles_and_order(name, arguments, dtype, tolerance):
    if dtype == torch.float32 and name in ('cmsei', 'hire') and arguments.get('refine', True):
        # a refined vector has two roundings more; float64 says it is only that
        tolerance = 3e-6
    matcher, (regions, captions) = make(name, arguments, dtype), ragged(dtype)
    scores = scores_of(matcher, regions, captions)
    close = lambda got, want=scores: torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    padded = (
        changed(
            regions,
            features=F.pad(regions.features, (0, 0, 0, 3)),
            mask=F.pad(regions.mask, (0, 3)),
            boxes=F.pad(regions.boxes, (0, 0, 0, 3), value=0.5),
            triples=F.pad(regions.triples, (0, 0, 0, 2), value=-1),
            confidence=F.pad(regions.confidence, (0, 2)),
        ),
        Captions(
            tokens=F.pad(captions.tokens, (0, 40)),
            lengths=captions.lengths,
            units=F.pad(captions.units, (0, 40, 0, 3)),
            kinds=F.pad(captions.kinds, (0, 3), value=-1),
        ),
    )
    close(scores_of(matcher, *padded))
    alone = torch.stack(
        [
            torch.cat(
                [
                    scores_of(
                        matcher,
                        regions[b],
                        Captions(
                            tokens=captions.tokens[c : c + 1, :n],
                            lengths=captions.lengths[c : c + 1],
                            units=captions.units[c : c + 1, :, :n],
                            kinds=captions.kinds[c : c + 1],
                        ),
                    )[0]
                    for c, n in enumerate(captions.lengths.tolist())
                ]
            )
            for b in range(len(regions))
        ]
    )
    close(alone)
    b = torch.randperm(len(regions))
    c = torch.randperm(len(captions))
    close(scores_of(matcher, regions[b], captions[c]), scores[b][:, c])
    images = encode(matcher.encode_images, [regions[:4], regions[4:]])
    sentences = encode(matcher.encode_captions, [captions[:2], captions[2:]])
    for memory in (1, 20_000, 2**30):
        torch.testing.assert_close(
            score(matcher, images, sentences, memory=memory),
            scores.float(),
            atol=max(tolerance, 1e-6),
            rtol=0,
        )
    rows = torch.randint(len(regions), (len(captions),))
    torch.testing.assert_close(
        score_pairs(matcher, images, sentences, rows),
        scores[rows, torch.arange(len(captions))].float(),
        atol=max(tolerance, 1e-6),
        rtol=0,
    )


@each
def test_pairs_are_the_diagonal_of_match(name, arguments):
    matcher, (regions, captions) = (
        make(name, arguments, torch.float64),
        ragged(torch.float64, images=19, captions=19),
    )
    images = matcher.encode_images(regions)
    sentences = matcher.encode_captions(captions)
    for n in (1, 2, 8, 19):
        torch.testing.assert_close(
            matcher.pairs(images[:n], sentences[:n]),
            matcher.match(images[:n], sentences[:n]).diagonal(),
            atol=1e-12,
            rtol=0,
        )
    pairs = torch.autograd.grad(
        matcher.pairs(images, sentences).sum(),
        list(matcher.parameters()),
        retain_graph=True,
        allow_unused=True,
    )
    whole = torch.autograd.grad(
        matcher.match(images, sentences).diagonal().sum(),
        list(matcher.parameters()),
        allow_unused=True,
    )
    for a, b in zip(pairs, whole):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    with pytest.raises(ValueError, match='as many images as captions, not 19 and 3'):
        matcher.pairs(images, sentences[:3])


def rerank_plain(first, exact, candidates):
    "Loops over rows and columns; what is left over keeps its order, one below the worst exact score."
    B, C = first.shape
    chosen = [[False] * C for _ in range(B)]
    for b in range(B):
        for c in sorted(range(C), key=lambda c: -first[b, c])[:candidates]:
            chosen[b][c] = True
    for c in range(C):
        for b in sorted(range(B), key=lambda b: -first[b, c])[:candidates]:
            chosen[b][c] = True
    exacts = [exact[b, c] for b in range(B) for c in range(C) if chosen[b][c]]
    others = [first[b, c] for b in range(B) for c in range(C) if not chosen[b][c]]
    return torch.tensor(
        [
            [
                exact[b, c] if chosen[b][c] else first[b, c] - max(others) + min(exacts) - 1
                for c in range(C)
            ]
            for b in range(B)
        ]
    )


@pytest.mark.parametrize('candidates', [1, 3, 6, 50])
def test_rerank_is_exact_for_candidates_and_puts_all_others_below(candidates):
    matcher, (regions, captions) = (
        make('scan', {}, torch.float64),
        ragged(torch.float64, images=7, captions=12),
    )
    with torch.no_grad():
        images = matcher.encode_images(regions)
        sentences = matcher.encode_captions(captions)
    exact = matcher.match(images, sentences).float()
    first = 5 * torch.randn(7, 12)
    told = []
    got = rerank(matcher, images, sentences, first, candidates=candidates, tell=told.append)
    torch.testing.assert_close(got, rerank_plain(first, exact, candidates), atol=1e-5, rtol=0)
    chosen = chosen_pairs(first, candidates)
    assert (
        sum(told) == chosen.sum()
        and (chosen.sum(0) >= min(candidates, 7)).all()
        and (chosen.sum(1) >= min(candidates, 12)).all()
    )
    torch.testing.assert_close(got[chosen], exact[chosen], atol=1e-6, rtol=0)
    if not chosen.all():
        assert got[~chosen].max() < got[chosen].min()
        # the order of the first look
        assert got[~chosen].argsort().equal(first[~chosen].argsort())
    every = torch.ones_like(chosen)
    torch.testing.assert_close(
        score_chosen(matcher, images, sentences, every, size=5).view(7, 12),
        exact,
        atol=1e-6,
        rtol=0,
    )
    found = rerank_agreement(matcher, images, sentences, first, candidates=candidates, sample=12)
    for k in (1, 5, 10):
        hits = [
            bool(chosen[b, c])
            for c in range(12)
            for b in exact[:, c].argsort(descending=True)[:k].tolist()
        ]
        assert found[k] == pytest.approx(100 * sum(hits) / len(hits))
    assert (
        rerank_agreement(matcher, images, sentences, exact, candidates=candidates, sample=5)[1]
        == 100
    )


def test_nothing_to_put_below():
    first = torch.randn(3, 4)
    assert put_below(first, torch.zeros(3, 4, dtype=torch.bool), torch.empty(0)).equal(first)
    assert put_below(first, torch.ones(3, 4, dtype=torch.bool), torch.arange(12.0)).equal(
        torch.arange(12.0).view(3, 4)
    )


@each
def test_regions_in_any_order(name, arguments):
    matcher, (regions, captions) = make(name, arguments, torch.float64), ragged(torch.float64)
    order = torch.randperm(5)
    # the triples' rows move along
    rows = torch.where(
        regions.triples[..., [0, 2]] < 0, -1, order.argsort()[regions.triples[..., [0, 2]]]
    )
    triples = torch.stack([rows[..., 0], regions.triples[..., 1], rows[..., 1]], -1)
    shuffled = changed(
        regions,
        features=regions.features[:, order],
        mask=regions.mask[:, order],
        boxes=regions.boxes[:, order],
        triples=triples,
    )
    torch.testing.assert_close(
        scores_of(matcher, shuffled, captions),
        scores_of(matcher, regions, captions),
        atol=1e-12,
        rtol=0,
    )


@each
def test_a_hidden_region_is_as_if_it_had_never_been(name, arguments):
    "What `drop_regions` relies on."
    matcher, (regions, captions) = make(name, arguments, torch.float64), ragged(torch.float64)
    hidden = changed(regions, mask=regions.mask & (torch.arange(5) != 1))
    # without region 1, and without its triples
    rows = torch.tensor([0, 2, 3, 4])
    place = torch.tensor([0, -1, 1, 2, 3])
    ends = torch.where(regions.triples[..., [0, 2]] < 0, -1, place[regions.triples[..., [0, 2]]])
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
    torch.testing.assert_close(
        scores_of(matcher, hidden, captions)[have],
        scores_of(matcher, fewer, captions)[have],
        atol=1e-12,
        rtol=0,
    )


@each
def test_gradients_are_finite_and_reach_every_parameter(name, arguments):
    matcher, (regions, captions) = (
        make(name, arguments, torch.float64).train(),
        ragged(torch.float64, images=6, captions=6),
    )
    bce = name == 'camp' and arguments.get('head') != 'cosine'
    criterion = HardestBCE() if bce else Triplet()
    scores = matcher.match(matcher.encode_images(regions), matcher.encode_captions(captions))
    criterion(scores, torch.eye(6, dtype=torch.bool)).backward()
    for n, p in matcher.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), n
    still = [
        n
        for n, p in matcher.named_parameters()
        if not p.grad.any() and not n.startswith('words.embed')
    ]
    assert not still


@each
def test_score_stays_within_its_memory_budget(name, arguments):
    matcher, (regions, captions) = (
        make(name, arguments, torch.float32),
        ragged(torch.float32, images=40, captions=60),
    )
    with torch.no_grad():
        images = matcher.encode_images(regions)
        sentences = matcher.encode_captions(captions)
    budget = 2**21
    with PeakBytes() as counter:
        score(matcher, images, sentences, memory=budget)
    assert counter.peak <= 1.15 * budget + 4 * 40 * 60


@pytest.mark.parametrize(
    'file,matcher',
    [
        ('gate_fusion_new', lambda **s: CAMP(form='released', **s)),
        ('gate_fusion_new_sum', lambda **s: CAMP(form='released', fusion='sum', **s)),
        ('cross_attention_new', lambda **s: CAMPStage1(count_padding=True, **s)),
    ],
)
def test_camp_equals_the_released_scores(file, matcher):
    arrays = {
        k: torch.from_numpy(v)
        for k, v in np.load(f'{__file__.rpartition("/")[0]}/camp_released/{file}.npz').items()
    }
    ours = matcher(region_width=32, words=5, width=32, word_width=4).double()
    load_released(
        ours, {k.removeprefix('weight.'): v for k, v in arrays.items() if k.startswith('weight.')}
    )
    v = arrays['regions']
    t = arrays['words']
    mask = torch.arange(t.shape[1]) < arrays['lengths'][:, None]
    with torch.no_grad():
        scores = ours.match(
            ours.image_codes(v, torch.ones(v.shape[:2], dtype=torch.bool)),
            ours.caption_codes(t, mask),
        )
    assert (scores - arrays['scores']).abs().max() < 1e-10


def test_released_weights_of_another_model_are_refused():
    arrays = np.load(f'{__file__.rpartition("/")[0]}/camp_released/cross_attention_new.npz')
    weights = {
        k.removeprefix('weight.'): torch.from_numpy(v)
        for k, v in arrays.items()
        if k.startswith('weight.')
    }
    with pytest.raises(ValueError, match='missing'):
        load_released(
            CAMP(form='released', region_width=32, words=5, width=32, word_width=4).double(),
            weights,
        )


def attend_plain(query, key, values):
    "Scaled dot-product attention of one item's vectors over another's, none of them padding."
    return (query @ key.T / math.sqrt(query.shape[-1])).softmax(-1) @ values


def released_pair_plain(camp, v, t):
    "The released full model for one picture (R, D) and one sentence (T, D), every tensor written out."

    def unit(x):
        return x / (x.norm(dim=-1, keepdim=True) + 1e-8)

    def side(x, y, own, other, fusion, pool):
        first = attend_plain(own.query(x), other.key(y), y)
        message = unit(attend_plain(other.message_query(first), other.message_key(first), first))
        gate = torch.sigmoid((x * message).sum(-1, keepdim=True))
        fused = F.relu(fusion.linear(torch.cat((x, message), -1) * gate)) + x
        heads = pool.logits(F.relu(pool.hidden(fused))).softmax(0)
        return unit((heads.T @ fused).mean(0))

    regions = camp.messages.regions
    words = camp.messages.words
    a = side(v, t, regions, words, camp.image_fusion, camp.image_pool)
    b = side(t, v, words, regions, camp.word_fusion, camp.word_pool)
    return torch.sigmoid(camp.head.out(F.relu(camp.head.hidden(torch.cat((a, b))))))[0]


def paper_pair_plain(
    camp,
    v,
    t,
    gate='elementwise',
    fusion='sum',
    residual=True,
    messages='one-level',
    pool='vector',
    head='mlp',
    codes='unit',
    start='',
):
    "The paper's model (eq. 1 to 12) and its ablations for one picture (R, D) and one sentence (T, D), position by position."

    def pooled(x, weight):
        a = (
            (x @ weight / math.sqrt(x.shape[-1])).softmax(0)
            if pool == 'vector'
            else torch.full((len(x),), 1 / len(x), dtype=x.dtype)
        )
        return sum(share * vector for share, vector in zip(a, x))

    def side(x, y, own, other, layer, weight):
        if messages == 'none':
            return pooled(x, weight)
        received = (
            y.mean(0).expand(len(x), -1)
            if messages == 'mean'
            else attend_plain(own(x), other(y), y)
        )
        out = []
        for vector, message in zip(x, received):
            if gate == 'elementwise':
                g = torch.sigmoid(vector * message)
            elif gate == 'scalar':
                g = torch.sigmoid(
                    vector @ message / (math.sqrt(len(vector)) if codes == 'unit' else 1)
                )
            else:
                g = 1
            if fusion == 'sum':
                out.append(F.relu(layer(g * (vector + message))))
            elif fusion == 'product':
                out.append(F.relu(layer(g * vector * message)))
            elif fusion == 'concat':
                out.append(F.relu(layer(torch.cat([g * vector, g * message]))))
            else:
                out.append(message)
            if residual and fusion != 'none':
                out[-1] = out[-1] + vector
        return pooled(torch.stack(out), weight)

    def parts(fusion_layer, pool_layer):
        return getattr(fusion_layer, 'linear', None), getattr(
            getattr(pool_layer, 'logits', None), 'weight', [None]
        )[0]

    own = getattr(camp.messages, 'regions', None)
    other = getattr(camp.messages, 'words', None)
    a = side(v, t, own, other, *parts(camp.image_fusion, camp.image_pool))
    b = side(t, v, other, own, *parts(camp.word_fusion, camp.word_pool))
    if head == 'cosine':
        return a @ b / (a.norm() * b.norm())
    return torch.sigmoid(camp.head.out(F.relu(camp.head.hidden(a + b))))[0]


@pytest.mark.parametrize(
    'arguments',
    [a for a in ({}, *CAMPS) if a.get('form') != 'released'] + [dict(form='released')],
    ids=lambda a: '-'.join(map(str, a.values())) or 'paper',
)
def test_camp_equals_its_plain_form_on_ragged_input_with_gradients(arguments):
    camp, (regions, captions) = make('camp', arguments, torch.float64), ragged(torch.float64)
    plain_pair = (
        released_pair_plain if arguments.get('form') else partial(paper_pair_plain, **arguments)
    )
    images = camp.encode_images(regions)
    sentences = camp.encode_captions(captions)
    fast = camp.match(images, sentences)
    plain = torch.stack(
        [
            torch.stack(
                [
                    plain_pair(camp, images.x[b][images.mask[b]], sentences.x[c][sentences.mask[c]])
                    for c in range(len(sentences))
                ]
            )
            for b in range(len(images))
        ]
    )
    torch.testing.assert_close(fast, plain, atol=1e-12, rtol=0)
    weight = torch.randn_like(fast)
    a, b = (
        torch.autograd.grad((s * weight).sum(), list(camp.parameters()), retain_graph=True)
        for s in (fast, plain)
    )
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-8)


@each
def test_what_is_recomputed_changes_neither_score_nor_gradient(name, arguments):
    matcher, (regions, captions) = (
        make(name, arguments, torch.float64),
        ragged(torch.float64, images=40, captions=20),
    )
    weight = torch.randn(40, 20, dtype=torch.float64)
    found = []
    for scores in (
        matcher.match,
        *(partial(match_by_length, matcher, memory=m) for m in (None, 100_000, 0)),
    ):
        s = scores(matcher.encode_images(regions), matcher.encode_captions(captions))
        found.append(
            (
                s.detach(),
                *torch.autograd.grad(
                    (s * weight).sum(), list(matcher.parameters()), allow_unused=True
                ),
            )
        )
    for a, b, c, d in zip(*found):
        if b is None:
            assert a is c is d is None
            continue
        # the very same operations, once or twice
        assert b.equal(c) and b.equal(d)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_recomputation_stays_within_its_budget():
    camp, (regions, captions) = (
        make('camp', {}, torch.float32),
        ragged(torch.float32, images=128, captions=64),
    )
    images = camp.encode_images(regions)
    sentences = camp.encode_captions(captions)
    kept = []
    for memory in (2**40, 2**21, 0):
        with PeakBytes() as peak:
            match_by_length(camp, images, sentences, memory=memory).sum().backward(
                retain_graph=True
            )
        kept.append(peak.peak)
    assert kept[0] > 3 * kept[1] > 3 * 2**21 and kept[1] > kept[2]


def test_a_tensor_changed_in_place_is_noticed_where_bytes_are_counted():
    x = torch.ones(3, requires_grad=True)
    with KeptBytes([x]) as counter:
        y = x.exp()
        z = y.square()
    # y, kept twice, counts once
    assert counter.bytes == 4 * 3
    z.sum().backward()
    with KeptBytes([x]):
        y = x.exp()
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match='changed in place'):
        y.sum().backward()
