"""Speed and memory side by side in one interleaved run: `make bench`, or `python -m benchmarks.bench [--quick] [--width 1024] [--rounds 5] [--out FILE]`.

Every figure is a median over rounds in which all forms take turns, so that what else the machine does hits all alike. Times say little beyond this machine:
read the ratios to the plain form, and the shares of the matmul peak measured in the same rounds. Figures go to benchmarks/results.json.
"""
import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import PLAIN, form
from imtm_lite.cli import commit
from imtm_lite.data import Split, batches, plan
from imtm_lite.losses import Triplet
from imtm_lite.phrases import Entity, PhraseLabels, TextGraph
from imtm_lite.recall import evaluate
from imtm_lite.regions import Regions
from imtm_lite.results import write_json
from imtm_lite.scoring import PeakBytes, score
from imtm_lite.text import Captions, Vocab
from imtm_lite.train import MODELS, arguments_for

REGIONS, WORDS = 36, 200
MOST = {'fast': (200_000, 4096), 'plain': (2048, 96)} # pairs timed in a round; the second figure is for CAMP
say = Console()


def clock(f) -> float: # seconds
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def peak_flops(n: int = 1024) -> float:
    "Multiply-adds of a square matmul, counted as two operations each, a second."
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n ** 3 / min(clock(lambda: a @ b) for _ in range(3))


def items(n_images: int, n_captions: int, seed: int = 0) -> tuple[Regions, Captions]:
    "Random pictures of 36 regions and captions of 10 to 20 tokens, 14 on average as on Flickr30K."
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n_images, REGIONS, 2, 2, generator=g).sort(2).values.flatten(2)                  # x0 y0 x1 y1
    triples = torch.stack([torch.randint(0, k, (n_images, 25), generator=g) for k in (REGIONS, 20, REGIONS)], -1)
    regions = Regions(features=torch.rand(n_images, REGIONS, 64, generator=g), boxes=corner, sizes=torch.full((n_images, 2), 500.), triples=triples,
                      confidence=torch.rand(n_images, 25, generator=g))
    lengths = (10 + torch.poisson(torch.full((n_captions,), 4.), generator=g)).clamp(max=20).long()
    captions = Captions.from_ids([torch.randint(4, WORDS, (k,), generator=g).tolist() for k in lengths.tolist()])
    words = lambda k, a, b: list(range(1 + a, min(1 + b, k - 1)))
    return regions, captions.with_units([[(0, words(k, 0, 3)), (0, words(k, 5, 8)), (1, words(k, 0, 8))] for k in lengths.tolist()])


def build(name: str, width: int, region_width: int = 64):
    torch.manual_seed(0)
    model, arguments = form(name)
    known = arguments_for(model, dict(region_width=region_width, words=WORDS, predicates=20, width=width, word_width=32))
    return MODELS[model](**known, **arguments).eval()


@torch.no_grad()
def flops(f) -> int:
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()


