"""What graphs and phrases are worth on the generated world: `python -m tools.graphs WORLDS OUT SEED [NAME ...]` (about four minutes a row on one core).

WORLDS/world<SEED> is written if it is not there. Every row is a system or an ablation trained with the same budget; figures of the test split,
accuracy by probe and by predicate, and recall under a corrupted scene graph go to data/results/graphs-seed<SEED>.json as soon as a row is ready.
"""
import fcntl
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from imtm_lite.cli import commit, dev_curves
from imtm_lite.data import Split, image_chunks, write_world
from imtm_lite.models.ssamt import blame_accuracy
from imtm_lite.recall import evaluate
from imtm_lite.results import write_json
from imtm_lite.scenes import INVERSE, WORDINGS
from imtm_lite.scoring import encode, score
from imtm_lite.semantic import corrupt_triples
from imtm_lite.train import load, probe_answers, recipe, train

ROWS = {'scan': ('scan', {}), 'cmsei': ('cmsei', {}), 'cmsei without spatial': ('cmsei', dict(spatial='none')),
        'cmsei without semantic': ('cmsei', dict(semantic=False)), 'cmsei without both': ('cmsei', dict(spatial='none', semantic=False)),
        'hire': ('hire', {}), 'hire, only implicit': ('hire', dict(spatial='none', semantic=False)),
        'hire, explicit-implicit': ('hire', dict(order='explicit-implicit')), 'hire, parallel': ('hire', dict(order='parallel')),
        'cmsei, IoU graph': ('cmsei', dict(spatial='iou')), 'cmsei, polar graph': ('cmsei', dict(spatial='polar')),
        'cmsei without object-sentence': ('cmsei', dict(object_sentence=0.)), 'cmsei without word-image': ('cmsei', dict(word_image=0.)),
        'cmsei without object-word': ('cmsei', dict(object_word=False)),
        'ssamt': ('ssamt', {}), 'ssamt without phrase loss': ('ssamt', dict(weights=[1., 1., 0.])), 'ssamt without phrase nodes': ('ssamt', dict(phrases=False)),
        'ssamt without local': ('ssamt', dict(local=False)), 'ssamt, gold phrases': ('ssamt', dict(parser='gold'))}
RATES, SPOILT = (0., .2, .4, .6, .8), ('cmsei', 'cmsei without spatial', 'hire', 'hire, explicit-implicit', 'hire, parallel') # rows whose recall under a corrupted graph is measured
PHRASES = sorted(((w, p) for d in (WORDINGS, INVERSE) for p, ways in d.items() for w in ways), key=lambda x: -len(x[0]))
RESULTS = Path(__file__).parent.parent / 'data' / 'results'


def predicate(sentence: str) -> str:
    "The relation that a sentence of the world names; longer wordings are looked for first."
    return next((p for w, p in PHRASES if f' {w} ' in f' {sentence} '), 'none')


def probes(matcher, split: Split) -> dict[str, dict[str, list]]:
    "Right answers and questions, by kind of probe and by predicate of the true sentence."
    out = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for p, right in probe_answers(matcher, split, matcher.vocab):
        for key in ('all', predicate(p['true'])): out[p['kind']][key] = [n + m for n, m in zip(out[p['kind']][key], (right, 1))]
    return {k: dict(v) for k, v in out.items()}


@torch.no_grad()
def recall_corrupted(matcher, split: Split, rate: float, seed: int):
    "Recall when that share of the test pictures' triples is replaced."
    generator = torch.Generator().manual_seed(seed)
    wrong = (corrupt_triples(r, rate=rate, predicates=len(split.predicates), generator=generator) for r in image_chunks(split))
    captions = encode(matcher.encode_captions, [split.encoded(matcher.vocab)[:]])
    return evaluate(score(matcher, encode(matcher.encode_images, wrong), captions), torch.from_numpy(split.caption_image))


def keep(path: Path, name: str, row: dict, **about):
    "Add a row to the file; several processes may do so."
    with open(Path(tempfile.gettempdir()) / f'{path.name}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = json.loads(path.read_text()) if path.is_file() else dict(about, rows={})
        record['rows'][name] = row
        write_json(path, record)


if __name__ == '__main__':
    worlds, out, seed, names = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or list(ROWS)
    world = worlds / f'world{seed}'
    if not world.exists(): write_world(world, train=2000, dev=200, test=500, seed=seed, pictures=False)
    test = Split(world, 'test')
    for name in names:
        model, arguments = ROWS[name]
        stage = recipe(model if model in ('hire', 'ssamt') else 'cmsei', 'demo')[0] | dict(model=model)   # one budget for all rows; Hire and SSAMT have a second epoch with all negatives
        stage['arguments'] = stage['arguments'] | arguments
        run = out / f'seed{seed}' / name.replace(' ', '-').replace(',', '')
        matcher = load(train(data=world, out=run, seed=seed, resume=True, device='cpu', progress=False, **stage))
        at = {str(r): recall_corrupted(matcher, test, r, seed) for r in (RATES if name in SPOILT else RATES[:1])}
        row = dict(library=commit(), model=model, arguments=arguments, i2t=at['0.0'].i2t, t2i=at['0.0'].t2i, rsum=at['0.0'].rsum, probes=probes(matcher, test),
                   corrupted={r: x.rsum for r, x in at.items()}, dev=dev_curves(run), parameters=sum(p.numel() for p in matcher.parameters()), **({'blame': blame_accuracy(matcher, test)} if model == 'ssamt' else {}))
        keep(RESULTS / f'graphs-seed{seed}.json', name, row, seed=seed, protocol='plain', fingerprint=test.fingerprint(), library=commit(),
             budget='2,000 pictures x 5 sentences, 10 epochs, batch 128, width 128', command=f'python -m tools.graphs WORLDS OUT {seed}')
        print(name, {k: round(100 * v['all'][0] / v['all'][1]) for k, v in row['probes'].items()}, round(row['rsum'], 1), flush=True)
