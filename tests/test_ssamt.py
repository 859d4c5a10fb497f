"SSAMT beside loops: transformer, rules of sight, scores, losses; its two phases; its looks."

import copy
import math
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imtm_lite.data import Batch, Split
from imtm_lite.encoders import Codes
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
from tests.matchers import changed, close, close_with_gradients, codes_of, gradients_of, one_by_one

SIZES = dict(region_width=7, words=30, width=8, layers=2, heads=2, feedforward=12, positions=12)
VARIANTS = [{}, dict(phrases=False), dict(local=False, layers=1), dict(mu=(0.7, 0.4), layers=1)]


def make(kind=SSAMT, **arguments):
    "A model whose parameters have all moved: nothing hides behind zeros and ones."
    torch.manual_seed(1)
    matcher = kind(**SIZES | arguments).double().eval()
    for parameter in matcher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return matcher


def ragged(images=4, captions=5, seed=0, regions=6, words=9, phrases=4):
    "Pictures of 1 to R regions, captions of 3 to T tokens, 0 to P phrases; noise as padding."
    generator = torch.Generator().manual_seed(seed)
    have = torch.randint(1, regions + 1, (images,), generator=generator)
    features = torch.randn(images, regions, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(regions) < have[:, None]
    lengths = torch.randint(3, words + 1, (captions,), generator=generator)
    lengths[0] = words
    tokens = torch.randint(4, 30, (captions, words), generator=generator)
    inside = torch.arange(words) < lengths[:, None]
    units = (torch.rand(captions, phrases, words, generator=generator) < 0.3) & inside[:, None]
    units[-1] = False
    kinds = torch.randint(0, 3, (captions, phrases), generator=generator).where(units.any(2), -1)
    pictures = Regions(features=features, mask=mask)
    return pictures, Captions(tokens=tokens, lengths=lengths, units=units, kinds=kinds)


# ---------------------------------------------------------------- the plain form


class Pair(NamedTuple):
    "One picture and one caption without padding."

    features: Tensor  # (R, region width)
    tokens: list[int]
    own: list[set[int]]  # the tokens of each phrase
    kinds: list[int]  # of phrases


def pair_of(matcher, regions, captions, b, c):
    features = regions.features[b][regions.mask[b]]
    tokens = captions.tokens[c, : captions.lengths[c]].tolist()
    own = []
    kinds = []
    units = captions.units[c] if matcher.config['phrases'] else []
    for unit, kind in zip(units, captions.kinds[c].tolist()):
        if unit.any():
            own.append(set(unit.nonzero().flatten().tolist()))
            kinds.append(kind)
    return Pair(features, tokens, own, kinds)


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def norm_plain(norm, x):
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def projected_plain(attention, node):
    "Query, key and value of one node, each in pieces, one a head."
    D = len(node)
    projected = attention.in_proj_weight @ node + attention.in_proj_bias
    return [third.split(D // attention.num_heads) for third in projected.split(D)]


def head_plain(query, keys, values):
    logits = torch.stack([query @ key / math.sqrt(len(query)) for key in keys])
    return logits.softmax(0) @ torch.stack(values)


def attention_plain(attention, x, sees):
    "Node by node and head by head: x is a list of vectors, sees a list of lists of nodes."
    query, key, value = zip(*(projected_plain(attention, node) for node in x))
    out = []
    for i, seen in enumerate(sees):
        heads = []
        for head in range(attention.num_heads):
            keys = [key[j][head] for j in seen]
            values = [value[j][head] for j in seen]
            heads.append(head_plain(query[i][head], keys, values))
        out.append(attention.out_proj(torch.cat(heads)))
    return out


def layer_plain(layer, x, sees):
    "One pre-norm layer."
    normed = [norm_plain(layer.norm1, node) for node in x]
    out = []
    for node, heard in zip(x, attention_plain(layer.self_attn, normed, sees)):
        node = node + heard
        out.append(node + layer.linear2(F.gelu(layer.linear1(norm_plain(layer.norm2, node)))))
    return out


def encoder_plain(encoder, x, sees):
    for layer in encoder.layers:
        x = layer_plain(layer, x, sees)
    return [norm_plain(encoder.norm, node) for node in x]


def text_rules(pair):
    "Whom sentence, phrases and words of a caption see."
    P = len(pair.own)
    T = len(pair.tokens)
    wholes = list(range(1 + P))
    everybody = list(range(1 + P + T))
    sees = [everybody]
    for mine in pair.own:
        sees.append(wholes + [1 + P + t for t in sorted(mine)])  # rule 3
    return sees + [everybody] * T


def pair_rules(pair):
    "Whom sentence, phrases, words, picture and regions see."
    text = text_rules(pair)
    n = len(text)
    R = len(pair.features)
    image = list(range(n, n + 1 + R))
    sees = [seen + image for seen in text]
    sees[0] = text[0] + [n]  # rule 1
    sees.append([0] + image)  # rule 2
    return sees + [list(range(n + 1 + R))] * R


def intra_plain(intra, pair):
    "States of picture and regions; of sentence, phrases and words."
    regions = [norm_plain(intra.region_norm, intra.region(region)) for region in pair.features]
    everybody = list(range(1 + len(regions)))
    sees = [everybody] * len(everybody)
    image = encoder_plain(intra.image_layers, [intra.picture, *regions], sees)
    phrases = [intra.segment.weight[kind] for kind in pair.kinds]
    words = []
    for t, word in enumerate(pair.tokens):
        node = intra.word.weight[word] + intra.position.weight[t]
        words.append(node + intra.segment.weight[3])
    nodes = [intra.sentence, *phrases, *words]
    return image, encoder_plain(intra.text_layers, nodes, text_rules(pair))


def inter_plain(inter, image, text, pair):
    "Cosines: of the wholes, of units with the picture, of regions with the sentence."
    states = encoder_plain(inter, [*text, *image], pair_rules(pair))
    sentence, *units = states[: len(text)]
    picture, *regions = states[len(text) :]
    of_units = torch.stack([cosine(picture, unit) for unit in units])
    of_regions = torch.stack([cosine(sentence, region) for region in regions])
    return cosine(picture, sentence), of_units, of_regions


def score_plain(matcher, pair):
    image, text = intra_plain(matcher.intra, pair)
    score = cosine(image[0], text[0])
    if not hasattr(matcher, 'inter'):
        return score
    whole, units, regions = inter_plain(matcher.inter, image, text, pair)
    mu1, mu2 = matcher.config['mu']
    score = score + mu1 * whole
    return score + mu2 * (units.mean() + regions.mean()) if matcher.config['local'] else score


def scores_plain(matcher, regions, captions):
    def score(b, c):
        return score_plain(matcher, pair_of(matcher, regions, captions, b, c))

    return one_by_one(score, len(regions), len(captions))


@pytest.mark.parametrize('arguments', VARIANTS, ids=str)
def test_scores_equal_the_plain_form_with_gradients(arguments):
    matcher = make(**arguments)
    regions, captions = ragged(2, 3)
    fast = matcher.match(*codes_of(matcher, regions, captions))
    plain = scores_plain(matcher, regions, captions)
    close_with_gradients(matcher, fast, plain, atol=1e-11, gradient_atol=1e-9, gradient_rtol=0)


@pytest.mark.parametrize('phrases', [True, False])
def test_the_intra_part_equals_the_plain_form(phrases):
    matcher = make(SSAMTIntra, phrases=phrases)
    regions, captions = ragged(3, 4)
    images, sentences = codes_of(matcher, regions, captions)
    scores = matcher.match(images, sentences)
    close(scores, scores_plain(matcher, regions, captions), atol=1e-11)
    assert matcher.first_scores(images, sentences).equal(scores)
    close(matcher.pairs(images, sentences[:3]), scores.diagonal(), atol=1e-11)


# ---------------------------------------------------------------- who sees whom

HIDDEN = {('sentence', 'region'), ('picture', 'phrase'), ('picture', 'word')}


def sees_plain(i, j, kinds, real, own):
    "Whether node i of a pair sees node j."
    if i == j:
        return True
    if not (real[i] and real[j]) or (kinds[i], kinds[j]) in HIDDEN:
        return False
    if (kinds[i], kinds[j]) != ('phrase', 'word'):
        return True
    return bool(own[j - kinds.index('word'), i - kinds.index('phrase')])


def test_sight_against_loops():
    _, captions = ragged(1, 6)
    own = captions.units.transpose(1, 2)  # (C, T, P)
    phrases = captions.units.any(2)
    regions = torch.arange(5) < torch.randint(1, 6, (6, 1))
    text = see_text(own, captions.mask, phrases)
    there = torch.cat([captions.mask[:, :1], phrases, captions.mask], 1)
    both = see_pair(text, there, regions)
    kinds = ['sentence'] + ['phrase'] * 4 + ['word'] * 9 + ['picture'] + ['region'] * 5
    for c in range(6):
        assert text[c].equal(both[c, : 1 + 4 + 9, : 1 + 4 + 9])
        real = there[c].tolist() + [True] + regions[c].tolist()
        for i, j in product(range(len(kinds)), range(len(kinds))):
            want = sees_plain(i, j, kinds, real, own[c])
            assert both[c, i, j] == want, (kinds[i], kinds[j])


def caption_of(phrases, kinds, tokens):
    "One caption of so many tokens, with these tokens as phrases."
    units = torch.zeros(1, len(phrases), tokens, dtype=torch.bool)
    for phrase, own in enumerate(phrases):
        units[0, phrase, own] = True
    return Captions(
        tokens=torch.arange(4, 4 + tokens)[None],
        lengths=torch.tensor([tokens]),
        units=units,
        kinds=torch.tensor([kinds]),
    )


def who_notices(matcher, images, captions, node):
    "The nodes of a pair whose states change when one entering node does."
    x, sees = matcher.nodes(images, captions)
    y = x.clone()
    y[:, node] += torch.randn(x.shape[2], dtype=x.dtype)
    change = run(matcher.inter, y, sees) - run(matcher.inter, x, sees)
    return set((change.abs().amax(2)[0] > 1e-9).nonzero().flatten().tolist())


def test_each_rule_hides_what_it_says_and_nothing_else():
    matcher = make(layers=1)  # one layer, so that nothing travels on
    captions = caption_of([[1, 2], [3]], [OBJECT, RELATION], 5)
    images, sentences = codes_of(matcher, ragged(1, 1, regions=4)[0], captions)
    images = changed(images, mask=torch.ones_like(images.mask))
    sentence = 0
    phrases = [1, 2]
    words = [3, 4, 5, 6, 7]
    picture = 8
    regions = [9, 10, 11, 12]
    blind = {node: set() for node in range(13)}  # node -> who does not notice it
    for region in regions:
        blind[region] = {sentence}  # rule 1
    for unit in phrases + words:
        blind[unit].add(picture)  # rule 2
    for phrase, word in product(phrases, words):
        if not captions.units[0, phrase - 1, word - 3]:
            blind[word].add(phrase)  # rule 3
    for node in range(13):
        assert who_notices(matcher, images, sentences, node) == set(range(13)) - blind[node], node


def test_phrases_start_alike_and_get_their_content_from_their_own_words():
    matcher = make(SSAMT)
    apart = caption_of([[1], [3]], [ATTRIBUTE, ATTRIBUTE], 6)
    one, other = matcher.encode_captions(apart).phrases[0]
    assert not torch.allclose(one, other)
    together = caption_of([[1, 3], [1, 3]], [ATTRIBUTE, ATTRIBUTE], 6)
    one, other = matcher.encode_captions(together).phrases[0]
    torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- pairs by themselves


def test_pairs_are_the_diagonal_and_ignore_order_and_padding():
    matcher = make()
    regions, captions = ragged(7, 7)
    images, sentences = codes_of(matcher, regions, captions)
    aligned = matcher.pairs(images, sentences)
    close(aligned, matcher.match(images, sentences).diagonal())
    order = torch.randperm(7)
    close(matcher.pairs(images[order], sentences[order]), aligned[order])
    wider = Captions(
        tokens=F.pad(captions.tokens, (0, 20)),
        lengths=captions.lengths,
        units=F.pad(captions.units, (0, 20, 0, 3)),
        kinds=F.pad(captions.kinds, (0, 3), value=-1),
    )
    close(matcher.pairs(images, matcher.encode_captions(wider)), aligned)


@pytest.mark.parametrize('size', [1, 2, 7])
def test_blocks_of_pairs_are_compared_as_the_whole(size):
    matcher = make()
    images, sentences = codes_of(matcher, *ragged(7, 7))
    whole = dict(matcher.compare(images, sentences).items())
    blocks = matcher.compare_by_size(images, sentences, size)
    counted = dict(
        both=torch.ones(7, 1, dtype=torch.bool),
        phrases=sentences.exists,
        words=sentences.mask,
        regions=images.mask,
    )
    for name, cosines in blocks.items():
        close(cosines[counted[name]], whole[name][counted[name]])


def test_noise_in_the_padding_of_regions_changes_nothing():
    matcher = make()
    regions, captions = ragged(4, 4)
    there = regions.mask[..., None]
    noisy = changed(regions, features=regions.features.where(there, 100.0))
    scores = matcher.match(*codes_of(matcher, regions, captions))
    close(matcher.match(*codes_of(matcher, noisy, captions)), scores)


def test_a_caption_that_is_too_long_is_refused():
    long = caption_of([[]], [-1], 13)
    message = 'a caption of 13 tokens, but this model has positions for 12'
    with pytest.raises(ValueError, match=message):
        make().encode_captions(long)


def test_captions_without_phrases_are_refused_unless_none_are_wanted():
    _, captions = ragged(1, 1)
    bare = Captions(tokens=captions.tokens, lengths=captions.lengths)
    with pytest.raises(ValueError, match='give the vocabulary a parser'):
        make().encode_captions(bare)
    make(phrases=False).encode_captions(bare)


# ---------------------------------------------------------------- losses

IMAGE = torch.tensor([0, 1, 2, 1, 3, 4])  # two captions of picture 1
SAME = IMAGE[:, None] == IMAGE


def wrong_partners(i):
    return [j for j in range(6) if IMAGE[j] != IMAGE[i]]


@pytest.mark.parametrize('hardness', [0.0, 3.0, 1e6])
def test_likely_is_a_softmax_over_wrong_partners(hardness):
    scores = torch.randn(6, 6, dtype=torch.float64)
    want = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        wrong = wrong_partners(i)
        weights = (hardness * (scores[i, wrong] - scores[i, wrong].max())).exp()
        want[i, wrong] = weights / weights.sum()
    close(likely(scores, SAME, hardness), want)


def test_drawn_partners_are_wrong_ones_where_there_are_any():
    scores = torch.randn(6, 6, dtype=torch.float64)
    columns, there = drawn(likely(scores, SAME, 3.0))
    assert there.all()
    assert not SAME[torch.arange(6), columns].any()
    _, there = drawn(likely(scores, torch.ones_like(SAME), 3.0))
    assert not there.any()


def test_partners_are_drawn_as_often_as_they_are_likely():
    scores = torch.randn(6, 6, dtype=torch.float64)
    likelihood = likely(scores, SAME, 1.0)
    torch.manual_seed(0)
    draws = torch.stack([drawn(likelihood)[0] for _ in range(4000)])
    share = F.one_hot(draws, 6).double().mean(0)
    close(share, likelihood, atol=0.03)


def hinge(margin, right, wrong):
    return (margin - right + wrong).clamp(min=0)


def l0_plain(scores, hardness, margin):
    "The mean over wrong partners, row by row and column by column."
    total = 0.0
    for i in range(6):
        wrong = wrong_partners(i)
        for line in (scores[i], scores[:, i]):
            weights = (hardness * line[wrong].detach()).softmax(0)
            total = total + weights @ hinge(margin, scores[i, i], line[wrong])
    return total


def close_losses(matcher, loss, want, atol):
    "Equal, with equal gradients."
    close(loss, want, atol=atol)
    for a, b in zip(gradients_of(matcher, loss), gradients_of(matcher, want)):
        close(a, b, atol=10 * atol)


@pytest.mark.parametrize('hardness', [0.0, 5.0, 1e7])
def test_l0_is_the_mean_over_wrong_partners_written_out(hardness):
    matcher = make(SSAMTIntra, margin=0.3, hardness=hardness)
    regions, captions = ragged(6, 6)
    images, sentences = codes_of(matcher, regions, captions)
    batch = Batch(regions, captions, IMAGE, IMAGE, torch.arange(6))
    loss = IntraTask(matcher, Triplet()).losses(images, sentences, batch)['total']
    want = l0_plain(matcher.match(images, sentences), hardness, 0.3)
    close_losses(matcher, loss, want, 1e-10)


SENTENCES = [
    'a man in a red shirt rides a horse',
    'a big dog on a box',
    'a dog',
    'a man wears a hat',
    'a small dog near a woman in a red hat',
    'two women are riding a horse',
]
VOCAB = Reader(Vocab.build(SENTENCES, 1), chunk)
SPOKEN = dict(words=len(VOCAB.vocab), positions=20)  # a model of these words


@pytest.fixture
def batch():
    "Six captions, two of them of the same picture."
    captions = Captions.from_text(SENTENCES, VOCAB)
    regions, _ = ragged(6, 1)
    return Batch(regions, captions, IMAGE, IMAGE, torch.arange(6))


@pytest.fixture
def labels():
    return PhraseLabels([chunk(sentence) for sentence in SENTENCES], IMAGE)


class PlainLosses:
    "L1 to L3 pair by pair, with the hardest wrong partners."

    def __init__(self, matcher, batch, labels):
        self.matcher = matcher
        self.batch = batch
        self.labels = labels
        self.known = {}

    def cosines(self, i, c):
        "Of one pair; each is computed once."
        if (i, c) not in self.known:
            pair = pair_of(self.matcher, self.batch.regions, self.batch.captions, i, c)
            image, text = intra_plain(self.matcher.intra, pair)
            self.known[i, c] = inter_plain(self.matcher.inter, image, text, pair)
        return self.known[i, c]

    def phrase_cost(self, i, c):
        "In a wrong pair, what the picture has above what it has not."
        captions = self.batch.captions
        P, T = captions.units.shape[1:]
        picture = self.batch.image[[i]]
        matched, mismatched = self.labels.matched(picture, torch.tensor([c]), P, T)
        real = torch.cat([captions.units[c].any(1), captions.mask[c]])
        _, units, _ = self.cosines(i, c)
        good = units[matched[0, real]]
        bad = units[mismatched[0, real]]
        if not len(good) or not len(bad):
            return 0.0
        return hinge(self.matcher.config['margins'][2], good.mean(), bad.mean())

    def of_item(self, k, first):
        "The three losses of one right pair; `first` are the scores by which wrong ones are drawn."
        wrong = wrong_partners(k)
        j = max(wrong, key=lambda j: float(first[k, j]))  # caption
        i = max(wrong, key=lambda i: float(first[i, k]))  # picture
        whole, units, regions = self.cosines(k, k)
        caption_whole, caption_units, _ = self.cosines(k, j)
        image_whole, _, image_regions = self.cosines(i, k)
        a1, a2, _ = self.matcher.config['margins']
        of_wholes = hinge(a1, whole, caption_whole) + hinge(a1, whole, image_whole)
        of_units = hinge(a2, units.mean(), caption_units.mean())
        of_regions = hinge(a2, regions.mean(), image_regions.mean())
        of_phrases = self.phrase_cost(k, j) + self.phrase_cost(i, k)
        return of_wholes, of_units + of_regions, of_phrases

    def losses(self, first):
        items = [self.of_item(k, first) for k in range(6)]
        names = ('global', 'local', 'phrase')
        weights = self.matcher.config['weights']
        of_each = zip(names, weights, zip(*items))
        return {name: weight * sum(costs) for name, weight, costs in of_each}


def test_l1_to_l3_are_the_sums_written_out(batch, labels):
    how = dict(hardness=1e9, margins=(0.3, 0.2, 0.4), weights=(1.0, 0.7, 0.3))
    matcher = make(layers=1, **SPOKEN, **how)
    images, sentences = codes_of(matcher, batch.regions, batch.captions)
    first = matcher.first_scores(images, sentences).detach()
    want = PlainLosses(matcher, batch, labels).losses(first)
    losses = PhraseTask(matcher, Triplet(), labels=labels).losses(images, sentences, batch)
    for name in want:
        assert want[name] > 0
        close(losses[name], want[name], atol=1e-9)
    close_losses(matcher, losses['total'], sum(want.values()), 1e-9)


def losses_without_labels(batch, **arguments):
    matcher = make(**SPOKEN, **arguments)
    codes = codes_of(matcher, batch.regions, batch.captions)
    return PhraseTask(matcher, Triplet()).losses(*codes, batch)


def test_variants_leave_losses_out_and_labels_are_asked_for(batch):
    with pytest.raises(ValueError, match='needs labels'):
        losses_without_labels(batch)
    without_phrases = losses_without_labels(batch, weights=(1.0, 0.1, 0.0))
    assert 'phrase' not in without_phrases
    assert without_phrases['local'] > 0
    without_scales = losses_without_labels(batch, local=False, weights=(1.0, 0.1, 0.0))
    assert without_scales['local'] == 0


# ---------------------------------------------------------------- two phases


def test_phase_two_starts_from_phase_one(batch):
    first = make(SSAMTIntra, **SPOKEN)
    second = make(SSAMT, **SPOKEN)
    lacking, unknown = second.load_state_dict(first.state_dict(), strict=False)
    assert not unknown
    assert all(name.startswith('inter.') for name in lacking)
    scores = first.match(*codes_of(first, batch.regions, batch.captions))
    now = second.first_scores(*codes_of(second, batch.regions, batch.captions))
    torch.testing.assert_close(now, scores)


def test_phase_two_leaves_phase_one_alone(batch, labels):
    matcher = make(SSAMT, dropout=0.5, **SPOKEN).train()
    how = dict(lr=0.1, weight_decay=0.1, frozen=('intra',))
    optimizer = make_optimizer(matcher, optimizer='adamw', **how)
    task = PhraseTask(matcher, Triplet(), labels=labels)
    # nothing is dropped there
    once = matcher.encode_images(batch.regions).x
    assert matcher.encode_images(batch.regions).x.equal(once)
    before = copy.deepcopy(matcher.state_dict())
    for _ in range(3):
        task(batch)['total'].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in matcher.state_dict().items():
        assert value.equal(before[name]) == name.startswith('intra.'), name


def test_dropped_nodes_only_in_training():
    matcher = make(SSAMTIntra, drop=0.5)
    regions, captions = ragged(4, 4)

    def twice_the_same():
        once = matcher.encode_images(regions).vector
        return matcher.encode_images(regions).vector.equal(once)

    assert twice_the_same()
    assert not matcher.intra.lost(captions.mask).any()
    matcher.train()
    for layer in matcher.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    assert not twice_the_same()
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
    images, sentences = codes_of(matcher, regions, captions)
    words = matcher.attention(images, sentences)
    phrases = matcher.phrase_attention(images, sentences, captions.units)
    assert words.shape == (3, 2, 9, 6)
    assert phrases.shape == (3, 2, 4, 6)
    for b, c in product(range(3), range(2)):
        real = words[b, c][captions.mask[c]]
        torch.testing.assert_close(real.sum(-1), torch.ones(len(real), dtype=torch.float64))
        assert not real[:, ~regions.mask[b]].any()
        looks = matcher.looks(images[b], sentences[c])
        torch.testing.assert_close(looks.sum(-1), torch.ones_like(looks[..., 0]))


def test_phrases_without_nodes_look_too():
    matcher = make(phrases=False)
    regions, captions = ragged(3, 2)
    codes = codes_of(matcher, regions, captions)
    assert matcher.phrase_attention(*codes, captions.units).shape == (3, 2, 4, 6)


# ---------------------------------------------------------------- scales


class Spoken(NamedTuple):
    "A model of the sample's words, and all it is asked about."

    matcher: SSAMT
    images: Codes
    encoded: object  # indices -> captions
    labels: PhraseLabels
    image: Tensor  # (M,) picture of each caption

    def scales(self, i, c):
        "Of one pair: wholes, units, regions; the units that the picture has and has not."
        v = self.images[int(i)]
        t = self.matcher.encode_captions(self.encoded[[int(c)]])
        cosines = self.matcher.compare(v, t)
        scales = [float(scale) for scale in self.matcher.scales(cosines, v, t)]
        P = t.exists.shape[1]
        T = t.mask.shape[1]
        pair = torch.tensor([i]), torch.tensor([c])
        matched, mismatched = self.labels.matched(*pair, P, T)
        units = torch.cat([cosines.phrases, cosines.words], 1)
        return *scales, units[matched], units[mismatched]


@pytest.fixture
@torch.no_grad()
def spoken():
    sample = Split(shipped('sample'), 'train')
    vocab = Reader(Vocab.build(sample.captions, 1), chunk)
    facts = dict(region_width=sample.features.shape[2], words=len(vocab.vocab))
    matcher = make(positions=50, **facts).float()
    images = matcher.encode_images(sample.regions(slice(None)))
    image = torch.from_numpy(sample.caption_image)
    labels = PhraseLabels([chunk(caption) for caption in sample.captions], image)
    return Spoken(matcher, images, sample.encoded(vocab), labels, image)


def test_others_are_captions_of_other_pictures(spoken):
    assert (spoken.image[others(spoken.image, 3)] != spoken.image).all()


def scale_answers_plain(true, false, local):
    "Which scales tell a true pair from a false one; `local` is the place of the local scale."
    answers = {'global': true[0] > false[0], 'local': true[local] > false[local]}
    good, bad = false[3:]
    if len(good) and len(bad):
        answers['phrase'] = bool(good.mean() > bad.mean())
    return answers


@torch.no_grad()
def test_scale_accuracy_by_hand(spoken):
    matcher, images, encoded, labels, image = spoken
    wrong = others(image, 3)
    right = dict(i2t={}, t2i={})
    for c in range(len(image)):
        true = spoken.scales(image[c], c)
        false = dict(i2t=spoken.scales(image[c], wrong[c]), t2i=spoken.scales(image[wrong[c]], c))
        for local, name in enumerate(('i2t', 't2i'), 1):
            for scale, answer in scale_answers_plain(true, false[name], local).items():
                right[name].setdefault(scale, []).append(answer)
    table = scale_accuracy(matcher, images, encoded[:], image, labels, seed=3)
    for scale, percents in table.items():
        for name, percent in zip(('i2t', 't2i'), percents):
            answers = right[name][scale]
            assert percent == pytest.approx(100 * sum(answers) / len(answers), abs=1.0)
