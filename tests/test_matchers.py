"What every matcher owes: scores of a pair depend on that pair alone, however it is padded, tiled, ordered or encoded."
import inspect, math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imtm_lite.data import Batch
from imtm_lite.encoders import KeptBytes, match_by_length
from imtm_lite.losses import HardestBCE, Triplet
from imtm_lite.models.camp import CAMP, CAMPStage1, load_released
from imtm_lite.phrases import Entity, PhraseLabels, TextGraph
from imtm_lite.regions import Regions
from imtm_lite.scoring import PeakBytes, encode, score, score_pairs
from imtm_lite.text import Captions
from imtm_lite.train import MODELS

PREDICATES = 4
VARIANTS = [(name, {}) for name in MODELS] + [('scan', dict(direction='i2t')), ('scan', dict(direction='both')), ('scan', dict(lse=6.)),
            *(('camp', a) for a in (dict(gate='elementwise'), dict(gate='none'), dict(fusion='sum'), dict(residual=False), dict(pool='mean'),
                                    dict(gate='elementwise', fusion='sum'))),
            *(('cmsei', a) for a in (dict(spatial='labels', layers=2), dict(spatial='iou', semantic=False), dict(spatial='none', threshold=.5), dict(reasoning='gated'),
                                     dict(object_word=False), dict(object_sentence=False), dict(word_image=False), dict(object_word=False, object_sentence=False, word_image=False),
                                     dict(spatial='binary', weighted=False, combined=True), dict(refine=False), dict(refine=False, object_word=False))),
            *(('ssamt', a) for a in (dict(units='entities'), dict(units='triples'), dict(structure=False), dict(local=False), dict(layers=2), dict(phrase_weight=0.))),
            *(('hire', a) for a in (dict(order='explicit-implicit'), dict(order='parallel'), dict(spatial='none', semantic=False)))]
each = pytest.mark.parametrize('name,arguments', VARIANTS, ids=lambda v: v if isinstance(v, str) else '-'.join(map(str, v.values())))


def ragged(dtype, images=6, captions=9, regions=5, words=8):
    "Pictures with 1 to R regions, sentences of 3 to T words, and a bundle of each."
    have = torch.randint(1, regions + 1, (images,)); have[0] = regions
    features = torch.rand(images, regions, 7, dtype=dtype) * (torch.arange(regions) < have[:, None])[..., None]
    lengths = torch.randint(3, words + 1, (captions,)); lengths[0] = words
    tokens = torch.randint(4, 30, (captions, words)) * (torch.arange(words) < lengths[:, None])
    corner, wide = torch.rand(images, regions, 2, 2, dtype=dtype).sort(-1).values.unbind(2), torch.tensor([640., 480.], dtype=dtype).repeat(images, 1)
    triples = torch.stack([torch.randint(0, n, (images, 6)) for n in (regions, PREDICATES, regions)], -1)
    triples[torch.rand(images, 6) < .3] = -1
    boxes = torch.stack([corner[0][..., 0], corner[1][..., 0], corner[0][..., 1], corner[1][..., 1]], -1)
    return Regions(features=features, boxes=boxes, sizes=wide, triples=triples, confidence=torch.rand(images, 6, dtype=dtype)), with_phrases(Captions(tokens=tokens, lengths=lengths))


def with_phrases(captions, phrases=4):
    "Some phrases for every caption but the last, which has none."
    kinds = torch.randint(-1, 2, (len(captions), phrases)); kinds[-1] = -1
    units = (torch.rand(len(captions), phrases, captions.tokens.shape[1]) < .3) & captions.mask[:, None] & (kinds >= 0)[..., None]
    return Captions(tokens=captions.tokens, lengths=captions.lengths, units=units, kinds=kinds.where(units.any(2), -1))


def changed(regions, **new):
    "The same regions with some tensors replaced."
    return Regions(**(dict(regions.items()) | new))


def make(name, arguments, dtype):
    facts = dict(region_width=7, words=30, predicates=PREDICATES)
    matcher = MODELS[name](**{k: v for k, v in facts.items() if k in inspect.signature(MODELS[name]).parameters}, width=16, word_width=6, **arguments)
    for p in matcher.parameters(): p.data += .05 * torch.randn_like(p)        # no layer that starts as zeros may hide
    return matcher.to(dtype).eval()


