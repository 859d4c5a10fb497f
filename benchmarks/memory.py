"""Peak memory of one training step of CAMP by how much its tiles may keep: `python -m benchmarks.memory` (six minutes on one core at the papers' size).

Random input with 36 regions and sentences of 8 to 20 words. Counted are the tensors of a step, forward and backward; weights, gradients and the optimizer come on top.
"""
import argparse
import time

import torch

from imtm_lite.cli import commit
from imtm_lite.data import Batch
from imtm_lite.losses import HardestBCE
from imtm_lite.models.camp import CAMP
from imtm_lite.regions import Regions
from imtm_lite.scoring import PeakBytes
from imtm_lite.text import Captions


def step(camp: CAMP, batch: Batch, memory: int) -> tuple[int, float]: # bytes that tiles may keep -> peak bytes, seconds of processor time
    "One step, without the optimizer."
    camp.memory, began = memory, time.process_time()
    with PeakBytes() as counted: camp(batch)['total'].backward()
    camp.zero_grad()
    return counted.peak, time.process_time() - began


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--width', type=int, default=1024)
    parser.add_argument('--region-width', type=int, default=2048)
    parser.add_argument('--keep', type=float, nargs='+', default=[0, 2], help='GiB')
    a = parser.parse_args(argv)
    torch.manual_seed(0)
    camp = CAMP(region_width=a.region_width, words=1000, width=a.width, word_width=300)
    camp.criterion, rows = HardestBCE(), torch.arange(a.batch)
    captions = Captions.from_ids([torch.randint(4, 1000, (int(n),)).tolist() for n in torch.randint(8, 21, (a.batch,))])
    batch = Batch(Regions(features=torch.rand(a.batch, 36, a.region_width)), captions, rows, rows, rows)
    print(f'CAMP, batch {a.batch}, width {a.width}, features of {a.region_width}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}, imtm_lite {commit()}')
    for keep in a.keep:
        peak, seconds = step(camp, batch, int(keep * 2**30))
        print(f'tiles may keep {keep:g} GiB: peak {peak / 2**20:,.0f} MiB, {seconds:.0f} s of processor time', flush=True)


if __name__ == '__main__': main()
