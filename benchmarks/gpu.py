"""The benchmarks on one GPU, in one call of at most eight minutes: `python -m benchmarks.gpu [--minutes 8] [--out FILE]`; `--quick` is a dry run on a CPU.

Needs torch, numpy, einops, safetensors, accelerate, typer and tqdm, and makes its own data. Scoring of every model in float32 and bfloat16 beside its plain
form; CAMP trained for a few hundred steps at the papers' size (36 x 2048 features, width 1024, batch 128), with its peak memory when the scores' tiles keep
what the budget allows and when all are recomputed; the hours that the papers' schedules would take.
The table comes last. What does not fit into memory or into the time is a line that says so.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.bench import REGIONS, build, items
from benchmarks.plain import PLAIN
from imtm_lite.encoders import Codes
from imtm_lite.losses import HardestBCE, Triplet
from imtm_lite.regions import Regions
from imtm_lite.scoring import score
from imtm_lite.train import RECIPES

F30K = 29_000 # training pictures, five captions each


class Budget:
    "Seconds left of the whole call."
    def __init__(self, minutes: float): self.end = time.monotonic() + 60 * minutes
    def left(self) -> float: return self.end - time.monotonic()


def wait(device: str) -> None:
    if device == 'cuda': torch.cuda.synchronize()


def clock(f, device: str, rounds: int) -> float: # median seconds, after one round to warm up
    f(); wait(device)
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        f(); wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def peak(device: str, dtype: torch.dtype, n: int) -> float: # operations a second of a square matmul
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / clock(lambda: a @ b, device, 5)


def memory_of(f, device: str) -> float | None: # MB at the peak beyond what stood there; None where nobody counts
    if device != 'cuda': f(); return None
    torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f(); wait(device)
    return round((torch.cuda.max_memory_allocated() - before) / 2 ** 20, 1)


@torch.no_grad()
def scoring(device: str, width: int, shape: tuple[int, int], rounds: int, budget: Budget) -> list[dict]:
    "Pairs a second of every model: fast in float32 and bfloat16, plain in float32; largest difference of the bfloat16 scores."
    regions, captions = items(*shape)
    rows = []
    for name in PLAIN:
        if budget.left() < 60: rows.append(dict(what='scoring', model=name, form='not run: no time left')); continue
        matcher = build(name, width).to(device).eval()
        v, t = matcher.encode_images(regions.to(device)), matcher.encode_captions(captions.to(device))
        few = v[:32], t[:32]
        exact = score(matcher, v, t)
        plain = clock(lambda: PLAIN[name](matcher, *few), device, rounds) / (len(few[0]) * len(few[1]))
        for form, dtype in (('float32', torch.float32), ('bfloat16', torch.bfloat16)):
            m = matcher.to(dtype)
            a, b = (Codes(**{k: x.to(dtype) if x.is_floating_point() else x for k, x in codes.items()}) for codes in (v, t))
            seconds = clock(lambda: score(m, a, b), device, rounds) / (shape[0] * shape[1])
            rows.append(dict(what='scoring', model=name, form=form, shape=list(shape), per_s=round(1 / seconds, 1), ratio_to_plain=round(plain / seconds, 2),
                             peak_mb=memory_of(lambda: score(m, a, b), device), largest_difference=float((score(m, a, b) - exact).abs().max())))
    return rows


def training(device: str, width: int, region_width: int, size: int, steps: int, precision: torch.dtype, budget: Budget) -> list[dict]:
    "CAMP's two losses at the papers' size: pairs a second, memory, and hours for the schedule of the release."
    rows, epochs = [], {'camp-stage1': [s for s in RECIPES['camp']['f30k'] if s['model'] == 'camp-stage1'], 'camp': [s for s in RECIPES['camp']['f30k'] if s['model'] == 'camp']}
    for name, criterion in (('camp-stage1', Triplet()), ('camp', HardestBCE())):
        regions, captions = items(size, size, seed=1)
        regions = Regions(features=torch.rand(size, REGIONS, region_width)).to(device)
        row = torch.arange(size, device=device)
        batch = type('Batch', (), dict(regions=regions, captions=captions.to(device), image=row, caption=row))()
        matcher = build(name, width, region_width).to(device).train()
        matcher.criterion = criterion
        optimiser = torch.optim.Adam(matcher.parameters(), lr=2e-4)

        def step():
            with torch.autocast(device, precision, enabled=precision != torch.float32): loss = matcher(batch)['total']
            optimiser.zero_grad(set_to_none=True); loss.backward(); optimiser.step()
            return float(loss.detach())
        about = dict(what='training', model=name, form=str(precision).removeprefix('torch.'), shape=[size, REGIONS, region_width])
        try:
            matcher.memory = 0                                    # every tile computed a second time in the backward pass
            step()                                                # what the optimiser keeps is there from now on
            least = memory_of(step, device)
            matcher.memory = None                                 # the budget of `match_by_length`
            used = memory_of(step, device)
            losses, began = [], time.perf_counter()
            while len(losses) < steps and budget.left() > 30: losses.append(step())
            wait(device)
            seconds = (time.perf_counter() - began) / max(1, len(losses))
        except torch.cuda.OutOfMemoryError as fault:
            rows.append(about | dict(note=f'out of memory: {str(fault)[:80]}')); continue
        hours = sum(s['epochs'] * F30K * (s['per_image'] or 5) for s in epochs[name]) / size * seconds / 3600
        rows.append(about | dict(steps=len(losses), first_loss=losses[0], last_loss=losses[-1], per_s=round(size / seconds, 1), pairs_per_s=round(size ** 2 / seconds), peak_mb=used, peak_mb_recomputed=least,
                                 projected_hours=round(hours, 1), note='tiles of 32 x 16 pairs, kept up to 8 GiB, then recomputed; peak_mb_recomputed: all of them'))
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'':10s}{'model':13s}{'form':10s}{'a second':>14s}{'to plain':>10s}{'peak MB':>10s}  more"]
    for r in rows:
        more = ', '.join(f'{k} {r[k]:.3g}' if isinstance(r[k], float) else f'{k} {r[k]}' for k in ('largest_difference', 'pairs_per_s', 'peak_mb_recomputed', 'projected_hours', 'note') if r.get(k) is not None)
        lines.append(f"{r['what']:10s}{r['model']:13s}{r['form']:10s}{r.get('per_s', float('nan')):14,.0f}{r.get('ratio_to_plain', float('nan')):10.2f}{r.get('peak_mb') or float('nan'):10.0f}  {more}")
    return '\n'.join(lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='tiny shapes on the CPU: does everything run?')
    parser.add_argument('--minutes', type=float, default=8)
    parser.add_argument('--out', type=Path, default=Path('gpu.json'))
    a = parser.parse_args()
    if not a.quick and not torch.cuda.is_available(): parser.error('there is no GPU here; --quick is a dry run on the CPU')
    device, budget = ('cpu' if a.quick else 'cuda'), Budget(a.minutes - .5)
    sizes = dict(width=32, region_width=64, size=8, steps=2) if a.quick else dict(width=1024, region_width=2048, size=128, steps=300)
    about = dict(device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu, dry run', torch=torch.__version__, cuda=torch.version.cuda,
                 tflops={str(d).removeprefix('torch.'): round(peak(device, d, 256 if a.quick else 8192) / 1e12, 2) for d in (torch.float32, torch.bfloat16)})
    rows = scoring(device, sizes['width'], (8, 20) if a.quick else (200, 1000), 1 if a.quick else 5, budget)
    for precision in (torch.float32, torch.bfloat16): rows += training(device, precision=precision, budget=budget, **sizes)
    a.out.write_text(json.dumps(dict(about, rows=rows), indent=1))
    print(json.dumps(about)); print(table(rows))
