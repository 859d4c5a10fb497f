"""Speed and memory side by side in one interleaved run: `make bench`, or
`python -m benchmarks.bench [--quick] [--width 1024] [--rounds 5] [--out FILE]`.

Every figure is a median over rounds in which all forms take turns, so that what else the machine
does hits all alike. Times say little beyond this machine: read the ratios to the plain form, and
the shares of the matmul peak measured in the same rounds. Forms that are dear are timed on few
pairs, as many as a try says. Beside them stand the multiply-adds of a pair, as counted, and those
that no exact form can do without: see `least`. Figures go to benchmarks/results.json.
"""

import argparse
import inspect
import platform
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import PLAIN, form
from imtm_lite.checkpoints import MODELS, TASKS
from imtm_lite.data import Batch, Split, batch_plan, batches
from imtm_lite.encoders import Codes, Matcher
from imtm_lite.files import write_json
from imtm_lite.losses import HardestBCE, Triplet
from imtm_lite.models.ssamt import PhraseTask
from imtm_lite.phrases import Entity, PhraseLabels, TextGraph
from imtm_lite.recall import evaluate
from imtm_lite.regions import Regions
from imtm_lite.scoring import PeakBytes, pair_bytes, score, tile_shape
from imtm_lite.tasks import Task
from imtm_lite.text import Captions, Vocab
from imtm_lite.workshop.printing import commit, print_table

REGIONS = 36
WORDS = 200
PREDICATES = 20
TRAINED = [
    *(name for name in PLAIN if name != 'ssamt'),
    'camp stage 1',
    'ssamt phase 1',
    'ssamt phase 2',
]
SECONDS = 1.0  # that one timing should take
AT_LEAST = 200  # pairs of a timing, whatever they cost
ALIGNED = 64  # pairs that `pairs` is asked for
AT_ONCE = 32  # pictures that a plain form is given, with two captions at least


# What is measured: matchers, and data of the papers' shape


def items(
    n_images: int, n_captions: int, seed: int = 0, region_width: int = 64
) -> tuple[Regions, Captions]:
    "Random pictures of 36 regions, random captions of the length that Flickr30K has."
    generator = torch.Generator().manual_seed(seed)
    regions = pictures(n_images, region_width, generator)
    return regions, sentences(n_captions, generator)


def pictures(n: int, region_width: int, generator: torch.Generator) -> Regions:
    "36 regions with boxes, and 25 triples."
    # (B, R, low/high, x/y)
    corners = torch.rand(n, REGIONS, 2, 2, generator=generator).sort(2).values
    kinds = (REGIONS, PREDICATES, REGIONS)
    ends = [torch.randint(0, count, (n, 25), generator=generator) for count in kinds]
    return Regions(
        features=torch.rand(n, REGIONS, region_width, generator=generator),
        boxes=corners.flatten(2),
        sizes=torch.full((n, 2), 500.0),
        triples=torch.stack(ends, -1),
        confidence=torch.rand(n, 25, generator=generator),
    )


def sentences(n: int, generator: torch.Generator) -> Captions:
    "10 to 20 tokens, 14 on average; 3 phrases."
    beyond_ten = torch.poisson(torch.full((n,), 4.0), generator=generator)
    lengths = (10 + beyond_ten).clamp(max=20).long().tolist()
    ids = [torch.randint(4, WORDS, (length,), generator=generator).tolist() for length in lengths]
    captions = Captions.from_ids(ids)
    return captions.with_units([phrases_of(length) for length in lengths])


def phrases_of(length: int) -> list[tuple[int, list[int]]]:  # kind, tokens
    "Two objects and what holds between them."
    return [(0, span(length, 0, 3)), (0, span(length, 5, 8)), (1, span(length, 0, 8))]


def span(length: int, start: int, end: int) -> list[int]:  # of a caption with <start> and <end>
    "The tokens of a phrase."
    return list(range(1 + start, min(1 + end, length - 1)))