@torch.no_grad()
def scores_of(matcher, regions, captions):
    return matcher.match(matcher.encode_images(regions), matcher.encode_captions(captions))


@each
@pytest.mark.parametrize('dtype,tolerance', [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_scores_ignore_padding_tiles_and_order(name, arguments, dtype, tolerance):
    matcher, (regions, captions) = make(name, arguments, dtype), ragged(dtype)
    scores = scores_of(matcher, regions, captions)
    close = lambda got, want=scores: torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    padded = (changed(regions, features=F.pad(regions.features, (0, 0, 0, 3)), mask=F.pad(regions.mask, (0, 3)), boxes=F.pad(regions.boxes, (0, 0, 0, 3), value=.5),
                      triples=F.pad(regions.triples, (0, 0, 0, 2), value=-1), confidence=F.pad(regions.confidence, (0, 2))),
              Captions(tokens=F.pad(captions.tokens, (0, 40)), lengths=captions.lengths, units=F.pad(captions.units, (0, 40, 0, 3)), kinds=F.pad(captions.kinds, (0, 3), value=-1)))
    close(scores_of(matcher, *padded))
    alone = torch.stack([torch.cat([scores_of(matcher, regions[b], Captions(tokens=captions.tokens[c:c + 1, :n], lengths=captions.lengths[c:c + 1], units=captions.units[c:c + 1, :, :n], kinds=captions.kinds[c:c + 1]))[0]
                                    for c, n in enumerate(captions.lengths.tolist())]) for b in range(len(regions))])
    close(alone)
    b, c = torch.randperm(len(regions)), torch.randperm(len(captions))
    close(scores_of(matcher, regions[b], captions[c]), scores[b][:, c])
    images, sentences = encode(matcher.encode_images, [regions[:4], regions[4:]]), encode(matcher.encode_captions, [captions[:2], captions[2:]])
    for memory in (1, 20_000, 2**30):
        torch.testing.assert_close(score(matcher, images, sentences, memory=memory), scores.float(), atol=max(tolerance, 1e-6), rtol=0)
    rows = torch.randint(len(regions), (len(captions),))
    torch.testing.assert_close(score_pairs(matcher, images, sentences, rows), scores[rows, torch.arange(len(captions))].float(), atol=max(tolerance, 1e-6), rtol=0)


@each
def test_regions_in_any_order(name, arguments):
    matcher, (regions, captions) = make(name, arguments, torch.float64), ragged(torch.float64)
    order = torch.randperm(5)
    rows = torch.where(regions.triples[..., [0, 2]] < 0, -1, order.argsort()[regions.triples[..., [0, 2]]])     # the triples' rows move along
    triples = torch.stack([rows[..., 0], regions.triples[..., 1], rows[..., 1]], -1)
    shuffled = changed(regions, features=regions.features[:, order], mask=regions.mask[:, order], boxes=regions.boxes[:, order], triples=triples)
    torch.testing.assert_close(scores_of(matcher, shuffled, captions), scores_of(matcher, regions, captions), atol=1e-12, rtol=0)


@each
def test_gradients_are_finite_and_reach_every_parameter(name, arguments):
    matcher, (regions, captions) = make(name, arguments, torch.float64).train(), ragged(torch.float64, images=6, captions=6)
    matcher.criterion = HardestBCE() if name == 'camp' else Triplet()
    scores = matcher.match(matcher.encode_images(regions), matcher.encode_captions(captions))
    matcher.criterion(scores, torch.eye(6, dtype=torch.bool)).backward()
    for n, p in matcher.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), n
    still = [n for n, p in matcher.named_parameters() if not p.grad.any() and not n.startswith('words.embed')]
    assert not still


@each
def test_score_stays_within_its_memory_budget(name, arguments):
    matcher, (regions, captions) = make(name, arguments, torch.float32), ragged(torch.float32, images=40, captions=60)
    with torch.no_grad(): images, sentences = matcher.encode_images(regions), matcher.encode_captions(captions)
    budget = 2**21
    with PeakBytes() as counter: score(matcher, images, sentences, memory=budget)
    assert counter.peak <= 1.15 * budget + 4 * 40 * 60


@pytest.mark.parametrize('file,matcher', [('gate_fusion_new', lambda **s: CAMP(**s)), ('gate_fusion_new_sum', lambda **s: CAMP(fusion='sum', **s)),
                                          ('cross_attention_new', lambda **s: CAMPStage1(count_padding=True, **s))])
def test_camp_equals_the_released_scores(file, matcher):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(f'{__file__.rpartition("/")[0]}/camp_released/{file}.npz').items()}
    ours = matcher(region_width=32, words=5, width=32, word_width=4).double()
    load_released(ours, {k.removeprefix('weight.'): v for k, v in arrays.items() if k.startswith('weight.')})
    v, t = arrays['regions'], arrays['words']
    mask = torch.arange(t.shape[1]) < arrays['lengths'][:, None]
    with torch.no_grad(): scores = ours.match(ours.image_codes(v, torch.ones(v.shape[:2], dtype=torch.bool)), ours.caption_codes(t, mask))
    assert (scores - arrays['scores']).abs().max() < 1e-10


