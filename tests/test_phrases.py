"Text graphs, parsers, phrase labels, the phrase penalty and the structure mask: slow loops, invariances, faults."
import json
import random
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imtm_lite.data import DataError, Split
from imtm_lite.phrases import (ENTITY, TRIPLE, GoldParser, PhraseLabels, SpacyParser, TextGraph, chunk, graph_from_spans, graph_from_triples,
                               lemma, named_parser, phrase_penalty, structure_mask, synonyms)
from imtm_lite.scenes import INVERSE, WORDINGS, describe, make_scene
from imtm_lite.text import Captions, Vocab


@pytest.fixture(scope='module')
def sample(): return Split('data/sample', 'train')


# ---------------------------------------------------------------- lemmas and graphs

@pytest.mark.parametrize('words, want', [
    ('dogs dog, dog\'s dogs\' "Dog" dog.', 'dog'), ('running runs ran run', 'run'), ('riding rides rode ridden', 'ride'), ('carries carried carrying', 'carry'),
    ('men man', 'man'), ('puppies puppy', 'puppy'), ('boxes', 'box'), ('benches', 'bench'), ('sitting sat', 'sit'), ('lying lay', 'lie'), ('grass', 'grass'),
    ('red', 'red'), ('building', 'building'), ('left', 'left'), ('chasing chased', 'chase')])
def test_lemma(words, want):
    got = {lemma(w) for w in words.split()}
    assert got <= {want, 'lay'} and want in got # "lay" is a verb of its own and a form of "lie"


def test_lemma_never_raises():
    for w in ('', '.', '—', "'s", 'ß', '犬', 'x' * 500, '42', 'a' * 3 + 'ing'): assert isinstance(lemma(w), str)


@pytest.mark.parametrize('phrase, head, modifiers', [
    ('a small lady in yellow', 'lady', {'small', 'yellow'}), ('two dogs', 'dog', {'two'}), ('a group of people', 'people', {'group'}),
    ('the edge of the cliffs', 'edge', {'cliff'}), ('black and white', 'white', {'black'}), ('something pink', 'something', {'pink'})])
def test_head_and_modifiers(phrase, head, modifiers):
    e, = graph_from_spans(phrase, [[0, len(phrase.split()), 'other', 7]]).entities
    assert (e.head, set(e.modifiers), e.kind, e.chain) == (head, modifiers, 'other', 7)


def test_units_and_keys_run_in_one_order():
    g = graph_from_spans('a man in a hat is riding a horse', [[3, 5, '', 0], [7, 9, '', 0], [0, 2, '', 0]])
    assert g.units == [(ENTITY, [0, 1]), (ENTITY, [3, 4]), (ENTITY, [7, 8]), (TRIPLE, [0, 1, 2, 3, 4]), (TRIPLE, [0, 1, 6, 7, 8])]
    assert g.keys == [('man', frozenset()), ('hat', frozenset()), ('horse', frozenset()), ('man', 'in', 'hat'), ('man', 'ride', 'horse')]
    assert hash(g) == hash(graph_from_spans(' '.join(g.words), [[0, 2, '', 0], [3, 5, '', 0], [7, 9, '', 0]]))


@pytest.mark.parametrize('caption, want', [
    ('a dog is on a box and is next to a cat', {('dog', 'on', 'box'), ('dog', 'next to', 'cat')}),
    ('a dog is on a box that is next to a cat', {('dog', 'on', 'box'), ('box', 'next to', 'cat')}),
    ('a dog is on a box and a cat is under a chair', {('dog', 'on', 'box'), ('cat', 'under', 'chair')}),
    ('a dog and a cat', set()), ('a dog, a cat', set()), ('a dog . a cat', set()),
    ('a horse ridden by a woman', {('horse', 'ride by', 'woman')}),
    ('a woman wearing a hat, holding a cup.', {('woman', 'wear', 'hat'), ('woman', 'hold', 'cup')}),
    ('a brown dog has a stick', {('dog', 'have', 'stick')}), ('a dog has jumped over a stick', {('dog', 'jump over', 'stick')})])