@torch.no_grad()
def scoring(shapes, width: int, rounds: int) -> list[dict]:
    "Pairs a second of every model and its plain form. A form that would take long is timed on a part of the captions: pairs are alike."
    rows = []
    for n_images, n_captions in shapes:
        regions, captions = items(n_images, n_captions)
        forms = {}
        for name in PLAIN:
            matcher = build(name, width)
            v, t = matcher.encode_images(regions), matcher.encode_captions(captions)
            for form, f in (('fast', lambda m, a, b: score(m, a, b)), ('plain', PLAIN[name])):
                n = n_images if form == 'fast' else min(n_images, 32)
                a, b = v[:n], t[torch.linspace(0, n_captions - 1, min(n_captions, max(2, MOST[form][name == 'camp'] // n))).long()]
                forms[name, form] = dict(run=lambda f=f, m=matcher, a=a, b=b: f(m, a, b), pairs=n * len(b), seconds=[], share=[],
                                         flops=flops(lambda f=f, m=matcher, a=a, b=b: f(m, a, b)) / (n * len(b)), memory=memory(f, matcher, a, b))
        for _ in range(rounds):
            peak = peak_flops()
            for x in forms.values():
                x['seconds'].append(clock(x['run']))
                x['share'].append(x['flops'] * x['pairs'] / x['seconds'][-1] / peak)
        speed = {k: x['pairs'] / statistics.median(x['seconds']) for k, x in forms.items()}
        for (name, form), x in forms.items():
            rows.append(dict(what='scoring', model=name, form=form, shape=[n_images, n_captions], per_s=round(speed[name, form], 1), ratio_to_plain=round(speed[name, form] / speed[name, 'plain'], 2),
                             peak_share=round(statistics.median(x['share']), 3), peak_mb=round(x['memory'] / 2 ** 20, 1), timed_pairs=x['pairs'], mflop_a_pair=round(x['flops'] / 1e6, 3)))
    return rows


def memory(f, matcher, a, b) -> int: # bytes alive at once beyond the codes
    with PeakBytes() as counter: f(matcher, a, b[:64])
    return counter.peak


def training(width: int, rounds: int, size: int) -> list[dict]:
    "Seconds of a training step (forward, backward) of every model."
    regions, captions = items(size, size)
    rows = torch.arange(size)
    batch = type('Batch', (), dict(regions=regions, captions=captions, image=rows, caption=rows, __len__=lambda self: size))()
    steps, found = {}, {}
    for name in PLAIN:
        matcher = build(name, width).train()
        matcher.criterion = Triplet()
        if name == 'ssamt': matcher.labels = PhraseLabels([TextGraph((), tuple(Entity(0, 1, f'{c}{p}') for p in range(3))) for c in range(size)], range(size))
        steps[name], found[name] = (lambda m=matcher: m(batch)['total'].backward()), []
    for _ in range(rounds):
        for name, step in steps.items(): found[name].append(clock(step))
    out = []
    for name, step in steps.items():
        with PeakBytes() as counter: step()
        out.append(dict(what='training step', model=name, form='fast', shape=[size, size], per_s=round(size / statistics.median(found[name]), 1), peak_mb=round(counter.peak / 2 ** 20, 1)))
    return out


def ranks(shape, rounds: int) -> list[dict]:
    "Recall of a score matrix by counting better entries, and by sorting."
    scores, image = torch.rand(*shape), torch.arange(shape[1]) * shape[0] // shape[1]

    def sort():
        for row in scores: row.argsort(descending=True)
        for column in scores.T: column.argsort(descending=True)
    forms, found = {'fast': lambda: evaluate(scores, image), 'plain': sort}, {'fast': [], 'plain': []}
    for _ in range(rounds):
        for form, f in forms.items(): found[form].append(clock(f))
    speed = {form: sum(shape) / statistics.median(s) for form, s in found.items()}
    return [dict(what='ranks', model='', form=form, shape=list(shape), per_s=round(s, 1), ratio_to_plain=round(s / speed['plain'], 2)) for form, s in speed.items()]


class PlainLoader:
    "One pair at a time, as released loaders read it: the image's row, the caption's words looked up anew; then a batch is stacked and padded."
    def __init__(self, split: Split, vocab: Vocab): self.split, self.vocab = split, vocab

    def __getitem__(self, c):
        return torch.tensor(self.split.features[self.split.caption_image[c]]).float(), torch.tensor(self.vocab.encode(self.split.captions[c]))

    def batch(self, rows):
        pairs = sorted((self[c] for c in rows), key=lambda pair: len(pair[1]), reverse=True)
        images, captions = zip(*pairs)
        tokens = torch.zeros(len(captions), len(captions[0]), dtype=torch.long)
        for row, caption in zip(tokens, captions): row[:len(caption)] = caption
        return torch.stack(images), tokens, [len(c) for c in captions]


def loader(n: int, rounds: int, workers: int = 2) -> list[dict]:
    "Samples a second from memory-mapped features of the papers' size (36 x 2048, float32), checked and read by threads, or one by one; warm."
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        np.save(root / 'train_ims.npy', np.random.default_rng(0).random((n, REGIONS, 2048), dtype=np.float32))
        (root / 'train_ids.txt').write_text(''.join(f'{i}\n' for i in range(n)))
        (root / 'train_caps.txt').write_text('a dog runs after a red ball on the grass\n' * 5 * n)
        split = Split(root, 'train')
        vocab = Vocab.build(split.captions, 1)
        order, plain = dict(size=128, seed=0, per_image=1), PlainLoader(split, vocab)
        forms = {'fast': lambda epoch: [len(b) for b in batches(split, vocab, epoch=epoch, workers=workers, **order)],
                 'plain': lambda epoch: [len(plain.batch(rows)[0]) for rows in plan(split, epoch=epoch, **order)]}
        found = {form: [] for form in forms}
        for epoch in range(rounds + 1):                                                              # the first reads the file into memory
            for form, f in forms.items(): found[form].append(clock(lambda: f(epoch)))
        speed = {form: n / statistics.median(s[1:]) for form, s in found.items()}
    return [dict(what='loader', model='', form=form, shape=[n, REGIONS, 2048], per_s=round(s, 1), ratio_to_plain=round(s / speed['plain'], 2)) for form, s in speed.items()]


def show(rows: list[dict], title: str):
    table = Table(title=title, title_justify='left')
    for column in ('', 'model', 'form', 'shape', 'a second', 'ratio to plain', 'share of peak', 'peak MB'): table.add_column(column, justify='right')
    for r in rows: table.add_row(r['what'], r['model'], r['form'], ' x '.join(map(str, r['shape'])), f"{r['per_s']:,.0f}", *(str(r.get(k, '')) for k in ('ratio_to_plain', 'peak_share', 'peak_mb')))
    say.print(table)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='small shapes, one round: does everything run?')
    parser.add_argument('--width', type=int, default=1024)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results.json')
    a = parser.parse_args()
    if a.quick: a.width, a.rounds = 32, 1
    rows = scoring([(8, 20)] if a.quick else [(64, 320), (200, 1000)], a.width, a.rounds)
    rows += training(a.width, a.rounds, 8 if a.quick else 32) + ranks((50, 250) if a.quick else (5000, 25_000), a.rounds) + loader(20 if a.quick else 1000, a.rounds)
    for r in rows: r |= dict(threads=torch.get_num_threads(), width=a.width, torch=torch.__version__, machine=platform.machine(), library=commit())
    show(rows, f'width {a.width}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}, imtm_lite {commit()}, medians of {a.rounds} rounds')
    write_json(a.out, rows)
