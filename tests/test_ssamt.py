"SSAMT against loops: transformer, rules of sight, scores, losses; what phase 2 leaves alone; attention, blame and scales."

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from imtm_lite.data import Batch, Split
from imtm_lite.explain import blame, blame_accuracy
from imtm_lite.files import shipped
from imtm_lite.losses import Triplet
from imtm_lite.models.ssamt import (
    SSAMT,
    IntraTask,
    PhraseTask,
    SSAMTIntra,
    drawn,
    likely,
    others,
    run,
    scale_accuracy,
    see_pair,
    see_text,
)
from imtm_lite.phrases import ATTRIBUTE, OBJECT, RELATION, PhraseLabels, chunk
from imtm_lite.regions import Regions
from imtm_lite.text import Captions, Reader, Vocab
from imtm_lite.training import make_optimizer

SIZES = dict(region_width=7, words=30, width=8, layers=2, heads=2, feedforward=12, positions=12)
VARIANTS = [{}, dict(phrases=False), dict(local=False, layers=1), dict(mu=(0.7, 0.4), layers=1)]


def make(kind=SSAMT, **arguments):
    "A model in which no parameter is what it was made as, so that nothing hides behind zeros and ones."
    torch.manual_seed(1)
    matcher = kind(**SIZES | arguments).double().eval()
    for p in matcher.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return matcher


def ragged(images=4, captions=5, seed=0, regions=6, words=9, phrases=4):
    "Pictures of 1 to R regions, captions of 3 to T tokens with 0 to P phrases; noise where the padding is."
    g = torch.Generator().manual_seed(seed)
    have = torch.randint(1, regions + 1, (images,), generator=g)
    features = torch.randn(images, regions, 7, generator=g, dtype=torch.float64)
    mask = torch.arange(regions) < have[:, None]
    lengths = torch.randint(3, words + 1, (captions,), generator=g)
    lengths[0] = words
    tokens = torch.randint(4, 30, (captions, words), generator=g)
    real = torch.arange(words) < lengths[:, None]
    units = (torch.rand(captions, phrases, words, generator=g) < 0.3) & real[:, None]
    units[-1] = False
    kinds = torch.randint(0, 3, (captions, phrases), generator=g).where(units.any(2), -1)
    return (
        Regions(features=features, mask=mask),
        Captions(tokens=tokens, lengths=lengths, units=units, kinds=kinds),
    )


# ---------------------------------------------------------------- the plain form


def norm_plain(norm, x):
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def layer_plain(layer, x, sees):  # x: list of vectors; sees: list of lists of nodes
    "One pre-norm layer, node by node and head by head."
    a = layer.self_attn
    D = len(x[0])
    size = D // a.num_heads
    q = []
    k = []
    v = []
    for node in x:
        projected = a.in_proj_weight @ norm_plain(layer.norm1, node) + a.in_proj_bias
        for part, store in zip(projected.split(D), (q, k, v)):
            store.append(part.split(size))
    out = []
    for i, node in enumerate(x):
        found = []
        for h in range(a.num_heads):
            logits = torch.stack([q[i][h] @ k[j][h] / math.sqrt(size) for j in sees[i]])
            weights = logits.softmax(0)
            found.append(sum(w * v[j][h] for w, j in zip(weights, sees[i])))
        node = node + a.out_proj(torch.cat(found))
        inner = layer.linear2(F.gelu(layer.linear1(norm_plain(layer.norm2, node))))
        out.append(node + inner)
    return out


def encoder_plain(encoder, x, sees):
    for layer in encoder.layers:
        x = layer_plain(layer, x, sees)
    return [norm_plain(encoder.norm, node) for node in x]


def text_rules(own, T):  # own: a list of sets of tokens, one a phrase
    "Whom sentence, phrases and words of a caption see."
    P = len(own)
    words = list(range(1 + P, 1 + P + T))
    everybody = list(range(1 + P)) + words
    return (
        [everybody]
        + [list(range(1 + P)) + [1 + P + t for t in sorted(mine)] for mine in own]
        + [everybody for _ in words]
    )


