"Figures of health beside plain loops, and alarms that sound where they should."

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from imtm_lite.attention import SCAN, attend
from imtm_lite.checkpoints import MODELS
from imtm_lite.health import diagnose, gradient_figures, health
from imtm_lite.runs import train
from tests.matchers import codes_of, make, ragged
from tests.runs import QUICK, log_of


class Shown(SCAN):
    "A SCAN that shows messages, gates and stages."

    def messages_of(self, images, captions):
        word_weights = attend(images, captions, 4.0)[1]
        region_weights = attend(captions, images, 9.0)[1].transpose(0, 1)
        to_regions = torch.einsum('bcrt,ctd->bcrd', word_weights, captions.x)
        return to_regions, torch.einsum('bctr,brd->bctd', region_weights, images.x)

    def gates(self, images, captions):
        to_regions, to_words = self.messages_of(images, captions)
        # one element-wise, one scalar
        return torch.sigmoid(to_regions), torch.sigmoid(to_words.sum(-1))

    def stages(self, regions):
        v = self.regions(regions)
        return {'encoder': v, 'reasoning': v + 3 * v.mean(1, keepdim=True)}


def mean(numbers):
    return float(sum(numbers) / len(numbers))


def mean_length_plain(items):  # each (L, D), without padding
    return mean([vector.norm() for vector in torch.cat(items)])


def alike_plain(item):
    "Mean cosine of two different positions of one item (L, D)."
    cosines = [F.cosine_similarity(one, other, dim=0) for one, other in permutations(item, 2)]
    return mean(cosines)


def mean_alike_plain(items):
    return mean([alike_plain(item) for item in items if len(item) > 1])


def real(x, mask):
    "Items without their padding."
    return [item[there] for item, there in zip(x, mask)]


def own(x):  # (B, B, ...): matching pairs
    return [x[k, k] for k in range(len(x))]


def others(x):
    "All pairs that do not match, row by row."
    return [x[b, c] for b, c in permutations(range(len(x)), 2)]


def message_figures_plain(side, messages, mask):
    matching = real(own(messages), mask)
    return {
        f'message_length_{side}': mean_length_plain(matching),
        f'message_cosine_{side}': mean_alike_plain(matching),
    }


def gate_figures_plain(side, gate, mask):  # both (B, B, L)
    matching = real(own(gate), own(mask))
    wrong = real(others(gate), others(mask))
    return {
        f'gate_{side}_own': float(torch.cat(matching).mean()),
        f'gate_{side}_others': float(torch.cat(wrong).mean()),
    }


def score_figures_plain(scores):
    matching = own(scores)
    wrong = others(scores)
    return dict(
        score_difference=mean(matching) - mean(wrong),
        score_spread_own=float(torch.stack(matching).std()),
        score_spread_others=float(torch.stack(wrong).std()),
    )


def code_figures_plain(side, codes):
    items = real(codes.x, codes.mask)
    return {f'{side}_length': mean_length_plain(items), f'{side}_cosine': mean_alike_plain(items)}


def inner_figures_plain(matcher, images, sentences):
    "Messages and gates."
    to_regions, to_words = matcher.messages_of(images, sentences)
    figures = message_figures_plain('regions', to_regions, images.mask)
    figures |= message_figures_plain('words', to_words, sentences.mask)
    region_gates, word_gates = matcher.gates(images, sentences)
    region_gates = region_gates.mean(-1)
    regions_there = images.mask[:, None].expand_as(region_gates)
    words_there = sentences.mask.expand_as(word_gates)
    figures |= gate_figures_plain('regions', region_gates, regions_there)
    return figures | gate_figures_plain('words', word_gates, words_there)


@torch.no_grad()
def test_figures_of_health_are_those_of_plain_loops():
    matcher = Shown(region_width=7, words=30, width=8, word_width=4).double()
    regions, captions = ragged(torch.float64, images=5, captions=5)
    figures = health(matcher.train(), regions, captions)
    # as it was
    assert matcher.training
    images, sentences = codes_of(matcher, regions, captions)
    want = score_figures_plain(matcher.match(images, sentences))
    want |= code_figures_plain('region', images) | code_figures_plain('word', sentences)
    for name, x in matcher.stages(regions).items():
        want[f'region_cosine.{name}'] = mean_alike_plain(real(x, images.mask))
    want |= inner_figures_plain(matcher, images, sentences)
    assert figures.keys() == want.keys()
    for name in want:
        assert figures[name] == pytest.approx(want[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize('name', MODELS)
def test_every_matcher_has_figures_of_health(name):
    matcher = make(name, {}, torch.float32)
    regions, captions = ragged(torch.float32)
    figures = health(matcher, regions, captions[:6])
    of_scores = {'score_difference', 'score_spread_own', 'score_spread_others'}
    assert of_scores <= figures.keys()
    assert all(map(math.isfinite, figures.values()))
    state = torch.get_rng_state()
    # looking changes nothing
    assert health(matcher, regions, captions[:6]) == figures
    assert torch.get_rng_state().equal(state)
    diagnose(figures)


SCORES = dict(score_difference=0.4, score_spread_own=0.1, score_spread_others=0.1)
FINE = SCORES | dict(region_length=1.0, word_length=1.2, region_cosine=0.5)
SMOOTHED = {'region_cosine.encoder': 0.4, 'region_cosine.implicit': 0.61}
SLOWLY = {
    'region_cosine.encoder': 0.4,
    'region_cosine.implicit': 0.55,
    'region_cosine.explicit': 0.7,
}
ALARMS = [
    ({}, []),
    (dict(score_difference=0.001, score_spread_others=0.001), ['collapsed']),
    (dict(score_difference=0.004, score_spread_others=0.1), ['blind']),
    (dict(score_difference=-0.3), ['blind']),
    (dict(region_cosine=0.95), ['over-smoothed']),
    (SMOOTHED, ['over-smoothed']),
    (SLOWLY, []),
    (dict(region_length=14.0), ['drowned']),
    (dict(message_length_regions=0.05), ['drowned']),
    (dict(message_length_words=20.0), ['drowned']),
    (dict(message_cosine_regions=0.999), ['alike']),
]


@pytest.mark.parametrize('change,names', ALARMS, ids=str)
def test_alarms_sound_where_they_should(change, names):
    alarms = diagnose(FINE | change)
    assert [alarm.name for alarm in alarms] == names
    for alarm in alarms:
        assert '; try ' in str(alarm)
        assert '\n' not in str(alarm)


def test_scores_alone_give_no_alarm():
    assert diagnose(SCORES) == []


def test_a_run_logs_its_health_once_an_epoch(world, tmp_path):
    train('scan', world, tmp_path / 'run', **QUICK)
    lines = [line for line in log_of(tmp_path / 'run') if 'health' in line]
    assert [line['epoch'] for line in lines] == [0, 1]
    of_codes = {'region_length', 'word_cosine', 'score_difference'}
    for line in lines:
        assert of_codes | {'gradient_mean', 'gradient_max'} <= line['health'].keys()


def test_figures_of_gradients_leave_overflows_out():
    figures = gradient_figures([1.0, 3.0, math.inf])
    assert figures == dict(gradient_mean=2.0, gradient_max=3.0)
    assert gradient_figures([]) == {}
