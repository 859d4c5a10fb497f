"""The figures of the phrase lesson on real captions: `python -m tools.phrases spans|labels|agreement PATH [PARSER ...]`.

spans DATA      exact spans of entities against people's, first 1,000 captions of the dev split, and seconds a caption;
labels DATA     how often a true phrase is called mismatched (one caption labelled by the others of its picture), and another picture's phrase matched;
agreement FILE  triples and entities against those of another caption parser, FILE a file of the form of f30k_graphs/val.jsonl.

DATA is a folder in the layout of data/README.md with phrases; PARSER is 'chunker', 'gold' (labels only) or the name of a spaCy model.
"""
import json
import random
import sys
import time

from imtm_lite.data import Split
from imtm_lite.phrases import graph_from_spans, graph_from_triples, implied, named_parser, normal, synonyms

percent = lambda n, of: f'{100 * n / max(1, of):5.1f}'


def spans(data: str, name: str):
    "Precision, recall, recall without pronouns; seconds a caption."
    dev, parse = Split(data, 'dev'), named_parser(name)
    said = [(dev.captions[c], marked) for row in range(dev.n_images) for c, marked in zip(dev.captions_of(row), dev.phrases[row]['phrases'])][:1000]
    began = time.process_time()
    found = [{(e.start, e.end) for e in parse(text).entities} for text, _ in said]
    seconds = time.process_time() - began
    people = [{(a, b) for a, b, *_ in marked} for _, marked in said]
    things = [{(e.start, e.end) for e in graph_from_spans(text, marked).entities} for text, marked in said]
    both = sum(len(a & b) for a, b in zip(found, people))
    print(f'{name}: precision {percent(both, sum(map(len, found)))}, recall {percent(both, sum(map(len, people)))}, '
          f'without pronouns {percent(sum(len(a & b) for a, b in zip(found, things)), sum(map(len, things)))}; {1000 * seconds / len(said):.2f} ms a caption')


def labels(data: str, name: str):
    "Per cent of held-out captions' phrases called mismatched, and of other pictures' phrases called matched; entities, then triples."
    dev = Split(data, 'dev')
    parse = named_parser(name, dev)
    graphs, same = [parse(c) for c in dev.captions], synonyms(Split(data, 'train'))
    said = [g.keys for g in graphs]
    head = lambda k: (k[0],) if len(k) == 2 else (k[0], k[2])
    rules = {'equal keys': (lambda k: k, lambda k: [k]), 'our rule': (lambda k: k, implied), 'our rule, synonyms': (lambda k: normal(k, same), implied),
             'heads only': (head, lambda k: [k]), 'heads only, synonyms': (lambda k: head(normal(k, same)), lambda k: [k])}
    for rule, (form, follows) in rules.items():
        true = [{form(x) for k in keys for x in follows(k)} for keys in said]
        own, other, rng = [[0, 0], [0, 0]], [[0, 0], [0, 0]], random.Random(0)
        for row in range(dev.n_images):
            mine = dev.captions_of(row).tolist()
            stranger = set().union(*(true[c] for c in dev.captions_of((row + rng.randrange(1, dev.n_images)) % dev.n_images)))
            for c in mine:
                rest = set().union(*(true[x] for x in mine if x != c))
                for k in said[c]:
                    for count, wrong in ((own, form(k) not in rest), (other, form(k) in stranger)): count[len(k) - 2][0] += wrong; count[len(k) - 2][1] += 1
        print(f'{name}, {rule}: held out, called mismatched {percent(*own[0])} {percent(*own[1])}; of another picture, called matched {percent(*other[0])} {percent(*other[1])}')


def agreement(file: str, name: str):
    "Of the other parser's, how many are ours; of ours, how many are its: triples, their heads, and entities' heads of a picture."
    parse, count = named_parser(name), {k: [0, 0, 0] for k in ('triples', 'heads of triples', 'entities of a picture')}
    for line in open(file, encoding='utf-8'):
        pairs = [(parse(c['text']), graph_from_triples(c['text'], c['triples'])) for c in json.loads(line)['captions']]
        three = [tuple({k for k in g.keys if len(k) == 3} for g in pair) for pair in pairs]
        one = tuple({k[0] for pair in pairs for k in pair[side].keys if len(k) == 2} for side in (0, 1))
        two = [tuple({(k[0], k[2]) for k in keys} for keys in pair) for pair in three]
        for what, some in (('triples', three), ('heads of triples', two), ('entities of a picture', [one])):
            for ours, its in some: count[what] = [n + m for n, m in zip(count[what], (len(ours & its), len(its), len(ours)))]
    for what, (both, its, ours) in count.items(): print(f'{name}, {what}: of its in ours {percent(both, its)}, of ours in its {percent(both, ours)}')


if __name__ == '__main__':
    what = dict(spans=spans, labels=labels, agreement=agreement)
    if len(sys.argv) < 3 or sys.argv[1] not in what: sys.exit(__doc__)
    for name in sys.argv[3:] or ['chunker']: what[sys.argv[1]](sys.argv[2], name)