def build(name: str, width: int, region_width: int = 64) -> Matcher:
    "The matcher of a row, in evaluation mode."
    torch.manual_seed(0)
    model, arguments = form(name)
    facts = dict(
        region_width=region_width, words=WORDS, predicates=PREDICATES, width=width, word_width=32
    )
    if model.startswith('ssamt'):
        facts |= dict(heads=max(2, width // 64), feedforward=2 * width)  # 16 and 2048, at 1024
    known = inspect.signature(MODELS[model]).parameters
    facts = {name: value for name, value in facts.items() if name in known}
    matcher = MODELS[model](**facts, **arguments)
    for parameter in matcher.parameters():
        # layers that begin as zeros
        if parameter.ndim == 2 and not parameter.any():
            nn.init.xavier_uniform_(parameter.data)
    return matcher.eval()


def training_task(
    name: str,
    width: int,
    size: int,
    region_width: int = 64,
    device: str = 'cpu',
    memory: int | None = None,
) -> Task:
    "The matcher of a row with its loss, ready for `training_batch`."
    model, _ = form(name)
    matcher = build(name, width, region_width).train().to(device)
    criterion = HardestBCE() if model == 'camp' else Triplet()
    if model != 'ssamt':
        return TASKS.get(model, Task)(matcher, criterion, memory=memory)
    matcher.intra.requires_grad_(False)  # phase 1 is over
    labels = PhraseLabels([graph(c) for c in range(size)], range(size))
    return PhraseTask(matcher, criterion, labels=labels, memory=memory)


def graph(c: int) -> TextGraph:
    "Three phrases of one word each; a wrong picture may have one of them and lack another."
    heads = tuple(f'thing{(c + phrase) % 7}' for phrase in range(3))
    entities = [Entity(place, place + 1, head) for place, head in enumerate(heads)]
    return TextGraph(heads, tuple(entities))


def training_batch(size: int, region_width: int = 64) -> Batch:
    "As many pictures as captions, all of different pictures."
    regions, captions = items(size, size, seed=1, region_width=region_width)
    rows = torch.arange(size)
    return Batch(regions, captions, rows, rows, rows)


# How it is measured: seconds, multiply-adds, bytes


def clock(action: Callable) -> float:  # seconds
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def peak_flops(n: int = 1024) -> float:
    "Operations a second of a square matmul; a multiply-add counts as two."
    a = torch.randn(n, n)
    b = torch.randn(n, n)
    return 2 * n**3 / min(clock(lambda: a @ b) for _ in range(3))


@contextmanager
def seen_through():
    "PyTorch's transformer layers step by step, since no counter looks into its fused ones."
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
def madds(action: Callable) -> float:
    "Multiply-adds of all matrix products; what is written element by element is not seen."
    with seen_through(), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 2


def scored_madds(matcher: Matcher, images: Codes, captions: Codes) -> float:  # of a pair
    "Of `score`, without the pairs that it tries in order to find its tiles."
    all_of_it = madds(lambda: score(matcher, images, captions))
    tried = madds(lambda: pair_bytes(matcher, images, captions))
    return (all_of_it - tried) / (len(images) * len(captions))


def peak_bytes(action: Callable) -> int:
    "Bytes alive at once beyond what was there before."
    with seen_through(), PeakBytes() as counter:
        action()
    return counter.peak


def least(name: str, D: int, R: int, T: int, P: int) -> int:
    """Multiply-adds of a pair that no exact form can do without.

    `R` regions, `T` words, `P` phrases. What belongs to one item alone is done once an item and
    not counted, nor are products without the width. All but vse compare regions with words, R T D.

    CAMP compares once more for its messages (released: twice, each side has queries and keys of
    its own), scalar gates once for themselves, and 2 R T D form what stands before the ReLU. With
    an element-wise gate the layer stands behind the gate, in the release the pooling's hidden
    layer behind the ReLU: either goes through every position of every pair, (R + T) D D.

    SSAMT sends n = 2 + P + T + R nodes through two layers of 8 n D D (hidden layer 2 D) and
    attention; only the first queries, keys and values, 3 n D D, and the first products inside an
    item belong to the items.
    """
    compare = R * T * D
    every = (R + T) * D
    if name == 'vse':
        return D
    if name == 'camp':  # affinity, messages; layer; pooling; head
        return 3 * compare + every * D + 2 * every + D * D + D
    if name == 'camp scalar gates':  # affinity, gates, what is sent; pooling; head
        return 4 * compare + 2 * every + D * D + D
    # two affinities, gates, what is sent; pooling with four heads; head
    if name == 'camp released':
        return 5 * compare + every * D + 5 * every + 2 * D * D + D
    if name == 'ssamt':
        text = 1 + P + T
        image = 1 + R
        n = text + image
        first = 2 * text * image * D + n * n * D + 5 * n * D * D
        second = 2 * n * n * D + 8 * n * D * D
        return first + second + n * D
    return compare


def least_of(name: str, images: Codes, captions: Codes) -> float:
    "The mean over captions of any length."
    if captions.mask is None:
        return least(name, captions.vector.shape[1], 0, 0, 0)
    exists = dict(captions.items()).get('exists')
    words = captions.mask.sum(1).tolist()
    phrases = exists.sum(1).tolist() if exists is not None else [0] * len(words)
    R, D = images.x.shape[1:]
    return statistics.mean(least(name, D, R, T, P) for T, P in zip(words, phrases))


# Scoring


@dataclass
class Timed:
    "One form of one model's scoring, and what was found."

    model: str
    form: str
    run: Callable
    pairs: int
    madds: float  # of a pair
    least: float  # of a pair
    memory: int  # bytes
    # part of `run` that the whole set would hide: its time does not count
    tries: Callable | None = None
    seconds: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def turn(self, peak: float):
        "Once more; the share is of a peak that was measured just before."
        seconds = clock(self.run)
        if self.tries is not None:
            seconds = seconds - clock(self.tries)
        self.seconds.append(seconds)
        self.share.append(2 * self.madds * self.pairs / self.seconds[-1] / peak)

    @property
    def speed(self) -> float:  # pairs a second
        return self.pairs / statistics.median(self.seconds)

    def row(self, shape, plain: 'Timed') -> dict:
        return dict(
            what='scoring',
            model=self.model,
            form=self.form,
            shape=list(shape),
            timed_pairs=self.pairs,
            per_s=round(self.speed, 1),
            ratio_to_plain=round(self.speed / plain.speed, 2),
            peak_share=round(statistics.median(self.share), 3),
            peak_mb=round(self.memory / 2**20, 1),
            madds_a_pair=round(self.madds),
            least_a_pair=round(self.least),
        )


def spread(captions: Codes, n: int) -> Codes:
    "So many captions, their lengths as in the whole."
    if n >= len(captions):
        return captions
    lengths = torch.zeros(len(captions)) if captions.mask is None else captions.mask.sum(1).cpu()
    places = ((torch.arange(n) + 0.5) / n * len(captions)).long()
    chosen = lengths.argsort(stable=True)[places]
    return captions[chosen.sort().values.tolist()]


def affordable(images: Codes, captions: Codes, pairs: float) -> tuple[Codes, Codes]:
    "A part of both with about so many pairs, as square as can be."
    height, width = tile_shape(pairs, len(images), len(captions))
    return images[:height], spread(captions, width)


def fast_form(name: str, matcher: Matcher, images: Codes, captions: Codes) -> Timed:
    "The library's `score`; of a part of the set, without the pairs by which it finds its tiles."
    few = images[:8], spread(captions, 8)
    cost = clock(lambda: matcher.match(*few)) / (len(few[0]) * len(few[1]))  # seconds a pair
    v, t = affordable(images, captions, max(AT_LEAST, SECONDS / cost))

    def run():
        return score(matcher, v, t)

    def tries():
        return pair_bytes(matcher, v, t)

    is_part = len(v) * len(t) < len(images) * len(captions)
    return Timed(
        model=name,
        form='fast',
        run=run,
        pairs=len(v) * len(t),
        madds=scored_madds(matcher, v, t),
        least=least_of(name, v, t),
        memory=peak_bytes(run),
        tries=tries if is_part else None,
    )


def pairs_form(name: str, matcher: Matcher, images: Codes, captions: Codes) -> Timed:
    "Aligned pairs, which is what a pair encoder is asked for where it reranks."
    v, t = affordable(images, captions, ALIGNED)
    rows = torch.arange(len(v)).repeat(len(t))
    columns = torch.arange(len(t)).repeat_interleave(len(v))
    v = v[rows]
    t = t[columns]

    def run():
        return matcher.pairs(v, t)

    return Timed(
        model=name,
        form='pairs',
        run=run,
        pairs=len(v),
        madds=madds(run) / len(v),
        least=least_of(name, v, t),
        memory=peak_bytes(run),
    )


def plain_form(name: str, matcher: Matcher, images: Codes, captions: Codes) -> Timed:
    "One caption at a time."
    plain = PLAIN[name]
    v = images[:AT_ONCE]
    cost = clock(lambda: plain(matcher, v, spread(captions, 1)))  # seconds a caption
    t = spread(captions, max(2, int(SECONDS / cost)))

    def run():
        return plain(matcher, v, t)

    pairs = len(v) * len(t)
    return Timed(
        model=name,
        form='plain',
        run=run,
        pairs=pairs,
        madds=madds(run) / pairs,
        least=least_of(name, v, t),
        memory=peak_bytes(run),
    )


@torch.no_grad()
def forms_of(name: str, width: int, regions: Regions, captions: Captions) -> list[Timed]:
    "The forms of a model, each with as many pairs as the time allows by a try on few."
    matcher = build(name, width)
    codes = matcher.encode_images(regions), matcher.encode_captions(captions)
    kinds = [fast_form, plain_form]
    if type(matcher).first_scores is not None:
        kinds.append(pairs_form)
    return [kind(name, matcher, *codes) for kind in kinds]


@torch.no_grad()
def scoring(shape: tuple[int, int], width: int, rounds: int) -> list[dict]:
    "Pairs a second of every model and its plain form."
    regions, captions = items(*shape)
    forms = []
    for name in PLAIN:
        forms += forms_of(name, width, regions, captions)
    for _ in range(rounds):
        peak = peak_flops()
        for one in forms:
            one.turn(peak)
    plain = {one.model: one for one in forms if one.form == 'plain'}
    fast = {one.model: one for one in forms if one.form == 'fast'}
    return [one.row(shape, plain[one.model]) for one in forms] + beside_scan(fast, shape)


def beside_scan(forms: dict[str, Timed], shape: tuple[int, int]) -> list[dict]:
    "How many times as long as SCAN both ways a refined pair takes: median of the rounds' ratios."
    base = forms['scan both']
    rows = []
    for name in ('cmsei', 'hire'):
        one = forms[name]
        rounds = zip(one.seconds, base.seconds)
        ratios = [mine / one.pairs / (its / base.pairs) for mine, its in rounds]
        row = dict(what='cost', model=name, form='beside scan both', shape=list(shape))
        rows.append(row | dict(times=round(statistics.median(ratios), 2), at_most=3))
    return rows


# Training, ranks, loader


def timed_in_turns(forms: dict[str, Callable], rounds: int) -> dict[str, float]:
    "Median seconds of each form."
    seconds = {name: [] for name in forms}
    for _ in range(rounds):
        for name, action in forms.items():
            seconds[name].append(clock(action))
    return {name: statistics.median(of_form) for name, of_form in seconds.items()}


def training(width: int, rounds: int, size: int) -> list[dict]:
    "Pairs a second of a training step (forward, backward) of every model."
    batch = training_batch(size)

    def step(task: Task):
        task(batch)['total'].backward()

    steps = {name: partial(step, training_task(name, width, size)) for name in TRAINED}
    seconds = timed_in_turns(steps, rounds)
    rows = []
    for name, action in steps.items():
        with PeakBytes() as counter:
            action()
        row = dict(what='training step', model=name, form='fast', shape=[size, size])
        row['per_s'] = round(size / seconds[name], 1)
        row['peak_mb'] = round(counter.peak / 2**20, 1)
        rows.append(row)
    return rows


def compared(
    what: str,
    shape: tuple[int, ...],
    n: int,  # items that a form goes through
    forms: dict[str, Callable],  # 'fast', 'plain'
    rounds: int,
) -> list[dict]:
    "Items a second of a fast and a plain form that take turns."
    seconds = timed_in_turns(forms, rounds)
    rows = []
    for name in forms:
        row = dict(what=what, model='', form=name, shape=list(shape))
        row['per_s'] = round(n / seconds[name], 1)
        row['ratio_to_plain'] = round(seconds['plain'] / seconds[name], 2)
        rows.append(row)
    return rows


def ranks(shape, rounds: int) -> list[dict]:
    "Recall of a score matrix by counting better entries, and by sorting."
    scores = torch.rand(*shape)
    image = torch.arange(shape[1]) * shape[0] // shape[1]

    def sort():
        for row in scores:
            row.argsort(descending=True)
        for column in scores.T:
            column.argsort(descending=True)

    forms = dict(fast=lambda: evaluate(scores, image), plain=sort)
    return compared('ranks', shape, sum(shape), forms, rounds)


class PlainLoader:
    "One pair at a time, as released loaders read it, then stacked and padded."

    def __init__(self, split: Split, vocab: Vocab):
        self.split = split
        self.vocab = vocab

    def __getitem__(self, c: int) -> tuple[Tensor, Tensor]:  # (R, region width), (T,)
        features = self.split.features[self.split.caption_image[c]]
        ids = self.vocab.encode(self.split.captions[c])
        return torch.tensor(features).float(), torch.tensor(ids)

    def batch(self, rows):
        pairs = [self[c] for c in rows]
        pairs.sort(key=lambda pair: len(pair[1]), reverse=True)
        images, captions = zip(*pairs)
        tokens = torch.zeros(len(captions), len(captions[0]), dtype=torch.long)
        for row, caption in zip(tokens, captions):
            row[: len(caption)] = caption
        return torch.stack(images), tokens, [len(c) for c in captions]


def write_split(root: Path, n: int):
    "A training split of the papers' feature size."
    features = np.random.default_rng(0).random((n, REGIONS, 2048), dtype=np.float32)
    np.save(root / 'train_ims.npy', features)
    (root / 'train_ids.txt').write_text(''.join(f'{i}\n' for i in range(n)))
    (root / 'train_caps.txt').write_text('a dog runs after a red ball on the grass\n' * 5 * n)


def loader(n: int, rounds: int, workers: int = 2) -> list[dict]:
    "Samples a second from memory-mapped features, read by threads, or one by one; warm."
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), n)
        split = Split(Path(folder), 'train')
        vocab = Vocab.build(split.captions, 1)
        plain = PlainLoader(split, vocab)
        order = dict(size=128, seed=0, per_image=1, epoch=0)

        def fast_epoch():
            for batch in batches(split, vocab, workers=workers, **order):
                len(batch)

        def plain_epoch():
            for rows in batch_plan(split, **order):
                plain.batch(rows)

        # reads the file into memory
        fast_epoch()
        plain_epoch()
        forms = dict(fast=fast_epoch, plain=plain_epoch)
        return compared('loader', (n, REGIONS, 2048), n, forms, rounds)


