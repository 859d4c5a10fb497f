"Phrase grounding: right regions against loops, figures against a count by hand, chance and best as bounds."

import copy

import pytest
import torch

from imtm_lite.attention import SCAN
from imtm_lite.data import Split
from imtm_lite.encoders import VSE, Matcher
from imtm_lite.explore import GROUNDING, ground, right_regions
from imtm_lite.files import shipped
from imtm_lite.models.ssamt import SSAMT
from imtm_lite.phrases import GoldParser, chunk
from imtm_lite.text import Captions, Reader, Vocab


@pytest.fixture(scope='module')
def sample():
    return Split(shipped('sample'), 'train')


def matcher_of(sample, kind, **arguments):
    torch.manual_seed(0)
    vocab = Vocab.build(sample.captions, 1)
    sizes = dict(heads=4, feedforward=24) if kind is SSAMT else dict(word_width=8)
    matcher = kind(
        region_width=sample.features.shape[2], words=len(vocab), width=16, **sizes, **arguments
    ).eval()
    for p in matcher.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return matcher, vocab


# x0 y0 x1 y1
def boxes_of(n, g):
    return torch.rand(n, 2, 2, generator=g).sort(1).values.flatten(1) * 100


def test_right_regions_against_loops():
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        boxes = boxes_of(9, g)
        gold = boxes_of(1 + seed % 3, g)
        pointing, overlap = right_regions(boxes, gold)
        around = [float(f(gold[:, k])) for f, k in ((min, 0), (min, 1), (max, 2), (max, 3))]
        for (x0, y0, x1, y1), p, o in zip(boxes.tolist(), pointing.tolist(), overlap.tolist()):
            x = (x0 + x1) / 2
            y = (y0 + y1) / 2
            assert p == any(a <= x <= c and b <= y <= d for a, b, c, d in gold.tolist())
            w = min(x1, around[2]) - max(x0, around[0])
            h = min(y1, around[3]) - max(y0, around[1])
            shared = max(0, w) * max(0, h)
            assert o == (
                shared
                >= 0.5
                * (
                    (x1 - x0) * (y1 - y0)
                    + (around[2] - around[0]) * (around[3] - around[1])
                    - shared
                )
            )


@pytest.mark.parametrize('kind', [SCAN, SSAMT])
def test_figures_are_a_count_by_hand(sample, kind):
    matcher, plain = matcher_of(sample, kind)
    parser = GoldParser(sample)
    vocab = Reader(plain, parser)
    found = []
    for row in range(sample.n_images):
        boxes = torch.tensor(sample.boxes[row], dtype=torch.float32)
        for c in sample.captions_of(row):
            captions = Captions.from_text([sample.captions[c]], vocab)
            with torch.no_grad():
                v = matcher.encode_images(sample.regions([row]))
                t = matcher.encode_captions(captions)
                # (T, R)
                words = matcher.attention(v, t)[0, 0]
                own = matcher.phrase_attention(v, t, captions.units)[0, 0]
            for p, e in enumerate(parser(sample.captions[c]).entities):
                gold = sample.phrases[row]['boxes'].get(str(e.chain))
                if not gold:
                    continue
                at = own[p] if kind is SSAMT else words[captions.units[0, p]].mean(0)
                x0, y0, x1, y1 = boxes[int(at.argmax())].tolist()
                found.append(
                    (
                        e.kind,
                        any(
                            a <= (x0 + x1) / 2 <= c_ and b <= (y0 + y1) / 2 <= d
                            for a, b, c_, d in gold
                        ),
                    )
                )
    result = ground(matcher, sample, plain)
    assert result['all']['phrases'] == len(found) > 100
    assert result['all']['pointing'] == pytest.approx(
        100 * sum(r for _, r in found) / len(found), abs=1e-3
    )
    for kind_ in {k for k, _ in found}:
        some = [r for k, r in found if k == kind_]
        assert result[kind_]['pointing'] == pytest.approx(
            100 * sum(some) / len(some), abs=1e-3
        ) and list(result[kind_]) == list(GROUNDING)
        for q in ('pointing', 'iou'):
            assert (
                result[kind_][f'{q} chance'] <= result[kind_][f'{q} best']
                and result[kind_][q] <= result[kind_][f'{q} best']
            )


def test_the_question_leaves_no_trace(sample):
    matcher, words = matcher_of(sample, SSAMT)
    vocab = Reader(words, chunk)
    assert ground(matcher, sample, vocab) == ground(matcher, sample, words)
    assert vocab.parser is chunk and words.parser is None


def test_a_matcher_without_attention_is_refused(sample):
    with pytest.raises(ValueError, match='no attention of words over regions'):
        matcher, words = matcher_of(sample, VSE)
        ground(matcher, sample, words)


def test_data_without_a_box_for_any_phrase_is_refused(sample):
    bare = copy.copy(sample)
    bare.phrases = [p | {'boxes': {}} for p in sample.phrases]
    with pytest.raises(ValueError, match='train_phrases.jsonl: no phrase of a caption has a box'):
        matcher, words = matcher_of(sample, SCAN)
        ground(matcher, bare, words)


def test_entities_without_nodes_look_where_their_words_look(sample):
    matcher, words = matcher_of(sample, SSAMT, phrases=False)
    plain, _ = matcher_of(sample, SSAMT, phrases=False)
    plain.phrase_attention = lambda *asked: Matcher.phrase_attention(plain, *asked)
    assert ground(matcher, sample, words) == ground(plain, sample, words)