def test_rule_for_triples(caption, want): assert {k for k in chunk(caption).keys if len(k) == 3} == want


def test_rule_agrees_with_the_grammar_of_the_world():
    straight, turned = ({p: {' '.join(lemma(w) for w in x.split() if w not in ('a', 'the')) for x in some} for p, some in t.items()} for t in (WORDINGS, INVERSE))
    seen = 0
    for n in range(700, 740):
        for s in describe(make_scene(n), n):
            g = graph_from_spans(s.text, s.phrases)
            start = [p[0] for p in s.phrases]
            found = {(start.index(g.entities[t.subject].start), t.predicate, start.index(g.entities[t.object].start)) for t in g.triples}
            assert len(found) == len(s.triples), s.text
            for a, p, b in s.triples: assert any((a, w, b) in found for w in straight[p]) or any((b, w, a) in found for w in turned.get(p, ())), s.text
            seen += len(s.triples)
    assert seen > 100


def test_pronouns_are_no_entities():
    g = graph_from_spans('she holds it near a dog', [[0, 1, 'people', 1], [2, 3, 'other', 2], [4, 6, 'animals', 3]])
    assert [k[0] for k in g.keys] == ['dog']


def test_graph_from_triples():
    g = graph_from_triples('Two men ride horses', [['man', 'ride', 'horse'], ['man', 'wear', 'big hat']])
    assert g.keys == [('man', frozenset()), ('horse', frozenset()), ('hat', frozenset({'big'})), ('man', 'ride', 'horse'), ('man', 'wear', 'hat')]
    assert g.units == [(0, [1]), (0, [3]), (0, []), (1, [1, 2, 3]), (1, [1])] # no hat in the sentence: a phrase without words
    assert graph_from_triples('a dog', []).units == []


# ---------------------------------------------------------------- the chunker

@pytest.mark.parametrize('caption, want', [
    ('A black and white dog runs', ['A black and white dog']), ('a running dog', ['a running dog']), ('dogs jump off a ski jump', ['dogs', 'a ski jump']),
    ('a man and woman sit', ['a man', 'woman']), ('a cup on top of a box', ['a cup', 'a box']), ('a cat to the left of a dog', ['a cat', 'a dog']),
    ('the edge of a cliff', ['the edge of a cliff']), ('a girl in red stands tall', ['a girl', 'red']), ('two dogs, one ball', ['two dogs,', 'one ball']),
    ('he is running', []), ('', []), ('. , !', [])])
def test_chunks(caption, want): assert [' '.join(caption.split()[e.start:e.end]) for e in chunk(caption).entities] == want


def test_chunker_takes_any_text():
    rng = random.Random(0)
    words = ['the', 'a', 'of', 'and', ',', '.', "'s", 'two', 'very', 'back', 'that', 'left', 'side', 'runs', 'running', 'dog', 'red', 'с', '犬が', '—', 'ünter', '\u200b', 'top', '3']
    for _ in range(2000):
        text = ' '.join(rng.choices(words, k=rng.randrange(9)))
        g, n = chunk(text), len(text.split())
        at = 0
        for e in g.entities: # in order, apart, inside
            assert at <= e.start < e.end <= n and e.head
            at = e.end
        for t in g.triples: assert t.subject < t.object < len(g.entities) and t.predicate and all(0 <= i < n for i in t.words)
        for _, span in g.units: assert span and max(span) < n
    assert chunk('два человека едут на лошадях').words[0] == 'два'


def test_human_spans_of_the_sample_and_chunks_agree_mostly(sample):
    gold = GoldParser(sample)
    a, b = ([{(e.start, e.end) for e in p(c).entities} for c in sample.captions] for p in (gold, chunk))
    hit = sum(len(x & y) for x, y in zip(a, b))
    assert hit > .7 * sum(map(len, a)) and hit > .7 * sum(map(len, b))


