"Text graphs, parsers, phrase labels and losses: slow loops, invariances, faults."

import json
import random
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imtm_lite.data import Split
from imtm_lite.files import DataError, shipped
from imtm_lite.phrases import (
    ATTRIBUTE,
    OBJECT,
    RELATION,
    GoldParser,
    PhraseLabels,
    SpacyParser,
    TextGraph,
    chunk,
    contained,
    graph_from_spans,
    graph_from_triples,
    lemma,
    mean_where,
    named_parser,
    phrase_loss,
    synonyms,
    tril,
)
from imtm_lite.text import Captions, Vocab, tokenize
from imtm_lite.world.scenes import INVERSE, WORDINGS, describe, make_scene


@pytest.fixture(scope='module')
def sample():
    return Split(shipped('sample'), 'train')


# ---------------------------------------------------------------- lemmas and graphs


@pytest.mark.parametrize(
    'words, want',
    [
        ('dogs dog, dog\'s dogs\' "Dog" dog.', 'dog'),
        ('running runs ran run', 'run'),
        ('riding rides rode ridden', 'ride'),
        ('carries carried carrying', 'carry'),
        ('men man', 'man'),
        ('puppies puppy', 'puppy'),
        ('boxes', 'box'),
        ('benches', 'bench'),
        ('sitting sat', 'sit'),
        ('lying lay', 'lie'),
        ('grass', 'grass'),
        ('red', 'red'),
        ('building', 'building'),
        ('left', 'left'),
        ('chasing chased', 'chase'),
    ],
)
def test_lemma(words, want):
    got = {lemma(w) for w in words.split()}
    assert got <= {want, 'lay'} and want in got  # "lay" is a verb of its own and a form of "lie"


def test_lemma_never_raises():
    for w in ('', '.', '—', "'s", 'ß', '犬', 'x' * 500, '42', 'a' * 3 + 'ing'):
        assert isinstance(lemma(w), str)


@pytest.mark.parametrize(
    'phrase, head, modifiers',
    [
        ('a small lady in yellow', 'lady', {'small', 'yellow'}),
        ('two dogs', 'dog', {'two'}),
        ('a group of people', 'people', {'group'}),
        ('the edge of the cliffs', 'edge', {'cliff'}),
        ('black and white', 'white', {'black'}),
        ('something pink', 'something', {'pink'}),
    ],
)
def test_head_and_modifiers(phrase, head, modifiers):
    (e,) = graph_from_spans(phrase, [[0, len(phrase.split()), 'other', 7]]).entities
    assert (e.head, set(e.modifiers), e.kind, e.chain) == (head, modifiers, 'other', 7)


def test_units_and_keys_run_in_one_order():
    g = graph_from_spans(
        'a tall old man in a hat is riding a horse', [[5, 7, '', 0], [9, 11, '', 0], [0, 4, '', 0]]
    )
    assert g.units == [
        (OBJECT, [3]),
        (OBJECT, [6]),
        (OBJECT, [10]),
        (ATTRIBUTE, [1, 3]),
        (ATTRIBUTE, [2, 3]),
        (RELATION, [3, 4, 6]),
        (RELATION, [3, 8, 10]),
    ]
    assert g.keys == [
        ('man',),
        ('hat',),
        ('horse',),
        ('tall', 'man'),
        ('old', 'man'),
        ('man', 'in', 'hat'),
        ('man', 'ride', 'horse'),
    ]
    assert g.texts[3:5] == ['tall man', 'old man'] and g.texts[-1] == 'man riding horse'
    assert hash(g) == hash(
        graph_from_spans(' '.join(g.words), [[0, 4, '', 0], [5, 7, '', 0], [9, 11, '', 0]])
    )


def test_every_unit_has_words_of_its_own_entities(sample):
    for caption in sample.captions:
        g = chunk(caption)
        assert [k for k, _ in g.units] == sorted(k for k, _ in g.units) and len(g.units) == len(
            g.keys
        )
        for (kind, words), key in zip(g.units, g.keys):
            assert words == sorted(words) and words
            if kind != RELATION:
                assert {lemma(g.words[w]) for w in words} <= set(key)


