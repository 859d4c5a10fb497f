"A split is scored exactly or by two looks, and says which."

import pytest
import torch

import imtm_lite
from imtm_lite import gallery
from imtm_lite.checkpoints import MODELS
from imtm_lite.data import Split, image_chunks
from imtm_lite.encoders import VSE
from imtm_lite.gallery import (
    RERANKED,
    TRIED,
    chosen_pairs,
    probe_accuracy,
    put_below,
    rerank,
    rerank_agreement,
    score_chosen,
    score_split,
)
from imtm_lite.runs import train
from imtm_lite.scoring import encode
from tests.matchers import close, codes_of, make, ragged
from tests.runs import QUICK, card_of, log_of

# ---------------------------------------------------------------- a second look


def best_places(row, count):
    "Where the largest numbers of a list are."
    places = range(len(row))
    return sorted(places, key=lambda place: -row[place])[:count]


def chosen_plain(first, candidates):
    "Loops over rows and columns."
    B, C = first.shape
    chosen = torch.zeros(B, C, dtype=torch.bool)
    for b in range(B):
        chosen[b, best_places(first[b], candidates)] = True
    for c in range(C):
        chosen[best_places(first[:, c], candidates), c] = True
    return chosen


def rerank_plain(first, exact, candidates):
    "What is not chosen keeps its order, one below the worst exact score."
    chosen = chosen_plain(first, candidates)
    if chosen.all():
        return exact
    below = first - first[~chosen].max() + exact[chosen].min() - 1
    return torch.where(chosen, exact, below)


@pytest.fixture
def pair_of_looks():
    "A matcher, codes of 7 pictures and 12 captions, all exact scores, a first look."
    matcher = make('scan', {}, torch.float64)
    with torch.no_grad():
        codes = codes_of(matcher, *ragged(torch.float64, images=7, captions=12))
    return matcher, *codes, matcher.match(*codes).detach().float(), 5 * torch.randn(7, 12)


@pytest.mark.parametrize('candidates', [1, 3, 6, 50])
def test_rerank_is_exact_for_candidates_and_puts_all_others_below(pair_of_looks, candidates):
    matcher, images, sentences, exact, first = pair_of_looks
    told = []
    scores = rerank(matcher, images, sentences, first, candidates=candidates, tell=told.append)
    close(scores, rerank_plain(first, exact, candidates), atol=1e-5)
    chosen = chosen_pairs(first, candidates)
    assert sum(told) == chosen.sum()
    assert (chosen.sum(0) >= min(candidates, 7)).all()
    assert (chosen.sum(1) >= min(candidates, 12)).all()
    close(scores[chosen], exact[chosen], atol=1e-6)
    if not chosen.all():
        assert scores[~chosen].max() < scores[chosen].min()
        # the order of the first look
        assert scores[~chosen].argsort().equal(first[~chosen].argsort())


def test_chosen_pairs_in_small_portions(pair_of_looks):
    matcher, images, sentences, exact, _ = pair_of_looks
    every = torch.ones(7, 12, dtype=torch.bool)
    scores = score_chosen(matcher, images, sentences, every, size=5)
    close(scores.view(7, 12), exact, atol=1e-6)


@pytest.mark.parametrize('candidates', [1, 3, 6, 50])
def test_agreement_counts_the_best_pictures_among_the_candidates(pair_of_looks, candidates):
    matcher, images, sentences, exact, first = pair_of_looks
    chosen = chosen_pairs(first, candidates)
    codes = matcher, images, sentences
    agreement = rerank_agreement(*codes, first, candidates=candidates, sample=12)
    for k in (1, 5, 10):
        hits = []
        for c in range(12):
            best = exact[:, c].argsort(descending=True)[:k]
            hits += chosen[best, c].tolist()
        assert agreement[k] == pytest.approx(100 * sum(hits) / len(hits))
    perfect = rerank_agreement(*codes, exact, candidates=candidates, sample=5)
    assert perfect[1] == 100


