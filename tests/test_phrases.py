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
from imtm_lite.files import DataError, SettingError, shipped
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
        ('takes took taken', 'take'),
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
    text = 'a tall old man in a hat is riding a horse'
    spans = [[0, 4, '', 0], [5, 7, '', 0], [9, 11, '', 0]]
    graph = graph_from_spans(text, spans)
    assert graph.units == [
        (OBJECT, [3]),
        (OBJECT, [6]),
        (OBJECT, [10]),
        (ATTRIBUTE, [1, 3]),
        (ATTRIBUTE, [2, 3]),
        (RELATION, [3, 4, 6]),
        (RELATION, [3, 8, 10]),
    ]
    assert graph.keys == [
        ('man',),
        ('hat',),
        ('horse',),
        ('tall', 'man'),
        ('old', 'man'),
        ('man', 'in', 'hat'),
        ('man', 'ride', 'horse'),
    ]
    assert graph.texts[3:5] == ['tall man', 'old man'] and graph.texts[-1] == 'man riding horse'
    # whatever the order of the spans
    again = graph_from_spans(text, [spans[1], spans[2], spans[0]])
    assert again == graph and hash(again) == hash(graph)


def test_every_unit_has_words_of_its_own_entities(sample):
    for caption in sample.captions:
        graph = chunk(caption)
        kinds = [kind for kind, _ in graph.units]
        assert kinds == sorted(kinds) and len(kinds) == len(graph.keys)
        for (kind, words), key in zip(graph.units, graph.keys):
            assert words == sorted(words) and words
            if kind != RELATION:
                assert {lemma(graph.words[k]) for k in words} <= set(key)


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
    graph = chunk(caption)
    phrases = zip(graph.units, graph.keys)
    assert {key for (kind, _), key in phrases if kind == RELATION} == want


def lemmas_of(wordings):
    "The lemmas of some wordings, without articles."
    words = [[lemma(word) for word in way.split() if word not in ('a', 'the')] for way in wordings]
    return set(map(' '.join, words))


def relations_of(graph, starts):
    "Triples by the rule, of phrases that begin at these words."
    row = {start: k for k, start in enumerate(starts)}
    ends = [row[entity.start] for entity in graph.entities]
    return {(ends[t.subject], t.predicate, ends[t.object]) for t in graph.triples}


def test_rule_agrees_with_the_grammar_of_the_world():
    seen = 0
    for number in range(700, 740):
        for sentence in describe(make_scene(number), number):
            graph = graph_from_spans(sentence.text, sentence.phrases)
            got = relations_of(graph, [start for start, *_ in sentence.phrases])
            assert len(got) == len(sentence.triples), sentence.text
            for one, predicate, other in sentence.triples:
                ways = {(one, way, other) for way in lemmas_of(WORDINGS[predicate])}
                ways |= {(other, way, one) for way in lemmas_of(INVERSE.get(predicate, ()))}
                assert ways & got, sentence.text
            seen += len(sentence.triples)
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
    words = caption.split()
    entities = chunk(caption).entities
    assert [' '.join(words[entity.start : entity.end]) for entity in entities] == want


# fmt: off
ODD_WORDS = [
    'the', 'a', 'of', 'and', ',', '.', "'s", 'two', 'very', 'back', 'that', 'left', 'side', 'runs',
    'running', 'dog', 'red', 'с', '犬が', '—', 'ünter', '\u200b', 'top', '3',
]
# fmt: on


def test_chunker_takes_any_text():
    rng = random.Random(0)
    for _ in range(2000):
        text = ' '.join(rng.choices(ODD_WORDS, k=rng.randrange(9)))
        graph = chunk(text)
        n = len(text.split())
        end = 0
        for entity in graph.entities:  # in order, apart, inside
            assert end <= entity.start < entity.end <= n and entity.head
            end = entity.end
        for triple in graph.triples:
            assert triple.subject < triple.object < len(graph.entities)
            assert triple.predicate and all(0 <= k < n for k in triple.words)
        for _, words in graph.units:
            assert words and max(words) < n
    assert chunk('два человека едут на лошадях').words[0] == 'два'


def test_human_spans_of_the_sample_and_chunks_agree_mostly(sample):
    gold = GoldParser(sample)
    hits = 0
    marked = 0
    chunks = 0
    for caption in sample.captions:
        theirs = {(entity.start, entity.end) for entity in gold(caption).entities}
        ours = {(entity.start, entity.end) for entity in chunk(caption).entities}
        hits += len(theirs & ours)
        marked += len(theirs)
        chunks += len(ours)
    assert hits > 0.7 * marked and hits > 0.7 * chunks


