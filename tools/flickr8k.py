"""The Flickr8k rows of the README: three systems at one budget, dev split. `python -m tools.flickr8k DATA OUT` (hours on two cores are minutes on a GPU).

DATA is a folder in the layout of data/README.md with train and dev splits. Every line it runs is printed and kept with the figures.
"""
import json
import shlex
import subprocess
import sys
from pathlib import Path

from imtm_lite.cli import dev_curves

RESULTS = Path(__file__).parent.parent / 'data' / 'results'
SHARED = '--device cpu --set width=128 --set word_width=300 --seed 0'                # every system sees all captions seven times
RUNS = {'vse': '--epochs 7 --size 64 --lr 5e-4 --decay-at 4 --soft-epochs 1',
        'scan': '--epochs 7 --size 64 --lr 5e-4 --decay-at 4 --soft-epochs 1',
        'camp': '--epochs 4/3 --size 64/32 --lr 5e-4/1e-3 --decay-at 3/2 --soft-epochs 2/1'}


def note(figures: Path, command: str, budget: str, **more):
    "Keep with the figures how they were made; `dev` is the dev rSum after each epoch."
    figures.write_text(json.dumps(json.loads(figures.read_text()) | dict(command=command, budget=budget, **more), indent=1))


if __name__ == '__main__':
    data, out = sys.argv[1:]
    for model, own in RUNS.items():
        command = f'imtm train {model} --data {data} --out {out}/{model} {own} {SHARED}'
        figures = RESULTS / f'flickr8k-{model}.json'
        for line in (f'{command} --resume', f'imtm eval {out}/{model} --data {data} --split dev --json {figures}'):
            print(line, flush=True)
            subprocess.run(shlex.split(line), check=True)
        note(figures, command.replace(data, 'DATA').replace(f'{out}/{model}', 'RUN'), 'captions seen 7 times, width 128', dev=dev_curves(Path(out) / model))
    first = RESULTS / 'flickr8k-camp-stage1.json'
    subprocess.run(shlex.split(f'imtm eval {out}/camp/stage1 --data {data} --split dev --json {first}'), check=True)
    note(first, 'the first stage of the run of CAMP', 'captions seen 4 times, width 128')
