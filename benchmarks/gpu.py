"""The benchmarks on one GPU, in one call of at most eight minutes:
`python -m benchmarks.gpu [--minutes 8] [--out FILE]`; `--quick` is a dry run on a CPU.

Needs what the library needs, and makes its own data. Scoring of every model in float32 and bfloat16
beside its plain form; then training at the papers' size (36 x 2048 features, width 1024, batch
128) of CAMP as in the paper, of CAMP's released stages and of SSAMT's two phases: a few hundred
steps in float32 and in bfloat16, peak memory, and the hours that the papers' schedules would take.
The table comes last. What does not fit into memory or into the time is a line that says so.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
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
from imtm_lite.files import write_json
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


def clock(action: Callable, device: str, rounds: int) -> float:
    "Median seconds, after one round to warm up."
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        action()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def peak_of(device: str, dtype: torch.dtype, n: int) -> float:
    "Operations a second of a square matmul."
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / clock(lambda: a @ b, device, 5)


def memory_of(action: Callable, device: str) -> float | None:
    "MB at the peak beyond what stood there; None where nobody counts."
    if device != 'cuda':
        action()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
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
    cost = clock(lambda: score(matcher, *few), device, 1) / pairs_of(*few)  # seconds a pair
    codes = affordable(images, captions, max(1024, seconds / (2 * rounds + 8) / cost))
    exact = score(matcher, *codes)
    operations = 2 * scored_madds(matcher, *few)
    portion = images[:32], captions[:8]
    plain = clock(lambda: PLAIN[name](matcher, *portion), device, rounds) / pairs_of(*portion)
    rows = []
    for dtype in PRECISIONS:
        figures = scored_in(dtype, matcher, codes, device, rounds, exact)
        a_pair = figures.pop('seconds')
        figures['ratio_to_plain'] = round(plain / a_pair, 2)
        figures['peak_share'] = round(operations / a_pair / peaks[dtype], 3)
        rows.append(dict(what='scoring', model=name, form=short(dtype)) | figures)
    return rows


def pairs_of(images: Codes, captions: Codes) -> int:
    return len(images) * len(captions)


def scored_in(
    dtype: torch.dtype,
    matcher: Matcher,
    codes: tuple[Codes, Codes],
    device: str,
    rounds: int,
    exact: Tensor,  # the scores in float32
) -> dict:
    "Seconds a pair, memory and difference of one precision."
    matcher = matcher.to(dtype)
    codes = [side.to(dtype) for side in codes]

    def run():
        return score(matcher, *codes)

    seconds = clock(run, device, rounds) / pairs_of(*codes)
    return dict(
        shape=[len(side) for side in codes],
        seconds=seconds,
        per_s=round(1 / seconds, 1),
        peak_mb=memory_of(run, device),
        largest_difference=float((run() - exact).abs().max()),
    )


# Training


class Trainer:
    "Steps of Adam on one batch."

    def __init__(self, task: Task, batch: Batch, device: str, precision: torch.dtype):
        self.task = task
        self.batch = batch
        self.device = device
        self.precision = precision
        moving = [each for each in task.matcher.parameters() if each.requires_grad]
        self.optimiser = torch.optim.Adam(moving, lr=1e-4)

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
    "So many steps of every row of SCHEDULES: losses, pairs a second, memory, hours."
    rows = []
    batch = training_batch(size, region_width).to(device)
    runs = list(product(SCHEDULES, PRECISIONS))
    for k, (name, precision) in enumerate(runs):
        row = dict(what='training', model=name, form=short(precision))
        row['shape'] = [size, REGIONS, region_width]
        seconds = budget.left() / (len(runs) - k)
        if seconds < 2:
            rows.append(row | dict(note='not run: no time left'))
            continue
        try:
            task = training_task(name, width, size, region_width, device)
            trainer = Trainer(task, batch, device, precision)
            rows.append(row | trained(name, trainer, steps, seconds, size, peaks[precision]))
        except torch.cuda.OutOfMemoryError as fault:
            rows.append(row | dict(note=f'out of memory: {str(fault)[:80]}'))
    return rows


def trained(
    name: str, trainer: Trainer, steps: int, seconds: float, size: int, peak: float
) -> dict:
    "What a run of one row shows, in about so many seconds."
    began = time.perf_counter()
    # every tile computed a second time in the backward pass
    trainer.task.memory = 0
    # what the optimiser keeps is there from now on
    figures = dict(first_loss=float(trainer.step()))
    if name in TILED:
        figures['peak_mb_recomputed'] = memory_of(trainer.step, trainer.device)
        figures['note'] = 'tiles of 32 x 16 pairs, kept up to 8 GiB, then recomputed'
    trainer.task.memory = None  # the budget of `match_by_length`
    figures['peak_mb'] = memory_of(trainer.step, trainer.device)
    losses, a_step = timed_steps(trainer, steps, began + seconds)
    # operations; backward there are twice as many
    forward = 2 * madds(lambda: trainer.task(trainer.batch))
    return figures | dict(
        steps=len(losses),
        last_loss=losses[-1],
        per_s=round(size / a_step, 1),
        peak_share=round(3 * forward / a_step / peak, 3),
        projected_hours=hours(name, a_step, size),
    )


def timed_steps(
    trainer: Trainer,
    steps: int,  # at most
    until: float,  # seconds on the clock; one step is always taken
) -> tuple[list[float], float]:  # losses; seconds a step
    trainer.step()
    wait(trainer.device)
    losses = []
    start = time.perf_counter()
    while len(losses) < steps and (not losses or time.perf_counter() < until):
        losses.append(float(trainer.step()))
    return losses, (time.perf_counter() - start) / len(losses)


def pairs_of_stage(stage: dict, size: int) -> float:
    "Pairs that a stage of a recipe goes through; `size` where it does not say."
    if stage.get('updates'):
        return batch_of_stage(stage, size) * stage['updates'] * stage.get('accumulate', 1)
    return stage['epochs'] * F30K * (stage.get('per_image') or 5)


def batch_of_stage(stage: dict, size: int) -> float:
    "Pairs of a batch; SSAMT's are counted in instances, regions and words."
    if stage.get('instances'):
        return stage['instances'] / (REGIONS + TOKENS)
    return stage.get('size', size)


def hours(name: str, a_step: float, size: int) -> float | None:
    """Of the schedule's stages, at the measured seconds a step.

    None where the recipes have no such stage. Where all pairs of a batch are scored, a larger batch
    costs more an item. Frozen parameters are taken for trained ones: an upper bound.
    """
    model, preset, stage_model = SCHEDULES[name]
    stages = RECIPES.get(model, {}).get(preset, [])
    stages = [stage for stage in stages if stage['model'] == stage_model]
    if not stages:
        return None
    seconds = 0.0
    for stage in stages:
        growth = batch_of_stage(stage, size) / size if name in TILED else 1.0
        seconds += pairs_of_stage(stage, size) / size * a_step * growth
    return round(seconds / 3600, 2)


# The table

EXTRA = (
    'largest_difference',
    'steps',
    'first_loss',
    'last_loss',
    'peak_mb_recomputed',
    'projected_hours',
    'note',
)


def number(value, width: int, digits: int) -> str:
    return f'{value:{width},.{digits}f}' if value is not None else ' ' * width


def named(name: str, value) -> str:
    return f'{name} {value:.3g}' if isinstance(value, float) else f'{name} {value}'


def line_of(row: dict) -> str:
    "A row as the table shows it."
    figures = number(row.get('per_s'), 14, 0) + number(row.get('ratio_to_plain'), 10, 2)
    figures += number(row.get('peak_share'), 9, 3) + number(row.get('peak_mb'), 10, 0)
    more = [named(name, row[name]) for name in EXTRA if row.get(name) is not None]
    return f'{row["what"]:10s}{row["model"]:19s}{row["form"]:10s}{figures}  {", ".join(more)}'


def table(rows: list[dict]) -> str:
    titles = f'{"a second":>14s}{"to plain":>10s}{"of peak":>9s}{"peak MB":>10s}  more'
    lines = [f'{"":10s}{"model":19s}{"form":10s}{titles}']
    return '\n'.join(lines + [line_of(row) for row in rows])


def parsed() -> argparse.Namespace:
    plainly = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plainly)
    quick = 'tiny shapes on the CPU: does everything run?'
    parser.add_argument('--quick', action='store_true', help=quick)
    parser.add_argument('--minutes', type=float, default=8)
    parser.add_argument('--out', type=Path, default=Path('gpu.json'))
    asked = parser.parse_args()
    if not asked.quick and not torch.cuda.is_available():
        parser.error('there is no GPU here; --quick is a dry run on the CPU')
    return asked


SIZES = dict(width=1024, region_width=2048, size=128, steps=300)
QUICK_SIZES = dict(width=32, region_width=64, size=8, steps=2)


def main():
    asked = parsed()
    budget = Budget(asked.minutes - 0.5)
    device = 'cpu' if asked.quick else 'cuda'
    square = 256 if asked.quick else 8192
    rounds = 1 if asked.quick else 5
    shape = (8, 20) if asked.quick else (200, 1000)
    sizes = QUICK_SIZES if asked.quick else SIZES
    peaks = {dtype: peak_of(device, dtype, square) for dtype in PRECISIONS}
    about = dict(device='cpu, dry run' if asked.quick else torch.cuda.get_device_name())
    about |= dict(torch=torch.__version__, cuda=torch.version.cuda)
    about['tflops'] = {short(dtype): round(peak / 1e12, 2) for dtype, peak in peaks.items()}
    rows = scoring(device, sizes['width'], shape, rounds, peaks, budget)
    rows += training(device, peaks=peaks, budget=budget, **sizes)
    write_json(asked.out, about | dict(rows=rows))
    print(json.dumps(about))
    print(table(rows))


if __name__ == '__main__':
    main()