# ---------------------------------------------------------------- parsers

def test_gold_parser(sample):
    gold = GoldParser(sample)
    for row in range(3):
        for c, spans in zip(sample.captions_of(row), sample.phrases[row]['phrases']):
            assert [(e.start, e.end, e.kind, e.chain) for e in gold(sample.captions[c]).entities] == sorted((s[0], s[1], s[2], s[3]) for s in spans)
    assert gold('a dog in the park') == chunk('a dog in the park')


def test_gold_parser_faults(sample, tmp_path):
    shutil.copytree('data/sample', tmp_path/'d', ignore=shutil.ignore_patterns('pictures'))
    path = tmp_path/'d'/'train_phrases.jsonl'
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    first['phrases'][0][0][1] = 99
    path.write_text('\n'.join([json.dumps(first), *lines[1:]]) + '\n')
    with pytest.raises(DataError, match='line 1: span .* words; expected 0 <= start < end') as fault: GoldParser(Split(tmp_path/'d', 'train'))
    assert '\n' not in str(fault.value)
    path.write_text('\n'.join([json.dumps({**json.loads(x), 'boxes': {}}) for x in lines]) + '\n') # chains without boxes are fine
    assert GoldParser(Split(tmp_path/'d', 'train'))(sample.captions[0]) == GoldParser(sample)(sample.captions[0])
    path.unlink()
    split = Split(tmp_path/'d', 'train')
    with pytest.raises(DataError, match='the gold parser needs it'): GoldParser(split)
    assert synonyms(split) == {}


def test_named_parser(sample):
    assert named_parser('chunker') is chunk and named_parser('gold') is chunk
    assert isinstance(named_parser('gold', sample), GoldParser)
    with pytest.raises((ImportError, ValueError), match='python -m spacy download no_such_model') as fault: named_parser('no_such_model')
    assert '\n' not in str(fault.value)


@pytest.mark.skipif(not (find_spec('spacy') and find_spec('en_core_web_sm')), reason='spaCy or its small English model is not installed')
def test_spacy_parser():
    g = SpacyParser()('A man in a red shirt is holding a cup, and he looks at two dogs.')
    assert {('man', frozenset()), ('shirt', frozenset({'red'})), ('cup', frozenset()), ('dog', frozenset({'two'})), ('man', 'hold', 'cup')} <= set(g.keys)
    assert all(span and max(span) < len(g.words) for _, span in g.units) and SpacyParser()('').units == []


def spoken(*pictures): # each a list of captions, each a list of (phrase, chain): what `synonyms` reads of a split
    captions = [' and '.join(p for p, _ in c) for picture in pictures for c in picture]
    image = np.repeat(np.arange(len(pictures)), [len(p) for p in pictures])
    def spans(c):
        at, out = 0, []
        for p, chain in c: out.append([at, at + len(p.split()), 'x', chain]); at = out[-1][1] + 1
        return out
    return SimpleNamespace(n_images=len(pictures), captions=captions, captions_of=lambda r: np.flatnonzero(image == r),
                           phrases=[{'phrases': [spans(c) for c in p], 'boxes': {}} for p in pictures])


def test_synonyms_join_words_of_one_chain():
    split = spoken(*[[[('a sofa', 1), ('a cat', 2)], [('the couch', 1)]]] * 6, [[('a couch', 1)], [('a bench', 1)]])
    assert synonyms(split) == {'sofa': 'couch', 'couch': 'couch'} # the bench once: too rare; the cat alone
    assert synonyms(split, chains=7) == {}
    assert synonyms(spoken(*[[[('a sofa', 0)], [('a couch', 0)]]] * 9)) == {} # chain 0 means nothing