# one picture (R, W), one caption (T,), no padding
def pair_plain(matcher, features, tokens, own, kinds):
    "Intra cosine, and all cosines of the inter part: of the wholes, of units with the picture, of regions with the sentence."
    intra = matcher.intra
    cos = lambda a, b: a @ b / (a.norm() * b.norm())
    regions = [norm_plain(intra.region_norm, intra.region(f)) for f in features]
    R = len(regions)
    T = len(tokens)
    P = len(own)
    picture, *regions = encoder_plain(
        intra.image_layers, [intra.picture, *regions], [list(range(1 + R))] * (1 + R)
    )
    words = [
        intra.word.weight[w] + intra.position.weight[t] + intra.segment.weight[3]
        for t, w in enumerate(tokens)
    ]
    starts = [intra.sentence, *(intra.segment.weight[k] for k in kinds), *words]
    sees = text_rules(own, T)
    text = encoder_plain(intra.text_layers, starts, sees)
    first = cos(picture, text[0])
    if not hasattr(matcher, 'inter'):
        return first, None, None, None
    n = 1 + P + T
    image_nodes = list(range(n, n + 1 + R))
    sees = [list(s) for s in sees]
    sees[0] = sees[0] + [n]  # rule 1
    for i in range(1, n):
        sees[i] = sees[i] + image_nodes
    sees += [[0] + image_nodes]  # rule 2
    sees += [list(range(n)) + image_nodes for _ in range(R)]
    states = encoder_plain(matcher.inter, [*text, picture, *regions], sees)
    sentence = states[0]
    units = states[1:n]
    image = states[n]
    seen = states[n + 1 :]
    return (
        first,
        cos(image, sentence),
        [cos(image, u) for u in units],
        [cos(sentence, r) for r in seen],
    )


def unpadded(matcher, regions, captions, b, c):
    "Arguments of `pair_plain` for picture b and caption c."
    own = []
    kinds = []
    if matcher.config['phrases']:
        for unit, kind in zip(captions.units[c], captions.kinds[c].tolist()):
            if unit.any():
                own.append(set(unit.nonzero().flatten().tolist()))
                kinds.append(kind)
    return (
        regions.features[b][regions.mask[b]],
        captions.tokens[c, : captions.lengths[c]].tolist(),
        own,
        kinds,
    )


def score_plain(matcher, *pair):
    first, whole, units, regions = pair_plain(matcher, *pair)
    if whole is None:
        return first
    mu1, mu2 = matcher.config['mu']
    local = sum(units) / len(units) + sum(regions) / len(regions)
    return first + mu1 * whole + (mu2 * local if matcher.config['local'] else 0)