# The table


HEADS = ('', 'model', 'form', 'shape', 'a second', 'to plain', 'of peak', 'MB', 'M madds', 'least')


def million(x: float | None) -> str:
    return '' if x is None else f'{x / 1e6:,.2f}'


def shape_of(row: dict) -> str:
    return ' x '.join(map(str, row['shape']))


def cells_of(row: dict) -> list[str]:
    "A row as the table shows it."
    about = [row['what'], row['model'], row['form'], shape_of(row), f'{row["per_s"]:,.0f}']
    measured = [str(row.get(name, '')) for name in ('ratio_to_plain', 'peak_share', 'peak_mb')]
    counted = [million(row.get(name)) for name in ('madds_a_pair', 'least_a_pair')]
    return about + measured + counted


def show(rows: list[dict], title: str):
    print_table(title, HEADS, [cells_of(row) for row in rows if row['what'] != 'cost'])
    print('M madds: million multiply-adds of a pair, as counted; least: what no exact form avoids')
    for row in rows:
        if row['what'] == 'cost':
            costs = f'{row["model"]} costs {row["times"]} times scan both (aim: {row["at_most"]})'
            print(f'{shape_of(row)}: {costs}')


SIZES = dict(shapes=[(64, 320), (200, 1000)], batch=16, ranks=(5000, 25_000), loader=1000)
QUICK_SIZES = dict(shapes=[(8, 20)], batch=8, ranks=(50, 250), loader=20)


