"Phrase grounding: right regions beside loops, figures beside a count by hand, their bounds."

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
    "A matcher whose parameters have all moved, and its words."
    torch.manual_seed(0)
    vocab = Vocab.build(sample.captions, 1)
    facts = dict(region_width=sample.features.shape[2], words=len(vocab), width=16)
    facts |= dict(heads=4, feedforward=24) if kind is SSAMT else dict(word_width=8)
    matcher = kind(**facts, **arguments).eval()
    for parameter in matcher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return matcher, vocab


# ---------------------------------------------------------------- right regions


def boxes_of(n, generator):  # (n, 4): x0 y0 x1 y1
    return torch.rand(n, 2, 2, generator=generator).sort(1).values.flatten(1) * 100


def centre_inside(box, gold):
    "Whether the centre of a box lies in one of several."
    x = (box[0] + box[2]) / 2
    y = (box[1] + box[3]) / 2
    return any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in gold)


def around(boxes):
    "The box around several."
    x0, y0, x1, y1 = zip(*boxes)
    return min(x0), min(y0), max(x1), max(y1)


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap_enough(box, gold):
    "Whether a box and another share half of what they cover together."
    width = min(box[2], gold[2]) - max(box[0], gold[0])
    height = min(box[3], gold[3]) - max(box[1], gold[1])
    shared = max(0, width) * max(0, height)
    return shared >= 0.5 * (area(box) + area(gold) - shared)


@pytest.mark.parametrize('seed', range(40))
def test_right_regions_against_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = boxes_of(9, generator)
    gold = boxes_of(1 + seed % 3, generator)
    pointing, overlap = right_regions(boxes, gold)
    boxes = boxes.tolist()
    gold = gold.tolist()
    assert pointing.tolist() == [centre_inside(box, gold) for box in boxes]
    assert overlap.tolist() == [overlap_enough(box, around(gold)) for box in boxes]


# ---------------------------------------------------------------- figures


@torch.no_grad()
def looked_plain(matcher, captions, regions, own_nodes):
    "Where each phrase of one caption looks: its node, or the mean of its words."
    v = matcher.encode_images(regions)
    t = matcher.encode_captions(captions)
    if own_nodes:
        return matcher.phrase_attention(v, t, captions.units)[0, 0]  # (P, R)
    words = matcher.attention(v, t)[0, 0]  # (T, R)
    return [words[unit].mean(0) if unit.any() else None for unit in captions.units[0]]


def answers_plain(matcher, sample, reader, row, own_nodes):
    "Kind of each phrase of a picture that has boxes, and whether its region is right."
    boxes = sample.boxes[row].tolist()
    answers = []
    for c in sample.captions_of(row):
        caption = sample.captions[c]
        captions = Captions.from_text([caption], reader)
        looked = looked_plain(matcher, captions, sample.regions([row]), own_nodes)
        for entity, weights in zip(reader.parser(caption).entities, looked):
            gold = sample.phrases[row]['boxes'].get(str(entity.chain))
            if gold:
                right = centre_inside(boxes[int(weights.argmax())], gold)
                answers.append((entity.kind, right))
    return answers


@pytest.mark.parametrize('matcher_kind', [SCAN, SSAMT])
def test_figures_are_a_count_by_hand(sample, matcher_kind):
    matcher, words = matcher_of(sample, matcher_kind)
    reader = Reader(words, GoldParser(sample))
    by_kind = {'all': []}
    for row in range(sample.n_images):
        for kind, right in answers_plain(matcher, sample, reader, row, matcher_kind is SSAMT):
            by_kind.setdefault(kind, []).append(right)
            by_kind['all'].append(right)
    table = ground(matcher, sample, words)
    assert table.keys() == by_kind.keys()
    assert table['all']['phrases'] == len(by_kind['all']) > 100
    for kind, answers in by_kind.items():
        percent = 100 * sum(answers) / len(answers)
        assert table[kind]['pointing'] == pytest.approx(percent, abs=1e-3)


def test_chance_and_the_figures_themselves_are_at_most_the_best(sample):
    matcher, words = matcher_of(sample, SCAN)
    for figures in ground(matcher, sample, words).values():
        assert tuple(figures) == GROUNDING
        for game in ('pointing', 'iou'):
            assert figures[f'{game} chance'] <= figures[f'{game} best']
            assert figures[game] <= figures[f'{game} best']


def test_the_question_leaves_no_trace(sample):
    matcher, words = matcher_of(sample, SSAMT)
    reader = Reader(words, chunk)
    assert ground(matcher, sample, reader) == ground(matcher, sample, words)
    assert reader.parser is chunk
    assert words.parser is None


def test_a_matcher_without_attention_is_refused(sample):
    matcher, words = matcher_of(sample, VSE)
    with pytest.raises(ValueError, match='no attention of words over regions'):
        ground(matcher, sample, words)


def test_data_without_a_box_for_any_phrase_is_refused(sample):
    matcher, words = matcher_of(sample, SCAN)
    bare = copy.copy(sample)
    bare.phrases = [phrases | {'boxes': {}} for phrases in sample.phrases]
    with pytest.raises(ValueError, match='train_phrases.jsonl: no phrase of a caption has a box'):
        ground(matcher, bare, words)


def test_entities_without_nodes_look_where_their_words_look(sample):
    matcher, words = matcher_of(sample, SSAMT, phrases=False)
    plain, _ = matcher_of(sample, SSAMT, phrases=False)
    plain.phrase_attention = lambda *asked: Matcher.phrase_attention(plain, *asked)
    assert ground(matcher, sample, words) == ground(plain, sample, words)