@pytest.mark.parametrize('arguments', VARIANTS, ids=str)
def test_scores_equal_the_plain_form_with_gradients(arguments):
    matcher = make(**arguments)
    regions, captions = ragged(2, 3)
    fast = matcher.match(matcher.encode_images(regions), matcher.encode_captions(captions))
    plain = torch.stack(
        [
            torch.stack(
                [
                    score_plain(matcher, *unpadded(matcher, regions, captions, b, c))
                    for c in range(3)
                ]
            )
            for b in range(2)
        ]
    )
    torch.testing.assert_close(fast, plain, atol=1e-11, rtol=0)
    weight = torch.randn_like(fast)
    grads = [
        torch.autograd.grad((s * weight).sum(), list(matcher.parameters())) for s in (fast, plain)
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize('phrases', [True, False])
def test_the_intra_part_equals_the_plain_form(phrases):
    matcher = make(SSAMTIntra, phrases=phrases)
    regions, captions = ragged(3, 4)
    images = matcher.encode_images(regions)
    said = matcher.encode_captions(captions)
    plain = torch.stack(
        [
            torch.stack(
                [
                    score_plain(matcher, *unpadded(matcher, regions, captions, b, c))
                    for c in range(4)
                ]
            )
            for b in range(3)
        ]
    )
    torch.testing.assert_close(matcher.match(images, said), plain, atol=1e-11, rtol=0)
    assert matcher.first_scores(images, said).equal(matcher.match(images, said))
    torch.testing.assert_close(
        matcher.pairs(images, said[:3]), plain.diagonal(), atol=1e-11, rtol=0
    )


# ---------------------------------------------------------------- who sees whom


def test_sight_against_loops():
    _, captions = ragged(1, 6)
    own = captions.units.transpose(1, 2)
    words = captions.mask
    phrases = captions.units.any(2)
    regions = torch.arange(5) < torch.randint(1, 6, (6, 1))
    text = see_text(own, words, phrases)
    there = torch.cat([words[:, :1], phrases, words], 1)
    both = see_pair(text, there, regions)
    n = text.shape[1]
    P = phrases.shape[1]
    R = 5
    for c in range(6):
        kind = ['sentence'] + ['phrase'] * P + ['word'] * (n - 1 - P) + ['picture'] + ['region'] * R
        real = there[c].tolist() + [True] + regions[c].tolist()
        for i in range(n + 1 + R):
            for j in range(n + 1 + R):
                sees = real[i] and real[j]
                if (kind[i], kind[j]) == ('sentence', 'region'):
                    sees = False
                if kind[i] == 'picture' and kind[j] in ('phrase', 'word'):
                    sees = False
                if (kind[i], kind[j]) == ('phrase', 'word'):
                    sees = sees and bool(own[c, j - 1 - P, i - 1])
                assert both[c, i, j] == (sees or i == j), (kind[i], kind[j])
        assert text[c].equal(both[c, :n, :n])


def outputs_that_change(matcher, images, captions, node):
    "Which states of a pair change when one entering node does; one layer, so that nothing travels on."
    x, sees = matcher.nodes(images, captions)
    y = x.clone()
    y[:, node] += torch.randn(x.shape[2], dtype=x.dtype)
    return (run(matcher.inter, y, sees) - run(matcher.inter, x, sees)).abs().amax(2)[0] > 1e-9


def test_each_rule_hides_what_it_says_and_nothing_else():
    matcher = make(layers=1)
    regions, _ = ragged(1, 1, regions=4)
    units = torch.zeros(1, 2, 5, dtype=torch.bool)
    units[0, 0, 1:3], units[0, 1, 3] = True, True
    captions = Captions(
        tokens=torch.tensor([[4, 5, 6, 7, 8]]),
        lengths=torch.tensor([5]),
        units=units,
        kinds=torch.tensor([[OBJECT, RELATION]]),
    )
    regions = Regions(features=regions.features, mask=torch.ones(1, 4, dtype=torch.bool))
    images = matcher.encode_images(regions)
    said = matcher.encode_captions(captions)
    sentence = 0
    phrases = [1, 2]
    words = [3, 4, 5, 6, 7]
    picture = 8
    seen = [9, 10, 11, 12]
    n = 13
    # who does not notice a change of node j
    blind = {sentence: set(), picture: set()}
    blind |= {r: {sentence} for r in seen}  # rule 1
    blind |= {p: {picture} for p in phrases}  # rule 2
    # rules 2 and 3
    blind |= {w: {picture} | {p for p in phrases if not units[0, p - 1, w - 3]} for w in words}
    for node in range(n):
        changed = outputs_that_change(matcher, images, said, node)
        assert set((~changed).nonzero().flatten().tolist()) == blind[node], node


def test_phrases_start_alike_and_get_their_content_from_their_own_words():
    matcher = make(SSAMT)
    units = torch.zeros(1, 2, 6, dtype=torch.bool)
    units[0, 0, 1], units[0, 1, 3] = True, True
    captions = Captions(
        tokens=torch.tensor([[4, 5, 6, 7, 8, 9]]),
        lengths=torch.tensor([6]),
        units=units,
        kinds=torch.tensor([[ATTRIBUTE, ATTRIBUTE]]),
    )
    apart = matcher.encode_captions(captions).phrases[0]
    assert not torch.allclose(apart[0], apart[1])
    both = Captions(
        **dict(captions.items()) | dict(units=units.any(1, keepdim=True).expand(1, 2, 6))
    )
    same = matcher.encode_captions(both).phrases[0]
    torch.testing.assert_close(same[0], same[1])


# ---------------------------------------------------------------- one pair does not depend on others


def test_pairs_are_the_diagonal_and_ignore_order_blocks_and_padding():
    matcher = make()
    regions, captions = ragged(7, 7)
    images = matcher.encode_images(regions)
    said = matcher.encode_captions(captions)
    scores = matcher.match(images, said)
    aligned = matcher.pairs(images, said)
    torch.testing.assert_close(aligned, scores.diagonal(), atol=1e-12, rtol=0)
    order = torch.randperm(7)
    torch.testing.assert_close(
        matcher.pairs(images[order], said[order]), aligned[order], atol=1e-12, rtol=0
    )
    whole = matcher.compare(images, said)
    for size in (1, 2, 7):
        blocks = matcher.compare_by_size(images, said, size)
        for (name, a), (_, b) in zip(blocks.items(), whole.items()):
            counted = dict(
                both=torch.ones(7, 1, dtype=torch.bool),
                phrases=said.exists,
                words=said.mask,
                regions=images.mask,
            )[name]
            torch.testing.assert_close(a[counted], b[counted], atol=1e-12, rtol=0)
    more = Captions(
        tokens=F.pad(captions.tokens, (0, 20)),
        lengths=captions.lengths,
        units=F.pad(captions.units, (0, 20, 0, 3)),
        kinds=F.pad(captions.kinds, (0, 3), value=-1),
    )
    torch.testing.assert_close(
        matcher.pairs(images, matcher.encode_captions(more)), aligned, atol=1e-12, rtol=0
    )


def test_noise_in_the_padding_of_regions_changes_nothing():
    matcher = make()
    regions, captions = ragged(4, 4)
    noisy = Regions(
        features=regions.features.where(regions.mask[..., None], 100.0), mask=regions.mask
    )
    said = matcher.encode_captions(captions)
    torch.testing.assert_close(
        matcher.match(matcher.encode_images(noisy), said),
        matcher.match(matcher.encode_images(regions), said),
        atol=1e-12,
        rtol=0,
    )


def test_a_caption_that_is_too_long_is_refused():
    matcher = make()
    _, captions = ragged(1, 1)
    long = Captions(
        tokens=torch.full((1, 13), 5),
        lengths=torch.tensor([13]),
        units=torch.zeros(1, 1, 13, dtype=torch.bool),
        kinds=torch.full((1, 1), -1),
    )
    with pytest.raises(
        ValueError, match='a caption of 13 tokens, but this model has positions for 12'
    ):
        matcher.encode_captions(long)
    with pytest.raises(ValueError, match='give the vocabulary a parser'):
        matcher.encode_captions(Captions(tokens=captions.tokens, lengths=captions.lengths))
    make(phrases=False).encode_captions(Captions(tokens=captions.tokens, lengths=captions.lengths))


# ---------------------------------------------------------------- losses


def test_likely_and_drawn():
    scores = torch.randn(6, 6, dtype=torch.float64)
    image = torch.tensor([0, 1, 2, 1, 3, 4])
    same = image[:, None] == image
    for hardness in (0.0, 3.0, 1e6):
        weights = likely(scores, same, hardness)
        for i in range(6):
            wrong = [j for j in range(6) if image[j] != image[i]]
            total = sum(
                math.exp(hardness * float(scores[i, j] - scores[i, wrong].max())) for j in wrong
            )
            for j in range(6):
                want = (
                    math.exp(hardness * float(scores[i, j] - scores[i, wrong].max())) / total
                    if j in wrong
                    else 0.0
                )
                assert float(weights[i, j]) == pytest.approx(want, abs=1e-12)
        columns, there = drawn(weights)
        assert there.all() and not same[torch.arange(6), columns].any()
    columns, there = drawn(likely(scores, torch.ones(6, 6, dtype=torch.bool), 3.0))
    assert not there.any()
    torch.manual_seed(0)
    draws = torch.stack([drawn(likely(scores, same, 1.0))[0] for _ in range(4000)])
    share = torch.nn.functional.one_hot(draws, 6).double().mean(0)
    torch.testing.assert_close(share, likely(scores, same, 1.0), atol=0.03, rtol=0)


@pytest.mark.parametrize('hardness', [0.0, 5.0, 1e7])
def test_l0_is_the_mean_over_wrong_partners_written_out(hardness):
    matcher = make(SSAMTIntra, margin=0.3, hardness=hardness)
    regions, captions = ragged(6, 6)
    image = torch.tensor([0, 1, 2, 1, 3, 4])
    v = matcher.encode_images(regions)
    t = matcher.encode_captions(captions)
    s = matcher.match(v, t)
    want = 0.0
    for i in range(6):
        wrong = [j for j in range(6) if image[j] != image[i]]
        for line, cost in (
            (s[i], lambda j: 0.3 - s[i, i] + s[i, j]),
            (s[:, i], lambda j: 0.3 - s[i, i] + s[j, i]),
        ):
            p = (hardness * line[wrong].detach()).softmax(0)
            want = want + sum(w * cost(j).clamp(min=0) for w, j in zip(p, wrong))
    task = IntraTask(matcher, Triplet())
    got = task.losses(v, t, Batch(regions, captions, image, image, image))['total']
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    a, b = (
        torch.autograd.grad(x, list(matcher.parameters()), retain_graph=True) for x in (got, want)
    )
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=0)