def test_synonyms_pass_nothing_over_a_bridge():
    split = spoken(*[[[('a man', 1)], [('a person', 1)]]] * 9, *[[[('a woman', 1)], [('a person', 1)]]] * 8)
    same = synonyms(split)
    assert same.get('man') != same.get('woman') or 'man' not in same
    many = [[[(f'a {w}', 1)], [('a person', 1)]] for w in ('man', 'woman', 'child', 'guy', 'lady', 'skier', 'rider') for _ in range(6)]
    assert 'person' not in synonyms(spoken(*many))


# ---------------------------------------------------------------- labels

def random_graphs(seed, n=30):
    "Captions over few words, so that keys meet; some without any phrase."
    rng = random.Random(seed)
    noun, mods = 'dog cat man'.split(), 'red big two old'.split()
    def one():
        parts = [' '.join([*rng.sample(mods, rng.randrange(4)), rng.choice(noun)]) for _ in range(rng.randrange(4))]
        spans, words = [], []
        for p in parts:
            if words: words += [rng.choice(['on', 'near', 'and'])]
            spans.append([len(words), len(words) + len(p.split()), '', 0]); words += p.split()
        return graph_from_spans(' '.join(words), spans)
    return [one() for _ in range(n)], [rng.randrange(6) for _ in range(n)]


def labels_loops(graphs, image, images, captions, units, same):
    norm = lambda k: (same.get(k[0], k[0]), *k[1:-1], k[-1] if len(k) == 2 else same.get(k[2], k[2]))
    out = torch.zeros(len(images), len(captions), units, dtype=torch.bool)
    for b, i in enumerate(images.tolist()):
        for c, cap in enumerate(captions.tolist()):
            for p, key in enumerate(graphs[cap].keys[:units]):
                for g, own in zip(graphs, image):
                    for k in g.keys if own == i else ():
                        a, o = norm(key), norm(k)
                        if len(a) == len(o) and (a == o or len(a) == 2 and a[0] == o[0] and a[1] <= o[1]): out[b, c, p] = True
    return out


@pytest.mark.parametrize('same', [{}, {'cat': 'dog', 'dog': 'dog'}])
def test_labels_against_loops(same):
    for seed in range(15):
        graphs, image = random_graphs(seed)
        labels = PhraseLabels(graphs, image, same)
        images, captions = torch.randint(6, (4,), generator=torch.Generator().manual_seed(seed)), torch.randperm(30, generator=torch.Generator().manual_seed(seed))[:7]
        widest = max(len(g.keys) for g in graphs)
        for units in (widest, widest + 3, 2): assert labels.matched(images, captions, units).equal(labels_loops(graphs, image, images, captions, units, same))


def test_labels_properties():
    graphs, image = random_graphs(3)
    labels, all_ = PhraseLabels(graphs, image), torch.arange(30)
    own = labels.matched(torch.tensor(image), all_, 12)[all_, all_] # every phrase of an own caption is matched, nothing beyond
    assert own.equal(torch.arange(12) < torch.tensor([len(g.keys) for g in graphs])[:, None])
    g = [graph_from_spans('a big red shirt', [[0, 4, '', 0]]), graph_from_spans('a red shirt', [[0, 3, '', 0]]), TextGraph(())]
    m = PhraseLabels(g, [0, 1, 2]).matched(torch.arange(3), torch.arange(3), 1)[..., 0]
    assert m.tolist() == [[True, True, False], [False, True, False], [False, False, False]] # upwards only; a picture without phrases matches nothing
    long = graph_from_spans(text := ' '.join([f'm{k}' for k in range(14)] + ['dog']), [[0, 15, '', 0]])
    assert PhraseLabels([long], [0]).matched(torch.tensor([0]), torch.tensor([0]), 1).item(), text
    assert PhraseLabels([TextGraph(())], [0]).matched(torch.tensor([0]), torch.tensor([0]), 3).tolist() == [[[False] * 3]]
    with pytest.raises(ValueError, match='30 graphs for 29 captions'): PhraseLabels(graphs, image[1:])


# ---------------------------------------------------------------- the penalty