def test_nothing_to_put_below():
    first = torch.randn(3, 4)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert put_below(first, nothing, torch.empty(0)).equal(first)
    exact = torch.arange(12.0)
    assert put_below(first, ~nothing, exact).equal(exact.view(3, 4))


# ---------------------------------------------------------------- a split


class TwoLooks(VSE):
    "A matcher whose pairs are said to be expensive, with a first look that is nearly right."

    asked = 0

    def first_scores(self, images, captions):
        v = images.vector.clone()
        v[:, ::7] = 0
        return v @ captions.vector.T

    def pairs(self, images, captions):
        self.asked += len(images)
        return super().pairs(images, captions)


@pytest.fixture(scope='module')
def two_looks(world, tmp_path_factory):
    "A trained matcher with two looks, its vocabulary, the dev split of 24 x 120 pairs."
    out = tmp_path_factory.mktemp('runs') / 'vse'
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, 'vse', TwoLooks)
        best = train('vse', world, out, **QUICK)
        matcher, vocab, _ = imtm_lite.load(best)
    return matcher, Split(world, 'dev'), vocab


def test_a_few_pairs_are_all_scored_exactly(two_looks):
    matcher, dev, vocab = two_looks
    matcher.asked = 0
    _, record = score_split(matcher, dev, vocab)
    assert record == dict(scored='exactly', pairs=24 * 120)
    assert matcher.asked == 0


def test_a_split_is_reranked_and_says_so(two_looks):
    matcher, dev, vocab = two_looks
    scores, record = score_split(matcher, dev, vocab, candidates=4)
    images = encode(matcher.encode_images, image_chunks(dev))
    sentences = encode(matcher.encode_captions, [dev.encoded(vocab)[:]])
    first = matcher.first_scores(images, sentences)
    close(scores, rerank(matcher, images, sentences, first, candidates=4), atol=1e-6)
    assert record['scored'] == 'reranked'
    assert record['candidates'] == 4
    assert record['pairs'] == chosen_pairs(first, 4).sum()
    agreement = rerank_agreement(matcher, images, sentences, first, candidates=4, sample=TRIED)
    assert record['agreement'] == {str(k): round(x, 1) for k, x in agreement.items()}


def test_many_pairs_are_reranked_unless_somebody_asks_for_all(two_looks, monkeypatch):
    matcher, dev, vocab = two_looks
    exact, _ = score_split(matcher, dev, vocab)
    monkeypatch.setattr(gallery, 'EXACT_PAIRS', 1000)
    _, record = score_split(matcher, dev, vocab)
    assert record['candidates'] == RERANKED
    assert score_split(matcher, dev, vocab, candidates=0)[0].equal(exact)
    close(score_split(matcher, dev, vocab, candidates=1000)[0], exact, atol=1e-6)


def test_a_run_tells_how_its_dev_split_was_scored(world, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'vse', TwoLooks)
    train('vse', world, tmp_path / 'two', candidates=5, **QUICK)
    records = [line['scored'] for line in log_of(tmp_path / 'two') if 'dev' in line]
    assert [record['candidates'] for record in records] == [5, 5]
    assert all(record['pairs'] < 24 * 120 for record in records)
    assert card_of(tmp_path / 'two/best.safetensors')['scored']['scored'] == 'reranked'


def test_probe_accuracy_counts_by_kind(two_looks, world, monkeypatch):
    matcher, _, vocab = two_looks
    split = Split(world, 'test')
    accuracy = probe_accuracy(matcher, split, vocab)
    assert set(accuracy) == {probe['kind'] for probe in split.probes}
    assert all(0 <= percent <= 100 for percent in accuracy.values())
    # a tie is a miss
    monkeypatch.setattr(matcher, 'pairs', lambda images, captions: torch.zeros(len(images)))
    assert set(probe_accuracy(matcher, split, vocab).values()) == {0.0}