SAID = [
    'a man in a red shirt rides a horse',
    'a big dog on a box',
    'a dog',
    'a man wears a hat',
    'a small dog near a woman in a red hat',
    'two women are riding a horse',
]


def spoken():
    "Six captions of five pictures, with labels."
    vocab = Reader(Vocab.build(SAID, 1), chunk)
    image = torch.tensor([0, 1, 2, 1, 3, 4])
    return (
        Captions.from_text(SAID, vocab),
        vocab,
        PhraseLabels([chunk(c) for c in SAID], image),
        image,
    )


def losses_plain(matcher, regions, captions, labels, image, first):
    "L1 to L3 pair by pair, with the hardest wrong partners."
    B = len(SAID)
    hinge = lambda a, right, wrong: (a - right + wrong).clamp(min=0)
    mean = lambda xs: sum(xs) / len(xs)
    found = {}

    def pair(i, c):
        if (i, c) not in found:
            found[i, c] = pair_plain(matcher, *unpadded(matcher, regions, captions, i, c))[1:]
        return found[i, c]

    a1, a2, a3 = matcher.config['margins']
    l1 = 0.0
    l2 = 0.0
    l3 = 0.0
    P, T = captions.units.shape[1:]
    for k in range(B):
        wrong = [j for j in range(B) if image[j] != image[k]]
        j = max(wrong, key=lambda j: float(first[k, j]))
        i = max(wrong, key=lambda i: float(first[i, k]))
        own = pair(k, k)
        by_text = pair(k, j)
        by_image = pair(i, k)
        l1 = l1 + hinge(a1, own[0], by_text[0]) + hinge(a1, own[0], by_image[0])
        l2 = (
            l2
            + hinge(a2, mean(own[1]), mean(by_text[1]))
            + hinge(a2, mean(own[2]), mean(by_image[2]))
        )
        for picture, caption, cosines in ((k, j, by_text), (i, k, by_image)):
            matched, mismatched = labels.matched(image[[picture]], torch.tensor([caption]), P, T)
            real = [p for p in range(P) if captions.units[caption, p].any()] + [
                P + t for t in range(int(captions.lengths[caption]))
            ]
            good = [x for x, u in zip(cosines[1], real) if matched[0, u]]
            bad = [x for x, u in zip(cosines[1], real) if mismatched[0, u]]
            if good and bad:
                l3 = l3 + hinge(a3, mean(good), mean(bad))
    return dict(
        zip(
            ('global', 'local', 'phrase'),
            (w * l for w, l in zip(matcher.config['weights'], (l1, l2, l3))),
        )
    )