def penalty_loops(a, matched, exists, images, captions, margin):
    out = []
    for i, c in zip(images.tolist(), captions.tolist()):
        bad = [u for u in range(a.shape[2]) if exists[c, u] and not matched[i, c, u]]
        out.append(sum(max(0., float(margin + a[i, c, u] - a[c, c, u])) for u in bad) / len(bad) if bad else 0.)
    return torch.tensor(out, dtype=torch.float64)


def of_pairs(a, matched, exists, images, captions):
    "What the penalty is given of all agreements: those of the wrong pairs, those of the own ones, and which phrases are mismatched."
    return a[images, captions], a[captions, captions], exists[captions] & ~matched[images, captions]


def test_penalty_against_loops_with_finite_gradients():
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        B, N, P = (int(torch.randint(1, 6, (), generator=g)) for _ in range(3))
        share = torch.rand(3, generator=g)
        a = torch.randn(B, B, P, generator=g, dtype=torch.float64)
        exists, matched = torch.rand(B, P, generator=g) < share[0], torch.rand(B, B, P, generator=g) < share[1]
        images, captions = torch.randint(B, (2, N), generator=g)
        cells = a.masked_fill(~exists, float(('nan', 'inf', '-inf')[seed % 3])).requires_grad_() # what stands in padding must not matter
        cost = phrase_penalty(*of_pairs(cells, matched, exists, images, captions), .3)
        torch.testing.assert_close(cost.detach(), penalty_loops(a, matched, exists, images, captions, .3), rtol=0, atol=1e-12)
        cost.sum().backward()
        assert cells.grad.isfinite().all() and (cells.grad[:, ~exists] == 0).all()


@pytest.mark.parametrize('corner', ['no phrase', 'all matched', 'no pair', 'no column'])
def test_penalty_is_zero_where_nothing_is_wrong(corner):
    B, P, N = 3, 0 if corner == 'no column' else 4, 0 if corner == 'no pair' else 3
    a = torch.randn(B, B, P, requires_grad=True)
    exists = torch.full((B, P), corner != 'no phrase')
    matched = torch.full((B, B, P), corner == 'all matched')
    cost = phrase_penalty(*of_pairs(a, matched, exists, torch.arange(N), (torch.arange(N) + 1) % B))
    assert cost.tolist() == [0.] * N
    cost.sum().backward()
    assert not a.grad.any()


def test_penalty_spares_matched_phrases_and_counts_in_full_precision():
    a, pairs = torch.zeros(2, 2, 2), (torch.tensor([0, 1]), torch.tensor([1, 0]))
    exists, matched = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, 2, dtype=torch.bool)
    matched[0, 1, 0] = True
    b = a.clone()
    b[0, 1, 0] = 100.
    given = of_pairs(a, matched, exists, *pairs)
    assert phrase_penalty(*of_pairs(b, matched, exists, *pairs)).equal(phrase_penalty(*given))
    assert phrase_penalty(*of_pairs(a.half(), matched, exists, *pairs)).dtype == torch.float32
    with pytest.raises(ValueError, match='expected .N, P.'): phrase_penalty(given[0], given[1][:1], given[2])
    with pytest.raises(ValueError, match='bad .2, 2, 2.'): phrase_penalty(*given[:2], matched)