@pytest.mark.parametrize(
    'caption, want',
    [
        (
            'a dog is on a box and is next to a cat',
            {('dog', 'on', 'box'), ('dog', 'next', 'to', 'cat')},
        ),
        (
            'a dog is on a box that is next to a cat',
            {('dog', 'on', 'box'), ('box', 'next', 'to', 'cat')},
        ),
        (
            'a dog is on a box and a cat is under a chair',
            {('dog', 'on', 'box'), ('cat', 'under', 'chair')},
        ),
        ('a dog and a cat', set()),
        ('a dog, a cat', set()),
        ('a dog . a cat', set()),
        ('a horse ridden by a woman', {('horse', 'ride', 'by', 'woman')}),
        (
            'a woman wearing a hat, holding a cup.',
            {('woman', 'wear', 'hat'), ('woman', 'hold', 'cup')},
        ),
        ('a brown dog has a stick', {('dog', 'have', 'stick')}),
        ('a dog has jumped over a stick', {('dog', 'jump', 'over', 'stick')}),
    ],
)
def test_rule_for_triples(caption, want):
    assert {
        k for (kind, _), k in zip(chunk(caption).units, chunk(caption).keys) if kind == RELATION
    } == want


def test_rule_agrees_with_the_grammar_of_the_world():
    straight, turned = (
        {
            p: {' '.join(lemma(w) for w in x.split() if w not in ('a', 'the')) for x in some}
            for p, some in t.items()
        }
        for t in (WORDINGS, INVERSE)
    )
    seen = 0
    for n in range(700, 740):
        for s in describe(make_scene(n), n):
            g = graph_from_spans(s.text, s.phrases)
            start = [p[0] for p in s.phrases]
            found = {
                (
                    start.index(g.entities[t.subject].start),
                    t.predicate,
                    start.index(g.entities[t.object].start),
                )
                for t in g.triples
            }
            assert len(found) == len(s.triples), s.text
            for a, p, b in s.triples:
                assert any((a, w, b) in found for w in straight[p]) or any(
                    (b, w, a) in found for w in turned.get(p, ())
                ), s.text
            seen += len(s.triples)
    assert seen > 100


def test_pronouns_are_no_entities():
    g = graph_from_spans(
        'she holds it near a dog', [[0, 1, 'people', 1], [2, 3, 'other', 2], [4, 6, 'animals', 3]]
    )
    assert [k[0] for k in g.keys] == ['dog']


def test_graph_from_triples():
    g = graph_from_triples(
        'Two men ride horses', [['man', 'ride', 'horse'], ['man', 'wear', 'big hat']]
    )
    assert g.keys == [
        ('man',),
        ('horse',),
        ('hat',),
        ('big', 'hat'),
        ('man', 'ride', 'horse'),
        ('man', 'wear', 'hat'),
    ]
    # no hat in the sentence: phrases without words
    assert g.units == [(0, [1]), (0, [3]), (0, []), (1, []), (2, [1, 2, 3]), (2, [1])]
    assert graph_from_triples('a dog', []).units == []


# ---------------------------------------------------------------- the chunker


@pytest.mark.parametrize(
    'caption, want',
    [
        ('A black and white dog runs', ['A black and white dog']),
        ('a running dog', ['a running dog']),
        ('dogs jump off a ski jump', ['dogs', 'a ski jump']),
        ('a man and woman sit', ['a man', 'woman']),
        ('a cup on top of a box', ['a cup', 'a box']),
        ('a cat to the left of a dog', ['a cat', 'a dog']),
        ('the edge of a cliff', ['the edge of a cliff']),
        ('a girl in red stands tall', ['a girl', 'red']),
        ('two dogs, one ball', ['two dogs,', 'one ball']),
        ('he is running', []),
        ('', []),
        ('. , !', []),
    ],
)
def test_chunks(caption, want):
    assert [' '.join(caption.split()[e.start : e.end]) for e in chunk(caption).entities] == want


def test_chunker_takes_any_text():
    rng = random.Random(0)
    words = [
        'the',
        'a',
        'of',
        'and',
        ',',
        '.',
        "'s",
        'two',
        'very',
        'back',
        'that',
        'left',
        'side',
        'runs',
        'running',
        'dog',
        'red',
        'с',
        '犬が',
        '—',
        'ünter',
        '\u200b',
        'top',
        '3',
    ]
    for _ in range(2000):
        text = ' '.join(rng.choices(words, k=rng.randrange(9)))
        g = chunk(text)
        n = len(text.split())
        at = 0
        for e in g.entities:  # in order, apart, inside
            assert at <= e.start < e.end <= n and e.head
            at = e.end
        for t in g.triples:
            assert (
                t.subject < t.object < len(g.entities)
                and t.predicate
                and all(0 <= i < n for i in t.words)
            )
        for _, span in g.units:
            assert span and max(span) < n
    assert chunk('два человека едут на лошадях').words[0] == 'два'