def test_l1_to_l3_are_the_sums_written_out():
    captions, vocab, labels, image = spoken()
    matcher = make(
        words=len(vocab),
        positions=20,
        layers=1,
        hardness=1e9,
        margins=(0.3, 0.2, 0.4),
        weights=(1.0, 0.7, 0.3),
    )
    regions, _ = ragged(6, 1)
    v = matcher.encode_images(regions)
    t = matcher.encode_captions(captions)
    want = losses_plain(
        matcher, regions, captions, labels, image, matcher.first_scores(v, t).detach()
    )
    task = PhraseTask(matcher, Triplet(), labels=labels)
    got = task.losses(v, t, Batch(regions, captions, image, image, torch.arange(6)))
    assert all(want[name] > 0 for name in want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-9, rtol=0)
    torch.testing.assert_close(got['total'], sum(want.values()), atol=1e-9, rtol=0)
    a, b = (
        torch.autograd.grad(x, list(matcher.parameters()), retain_graph=True)
        for x in (got['total'], sum(want.values()))
    )
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, atol=1e-8, rtol=0)


def test_variants_leave_losses_out_and_labels_are_asked_for():
    captions, vocab, labels, image = spoken()
    batch = lambda regions: Batch(regions, captions, image, image, torch.arange(6))
    regions, _ = ragged(6, 1)

    def loss(**arguments):
        matcher = make(words=len(vocab), positions=20, **arguments)
        images = matcher.encode_images(regions)
        codes = matcher.encode_captions(captions)
        return PhraseTask(matcher, Triplet()).losses(images, codes, batch(regions))

    with pytest.raises(ValueError, match='needs labels'):
        loss()
    alone = loss(weights=(1.0, 0.1, 0.0))
    assert 'phrase' not in alone and alone['local'] > 0
    assert loss(local=False, weights=(1.0, 0.1, 0.0))['local'] == 0


