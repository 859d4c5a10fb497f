"CAMP beside the released code's scores, and beside its equations written out."

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imtm_lite.models.camp import CAMP, CAMPStage1, load_released
from tests.matchers import CAMPS, close_with_gradients, codes_of, in_short, make, one_by_one, ragged

SIZES = dict(region_width=32, words=5, width=32, word_width=4)
RELEASED = {  # file of weights and scores -> the model that has them
    'gate_fusion_new': partial(CAMP, form='released', **SIZES),
    'gate_fusion_new_sum': partial(CAMP, form='released', fusion='sum', **SIZES),
    'cross_attention_new': partial(CAMPStage1, count_padding=True, **SIZES),
}


def released(file):
    "What the released code was given and gave, and its weights."
    arrays = np.load(Path(__file__).parent / 'camp_released' / f'{file}.npz')
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    weights = {}
    for name in list(tensors):
        if name.startswith('weight.'):
            weights[name.removeprefix('weight.')] = tensors.pop(name)
    return tensors, weights


@pytest.mark.parametrize('file', RELEASED)
def test_camp_equals_the_released_scores(file):
    given, weights = released(file)
    ours = RELEASED[file]().double()
    load_released(ours, weights)
    v = given['regions']
    t = given['words']
    regions_there = torch.ones(v.shape[:2], dtype=torch.bool)
    words_there = torch.arange(t.shape[1]) < given['lengths'][:, None]
    with torch.no_grad():
        images = ours.image_codes(v, regions_there)
        scores = ours.match(images, ours.caption_codes(t, words_there))
    assert (scores - given['scores']).abs().max() < 1e-10


def test_released_weights_of_another_model_are_refused():
    _, weights = released('cross_attention_new')
    with pytest.raises(ValueError, match='missing'):
        load_released(RELEASED['gate_fusion_new']().double(), weights)


# ---------------------------------------------------------------- the equations


def attend_plain(query, key, values):
    "Scaled dot-product attention of one item's vectors over another's, none of them padding."
    return (query @ key.T / math.sqrt(query.shape[-1])).softmax(-1) @ values


def unit(x):
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


def released_side(x, y, own, other, fusion, pool):
    "One side of a released pair: what x hears from y, and the vector it becomes."
    first = attend_plain(own.query(x), other.key(y), y)
    message = unit(attend_plain(other.message_query(first), other.message_key(first), first))
    gate = torch.sigmoid((x * message).sum(-1, keepdim=True))
    fused = F.relu(fusion.linear(torch.cat((x, message), -1) * gate)) + x
    heads = pool.logits(F.relu(pool.hidden(fused))).softmax(0)
    return unit((heads.T @ fused).mean(0))


def released_pair(camp, v, t):
    "The released full model for one picture (R, D) and one sentence (T, D)."
    regions = camp.messages.regions
    words = camp.messages.words
    a = released_side(v, t, regions, words, camp.image_fusion, camp.image_pool)
    b = released_side(t, v, words, regions, camp.word_fusion, camp.word_pool)
    return torch.sigmoid(camp.head.out(F.relu(camp.head.hidden(torch.cat((a, b))))))[0]


class PaperPair:
    "The paper's model (eq. 1 to 12) and its ablations, position by position."

    def __init__(self, camp):
        self.camp = camp
        self.config = camp.config

    def received(self, x, y, own, other):
        "A message for every position of x."
        if self.config['messages'] == 'mean':
            return y.mean(0).expand(len(x), -1)
        return attend_plain(own(x), other(y), y)

    def gate(self, vector, message):
        kind = self.config['gate']
        if kind == 'elementwise':
            return torch.sigmoid(vector * message)
        if kind == 'scalar':
            scale = math.sqrt(len(vector)) if self.config['codes'] == 'unit' else 1
            return torch.sigmoid(vector @ message / scale)
        return 1

    def fused(self, vector, message, fusion):
        "One position and its message made one."
        kind = self.config['fusion']
        gate = self.gate(vector, message)
        if kind == 'none':
            return message
        if kind == 'sum':
            inside = gate * (vector + message)
        elif kind == 'product':
            inside = gate * vector * message
        else:
            inside = torch.cat([gate * vector, gate * message])
        together = F.relu(fusion.linear(inside))
        return together + vector if self.config['residual'] else together

    def pooled(self, x, pool):
        "Many positions made one vector."
        if self.config['pool'] == 'mean':
            return x.mean(0)
        weight = pool.logits.weight[0]
        share = (x @ weight / math.sqrt(x.shape[-1])).softmax(0)
        return sum(a * vector for a, vector in zip(share, x))

    def side(self, x, y, own, other, fusion, pool):
        if self.config['messages'] == 'none':
            return self.pooled(x, pool)
        messages = self.received(x, y, own, other)
        fused = [self.fused(vector, message, fusion) for vector, message in zip(x, messages)]
        return self.pooled(torch.stack(fused), pool)

    def __call__(self, v, t):  # one picture (R, D), one sentence (T, D)
        camp = self.camp
        regions = getattr(camp.messages, 'regions', None)
        words = getattr(camp.messages, 'words', None)
        a = self.side(v, t, regions, words, camp.image_fusion, camp.image_pool)
        b = self.side(t, v, words, regions, camp.word_fusion, camp.word_pool)
        if self.config['head'] == 'cosine':
            return a @ b / (a.norm() * b.norm())
        return torch.sigmoid(camp.head.out(F.relu(camp.head.hidden(a + b))))[0]


@pytest.mark.parametrize('arguments', [{}, *CAMPS, dict(form='released')], ids=in_short)
def test_camp_equals_its_plain_form_on_ragged_input_with_gradients(arguments):
    camp = make('camp', arguments, torch.float64)
    images, sentences = codes_of(camp, *ragged(torch.float64))
    plain_pair = PaperPair(camp)
    if arguments.get('form') == 'released':
        plain_pair = partial(released_pair, camp)

    def plain(b, c):
        return plain_pair(images.x[b][images.mask[b]], sentences.x[c][sentences.mask[c]])

    fast = camp.match(images, sentences)
    close_with_gradients(camp, fast, one_by_one(plain, *fast.shape))
