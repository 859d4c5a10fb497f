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
from imtm_lite.phrases import OBJECT, RELATION, contained, graph_from_spans, graph_from_triples, named_parser, normal, synonyms, word_keys

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


def keys_of(graph, kind: int) -> set: # of the phrases of one kind
    return {key for key, (k, _) in zip(graph.keys, graph.units) if k == kind}


def share(rule, same: dict, graphs, pictures, strangers) -> tuple[list, list]: # both [wrong, all] for objects, attributes, relations, words
    "Phrases of a held-out caption called mismatched, and of another picture's captions called matched."
    said = []
    for graph in graphs:
        units = [(kind, normal(key, same)) for key, (kind, _) in zip(graph.keys, graph.units)]
        said.append(units + [(3, normal(key, same)) for key in word_keys(graph) if key])
    true = [set().union(*(rule(key) for _, key in some)) if some else set() for some in said]
    own, other = ([[0, 0] for _ in range(4)] for _ in range(2))
    for mine, theirs in zip(pictures, strangers):
        stranger = set().union(*(true[c] for c in theirs))
        for c in mine:
            rest = set().union(*(true[x] for x in mine if x != c))
            for kind, key in said[c]:
                for count, wrong in ((own, key not in rest), (other, key in stranger)):
                    count[kind][0] += wrong
                    count[kind][1] += 1
    return own, other


def labels(data: str, name: str):
    "Per cent of held-out captions' units called mismatched, and of other pictures' units called matched: objects, attributes, relations, words."
    dev = Split(data, 'dev')
    parse, rng = named_parser(name, dev), random.Random(0)
    graphs, same = [parse(c) for c in dev.captions], synonyms(Split(data, 'train'))
    pictures = [dev.captions_of(row).tolist() for row in range(dev.n_images)]
    strangers = [pictures[(row + rng.randrange(1, dev.n_images)) % dev.n_images] for row in range(dev.n_images)]
    rules = {'equal keys': (lambda key: {key}, {}), 'contained': (contained, {}), 'contained, synonyms': (contained, same)}
    for rule, (follows, alike) in rules.items():
        own, other = share(follows, alike, graphs, pictures, strangers)
        counts = ' '.join(str(n) for _, n in own)
        print(f'{name}, {rule}: held out, called mismatched {" ".join(percent(*x) for x in own)}; of another picture, called matched {" ".join(percent(*x) for x in other)}; of {counts}')


def agreement(file: str, name: str):
    "Of the other parser's, how many are ours; of ours, how many are its: triples, their heads, and entities' heads of a picture."
    parse, count = named_parser(name), {k: [0, 0, 0] for k in ('triples', 'heads of triples', 'entities of a picture')}
    for line in open(file, encoding='utf-8'):
        pairs = [(parse(c['text']), graph_from_triples(c['text'], c['triples'])) for c in json.loads(line)['captions']]
        three = [tuple(keys_of(g, RELATION) for g in pair) for pair in pairs]
        one = tuple(set().union(*(keys_of(pair[side], OBJECT) for pair in pairs)) for side in (0, 1))
        two = [tuple({(k[0], k[-1]) for k in keys} for keys in pair) for pair in three]
        for what, some in (('triples', three), ('heads of triples', two), ('entities of a picture', [one])):
            for ours, its in some: count[what] = [n + m for n, m in zip(count[what], (len(ours & its), len(its), len(ours)))]
    for what, (both, its, ours) in count.items(): print(f'{name}, {what}: of its in ours {percent(both, its)}, of ours in its {percent(both, ours)}')


if __name__ == '__main__':
    what = dict(spans=spans, labels=labels, agreement=agreement)
    if len(sys.argv) < 3 or sys.argv[1] not in what: sys.exit(__doc__)
    for name in sys.argv[3:] or ['chunker']: what[sys.argv[1]](sys.argv[2], name)