# ---------------------------------------------------------------- parsers


def test_gold_parser(sample):
    gold = GoldParser(sample)
    for row in range(3):
        for k, spans in zip(sample.captions_of(row), sample.phrases[row]['phrases']):
            entities = gold(sample.captions[k]).entities
            got = [[e.start, e.end, e.kind, e.chain] for e in entities]
            assert got == sorted(spans)
    assert gold('a dog in the park') == chunk('a dog in the park')


@pytest.fixture
def copy(tmp_path):
    "The sample without pictures."
    root = tmp_path / 'd'
    return shutil.copytree(shipped('sample'), root, ignore=shutil.ignore_patterns('pictures'))


def write_lines(path, values):
    path.write_text('\n'.join(map(json.dumps, values)) + '\n')


def test_gold_parser_faults(sample, copy):
    path = copy / 'train_phrases.jsonl'
    lines = list(map(json.loads, path.read_text().splitlines()))
    first = lines[0]['phrases'][0][0]
    end = first[1]
    first[1] = 99
    write_lines(path, lines)
    says = 'line 1: span .* words; expected 0 <= start < end'
    with pytest.raises(DataError, match=says) as fault:
        GoldParser(Split(copy, 'train'))
    assert '\n' not in str(fault.value)
    # chains without boxes are fine
    first[1] = end
    write_lines(path, [line | {'boxes': {}} for line in lines])
    caption = sample.captions[0]
    assert GoldParser(Split(copy, 'train'))(caption) == GoldParser(sample)(caption)


def test_gold_parser_needs_annotations(copy):
    (copy / 'train_phrases.jsonl').unlink()
    split = Split(copy, 'train')
    with pytest.raises(DataError, match='the gold parser needs it'):
        GoldParser(split)
    assert synonyms(split) == {}


def test_named_parser(sample):
    assert named_parser('chunker') is chunk and named_parser('gold') is chunk
    assert isinstance(named_parser('gold', sample), GoldParser)
    says = 'python -m spacy download no_such_model'
    with pytest.raises(SettingError, match=says) as fault:
        named_parser('no_such_model')
    assert '\n' not in str(fault.value)


@pytest.mark.skipif(
    not (find_spec('spacy') and find_spec('en_core_web_sm')),
    reason='spaCy or its small English model is not installed',
)
def test_spacy_parser():
    parser = SpacyParser()
    graph = parser('A man in a red shirt is holding a cup, and he looks at two dogs.')
    assert {('man',), ('shirt',), ('cup',)} <= set(graph.keys)
    assert {('red', 'shirt'), ('two', 'dog')} <= set(graph.keys)
    assert ('man', 'hold', 'cup') in graph.keys
    for _, words in graph.units:
        assert words and max(words) < len(graph.words)
    assert parser('').units == []


def spoken(*pictures):
    "What `synonyms` reads of a split: pictures are captions, and these (phrase, chain)."
    captions = []
    lines = []
    for picture in pictures:
        lines.append({'phrases': list(map(spans_of, picture)), 'boxes': {}})
        captions += [' and '.join(phrase for phrase, _ in caption) for caption in picture]
    image = np.repeat(np.arange(len(pictures)), list(map(len, pictures)))
    return SimpleNamespace(
        n_images=len(pictures),
        captions=captions,
        captions_of=lambda row: np.flatnonzero(image == row),
        phrases=lines,
    )


def spans_of(caption):
    "Spans of (phrase, chain) that are joined by one word."
    spans = []
    start = 0
    for phrase, chain in caption:
        end = start + len(phrase.split())
        spans.append([start, end, 'x', chain])
        start = end + 1
    return spans


def test_synonyms_join_words_of_one_chain():
    often = [[('a sofa', 1), ('a cat', 2)], [('the couch', 1)]]
    # too rare
    once = [[('a couch', 1)], [('a bench', 1)]]
    split = spoken(*[often] * 6, once)
    assert synonyms(split) == {'sofa': 'couch', 'couch': 'couch'}
    assert synonyms(split, chains=7) == {}
    # chain 0 means nothing
    assert synonyms(spoken(*[[[('a sofa', 0)], [('a couch', 0)]]] * 9)) == {}


