"Tokens, vocabulary and captions: properties, and equality with torchtext 0.6.0."

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from imtm_lite.regions import Bundle
from imtm_lite.text import (
    END,
    PAD,
    SPECIALS,
    START,
    UNK,
    Captions,
    Reader,
    Vocab,
    tokenize,
    torchtext_vocab,
    vocabulary,
)
from imtm_lite.world.scenes import describe, make_scene

WORLD = [s.text for seed in range(60) for s in describe(make_scene(seed), seed)]
HUMAN = [
    "A man's T-shirt, isn't it?",
    'Two dogs;  three cats',
    "the boys' ball .",
    'Un café à Paris',
    '犬 と 猫',
    'A dog \u2028 runs',
    'O’Brien smiles',
    '3.5 dogs & 1/2 cat',
]


def test_tokenize():
    assert tokenize("A man's T-shirt, isn't it?") == "a man's t - shirt , isn't it ?".split()
    assert tokenize("the boys' O’Brien café 犬") == ['the', 'boys', "'", "o'brien", 'café', '犬']
    assert tokenize('') == tokenize(' \t\u2028') == []


def test_tokens_never_cross_white_space():
    rng = random.Random(1)
    for _ in range(2000):
        text = ''.join(rng.choices("abZ'’-., é9_\t\n犬İß\u00a0\"", k=15))
        assert tokenize(text) == [t for word in text.split() for t in tokenize(word)]
        # each white-space word gives a token
        assert all(tokenize(word) for word in text.split())
        # cutting again changes nothing
        assert tokenize(' '.join(tokenize(text))) == tokenize(text)


@pytest.mark.parametrize('min_freq', [1, 2, 4, 10])
@pytest.mark.parametrize(
    'corpus',
    [WORLD, HUMAN * 2, ['b a c', 'c b a', 'd d', 'e e e'], []],
    ids=['world', 'human', 'ties', 'empty'],
)
def test_equals_torchtext(corpus, min_freq):
    ours = Vocab.build(corpus, min_freq)
    theirs = torchtext_vocab(corpus, min_freq)
    assert ours.words == theirs.itos
    words = [token for caption in corpus for token in tokenize(caption)]
    for word in words + ['zeppelin', '<pad>', '<unk>']:
        assert ours[word] == theirs[word]


def test_power_law_ties_equal_torchtext():
    rng = random.Random(2)
    names = [a + b for a in "abcdefghé'9" for b in 'aeiouxyz']

    def sentence():
        return ' '.join(names[min(int(rng.paretovariate(0.6)), 87)] for _ in range(9))

    corpus = [sentence() for _ in range(300)]
    # ties do not depend on the order of captions
    for _ in range(3):
        rng.shuffle(corpus)
        theirs = torchtext_vocab(corpus, 2).itos
        assert Vocab.build(corpus, 2).words == theirs
        assert Vocab.build(sorted(corpus), 2).words == theirs


def test_vocab():
    v = Vocab.build(['a dog runs', 'a dog'], min_freq=2)
    assert v.words == [*SPECIALS, 'a', 'dog'] and len(v) == 6
    assert (v['a'], v['dog'], v['runs'], v['<end>']) == (4, 5, UNK, END) and 'runs' not in v
    assert v.encode('A dog runs!') == [START, 4, 5, UNK, UNK, END]
    assert v.decode([START, 4, 5, END, PAD]) == 'a dog'
    assert len(v.encode('dog ' * 100)) == 49 and len(v.encode('dog ' * 100, max_words=3)) == 5
    assert v == Vocab(v.words) == Vocab(['a', 'dog']) != Vocab(['dog', 'a'])
    assert hash(v) == hash(Vocab(v.words))


def test_stored():
    v = Vocab.build(HUMAN, 1)
    text = json.dumps(v.stored)
    assert json.loads(text) == v.words
    assert vocabulary(json.loads(text)) == v
    for bad in (['dog', 'cat', 'dog'], ['dog', '<pad>'], ['<unk>', '<pad>']):
        with pytest.raises(ValueError, match='twice'):
            Vocab(bad)


