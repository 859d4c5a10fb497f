"Search in two stages: all candidates are the exact search, fewer keep exact scores."

import pytest
import torch

from imtm_lite.attention import SCAN
from imtm_lite.checkpoints import MODELS
from imtm_lite.data import Split, image_chunks
from imtm_lite.encoders import Codes
from imtm_lite.explore import FirstLook, candidate_recall, draw_rankings, search, shortlist
from imtm_lite.scoring import encode, score
from imtm_lite.text import Captions, Vocab
from tests.matchers import close, codes_of, make, one_by_one, padded, ragged


@pytest.fixture(scope='module')
def gallery(world):
    "A matcher, a split, a vocabulary, codes of the split's pictures."
    torch.manual_seed(0)
    split = Split(world, 'test')
    vocab = Vocab.build(Split(world, 'train').captions, 1)
    facts = dict(region_width=split.features.shape[2], words=len(vocab))
    matcher = SCAN(width=16, word_width=8, **facts).eval()
    return matcher, split, vocab, encode(matcher.encode_images, image_chunks(split))


def first_look_plain(images, captions, b, c):
    "One picture, one sentence, in loops."
    if images.mask is None:
        return (images.vector[b] * captions.vector[c]).sum()
    regions = images.x[b][images.mask[b]]
    words = captions.x[c][captions.mask[c]]
    total = 0.0
    for word in words:
        total = total + max((word * region).sum() for region in regions)
    return total / len(words)


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_first_look_of_every_model_against_loops_and_padding(name):
    matcher = make(name, {}, torch.float64)
    regions, captions = ragged(torch.float64)
    images, sentences = codes_of(matcher, regions, captions)
    quick = FirstLook.match(images, sentences)

    def plain(b, c):
        return first_look_plain(images, sentences, b, c)

    close(quick, one_by_one(plain, *quick.shape))
    close(FirstLook.match(*codes_of(matcher, *padded(regions, captions))), quick)
    for memory in (1, 2000, 2**30):
        tiled = score(FirstLook, images, sentences, memory=memory)
        close(tiled, quick.float(), atol=1e-6)
    # its own first look
    if matcher.first_scores:
        quick = matcher.first_scores(images, sentences)
    rows = shortlist(matcher, images, sentences, 3)  # (C, 3)
    for c in range(len(sentences)):
        assert rows[c].tolist() == sorted(quick[:, c].topk(3).indices.tolist())


def test_a_picture_without_regions_comes_last():
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    images = Codes(x=torch.randn(3, 2, 4) * mask[..., None], mask=mask)
    lengths = torch.tensor([3, 2, 1, 3, 3])
    captions = Codes(x=torch.randn(5, 3, 4), mask=torch.arange(3) < lengths[:, None])
    quick = FirstLook.match(images, captions)
    assert not quick.isnan().any()
    assert (quick.argmin(0) == 1).all()


def test_all_candidates_are_the_exact_search(gallery):
    matcher, split, vocab, images = gallery
    how = dict(top=7, images=images)
    for sentence in split.captions[:20:4]:
        exact = search(matcher, split, vocab, sentence, **how)
        for n in (split.n_images, split.n_images + 1, 10**6):
            assert search(matcher, split, vocab, sentence, candidates=n, **how) == exact
    sentence = split.captions[0]
    encoded_anew = search(matcher, split, vocab, sentence, top=7)
    assert encoded_anew == search(matcher, split, vocab, sentence, **how)


def test_two_stages_keep_scores_and_order_and_only_candidates(gallery):
    matcher, split, vocab, images = gallery
    for sentence in split.captions[:40:4]:
        asked = encode(matcher.encode_captions, [Captions.from_text([sentence], vocab)])
        column = score(matcher, images, asked)[:, 0]
        allowed = shortlist(matcher, images, asked, 6)[0]
        hits = search(matcher, split, vocab, sentence, top=4, images=images, candidates=6)
        assert len(hits) == 4
        assert {hit.row for hit in hits} <= set(allowed.tolist())
        best = column[allowed].sort(descending=True).values[:4]
        close(torch.tensor([hit.score for hit in hits]), best, atol=1e-6)
        for hit in hits:
            assert hit.score == pytest.approx(float(column[hit.row]), abs=1e-6)
            assert hit.id == split.ids[hit.row]


def test_too_few_candidates_are_refused(gallery):
    matcher, split, vocab, images = gallery
    for n in (0, -1, 4):
        with pytest.raises(ValueError, match=f'{n} candidates for 5 pictures'):
            search(matcher, split, vocab, 'a dog', images=images, candidates=n)
    assert len(search(matcher, split, vocab, 'a dog', images=images, candidates=5)) == 5


def test_candidate_recall_by_hand():
    exact = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    quick = torch.tensor([[0.5, 0.1], [0.1, 0.9], [0.9, 0.8], [0.8, 0.2]])
    # candidates -> percent of each sentence's first two
    wanted = {1: (0, 0), 2: (0, 50), 3: (50, 100), 4: (100, 100), 9: (100, 100)}
    for n, (first, second) in wanted.items():
        assert candidate_recall(exact, quick, n, top=2) == (first + second) / 2, n
    assert candidate_recall(exact, exact, 2, top=2) == 100
    assert candidate_recall(exact, -exact, 2, top=2) == 0
    # a gallery of fewer than ten: all of it is wanted
    assert candidate_recall(exact, quick, 1) == 25


def test_figure_of_hits_asks_nothing_again(gallery, monkeypatch):
    import matplotlib

    matplotlib.use('Agg')
    matcher, split, vocab, images = gallery
    sentence = split.captions[0]
    hits = search(matcher, split, vocab, sentence, top=2, images=images)
    monkeypatch.setattr('imtm_lite.explore.search', None)
    figure = draw_rankings(matcher, split, vocab, {sentence: None}, top=2, hits={sentence: hits})
    assert [ax.get_xlabel() for ax in figure.axes] == [f'{hit.score:.3f}' for hit in hits]
