"""The benchmarks on one GPU, in one call of at most eight minutes:
`python -m benchmarks.gpu [--minutes 8] [--out FILE]`; `--quick` is a dry run on a CPU.

Needs torch, numpy, einops, safetensors, accelerate, typer and tqdm, and makes its own data. Scoring of every
model in float32 and bfloat16 beside its plain form; then training at the papers' size (36 x 2048 features,
width 1024, batch 128) of CAMP as in the paper, of CAMP's released stages and of SSAMT's two phases: a few
hundred steps in float32 and in bfloat16, peak memory, and the hours that the papers' schedules would take.
The table comes last. What does not fit into memory or into the time is a line that says so.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench import (
    PLAIN,
    REGIONS,
    affordable,
    build,
    items,
    madds,
    scored_madds,
    training_batch,
    training_task,
)
from imtm_lite.data import Batch
from imtm_lite.encoders import Codes, Matcher
from imtm_lite.recipes import RECIPES
from imtm_lite.scoring import score
from imtm_lite.tasks import Task

F30K = 29_000  # training pictures, five captions each
TOKENS = 14  # of a caption, on average
PRECISIONS = (torch.float32, torch.bfloat16)
SCHEDULES = {  # a row of the training table -> recipe, preset, and the stages of which model
    'camp': ('camp', 'f30k', 'camp'),
    'camp stage 1': ('camp', 'f30k-released', 'camp-stage1'),
    'camp released': ('camp', 'f30k-released', 'camp'),
    'ssamt phase 1': ('ssamt', 'f30k', 'ssamt-intra'),
    'ssamt phase 2': ('ssamt', 'f30k', 'ssamt'),
}
# all pairs of a batch, in tiles that may be recomputed
TILED = ('camp', 'camp stage 1', 'camp released')


class Budget:
    "Seconds left of the whole call."

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic()


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def wait(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def clock(f, device: str, rounds: int) -> float:  # median seconds, after one round to warm up
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        f()
        wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


# operations a second of a square matmul
def peak(device: str, dtype: torch.dtype, n: int) -> float:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / clock(lambda: a @ b, device, 5)


def memory_of(f, device: str) -> float | None:
    "MB at the peak beyond what stood there; None where nobody counts."
    if device != 'cuda':
        f()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    wait(device)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


# Scoring


@torch.no_grad()
def scoring(
    device: str,
    width: int,
    shape: tuple[int, int],
    rounds: int,
    peaks: dict[torch.dtype, float],  # operations a second of a matmul
    budget: Budget,
) -> list[dict]:
    "Pairs a second of every model: fast in float32 and bfloat16, plain in float32."
    regions, captions = items(*shape)
    regions = regions.to(device)
    captions = captions.to(device)
    rows = []
    for k, name in enumerate(PLAIN):
        seconds = budget.left() / 2 / (len(PLAIN) - k)  # half of the time is for training
        if seconds < 2:
            rows.append(dict(what='scoring', model=name, form='not run: no time left'))
            continue
        matcher = build(name, width).to(device)
        codes = matcher.encode_images(regions), matcher.encode_captions(captions)
        rows += scored(name, matcher, *codes, device, rounds, seconds, peaks)
    return rows


def scored(
    name: str,
    matcher: Matcher,
    images: Codes,
    captions: Codes,
    device: str,
    rounds: int,
    seconds: float,  # for all of it
    peaks: dict[torch.dtype, float],
) -> list[dict]:
    "One model's rows, on as many pairs as the time allows."
    few = affordable(images, captions, 256)
    # seconds a pair
    cost = clock(lambda: score(matcher, *few), device, 1) / (len(few[0]) * len(few[1]))
    v, t = affordable(images, captions, max(1024, seconds / (2 * rounds + 8) / cost))
    pairs = len(v) * len(t)
    exact = score(matcher, v, t)
    operations = 2 * scored_madds(matcher, *few)
    some = images[:32], captions[:8]
    plain = clock(lambda: PLAIN[name](matcher, *some), device, rounds) / (
        len(some[0]) * len(some[1])
    )
    rows = []
    for dtype in PRECISIONS:
        m = matcher.to(dtype)
        a = v.to(dtype)
        b = t.to(dtype)
        found = clock(lambda: score(m, a, b), device, rounds) / pairs
        rows.append(
            dict(
                what='scoring',
                model=name,
                form=short(dtype),
                shape=[len(v), len(t)],
                per_s=round(1 / found, 1),
                ratio_to_plain=round(plain / found, 2),
                peak_share=round(operations / found / peaks[dtype], 3),
                peak_mb=memory_of(lambda: score(m, a, b), device),
                largest_difference=float((score(m, a, b) - exact).abs().max()),
            )
        )
    return rows


# Training


class Trainer:
    "Steps of Adam on one batch."

    def __init__(self, task: Task, batch: Batch, device: str, precision: torch.dtype):
        self.task = task
        matcher = task.matcher
        self.batch = batch
        self.device = device
        self.precision = precision
        self.optimiser = torch.optim.Adam(
            [p for p in matcher.parameters() if p.requires_grad], lr=1e-4
        )

    def step(self) -> Tensor:  # the loss
        with torch.autocast(self.device, self.precision, enabled=self.precision != torch.float32):
            loss = self.task(self.batch)['total']
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.matcher.parameters(), 2.0)
        self.optimiser.step()
        return loss.detach()


def training(
    device: str,
    width: int,
    region_width: int,
    size: int,
    steps: int,
    peaks: dict[torch.dtype, float],
    budget: Budget,
) -> list[dict]:
    "So many steps of every row of SCHEDULES, in float32 and bfloat16: losses, pairs a second, memory, hours."
    rows = []
    batch = training_batch(size, region_width).to(device)
    runs = [(name, precision) for name in SCHEDULES for precision in PRECISIONS]
    for k, (name, precision) in enumerate(runs):
        about = dict(
            what='training', model=name, form=short(precision), shape=[size, REGIONS, region_width]
        )
        seconds = budget.left() / (len(runs) - k)
        if seconds < 2:
            rows.append(about | dict(note='not run: no time left'))
            continue
        try:
            task = training_task(name, width, size, region_width, device)
            trainer = Trainer(task, batch, device, precision)
            rows.append(about | trained(name, trainer, steps, seconds, size, peaks[precision]))
        except torch.cuda.OutOfMemoryError as fault:
            rows.append(about | dict(note=f'out of memory: {str(fault)[:80]}'))
    return rows


def trained(
    name: str, trainer: Trainer, steps: int, seconds: float, size: int, peak: float
) -> dict:
    "What a run of one row shows, in about so many seconds."
    device = trainer.device
    figures = {}
    began = time.perf_counter()
    # every tile computed a second time in the backward pass
    trainer.task.memory = 0
    # what the optimiser keeps is there from now on
    first = float(trainer.step())
    if name in TILED:
        figures['peak_mb_recomputed'] = memory_of(trainer.step, device)
        figures['note'] = 'tiles of 32 x 16 pairs, kept up to 8 GiB, then recomputed'
    trainer.task.memory = None  # the budget of `match_by_length`
    figures['peak_mb'] = memory_of(trainer.step, device)
    trainer.step()
    wait(device)
    losses = []
    start = time.perf_counter()
    while len(losses) < steps and (not losses or time.perf_counter() - began < seconds):
        losses.append(float(trainer.step()))
    a_step = (time.perf_counter() - start) / len(losses)
    # operations; backward there are twice as many
    forward = 2 * madds(lambda: trainer.task(trainer.batch))
    return figures | dict(
        steps=len(losses),
        first_loss=first,
        last_loss=losses[-1],
        per_s=round(size / a_step, 1),
        peak_share=round(3 * forward / a_step / peak, 3),
        projected_hours=hours(name, a_step, size),
    )


def hours(name: str, a_step: float, size: int) -> float | None:
    """Of the schedule's stages, at the measured seconds a step; None where the recipes have no such stage.

    SSAMT's batches are counted in instances, regions and words; where all pairs of a batch are scored, a
    larger batch costs more an item. Frozen parameters are taken for trained ones: an upper bound.
    """
    model, preset, stage_model = SCHEDULES[name]
    stages = [s for s in RECIPES.get(model, {}).get(preset, []) if s['model'] == stage_model]
    if not stages:
        return None
    seconds = 0.0
    for stage in stages:
        batch = stage.get('size', size)
        if stage.get('instances'):
            batch = stage['instances'] / (REGIONS + TOKENS)
        pairs = batch * (stage.get('updates') or 0) * stage.get('accumulate', 1)
        if not pairs:
            pairs = stage['epochs'] * F30K * (stage.get('per_image') or 5)
        # where all pairs of a batch are scored
        growth = batch / size if name in TILED else 1.0
        seconds += pairs / size * a_step * growth
    return round(seconds / 3600, 2)


# The table


def number(value, width: int, digits: int) -> str:
    return f'{value:{width},.{digits}f}' if value is not None else f"{'':{width}s}"


def table(rows: list[dict]) -> str:
    titles = f"{'a second':>14s}{'to plain':>10s}{'of peak':>9s}{'peak MB':>10s}  more"
    lines = [f"{'':10s}{'model':19s}{'form':10s}{titles}"]
    extra = (
        'largest_difference',
        'steps',
        'first_loss',
        'last_loss',
        'peak_mb_recomputed',
        'projected_hours',
        'note',
    )
    for r in rows:
        more = []
        for k in extra:
            if r.get(k) is not None:
                more.append(f'{k} {r[k]:.3g}' if isinstance(r[k], float) else f'{k} {r[k]}')
        figures = number(r.get('per_s'), 14, 0) + number(r.get('ratio_to_plain'), 10, 2)
        figures += number(r.get('peak_share'), 9, 3) + number(r.get('peak_mb'), 10, 0)
        lines.append(f"{r['what']:10s}{r['model']:19s}{r['form']:10s}{figures}  {', '.join(more)}")
    return '\n'.join(lines)


def main():
    plainly = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plainly)
    parser.add_argument(
        '--quick', action='store_true', help='tiny shapes on the CPU: does everything run?'
    )
    parser.add_argument('--minutes', type=float, default=8)
    parser.add_argument('--out', type=Path, default=Path('gpu.json'))
    a = parser.parse_args()
    if not a.quick and not torch.cuda.is_available():
        parser.error('there is no GPU here; --quick is a dry run on the CPU')
    budget = Budget(a.minutes - 0.5)
    if a.quick:
        device = 'cpu'
        name = 'cpu, dry run'
        square = 256
        rounds = 1
        shape = (8, 20)
        sizes = dict(width=32, region_width=64, size=8, steps=2)
    else:
        device = 'cuda'
        name = torch.cuda.get_device_name()
        square = 8192
        rounds = 5
        shape = (200, 1000)
        sizes = dict(width=1024, region_width=2048, size=128, steps=300)
    peaks = {dtype: peak(device, dtype, square) for dtype in PRECISIONS}
    about = dict(
        device=name,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        tflops={short(dtype): round(p / 1e12, 2) for dtype, p in peaks.items()},
    )
    rows = scoring(device, sizes['width'], shape, rounds, peaks, budget)
    rows += training(device, peaks=peaks, budget=budget, **sizes)
    a.out.write_text(json.dumps(dict(about, rows=rows), indent=1))
    print(json.dumps(about))
    print(table(rows))


if __name__ == '__main__':
    main()