def test_released_weights_of_another_model_are_refused():
    arrays = np.load(f'{__file__.rpartition("/")[0]}/camp_released/cross_attention_new.npz')
    weights = {k.removeprefix('weight.'): torch.from_numpy(v) for k, v in arrays.items() if k.startswith('weight.')}
    with pytest.raises(ValueError, match='missing'): load_released(CAMP(region_width=32, words=5, width=32, word_width=4).double(), weights)


def camp_pair_plain(camp, v, t):
    "The released full model for one picture (R, D) and one sentence (T, D), every tensor written out."
    def attend(q, k, values): return (q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ values
    unit = lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-8)
    def side(x, y, x_side, y_side, fusion, pool):
        m = attend(x_side.query(x), y_side.key(y), y)
        m = unit(attend(y_side.message_query(m), y_side.message_key(m), m))
        g = torch.sigmoid((x * m).sum(-1, keepdim=True))
        fused = F.relu(fusion.linear(torch.cat((x, m), -1) * g)) + x
        heads = pool.logits(F.relu(pool.hidden(fused))).softmax(0)
        return unit((heads.T @ fused).mean(0))
    a = side(v, t, camp.image_side, camp.word_side, camp.image_fusion, camp.image_pool)
    b = side(t, v, camp.word_side, camp.image_side, camp.word_fusion, camp.word_pool)
    return torch.sigmoid(camp.head(torch.cat((a, b))))[0]


def test_camp_equals_its_plain_form_on_ragged_input_with_gradients():
    camp, (regions, captions) = make('camp', {}, torch.float64), ragged(torch.float64)
    images, sentences = camp.encode_images(regions), camp.encode_captions(captions)
    fast = camp.match(images, sentences)
    plain = torch.stack([torch.stack([camp_pair_plain(camp, images.x[b][images.mask[b]], sentences.x[c][sentences.mask[c]])
                                      for c in range(len(sentences))]) for b in range(len(images))])
    torch.testing.assert_close(fast, plain, atol=1e-12, rtol=0)
    weight = torch.randn_like(fast)
    a, b = (torch.autograd.grad((s * weight).sum(), list(camp.parameters()), retain_graph=True) for s in (fast, plain))
    for x, y in zip(a, b): torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-8)