def test_human_spans_of_the_sample_and_chunks_agree_mostly(sample):
    gold = GoldParser(sample)
    a, b = (
        [{(e.start, e.end) for e in p(c).entities} for c in sample.captions] for p in (gold, chunk)
    )
    hit = sum(len(x & y) for x, y in zip(a, b))
    assert hit > 0.7 * sum(map(len, a)) and hit > 0.7 * sum(map(len, b))


# ---------------------------------------------------------------- parsers


def test_gold_parser(sample):
    gold = GoldParser(sample)
    for row in range(3):
        for c, spans in zip(sample.captions_of(row), sample.phrases[row]['phrases']):
            assert [
                (e.start, e.end, e.kind, e.chain) for e in gold(sample.captions[c]).entities
            ] == sorted((s[0], s[1], s[2], s[3]) for s in spans)
    assert gold('a dog in the park') == chunk('a dog in the park')


def test_gold_parser_faults(sample, tmp_path):
    shutil.copytree(shipped('sample'), tmp_path / 'd', ignore=shutil.ignore_patterns('pictures'))
    path = tmp_path / 'd' / 'train_phrases.jsonl'
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    first['phrases'][0][0][1] = 99
    path.write_text('\n'.join([json.dumps(first), *lines[1:]]) + '\n')
    with pytest.raises(
        DataError, match='line 1: span .* words; expected 0 <= start < end'
    ) as fault:
        GoldParser(Split(tmp_path / 'd', 'train'))
    assert '\n' not in str(fault.value)
    # chains without boxes are fine
    path.write_text('\n'.join([json.dumps({**json.loads(x), 'boxes': {}}) for x in lines]) + '\n')
    assert GoldParser(Split(tmp_path / 'd', 'train'))(sample.captions[0]) == GoldParser(sample)(
        sample.captions[0]
    )
    path.unlink()
    split = Split(tmp_path / 'd', 'train')
    with pytest.raises(DataError, match='the gold parser needs it'):
        GoldParser(split)
    assert synonyms(split) == {}


def test_named_parser(sample):
    assert named_parser('chunker') is chunk and named_parser('gold') is chunk
    assert isinstance(named_parser('gold', sample), GoldParser)
    with pytest.raises(
        (ImportError, ValueError), match='python -m spacy download no_such_model'
    ) as fault:
        named_parser('no_such_model')
    assert '\n' not in str(fault.value)


@pytest.mark.skipif(
    not (find_spec('spacy') and find_spec('en_core_web_sm')),
    reason='spaCy or its small English model is not installed',
)
def test_spacy_parser():
    g = SpacyParser()('A man in a red shirt is holding a cup, and he looks at two dogs.')
    assert {
        ('man',),
        ('shirt',),
        ('red', 'shirt'),
        ('cup',),
        ('two', 'dog'),
        ('man', 'hold', 'cup'),
    } <= set(g.keys)
    assert (
        all(span and max(span) < len(g.words) for _, span in g.units)
        and SpacyParser()('').units == []
    )


# each a list of captions, each a list of (phrase, chain): what `synonyms` reads of a split
def spoken(*pictures):
    captions = [' and '.join(p for p, _ in c) for picture in pictures for c in picture]
    image = np.repeat(np.arange(len(pictures)), [len(p) for p in pictures])

    def spans(c):
        at = 0
        out = []
        for p, chain in c:
            out.append([at, at + len(p.split()), 'x', chain])
            at = out[-1][1] + 1
        return out

    return SimpleNamespace(
        n_images=len(pictures),
        captions=captions,
        captions_of=lambda r: np.flatnonzero(image == r),
        phrases=[{'phrases': [spans(c) for c in p], 'boxes': {}} for p in pictures],
    )


def test_synonyms_join_words_of_one_chain():
    split = spoken(
        *[[[('a sofa', 1), ('a cat', 2)], [('the couch', 1)]]] * 6,
        [[('a couch', 1)], [('a bench', 1)]],
    )
    # the bench once: too rare; the cat alone
    assert synonyms(split) == {'sofa': 'couch', 'couch': 'couch'}
    assert synonyms(split, chains=7) == {}
    # chain 0 means nothing
    assert synonyms(spoken(*[[[('a sofa', 0)], [('a couch', 0)]]] * 9)) == {}


