"Search in two stages: all candidates are the exact search, fewer keep exact scores; what the first look misses is counted right."

import pytest
import torch
import torch.nn.functional as F

from imtm_lite.attention import SCAN
from imtm_lite.checkpoints import MODELS
from imtm_lite.data import Split, image_chunks
from imtm_lite.encoders import Codes
from imtm_lite.explore import FirstLook, candidate_recall, draw_rankings, search, shortlist
from imtm_lite.scoring import encode, score
from imtm_lite.text import Captions, Vocab
from tests.test_matchers import changed, make, ragged


@pytest.fixture(scope='module')
def gallery(world):
    "A matcher, a split, codes of its pictures."
    torch.manual_seed(0)
    split = Split(world, 'test')
    vocab = Vocab.build(Split(world, 'train').captions, 1)
    matcher = SCAN(
        region_width=split.features.shape[2], words=len(vocab), width=16, word_width=8
    ).eval()
    return matcher, split, vocab, encode(matcher.encode_images, image_chunks(split))


def first_look_plain(images, captions, b, c):
    "One picture, one sentence, in loops."
    if images.mask is None:
        return sum(float(a * b) for a, b in zip(images.vector[b], captions.vector[c]))
    regions = images.x[b][images.mask[b]]
    words = captions.x[c][captions.mask[c]]
    return sum(max(float((t * v).sum()) for v in regions) for t in words) / len(words)


@pytest.mark.parametrize('name', MODELS)
def test_first_look_of_every_model_against_loops_and_padding(name):
    matcher, (regions, captions) = make(name, {}, torch.float64), ragged(torch.float64)
    with torch.no_grad():
        images = matcher.encode_images(regions)
        sentences = matcher.encode_captions(captions)
    quick = FirstLook.match(images, sentences)
    plain = [
        [first_look_plain(images, sentences, b, c) for c in range(len(sentences))]
        for b in range(len(images))
    ]
    torch.testing.assert_close(quick, torch.tensor(plain, dtype=torch.float64), atol=1e-12, rtol=0)
    padded = changed(
        regions,
        features=F.pad(regions.features, (0, 0, 0, 3)),
        mask=F.pad(regions.mask, (0, 3)),
        boxes=F.pad(regions.boxes, (0, 0, 0, 3), value=0.5),
    )
    wider = Captions(
        tokens=F.pad(captions.tokens, (0, 9)),
        lengths=captions.lengths,
        units=F.pad(captions.units, (0, 9)),
        kinds=captions.kinds,
    )
    with torch.no_grad():
        again = FirstLook.match(matcher.encode_images(padded), matcher.encode_captions(wider))
    torch.testing.assert_close(again, quick, atol=1e-12, rtol=0)
    for memory in (1, 2000, 2**30):
        torch.testing.assert_close(
            score(FirstLook, images, sentences, memory=memory), quick.float(), atol=1e-6, rtol=0
        )
    # its own first look
    if matcher.first_scores:
        quick = matcher.first_scores(images, sentences)
    # (C, 3)
    rows = shortlist(matcher, images, sentences, 3)
    for c in range(len(sentences)):
        assert rows[c].tolist() == sorted(quick[:, c].topk(3).indices.tolist())


def test_a_picture_without_regions_comes_last():
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    images = Codes(x=torch.randn(3, 2, 4) * mask[..., None], mask=mask)
    captions = Codes(
        x=torch.randn(5, 3, 4),
        mask=torch.tensor(
            [[True] * 3, [True, True, False], [True, False, False], [True] * 3, [True] * 3]
        ),
    )
    quick = FirstLook.match(images, captions)
    assert not quick.isnan().any() and (quick.argmin(0) == 1).all()


def test_all_candidates_are_the_exact_search(gallery):
    matcher, split, vocab, images = gallery
    for sentence in split.captions[:20:4]:
        exact = search(matcher, split, vocab, sentence, top=7, images=images)
        for n in (split.n_images, split.n_images + 1, 10**6):
            assert search(matcher, split, vocab, sentence, top=7, images=images, candidates=n) == exact
    assert search(matcher, split, vocab, split.captions[0], top=7) == search(
        matcher, split, vocab, split.captions[0], top=7, images=images
    )


def test_two_stages_keep_scores_and_order_and_only_candidates(gallery):
    matcher, split, vocab, images = gallery
    for sentence in split.captions[:40:4]:
        asked = encode(matcher.encode_captions, [Captions.from_text([sentence], vocab)])
        column = score(matcher, images, asked)[:, 0]
        allowed = set(shortlist(matcher, images, asked, 6)[0].tolist())
        hits = search(matcher, split, vocab, sentence, top=4, images=images, candidates=6)
        assert len(hits) == 4 and {h.row for h in hits} <= allowed
        best = sorted(allowed, key=lambda r: -float(column[r]))[:4]
        torch.testing.assert_close(
            torch.tensor([h.score for h in hits]), column[torch.tensor(best)], atol=1e-6, rtol=0
        )
        for h in hits:
            assert abs(h.score - float(column[h.row])) < 1e-6 and h.id == split.ids[h.row]


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
    for n, (a, b) in wanted.items():
        assert candidate_recall(exact, quick, n, top=2) == (a + b) / 2, n
    assert (
        candidate_recall(exact, exact, 2, top=2) == 100
        and candidate_recall(exact, -exact, 2, top=2) == 0
    )
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
    assert [ax.get_xlabel() for ax in figure.axes] == [f'{h.score:.3f}' for h in hits]
