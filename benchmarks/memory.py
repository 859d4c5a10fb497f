"""Peak memory of one training step of CAMP by how much its tiles may keep:
`python -m benchmarks.memory [--form 'camp released']` (minutes on one core at the papers' size).

Random input with 36 regions and sentences of 10 to 20 words. Counted are the tensors of a step,
forward and backward; weights, gradients and the optimizer come on top.
"""

import argparse
import time

import torch

from benchmarks.bench import training_batch, training_task
from imtm_lite.data import Batch
from imtm_lite.scoring import PeakBytes
from imtm_lite.tasks import Task
from imtm_lite.workshop.printing import commit

FORMS = ('camp', 'camp scalar gates', 'camp released', 'camp stage 1')


def step(task: Task, batch: Batch) -> tuple[int, float]:  # peak bytes, seconds of processor time
    "One step, without the optimizer."
    began = time.process_time()
    with PeakBytes() as counted:
        task(batch)['total'].backward()
    task.matcher.zero_grad()
    return counted.peak, time.process_time() - began


def parsed(argv: list[str] | None) -> argparse.Namespace:
    plainly = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plainly)
    how = dict(choices=FORMS, nargs='+', default=['camp'])
    parser.add_argument('--form', help='default: the paper', **how)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--width', type=int, default=1024)
    parser.add_argument('--region-width', type=int, default=2048)
    parser.add_argument('--keep', type=float, nargs='+', default=[0, 2], help='GiB')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    asked = parsed(argv)
    batch = training_batch(asked.batch, asked.region_width)
    print(
        f'batch {asked.batch}, width {asked.width}, features of {asked.region_width}, float32, '
        f'{torch.get_num_threads()} threads, torch {torch.__version__}, imtm_lite {commit()}'
    )
    for name in asked.form:
        task = training_task(name, asked.width, asked.batch, asked.region_width)
        for keep in asked.keep:
            task.memory = int(keep * 2**30)
            peak, seconds = step(task, batch)
            print(
                f'{name}, tiles may keep {keep:g} GiB: peak {peak / 2**20:,.0f} MiB, '
                f'{seconds:.0f} s of processor time',
                flush=True,
            )


if __name__ == '__main__':
    main()