def called_a_person(word):
    "A picture whose captions call somebody a person and something else."
    return [[(f'a {word}', 1)], [('a person', 1)]]


def test_synonyms_pass_nothing_over_a_bridge():
    same = synonyms(spoken(*[called_a_person('man')] * 9, *[called_a_person('woman')] * 8))
    assert same.get('man') != same.get('woman') or 'man' not in same
    words = 'man woman child guy lady skier rider'.split()
    assert 'person' not in synonyms(spoken(*map(called_a_person, words * 6)))


# ---------------------------------------------------------------- labels


def random_phrase(rng):
    modifiers = rng.sample('red big two old'.split(), rng.randrange(4))
    return [*modifiers, rng.choice('dog cat man'.split())]


def random_graph(rng):
    "A caption over few words, so that keys meet; perhaps without any phrase."
    words = []
    spans = []
    for phrase in [random_phrase(rng) for _ in range(rng.randrange(4))]:
        if words:
            words.append(rng.choice(['on', 'near', 'and']))
        spans.append([len(words), len(words) + len(phrase), '', 0])
        words += phrase
    return graph_from_spans(' '.join(words), spans)


def random_graphs(seed, n=30):
    "Graphs, and the picture of each."
    rng = random.Random(seed)
    return [random_graph(rng) for _ in range(n)], [rng.randrange(6) for _ in range(n)]


def keys_of(graph, same):
    "Keys of the phrases, and of the tokens; an empty one for punctuation."
    phrases = [tuple(same.get(word, word) for word in key) for key in graph.keys]
    lemmas = [lemma(token) for token in tokenize(' '.join(graph.words))]
    return phrases, [(same.get(word, word),) if word else () for word in lemmas]


def inside(small, large):
    "Whether the words of one key stand side by side in the other."
    return any(large[k : k + len(small)] == small for k in range(len(large)))


def said_of(image, graphs, image_of, same):
    "All keys of all captions of a picture."
    keys = []
    for graph, its_image in zip(graphs, image_of):
        if its_image == image:
            phrases, tokens = keys_of(graph, same)
            keys += phrases + tokens
    return keys


def labels_loops(graphs, image_of, images, captions, P, T, same):
    matched, mismatched = torch.zeros(2, len(images), P + T, dtype=torch.bool)
    for n, (image, caption) in enumerate(zip(images.tolist(), captions.tolist())):
        labels = said_of(image, graphs, image_of, same)
        phrases, tokens = keys_of(graphs[caption], same)
        columns = dict(enumerate(phrases[:P]))
        columns |= enumerate(tokens[: T - 1], P + 1)
        for column, key in columns.items():
            true = any(inside(key, label) for label in labels)
            matched[n, column] = bool(key) and true
            mismatched[n, column] = bool(key) and not true
    return matched, mismatched


@pytest.mark.parametrize('same', [{}, {'cat': 'dog', 'dog': 'dog'}])
@pytest.mark.parametrize('seed', range(12))
def test_labels_against_loops(seed, same):
    graphs, image_of = random_graphs(seed)
    labels = PhraseLabels(graphs, image_of, same)
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(6, (9,), generator=g)
    captions = torch.randint(30, (9,), generator=g)
    widest = max(len(graph.keys) for graph in graphs)
    longest = max(len(graph.words) for graph in graphs) + 2
    for P, T in ((widest, longest), (widest + 3, longest + 4), (2, 3), (0, 5)):
        got = labels.matched(images, captions, P, T)
        want = labels_loops(graphs, image_of, images, captions, P, T, same)
        assert got[0].equal(want[0]) and got[1].equal(want[1])


def test_everything_in_an_own_caption_is_matched():
    graphs, image_of = random_graphs(3)
    labels = PhraseLabels(graphs, image_of)
    matched, mismatched = labels.matched(torch.tensor(image_of), torch.arange(30), 12, 0)
    assert not mismatched.any()
    # and nothing beyond
    counts = torch.tensor([len(graph.keys) for graph in graphs])
    assert matched.equal(torch.arange(12) < counts[:, None])