def test_captions():
    v = Vocab.build(WORLD)
    c = Captions.from_text(WORLD[:9], v)
    assert isinstance(c, Bundle) and len(c) == 9
    assert c.tokens.dtype == c.lengths.dtype == torch.int64
    assert c.tokens.shape[1] == c.lengths.max()
    for row, n, mask, text in zip(c.tokens, c.lengths, c.mask, WORLD):
        assert row[:n].tolist() == v.encode(text) and not row[n:].any()
        assert mask.tolist() == [t < n for t in range(len(row))]
    assert c[2:4].mask.shape == (2, c.tokens.shape[1])
    wide = Captions.from_ids([v.encode(t) for t in WORLD[:9]], pad_to=50)
    assert wide.tokens.shape == (9, 50) and wide.lengths.equal(c.lengths)
    assert wide.tokens[:, : c.tokens.shape[1]].equal(c.tokens)
    joined = Captions.cat([Captions.from_text(WORLD[i : i + 1], v) for i in range(9)])
    assert joined.tokens.equal(c.tokens) and joined.mask.equal(c.mask)
    assert len(Captions.from_ids([])) == 0


PHRASED = ["a man's T-shirt, red", '  two   dogs', '—', "a-b c'd e."]
UNITS = {PHRASED[0]: [(0, [0, 1, 2]), (1, [2, 3])], PHRASED[1]: [(0, [1])]}


@pytest.fixture
def phrased():
    "A reader whose parser knows two sentences."
    return Reader(
        Vocab.build(PHRASED, 1), lambda caption: SimpleNamespace(units=UNITS.get(caption, []))
    )


def test_tokens_know_their_words():
    v = Vocab.build(PHRASED, 1)
    for caption in PHRASED:
        words = caption.split()
        assert [token for word in words for token in tokenize(word)] == v.tokens(caption)
        assert v.word_of(caption) == [i for i, word in enumerate(words) for _ in tokenize(word)]
    assert Captions.from_text(PHRASED, v).units is None


def test_a_reader_reads_as_its_vocabulary_does(phrased):
    v = phrased.vocab
    assert len(phrased) == len(v) and 'red' in phrased and 'zeppelin' not in phrased
    assert (phrased.stored, phrased.unk) == (v.stored, UNK)
    for caption in PHRASED:
        assert phrased.encode(caption) == v.encode(caption)
        assert phrased.tokens(caption) == v.tokens(caption)
        assert phrased.decode(v.encode(caption)) == v.decode(v.encode(caption))
    assert phrased == Reader(v, phrased.parser) != Reader(v, print)
    assert len({phrased, Reader(v, phrased.parser), Reader(v, print), v}) == 3


def test_phrases_cover_the_tokens_of_their_words(phrased):
    captions = Captions.from_text(PHRASED, phrased)
    assert captions.units.shape == (4, 2, captions.tokens.shape[1])
    assert captions.kinds.tolist() == [[0, 1], [0, -1], [-1, -1], [-1, -1]]

    def words(c, p):
        return phrased.decode(captions.tokens[c][captions.units[c, p]])

    assert words(0, 0) == "a man's t - shirt ,"
    assert words(0, 1) == 't - shirt , red'
    assert words(1, 0) == 'dogs'
    # no padding, no <start>
    assert not (captions.units & ~captions.mask[:, None]).any()
    assert not captions.units[:, :, 0].any()
    joined = Captions.cat([captions[:1], captions[1:2]])
    assert joined.units.equal(captions.units[:2]) and joined.kinds.equal(captions.kinds[:2])


def test_phrases_are_cut_with_their_caption(phrased):
    cut = Captions.from_text(PHRASED[:1], phrased, max_words=3)
    assert cut.units.sum(-1).tolist() == [[3, 1]] and cut.tokens.shape[1] == 5
    assert not Captions.from_text([' '.join(['x'] * 50)], phrased).units.any()


def test_torchtext_is_lazy_and_its_absence_is_one_line():
    code = '''
import sys; sys.modules["torchtext"] = None
import importlib.metadata as m
old = m.version
def version(name):
    if name == "torchtext": raise m.PackageNotFoundError(name)
    return old(name)
m.version = version
from imtm_lite.text import Vocab, torchtext_vocab
Vocab.build(["a dog"])
try: torchtext_vocab(["a dog"])
except ImportError as e: print(e)
'''
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout
    assert out.count('\n') == 1 and 'torchtext==0.6.0' in out
