"""SCAN, CAMP, SSAMT, CMSEI and Hire on Flickr8k regions, dev split: `python -m tools.real DATA OUT SEED [NAME ...]` (a quarter of an hour a row on one core).

DATA is a folder in the layout of data/README.md with boxes, triples and phrases. Every row has the same budget; figures, of phrase grounding too, go to data/results/graphs-flickr8k.json.
"""
import sys
from pathlib import Path

from imtm_lite.cli import commit, dev_curves
from imtm_lite.data import Split
from imtm_lite.explore import ground
from imtm_lite.train import load, split_recall, train
from tools.graphs import RESULTS, ROWS, keep

BUDGET = dict(size=64, optimizer='adamw', lr=5e-4, weight_decay=1e-4, epochs=3, soft_epochs=1, decay_at=(2,))
SIZES = dict(width=128, word_width=300)

def trained(model: str, arguments: dict, data: str, run: Path, seed: int):
    "The best matcher of a row. CAMP goes in two stages, as released: one pass for its attention, the others for gates and scores."
    how = dict(arguments=SIZES | arguments, seed=seed, resume=True, device='cpu', progress=False) | BUDGET
    if model != 'camp': return load(train(model, data, run, **how))
    start = train('camp-stage1', data, run / 'stage1', **how | dict(epochs=1, decay_at=()))
    return load(train('camp', data, run, start=start, **how | dict(epochs=BUDGET['epochs'] - 1, decay_at=(1,), criterion='bce')))


if __name__ == '__main__':
    data, out, seed, names = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or ['scan', 'camp', 'ssamt', 'ssamt, gold phrases', 'cmsei', 'hire', 'cmsei without spatial', 'cmsei without semantic']
    dev = Split(data, 'dev')
    for name in names:
        model, arguments = ('camp', {}) if name == 'camp' else ROWS[name]
        run = out / f'seed{seed}' / name.replace(' ', '-').replace(',', '')
        matcher = trained(model, arguments, data, run, seed)
        r = split_recall(matcher, dev, matcher.vocab)
        row = dict(library=commit(), model=model, arguments=arguments, seed=seed, i2t=r.i2t, t2i=r.t2i, rsum=r.rsum, dev=dev_curves(run), parameters=sum(p.numel() for p in matcher.parameters()),
                   grounding=ground(matcher, dev)['all'])
        keep(RESULTS / 'graphs-flickr8k.json', f'{name}, seed {seed}', row, split='dev', protocol='plain', fingerprint=dev.fingerprint(), library=commit(),
             budget='captions seen 3 times, batch 64, width 128', command='python -m tools.real DATA OUT SEED')
        print(name, seed, r, flush=True)