def test_labels_of_three_captions():
    graphs = [chunk('a man wears a red shirt .'), chunk('a shirt'), chunk('a red hat')]
    labels = PhraseLabels(graphs, [0, 1, 2])
    images = torch.tensor([0, 1, 0])
    matched, mismatched = labels.matched(images, torch.tensor([1, 0, 2]), 4, 9)
    # a shirt is part of a red shirt
    assert matched[0, :1].all() and graphs[1].keys == [('shirt',)]
    keys = [('man',), ('shirt',), ('red', 'shirt'), ('man', 'wear', 'shirt')]
    assert graphs[0].keys == keys
    assert matched[1, :4].tolist() == [False, True, False, False]
    assert mismatched[1, :4].tolist() == [True, False, True, True]
    # a hat is not there, and nothing red that is a hat
    assert mismatched[2, :2].all()
    # <start> a man wears a red shirt . <end>
    a_and_shirt = [False, True, False, False, True, False, True, False, False]
    the_others = [False, False, True, True, False, True, False, False, False]
    assert matched[1, 4:].tolist() == a_and_shirt
    assert mismatched[1, 4:].tolist() == the_others


def test_labels_of_nothing():
    labels = PhraseLabels([TextGraph(())], [0])
    matched, mismatched = labels.matched(torch.tensor([0]), torch.tensor([0]), 3, 2)
    assert not matched.any() and not mismatched.any()


def test_every_caption_has_a_picture():
    graphs, image_of = random_graphs(3)
    with pytest.raises(ValueError, match='30 graphs for 29 captions'):
        PhraseLabels(graphs, image_of[1:])


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


def phrase_loss_loops(cosine, label, margin):
    costs = torch.zeros(len(cosine), dtype=torch.float64)
    for n, (row, kind) in enumerate(zip(cosine, label)):
        matched = row[kind == 1].tolist()
        mismatched = row[kind == 2].tolist()
        if matched and mismatched:
            right = sum(matched) / len(matched)
            wrong = sum(mismatched) / len(mismatched)
            costs[n] = max(0.0, margin - right + wrong)
    return costs


@pytest.mark.parametrize('seed', range(60))
def test_phrase_loss_against_loops_with_finite_gradients(seed):
    g = torch.Generator().manual_seed(seed)
    N, U = torch.randint(1, 7, (2,), generator=g).tolist()
    cosine = torch.randn(N, U, generator=g, dtype=torch.float64)
    # neither, matched, mismatched
    label = torch.randint(3, (N, U), generator=g)
    nonsense = float(('nan', 'inf', '-inf')[seed % 3])
    noisy = cosine.masked_fill(label == 0, nonsense).requires_grad_()
    cost = phrase_loss(noisy, label == 1, label == 2, 0.3)
    want = phrase_loss_loops(cosine, label, 0.3)
    torch.testing.assert_close(cost.detach(), want, rtol=0, atol=1e-12)
    cost.sum().backward()
    assert noisy.grad.isfinite().all() and not noisy.grad[label == 0].any()


def test_losses_in_full_precision():
    half = torch.zeros(2, 3).half()
    every = torch.ones(2, 3, dtype=torch.bool)
    assert phrase_loss(half, every, every, 0.2).dtype == torch.float32
    assert tril(half, half, 0.2).dtype == torch.float32


def test_losses_of_one_shape():
    values = torch.zeros(2, 3)
    every = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match='expected one shape'):
        tril(values, values[:1], 0.2)
    with pytest.raises(ValueError, match='expected .N, U. three times'):
        phrase_loss(values, every[:, :2], every, 0.2)


def test_losses_by_hand():
    cost = tril(torch.tensor([0.5, 0.1]), torch.tensor([0.1, 0.1]), 0.2)
    assert cost.tolist() == pytest.approx([0.0, 0.2])
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    counted = torch.tensor([[True, False, True], [False] * 3])
    assert mean_where(values, counted).tolist() == [2.0, 0.0]


# ---------------------------------------------------------------- captions with phrases


def cut(captions, max_words=47):
    vocab = Vocab.build(captions, min_freq=1)
    vocab.parser = chunk
    return Captions.from_text(captions, vocab, max_words=max_words)


def test_words_behind_the_cut_leave_phrases_without_tokens():
    text = ' '.join(['a dog on'] * 67)  # 201 words
    captions = cut([text])
    _, P, T = captions.units.shape
    assert len(chunk(text).units) == P and int(captions.lengths) == 49
    there = captions.units.any(2)[0]
    assert there.any() and not there.all() and (captions.kinds[0] == -1).equal(~there)
    labels = PhraseLabels([chunk(text)], [0])
    matched, _ = labels.matched(torch.tensor([0]), torch.tensor([0]), P, T)
    assert matched.shape == (1, P + T) and matched[0, -48:-1].all()


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
