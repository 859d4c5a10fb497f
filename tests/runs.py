"Runs of a few seconds, and what tests ask of them."

import torch

from imtm_lite.checkpoints import read_checkpoint
from imtm_lite.runs import Log

QUICK = dict(
    arguments=dict(width=16, word_width=8),
    epochs=2,
    size=20,
    lr=2e-3,
    per_image=2,
    min_freq=2,
    decay_at=(1,),
    device='cpu',
    progress=False,
)


def card_of(path):
    return read_checkpoint(path)[0]


def tensors_of(path):
    return read_checkpoint(path)[1]


def same_tensors(path, other):
    "Two checkpoints hold the same, bit for bit."
    a = tensors_of(path)
    b = tensors_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(run):
    return Log(run / 'log.jsonl').lines()