# ---------------------------------------------------------------- two phases


def test_phase_two_starts_from_phase_one_and_leaves_it_alone():
    captions, vocab, labels, image = spoken()
    first = make(SSAMTIntra, words=len(vocab), positions=20)
    second = make(SSAMT, words=len(vocab), positions=20, dropout=0.5)
    lacking, unknown = second.load_state_dict(first.state_dict(), strict=False)
    assert not unknown and all(n.startswith('inter.') for n in lacking)
    regions, _ = ragged(6, 1)
    torch.testing.assert_close(
        second.first_scores(second.encode_images(regions), second.encode_captions(captions)),
        first.match(first.encode_images(regions), first.encode_captions(captions)),
    )
    task = PhraseTask(second, Triplet(), labels=labels)
    optimizer = make_optimizer(
        second, optimizer='adamw', lr=0.1, weight_decay=0.1, frozen=('intra',)
    )
    second.train()
    before = copy.deepcopy(second.state_dict())
    # nothing is dropped there
    assert second.encode_images(regions).x.equal(second.encode_images(regions).x)
    for _ in range(3):
        task(Batch(regions, captions, image, image, torch.arange(6)))['total'].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in second.state_dict().items():
        assert value.equal(before[name]) == name.startswith('intra.'), name


def test_dropped_nodes_only_in_training():
    matcher = make(SSAMTIntra, drop=0.5)
    regions, captions = ragged(4, 4)
    assert matcher.encode_images(regions).vector.equal(matcher.encode_images(regions).vector)
    assert not matcher.intra.lost(captions.mask).any()
    matcher.train()
    for layer in matcher.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    assert not matcher.encode_images(regions).vector.equal(matcher.encode_images(regions).vector)
    share = matcher.intra.lost(torch.ones(100, 100, dtype=torch.bool)).double().mean()
    assert 0.4 < share < 0.6


def test_soft_criterion_means_all_alike():
    matcher = make(SSAMTIntra)
    assert IntraTask(matcher, Triplet()).hardness == 20.0
    assert IntraTask(matcher, Triplet(hardest=False)).hardness == 0.0


# ---------------------------------------------------------------- looking


