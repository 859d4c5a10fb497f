"Small matchers of every kind, ragged input for them, and what tests ask of both."

import inspect
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from imtm_lite.checkpoints import MODELS
from imtm_lite.regions import Regions
from imtm_lite.text import Captions

PREDICATES = 4
SCANS = (dict(direction='i2t'), dict(direction='both'), dict(lse=6.0))
CAMPS = (
    dict(gate='scalar'),
    dict(gate='none'),
    dict(fusion='concat'),
    dict(fusion='product'),
    dict(fusion='none'),
    dict(messages='mean'),
    dict(messages='none'),
    dict(messages='none', head='cosine'),
    dict(residual=False),
    dict(pool='mean'),
    dict(head='cosine'),
    dict(codes='raw'),
    dict(start='uniform'),
)
RELEASED_CAMPS = (
    dict(form='released'),
    dict(form='released', gate='elementwise'),
    dict(form='released', gate='none'),
    dict(form='released', fusion='sum'),
    dict(form='released', residual=False),
    dict(form='released', pool='mean'),
    dict(form='released', start='similarity'),
    dict(form='released', codes='unit'),
)
CMSEIS = (
    dict(spatial='labels', layers=2),
    dict(spatial='iou', semantic=False),
    dict(spatial='none', threshold=0.5),
    dict(reasoning='gated'),
    dict(object_word=False),
    dict(object_sentence=False),
    dict(word_image=False),
    dict(object_word=False, object_sentence=False, word_image=False),
    dict(spatial='binary', weighted=False, combined=True),
    dict(refine=False),
    dict(refine=False, object_word=False),
)
SSAMTS = (dict(phrases=False), dict(local=False), dict(layers=1))
HIRES = (
    dict(order='explicit-implicit'),
    dict(order='parallel'),
    dict(spatial='none', semantic=False),
)
ABLATIONS = {
    'scan': SCANS,
    'camp': CAMPS + RELEASED_CAMPS,
    'cmsei': CMSEIS,
    'ssamt': SSAMTS,
    'hire': HIRES,
}
VARIANTS = [(name, {}) for name in MODELS]
for name, several in ABLATIONS.items():
    VARIANTS += [(name, arguments) for arguments in several]


def in_short(value):
    "How a variant is called among the tests."
    return value if isinstance(value, str) else '-'.join(map(str, value.values()))


each = pytest.mark.parametrize('name,arguments', VARIANTS, ids=in_short)


# ---------------------------------------------------------------- input


def ragged(dtype, images=6, captions=9, regions=5, words=8):
    "Pictures with 1 to R regions, sentences of 3 to T words, and a bundle of each."
    have = torch.randint(1, regions + 1, (images,))
    have[0] = regions
    there = torch.arange(regions) < have[:, None]
    features = torch.rand(images, regions, 7, dtype=dtype) * there[..., None]
    lengths = torch.randint(3, words + 1, (captions,))
    lengths[0] = words
    inside = torch.arange(words) < lengths[:, None]
    tokens = torch.randint(4, 30, (captions, words)) * inside
    pictures = Regions(features=features, **surroundings(dtype, images, regions))
    return pictures, with_phrases(Captions(tokens=tokens, lengths=lengths))


def surroundings(dtype, images, regions):
    "Boxes, sizes and triples of some pictures."
    # (B, R, x/y, low/high)
    corners = torch.rand(images, regions, 2, 2, dtype=dtype).sort(-1).values
    ends = [torch.randint(0, n, (images, 6)) for n in (regions, PREDICATES, regions)]
    triples = torch.stack(ends, -1)
    triples[torch.rand(images, 6) < 0.3] = -1
    return dict(
        boxes=corners.transpose(2, 3).flatten(2),
        sizes=torch.tensor([640.0, 480.0], dtype=dtype).repeat(images, 1),
        triples=triples,
        confidence=torch.rand(images, 6, dtype=dtype),
    )


def with_phrases(captions, phrases=4):
    "Some phrases for every caption but the last, which has none."
    kinds = torch.randint(-1, 3, (len(captions), phrases))
    kinds[-1] = -1
    drawn = torch.rand(len(captions), phrases, captions.tokens.shape[1]) < 0.3
    units = drawn & captions.mask[:, None] & (kinds >= 0)[..., None]
    return changed(captions, units=units, kinds=kinds.where(units.any(2), -1))


def changed(bundle, **new):
    "The same regions or captions with some tensors replaced."
    return type(bundle)(**(dict(bundle.items()) | new))


def padded(regions, captions, columns=40):
    "The same pictures and sentences with more padding."
    wider = changed(
        regions,
        features=F.pad(regions.features, (0, 0, 0, 3)),
        mask=F.pad(regions.mask, (0, 3)),
        boxes=F.pad(regions.boxes, (0, 0, 0, 3), value=0.5),
        triples=F.pad(regions.triples, (0, 0, 0, 2), value=-1),
        confidence=F.pad(regions.confidence, (0, 2)),
    )
    longer = Captions(
        tokens=F.pad(captions.tokens, (0, columns)),
        lengths=captions.lengths,
        units=F.pad(captions.units, (0, columns, 0, 3)),
        kinds=F.pad(captions.kinds, (0, 3), value=-1),
    )
    return wider, longer


def without_padding(captions, c):
    "One caption alone."
    n = int(captions.lengths[c])
    return Captions(
        tokens=captions.tokens[[c], :n],
        lengths=captions.lengths[[c]],
        units=captions.units[[c], :, :n],
        kinds=captions.kinds[[c]],
    )


# ---------------------------------------------------------------- matchers


def make(name, arguments, dtype):
    "A matcher in which no layer hides because it starts as zeros."
    facts = dict(region_width=7, words=30, predicates=PREDICATES, width=16, word_width=6)
    if name.startswith('ssamt'):
        facts |= dict(heads=4, feedforward=24)
    known = inspect.signature(MODELS[name]).parameters
    facts = {fact: value for fact, value in facts.items() if fact in known}
    matcher = MODELS[name](**facts, **arguments)
    for parameter in matcher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return matcher.to(dtype).eval()


def codes_of(matcher, regions, captions):
    return matcher.encode_images(regions), matcher.encode_captions(captions)


@torch.no_grad()
def scores_of(matcher, regions, captions):
    return matcher.match(*codes_of(matcher, regions, captions))


def one_by_one(score, images, captions):
    "A matrix of scores, each of which is asked for alone: `score(b, c)`."
    pairs = product(range(images), range(captions))
    return torch.stack([score(b, c) for b, c in pairs]).view(images, captions)


# ---------------------------------------------------------------- what is compared


def close(value, want, atol=1e-12, rtol=0.0):
    "Equal up to rounding."
    torch.testing.assert_close(value, want, atol=atol, rtol=rtol)


def gradients_of(matcher, number):
    "Of one number, for every parameter; zeros where a parameter plays no part."
    parameters = list(matcher.parameters())
    return torch.autograd.grad(number, parameters, retain_graph=True, materialize_grads=True)


def close_with_gradients(matcher, fast, plain, atol=1e-12, gradient_atol=1e-10, gradient_rtol=1e-8):
    "Two ways to the same scores, and to the same gradients of every parameter."
    close(fast, plain, atol=atol)
    weight = torch.randn_like(fast)
    one = gradients_of(matcher, (fast * weight).sum())
    other = gradients_of(matcher, (plain * weight).sum())
    for a, b in zip(one, other):
        close(a, b, atol=gradient_atol, rtol=gradient_rtol)