def ssamt_pair_plain(ssamt, regions, captions):
    "SSAMT for one picture and one sentence without padding: every node a vector, every look a loop."
    def look(block, x, looks): # x: list of vectors, looks: list of sets
        y, out, a = [block.norm(v) for v in x], [], block.attend
        heads = lambda z: z.view(a.heads, -1)
        for i, allowed in enumerate(looks):
            js = sorted(allowed)
            q, k, u = heads(a.query(y[i])), [heads(a.key(y[j])) for j in js], [heads(a.value(y[j])) for j in js]
            found = []
            for h in range(a.heads):
                w = torch.stack([q[h] @ k_[h] for k_ in k]).div(math.sqrt(q.shape[1])).softmax(0)
                found.append(sum(w_ * u_[h] for w_, u_ in zip(w, u)))
            out.append(F.normalize(x[i] + a.out(torch.cat(found)), dim=0))
        return out
    boxes = regions.boxes[0]
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))[:, None]
    v = [F.normalize(ssamt.regions.linear(f), dim=0) + ssamt.place(p) for f, p in zip(regions.features[0], torch.cat([boxes, area], 1))]
    R = len(v)
    x = [F.normalize(z, dim=0) for z in (*v, sum(v) / R)]
    for block in ssamt.image_tower.blocks: x = look(block, x, [set(range(R))] * R + [set(range(R + 1))])
    v, g = torch.stack(x[:R]), x[R]
    t = list(ssamt.words(captions)[0])
    T, wanted = len(t), {'both': (0, 1), 'entities': (0,), 'triples': (1,)}[ssamt.config['units']]
    units = [(k, set(u.nonzero().flatten().tolist())) for k, u in zip(captions.kinds[0].tolist(), captions.units[0]) if k in wanted]
    x = [F.normalize(z, dim=0) for z in (*t, *(sum(t[j] for j in u) / len(u) for _, u in units), sum(t) / T)]
    n = T + len(units)
    looks = [set(range(T)) for _ in range(T)] + [set() for _ in units] + [set(range(n + 1))]
    for p, (kind, u) in enumerate(units):
        looks[T + p] |= u | {T + p}
        for j in u: looks[j].add(T + p)
        for q, (other, w) in enumerate(units):
            if kind == 0 and other == 1 and u <= w: looks[T + p].add(T + q); looks[T + q].add(T + p)
    if not ssamt.config['structure']: looks = [set(range(n + 1))] * (n + 1)
    for block in ssamt.text_tower.blocks: x = look(block, x, looks)
    t, s = torch.stack(x[:T]), x[-1]
    phrases = [F.cosine_similarity(u, (ssamt.temperature * v @ u).softmax(0) @ v, dim=0) for u in x[T:-1]]
    scaled = F.leaky_relu(t @ v.T, .1)
    a = (ssamt.temperature * scaled / scaled.norm(dim=0)).softmax(-1)
    local = sum(F.cosine_similarity(w, b @ v, dim=0) for w, b in zip(t, a)) / T
    return s @ g + (local if ssamt.config['local'] else 0), phrases


@pytest.mark.parametrize('arguments', [{}, dict(units='entities'), dict(units='triples'), dict(structure=False), dict(local=False), dict(layers=2)])
def test_ssamt_equals_its_plain_form_on_ragged_input(arguments):
    torch.manual_seed(0)
    ssamt, (regions, captions) = make('ssamt', arguments, torch.float64), ragged(torch.float64)
    images, sentences = ssamt.encode_images(regions), ssamt.encode_captions(captions)
    scores = ssamt.match(images, sentences)
    for b in range(len(regions)):
        agreed = ssamt.phrase_agreement(images[[b] * len(sentences)], sentences)   # (C, P)
        R = int(regions.mask[b].sum())
        one = Regions(features=regions.features[b:b + 1, :R], boxes=regions.boxes[b:b + 1, :R])
        for c, n in enumerate(captions.lengths.tolist()):
            said = Captions(tokens=captions.tokens[c:c + 1, :n], lengths=captions.lengths[c:c + 1], units=captions.units[c:c + 1, :, :n], kinds=captions.kinds[c:c + 1])
            score, phrases = ssamt_pair_plain(ssamt, one, said)
            torch.testing.assert_close(scores[b, c], score, atol=1e-10, rtol=0)
            if phrases: torch.testing.assert_close(agreed[c, sentences.exists[c]], torch.stack(phrases), atol=1e-10, rtol=0)


def test_ssamt_loss_reaches_every_parameter_and_needs_labels():
    ssamt, (regions, captions) = make('ssamt', {}, torch.float64).train(), ragged(torch.float64, images=6, captions=6)
    ssamt.criterion = Triplet()
    batch = Batch(regions, captions, torch.arange(6), torch.arange(6), torch.arange(6))
    with pytest.raises(ValueError, match='no phrase labels yet'): ssamt(batch)
    ssamt.labels = PhraseLabels([TextGraph(('a',), tuple(Entity(0, 1, f'{c}{p}') for p in range(4))) for c in range(6)], range(6))
    losses = ssamt(batch)
    assert losses.keys() == {'match', 'phrase', 'total'} and losses['phrase'] > 0 and losses['total'] == losses['match'] + losses['phrase']
    losses['phrase'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad.any() or n == 'words.embed.weight') for n, p in ssamt.named_parameters())
    without = make('ssamt', dict(phrase_weight=0.), torch.float64)
    without.criterion = Triplet()
    assert without(batch).keys() == {'match', 'total'}