def test_attention_is_the_last_layers_own_weights():
    matcher = make()
    regions, captions = ragged(3, 2)
    images = matcher.encode_images(regions)
    said = matcher.encode_captions(captions)
    words = matcher.attention(images, said)
    phrases = matcher.phrase_attention(images, said, captions.units)
    assert words.shape == (3, 2, 9, 6) and phrases.shape == (3, 2, 4, 6)
    for b in range(3):
        for c in range(2):
            real = words[b, c][captions.mask[c]]
            torch.testing.assert_close(real.sum(-1), torch.ones(len(real), dtype=torch.float64))
            assert not real[:, ~regions.mask[b]].any()
            looks = matcher.looks(images[b], said[c])
            torch.testing.assert_close(looks.sum(-1), torch.ones_like(looks[..., 0]))
    plain = make(phrases=False)
    t = plain.encode_captions(captions)
    v = plain.encode_images(regions)
    assert plain.phrase_attention(v, t, captions.units).shape == (3, 2, 4, 6)


@pytest.fixture(scope='module')
def sample():
    return Split(shipped('sample'), 'train')


def of_sample(sample, **arguments):
    vocab = Reader(Vocab.build(sample.captions, 1), chunk)
    matcher = make(
        region_width=sample.features.shape[2], words=len(vocab), positions=50, **arguments
    ).float()
    return matcher, vocab


def test_blame_and_its_accuracy_by_hand(sample):
    matcher, vocab = of_sample(sample)
    right = {}
    for p in sample.probes:
        agreed = []
        for sentence in (p['false'], p['true']):
            said = matcher.encode_captions(Captions.from_text([sentence], vocab))
            with torch.no_grad():
                a = matcher.phrase_agreement(
                    matcher.encode_images(sample.regions([p['image']])), said
                )[0]
            agreed.append(a[said.exists[0]].tolist())
        graph = chunk(p['false'])
        known = chunk(p['true']).keys
        assert len(agreed[0]) == len(graph.units)
        assert [a for _, a in blame(matcher, sample, vocab, p['image'], p['false'])] == pytest.approx(
            sorted(agreed[0]), abs=1e-5
        )
        wrong = [u for u, key in enumerate(graph.keys) if key not in known]
        if wrong and len(wrong) < len(graph.keys):
            lowest = [a.index(min(a)) in wrong for a in agreed]
            right.setdefault(p['kind'], []).append(
                (lowest[0], len(wrong) / len(graph.keys), lowest[1])
            )
    found = blame_accuracy(matcher, sample, vocab)
    assert found.keys() == right.keys() and len(found) > 1
    for kind, some in right.items():
        assert found[kind] == pytest.approx(
            (len(some), *(100 * sum(x) / len(some) for x in zip(*some)))
        )


def test_scale_accuracy_by_hand(sample):
    matcher, vocab = of_sample(sample)
    image = torch.from_numpy(sample.caption_image)
    wrong = others(image, 3)
    assert (image[wrong] != image).all()
    labels = PhraseLabels([chunk(c) for c in sample.captions], image)
    encoded = sample.encoded(vocab)
    right = {}
    with torch.no_grad():
        images = matcher.encode_images(sample.regions(slice(None)))
        for c in range(len(image)):
            found = {}
            for name, (i, k) in dict(
                true=(image[c], c), i2t=(image[c], int(wrong[c])), t2i=(image[wrong[c]], c)
            ).items():
                v = images[int(i)]
                t = matcher.encode_captions(encoded[[k]])
                cosines = matcher.compare(v, t)
                scales = [float(s) for s in matcher.scales(cosines, v, t)]
                matched, mismatched = labels.matched(
                    i[None], torch.tensor([k]), t.exists.shape[1], t.mask.shape[1]
                )
                units = torch.cat([cosines.phrases, cosines.words], 1)
                found[name] = scales + [units[matched], units[mismatched]]
            for name, k in (('i2t', 1), ('t2i', 2)):
                right.setdefault(('global', name), []).append(found['true'][0] > found[name][0])
                right.setdefault(('local', name), []).append(found['true'][k] > found[name][k])
                good, bad = found[name][3:]
                if len(good) and len(bad):
                    right.setdefault(('phrase', name), []).append(bool(good.mean() > bad.mean()))
    table = scale_accuracy(matcher, images, encoded[:], image, labels, seed=3)
    for scale, percents in table.items():
        for name, percent in zip(('i2t', 't2i'), percents):
            some = right[scale, name]
            assert percent == pytest.approx(100 * sum(some) / len(some), abs=1.0)
