"""How many of the pictures that exact scores put first the first stage of search keeps: `python -m tools.first_look DATA SPLIT RUN ...` (a minute a run on one core).

A hundred of the split's sentences, evenly spaced, ask for ten pictures each. Figures go to data/results/first-look.json, a row a model.
"""
import sys

import torch
import torch.nn.functional as F

from imtm_lite.cli import commit
from imtm_lite.data import Split, image_chunks
from imtm_lite.encoders import masked_mean
from imtm_lite.explore import FirstLook, candidate_recall
from imtm_lite.scoring import encode, score
from imtm_lite.text import Captions
from imtm_lite.train import load
from tools.graphs import RESULTS, keep

CANDIDATES = (50, 100, 200, 400)

def mean_vectors(codes): return F.normalize(codes.vector if codes.mask is None else masked_mean(codes.x, codes.mask), dim=-1)

@torch.no_grad()
def measure(matcher, split: Split) -> dict[str, dict[int, float]]: # first stage -> candidates -> percent of the exact first ten
    "Recall of both first stages."
    sentences = split.captions[::len(split.captions) // 100][:100]
    images, asked = encode(matcher.encode_images, image_chunks(split)), encode(matcher.encode_captions, [Captions.from_text(sentences, matcher.vocab)])
    exact = score(matcher, images, asked)
    first = {'best regions': score(FirstLook, images, asked), 'mean vectors': mean_vectors(images) @ mean_vectors(asked).T}
    return {name: {n: candidate_recall(exact, quick, n) for n in CANDIDATES} for name, quick in first.items()}


if __name__ == '__main__':
    split = Split(*sys.argv[1:3])
    for run in sys.argv[3:]:
        matcher = load(run)
        name, found = matcher.card['model'], measure(matcher, split)
        keep(RESULTS / 'first-look.json', name, dict(library=commit(), seed=matcher.card['settings']['seed'], recall=found), pictures=split.n_images, sentences=100, top=10, fingerprint=split.fingerprint(),
             command='python -m tools.first_look DATA SPLIT RUN ...')
        print(name, found, flush=True)