def test_ssamt_penalty_is_that_of_all_pairs_written_out():
    ssamt, (regions, captions) = make('ssamt', dict(phrase_weight=.7, margin=.3), torch.float64), ragged(torch.float64, images=6, captions=6)
    ssamt.criterion = Triplet()
    image = torch.tensor([0, 1, 2, 1, 3, 4])                                  # rows 1 and 3 are one picture
    named = [[int(x) for x in torch.randint(0, 20, (4,))] for _ in range(6)]
    ssamt.labels = PhraseLabels([TextGraph(('a',), tuple(Entity(0, 1, str(x)) for x in n)) for n in named], image)
    images, sentences = ssamt.encode_images(regions), ssamt.encode_captions(captions)
    scores, agreed, want = ssamt.match(images, sentences), torch.stack([ssamt.phrase_agreement(images[[b] * 6], sentences) for b in range(6)]), 0.
    said = lambda b: {x for c in range(6) if image[c] == image[b] for x in named[c]}
    others = lambda k: [j for j in range(6) if image[j] != image[k]]
    pairs = [(k, max(others(k), key=lambda c: float(scores[k, c].detach()))) for k in range(6)] + [(max(others(k), key=lambda b: float(scores[b, k].detach())), k) for k in range(6)]
    for b, c in pairs:
        bad = [u for u in range(4) if sentences.exists[c, u] and named[c][u] not in said(b)]
        if bad: want += .7 * sum((.3 + agreed[b, c, u] - agreed[c, c, u]).clamp(min=0) for u in bad) / len(bad)
    got = ssamt.loss(images, sentences, Batch(regions, captions, image, image, torch.arange(6)))['phrase']
    assert want > 0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    parts = [torch.autograd.grad(x, list(ssamt.parameters()), retain_graph=True, allow_unused=True) for x in (got, want)]
    for a, b in zip(*parts): assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=0, atol=1e-11))


@each
def test_what_is_recomputed_changes_neither_score_nor_gradient(name, arguments):
    matcher, (regions, captions) = make(name, arguments, torch.float64), ragged(torch.float64, images=40, captions=20)
    weight, found = torch.randn(40, 20, dtype=torch.float64), []
    for scores in (matcher.match, *(partial(match_by_length, matcher, memory=m) for m in (None, 100_000, 0))):
        s = scores(matcher.encode_images(regions), matcher.encode_captions(captions))
        found.append((s.detach(), *torch.autograd.grad((s * weight).sum(), list(matcher.parameters()), allow_unused=True)))
    for a, b, c, d in zip(*found):
        if b is None: assert a is c is d is None; continue
        assert b.equal(c) and b.equal(d)                                      # the very same operations, once or twice
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_recomputation_stays_within_its_budget():
    camp, (regions, captions) = make('camp', {}, torch.float32), ragged(torch.float32, images=128, captions=64)
    images, sentences = camp.encode_images(regions), camp.encode_captions(captions)
    kept = []
    for memory in (2**40, 2**21, 0):
        with PeakBytes() as peak: match_by_length(camp, images, sentences, memory=memory).sum().backward(retain_graph=True)
        kept.append(peak.peak)
    assert kept[0] > 3 * kept[1] > 3 * 2**21 and kept[1] > kept[2]


def test_a_tensor_changed_in_place_is_noticed_where_bytes_are_counted():
    x = torch.ones(3, requires_grad=True)
    with KeptBytes([x]) as counter:
        y = x.exp()
        z = y.square()
    assert counter.bytes == 4 * 3                                             # y, kept twice, counts once
    z.sum().backward()
    with KeptBytes([x]): y = x.exp()
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match='changed in place'): y.sum().backward()


def test_ssamt_without_phrases_in_the_captions_says_what_to_do():
    ssamt, (regions, captions) = make('ssamt', {}, torch.float64), ragged(torch.float64)
    with pytest.raises(ValueError, match='give the vocabulary a parser'): ssamt.encode_captions(Captions(tokens=captions.tokens, lengths=captions.lengths))
    with pytest.raises(ValueError, match="units is one of both, entities, triples, not 'words'"): make('ssamt', dict(units='words'), torch.float64)
