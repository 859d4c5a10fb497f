"""Real scene graphs without pictures: `python -m tools.symbolic GRAPHS OUT [NAME ...]`, GRAPHS a file of the form of f30k_graphs/val.jsonl.

A region is its detector label (one-hot, so the first layer is a label embedding) and its box. Five folds over the pictures; of the four that train,
100 pictures choose the epoch. Mean over the folds goes to data/results/graphs-f30k.json.
"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from imtm_lite.cli import commit
from imtm_lite.data import Split
from imtm_lite.semantic import write_triples
from imtm_lite.train import load, split_recall, train
from tools.graphs import RESULTS, ROWS, keep

FOLDS, DEV = 5, 100
BUDGET = dict(size=64, optimizer='adamw', lr=1e-3, weight_decay=1e-4, epochs=8, soft_epochs=4, decay_at=(6,), min_freq=2) # an epoch has 55 steps: with one of all negatives the hardest ones come too early, by the dev curves


def write_split(folder: Path, name: str, lines: list[dict], classes: list[str], predicates: list[str]):
    "Some pictures in the layout of data/README.md. The release has no picture sizes: the extent of the boxes stands in."
    boxes = np.array([x['boxes'] for x in lines], np.float32)                                              # (N, R, 4)
    sizes = np.ceil(boxes.reshape(len(lines), -1, 2).max(1))                                               # (N, 2)
    labels = np.array([[classes.index(c) for c in x['labels']] for x in lines])
    box = boxes / np.tile(sizes, 2)[:, None]
    features = np.concatenate([np.eye(len(classes))[labels], box, np.prod(box[..., 2:] - box[..., :2], -1, keepdims=True)], -1)
    for key, a in (('ims', features.astype('f2')), ('boxes', boxes), ('img_sizes', sizes.astype('i4')), ('labels', labels.astype('i2'))): np.save(folder / f'{name}_{key}.npy', a)
    triples = [[[s, predicates.index(p), o, 1.] for s, p, o in x['triples']] for x in lines]
    texts = dict(ids=[str(x['id']) for x in lines], caps=[c['text'].strip() for x in lines for c in x['captions']])
    for key, rows in texts.items(): (folder / f'{name}_{key}.txt').write_text(''.join(f'{r}\n' for r in rows), encoding='utf-8')
    write_triples(folder / f'{name}_triples.jsonl', triples)


def write_fold(folder: Path, lines: list[dict], fold: int):
    "Train, dev and test of one fold; every fifth picture is a test picture."
    if (folder / 'predicates.txt').exists(): return
    shutil.rmtree(folder, ignore_errors=True); folder.mkdir(parents=True)
    classes, predicates = sorted({c for x in lines for c in x['labels']}), sorted({t[1] for x in lines for t in x['triples']})
    rest = [x for i, x in enumerate(lines) if i % FOLDS != fold]
    for name, some in (('train', rest[DEV:]), ('dev', rest[:DEV]), ('test', lines[fold::FOLDS])): write_split(folder, name, some, classes, predicates)
    for name, words in (('classes', classes), ('predicates', predicates)): (folder / f'{name}.txt').write_text('\n'.join(words) + '\n')


if __name__ == '__main__':
    lines, out = [json.loads(x) for x in open(sys.argv[1], encoding='utf-8')], Path(sys.argv[2])
    for name in sys.argv[3:] or ['scan', 'cmsei', 'cmsei without spatial', 'cmsei without semantic', 'hire']:
        (model, arguments), found = ROWS[name], []
        for fold in range(FOLDS):
            folder = out / f'fold{fold}'
            write_fold(folder, lines, fold)
            best = train(model, folder, out / f'runs{fold}' / name.replace(' ', '-'), arguments=dict(width=128, word_width=64) | arguments, seed=0, resume=True, device='cpu', progress=False, **BUDGET)
            matcher, test = load(best), Split(folder, 'test')
            found.append(split_recall(matcher, test, matcher.vocab))
            print(name, fold, found[-1], flush=True)
        mean = lambda rows: [round(float(x), 2) for x in np.mean(rows, 0)]
        row = dict(library=commit(), model=model, arguments=arguments, i2t=mean([r.i2t for r in found]), t2i=mean([r.t2i for r in found]), rsum=float(np.mean([r.rsum for r in found])), folds=[r.rsum for r in found])
        keep(RESULTS / 'graphs-f30k.json', name, row, pictures=len(lines), protocol=f'plain, mean of {FOLDS} folds of about {len(lines) // FOLDS} test pictures', library=commit(),
             budget='711 or so pictures x 5 sentences, 8 epochs (4 with all negatives), batch 64, width 128, seed 0', command='python -m tools.symbolic GRAPHS OUT')