def test_synonyms_pass_nothing_over_a_bridge():
    split = spoken(
        *[[[('a man', 1)], [('a person', 1)]]] * 9, *[[[('a woman', 1)], [('a person', 1)]]] * 8
    )
    same = synonyms(split)
    assert same.get('man') != same.get('woman') or 'man' not in same
    many = [
        [[(f'a {w}', 1)], [('a person', 1)]]
        for w in ('man', 'woman', 'child', 'guy', 'lady', 'skier', 'rider')
        for _ in range(6)
    ]
    assert 'person' not in synonyms(spoken(*many))


# ---------------------------------------------------------------- labels


def random_graphs(seed, n=30):
    "Captions over few words, so that keys meet; some without any phrase."
    rng = random.Random(seed)
    noun = 'dog cat man'.split()
    mods = 'red big two old'.split()

    def one():
        parts = [
            ' '.join([*rng.sample(mods, rng.randrange(4)), rng.choice(noun)])
            for _ in range(rng.randrange(4))
        ]
        spans = []
        words = []
        for p in parts:
            if words:
                words += [rng.choice(['on', 'near', 'and'])]
            spans.append([len(words), len(words) + len(p.split()), '', 0])
            words += p.split()
        return graph_from_spans(' '.join(words), spans)

    return [one() for _ in range(n)], [rng.randrange(6) for _ in range(n)]


def keys_of(graph, same):
    "Keys of the phrases, and of the tokens; an empty one for punctuation."
    norm = lambda key: tuple(same.get(w, w) for w in key)
    tokens = [lemma(t) for t in tokenize(' '.join(graph.words))]
    return [norm(k) for k in graph.keys], [norm((t,)) if t else () for t in tokens]


def inside(small, large):
    "Whether the words of one key stand side by side in the other."
    return any(large[k : k + len(small)] == small for k in range(len(large)))


def labels_loops(graphs, image, images, captions, P, T, same):
    matched, mismatched = torch.zeros(2, len(images), P + T, dtype=torch.bool)
    for n, (i, c) in enumerate(zip(images.tolist(), captions.tolist())):
        own = [
            k for g, at in zip(graphs, image) if at == i for part in keys_of(g, same) for k in part
        ]
        phrases, tokens = keys_of(graphs[c], same)
        columns = list(enumerate(phrases[:P])) + [
            (P + 1 + t, k) for t, k in enumerate(tokens[: T - 1])
        ]
        for column, key in columns:
            if key:
                true = any(inside(key, label) for label in own)
                (matched if true else mismatched)[n, column] = True
    return matched, mismatched


@pytest.mark.parametrize('same', [{}, {'cat': 'dog', 'dog': 'dog'}])
def test_labels_against_loops(same):
    for seed in range(12):
        graphs, image = random_graphs(seed)
        labels = PhraseLabels(graphs, image, same)
        g = torch.Generator().manual_seed(seed)
        images = torch.randint(6, (9,), generator=g)
        captions = torch.randint(30, (9,), generator=g)
        widest = max(len(x.keys) for x in graphs)
        longest = max(len(x.words) for x in graphs) + 2
        for P, T in ((widest, longest), (widest + 3, longest + 4), (2, 3), (0, 5)):
            for got, want in zip(
                labels.matched(images, captions, P, T),
                labels_loops(graphs, image, images, captions, P, T, same),
            ):
                assert got.equal(want)


def test_labels_properties():
    graphs, image = random_graphs(3)
    labels = PhraseLabels(graphs, image)
    own = torch.arange(30)
    # every phrase of an own caption is matched, nothing beyond
    matched, mismatched = labels.matched(torch.tensor(image), own, 12, 0)
    assert not mismatched.any() and matched.equal(
        torch.arange(12) < torch.tensor([len(g.keys) for g in graphs])[:, None]
    )
    g = [chunk('a man wears a red shirt .'), chunk('a shirt'), chunk('a red hat')]
    labels = PhraseLabels(g, [0, 1, 2])
    matched, mismatched = labels.matched(torch.tensor([0, 1, 0]), torch.tensor([1, 0, 2]), 4, 9)
    # a shirt is part of a red shirt
    assert matched[0, :1].all() and g[1].keys == [('shirt',)]
    assert g[0].keys == [('man',), ('shirt',), ('red', 'shirt'), ('man', 'wear', 'shirt')]
    assert matched[1, :4].tolist() == [False, True, False, False] and mismatched[
        1, :4
    ].tolist() == [True, False, True, True]
    # a hat is not there, and nothing red that is a hat
    assert mismatched[2, :2].all()
    words = matched[1, 4:], mismatched[1, 4:]
    # <start> a man wears a red shirt . <end>
    assert words[0].tolist() == [False, True, False, False, True, False, True, False, False]
    assert words[1].tolist() == [False, False, True, True, False, True, False, False, False]
    empty = PhraseLabels([TextGraph(())], [0]).matched(torch.tensor([0]), torch.tensor([0]), 3, 2)
    assert not empty[0].any() and not empty[1].any()
    with pytest.raises(ValueError, match='30 graphs for 29 captions'):
        PhraseLabels(graphs, image[1:])