def test_penalty_compares_a_phrase_with_itself():
    "What a phrase agrees with every picture alike costs nothing: levels of their own change no penalty."
    g = torch.Generator().manual_seed(0)
    a, level = torch.randn(4, 4, 5, generator=g, dtype=torch.float64), 10 * torch.randn(4, 5, generator=g, dtype=torch.float64)
    exists, matched = torch.rand(4, 5, generator=g) < .8, torch.rand(4, 4, 5, generator=g) < .3
    pairs = torch.randint(4, (2, 20), generator=g)
    cost = phrase_penalty(*of_pairs(a, matched, exists, *pairs))
    assert cost.any()
    torch.testing.assert_close(phrase_penalty(*of_pairs(a + level, matched, exists, *pairs)), cost, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the mask, and captions with phrases

def mask_loops(captions):
    C, P, T = captions.units.shape
    out = torch.zeros(C, T + P + 1, T + P + 1, dtype=torch.bool)
    for c in range(C):
        words = range(int(captions.lengths[c]))
        span = {p: {t for t in range(T) if captions.units[c, p, t]} for p in range(P)}
        span = {p: s for p, s in span.items() if s}
        for i in words:
            for j in words: out[c, i, j] = True
        for p, s in span.items():
            out[c, T + p, T + p] = True
            for t in s: out[c, T + p, t] = out[c, t, T + p] = True
            for q, r in span.items():
                if captions.kinds[c, p] == ENTITY and captions.kinds[c, q] == TRIPLE and s <= r: out[c, T + p, T + q] = out[c, T + q, T + p] = True
        for n in [*words, *(T + p for p in span), T + P]: out[c, T + P, n] = True
    return out


def cut(captions, max_words=47):
    vocab = Vocab.build(captions, min_freq=1)
    vocab.parser = chunk
    return Captions.from_text(captions, vocab, max_words=max_words)


def test_mask_against_loops(sample):
    captions = cut([*sample.captions[:25], 'running away', 'a', ' '.join(['a big dog on'] * 50)]) # no phrase; one word; 200 words
    assert structure_mask(captions).equal(mask_loops(captions))
    captions = cut(sample.captions[:25], max_words=6)                                             # phrases that are cut in the middle
    assert structure_mask(captions).equal(mask_loops(captions))


def test_mask_leaves_padding_alone(sample):
    captions = cut([sample.captions[0], 'away', ' '.join(['a red dog near'] * 12)])
    mask = structure_mask(captions)
    nodes = torch.cat([captions.mask, captions.units.any(2), torch.ones(3, 1, dtype=torch.bool)], 1)
    assert not mask[~nodes].any() and not mask.transpose(1, 2)[~nodes].any()
    assert not mask[:, :-1, -1].any() and mask[:, -1].equal(nodes)
    alone = structure_mask(cut([sample.captions[0]]))[0]
    T, P = (cut([sample.captions[0]]).units.shape[k] for k in (2, 1))
    keep = [*range(T), *(captions.units.shape[2] + p for p in range(P)), mask.shape[1] - 1]
    assert mask[0][keep][:, keep].equal(alone)
    with pytest.raises(ValueError, match='give the vocabulary a parser'): structure_mask(Captions.from_ids([[1, 2]]))


def test_words_behind_the_cut_leave_phrases_without_tokens():
    text = ' '.join(['a dog on'] * 67)                                           # 201 words
    captions = cut([text])
    assert len(chunk(text).units) == captions.units.shape[1] and int(captions.lengths) == 49
    there = captions.units.any(2)[0]
    assert there.any() and not there.all() and (captions.kinds[0] == -1).equal(~there)
    labels = PhraseLabels([chunk(text)], [0]).matched(torch.tensor([0]), torch.tensor([0]), captions.units.shape[1])
    assert labels.shape == (1, 1, captions.units.shape[1])


def test_a_caption_without_a_phrase():
    captions = cut(['running away', 'a dog'])
    assert captions.kinds[0].eq(-1).all() and not captions.units[0].any()
    graphs = [chunk('running away'), chunk('a dog')]
    matched = PhraseLabels(graphs, [0, 1]).matched(torch.arange(2), torch.arange(2), 1)
    assert matched.tolist() == [[[False], [False]], [[False], [True]]]
    cost = phrase_penalty(*of_pairs(torch.zeros(2, 2, 1), matched, captions.units.any(2), torch.tensor([0, 1]), torch.tensor([1, 0])))
    torch.testing.assert_close(cost, torch.tensor([.2, 0.]))                     # 'a dog' is wrong in the first picture; nothing in the other caption can be