def measured(width: int, rounds: int, sizes: dict) -> list[dict]:
    "Every row of the table."
    rows = []
    for shape in sizes['shapes']:
        rows += scoring(shape, width, rounds)
    rows += training(width, rounds, sizes['batch'])
    rows += ranks(sizes['ranks'], rounds)
    return rows + loader(sizes['loader'], rounds)


def parsed() -> argparse.Namespace:
    plainly = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plainly)
    quick = 'small shapes, one round: does everything run?'
    parser.add_argument('--quick', action='store_true', help=quick)
    parser.add_argument('--width', type=int, default=1024)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results.json')
    return parser.parse_args()


def main():
    asked = parsed()
    width = 32 if asked.quick else asked.width
    rounds = 1 if asked.quick else asked.rounds
    about = dict(threads=torch.get_num_threads(), width=width, torch=torch.__version__)
    about |= dict(machine=platform.machine(), library=commit())
    rows = measured(width, rounds, QUICK_SIZES if asked.quick else SIZES)
    rows = [row | about for row in rows]
    title = (
        f'width {width}, {about["threads"]} threads, torch {torch.__version__}, '
        f'{about["machine"]}, imtm_lite {about["library"]}, medians of {rounds} rounds'
    )
    show(rows, title)
    write_json(asked.out, rows)


if __name__ == '__main__':
    main()