def test_contained_runs():
    assert contained(('man', 'on', 'horse')) == {
        ('man',),
        ('on',),
        ('horse',),
        ('man', 'on'),
        ('on', 'horse'),
        ('man', 'on', 'horse'),
    }


# ---------------------------------------------------------------- the losses


def test_phrase_loss_against_loops_with_finite_gradients():
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        N, U = (int(torch.randint(1, 7, (), generator=g)) for _ in range(2))
        cosine = torch.randn(N, U, generator=g, dtype=torch.float64)
        # neither, matched, mismatched
        label = torch.randint(3, (N, U), generator=g)
        want = []
        for row, kind in zip(cosine.tolist(), label.tolist()):
            good, bad = ([x for x, k in zip(row, kind) if k == which] for which in (1, 2))
            want.append(
                max(0.0, 0.3 - sum(good) / len(good) + sum(bad) / len(bad)) if good and bad else 0.0
            )
        noisy = cosine.masked_fill(
            label == 0, float(('nan', 'inf', '-inf')[seed % 3])
        ).requires_grad_()
        cost = phrase_loss(noisy, label == 1, label == 2, 0.3)
        torch.testing.assert_close(
            cost.detach(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12
        )
        cost.sum().backward()
        assert noisy.grad.isfinite().all() and not noisy.grad[label == 0].any()


def test_losses_in_full_precision_and_of_one_shape():
    half = torch.zeros(2, 3).half()
    none = torch.ones(2, 3, dtype=torch.bool)
    assert phrase_loss(half, none, none, 0.2).dtype == tril(half, half, 0.2).dtype == torch.float32
    with pytest.raises(ValueError, match='expected one shape'):
        tril(half, half[:1], 0.2)
    with pytest.raises(ValueError, match='expected .N, U. three times'):
        phrase_loss(half, none[:, :2], none, 0.2)
    assert tril(torch.tensor([0.5, 0.1]), torch.tensor([0.1, 0.1]), 0.2).tolist() == pytest.approx(
        [0.0, 0.2]
    )
    assert mean_where(
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        torch.tensor([[True, False, True], [False] * 3]),
    ).tolist() == [2.0, 0.0]


# ---------------------------------------------------------------- captions with phrases


def cut(captions, max_words=47):
    vocab = Vocab.build(captions, min_freq=1)
    vocab.parser = chunk
    return Captions.from_text(captions, vocab, max_words=max_words)


def test_words_behind_the_cut_leave_phrases_without_tokens():
    text = ' '.join(['a dog on'] * 67)  # 201 words
    captions = cut([text])
    assert len(chunk(text).units) == captions.units.shape[1] and int(captions.lengths) == 49
    there = captions.units.any(2)[0]
    assert there.any() and not there.all() and (captions.kinds[0] == -1).equal(~there)
    matched, _ = PhraseLabels([chunk(text)], [0]).matched(
        torch.tensor([0]), torch.tensor([0]), *captions.units.shape[1:]
    )
    assert matched.shape == (1, sum(captions.units.shape[1:])) and matched[0, -48:-1].all()


def test_a_caption_without_a_phrase():
    captions = cut(['running away', 'a dog'])
    assert captions.kinds[0].eq(-1).all() and not captions.units[0].any()
    labels = PhraseLabels([chunk('running away'), chunk('a dog')], [0, 1])
    matched, mismatched = labels.matched(torch.tensor([0, 1]), torch.tensor([1, 0]), 1, 4)
    assert not matched.any()
    assert mismatched.tolist() == [
        [True, False, True, True, False],
        [False, False, True, True, False],
    ]
