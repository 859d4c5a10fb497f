"A tiny data set in the layout of the library, and everything that can be wrong with one."

import json
import re

import numpy as np

from imtm_lite.data import path_of

N = 6
R = 4
D = 8
PROBE = {'image': 0, 'kind': 'object', 'true': 'a dog', 'false': 'a cat'}


def lines(path, items, end='\n'):
    path.write_text(''.join(f'{x}{end}' for x in items), encoding='utf-8', newline='')


def tiny(root, name='train', n=N, per=5, d=D):
    "A complete, sound split of n images."
    root.mkdir(exist_ok=True)
    write_arrays(root, name, n, d)
    write_texts(root, name, n, per)
    lines(root / 'classes.txt', ['dog', 'cat', 'man'])
    lines(root / 'predicates.txt', ['on', 'near'])
    return root


def write_arrays(root, name, n, d):
    rng = np.random.default_rng(len(name) + n)
    features = rng.normal(size=(n, R, d)).astype(np.float16)
    corner = rng.uniform(0, 50, (n, R, 2))
    opposite = corner + rng.uniform(1, 50, (n, R, 2))
    arrays = dict(
        features=features,
        boxes=np.concatenate([corner, opposite], -1).astype(np.float32),
        sizes=np.tile(np.array([[100, 101]], np.int32), (n, 1)),
        labels=rng.integers(-1, 3, (n, R)).astype(np.int16),
        scores=rng.uniform(size=(n, R)).astype(np.float16),
    )
    for key, array in arrays.items():
        np.save(path_of(root, name, key), array)


def write_texts(root, name, n, per):
    captions = [f'a dog number {i} of {name} seen {j} times' for i in range(n) for j in range(per)]
    triples = [[]] + [[[0, 1, 2, 0.5], [3, 0, 1, 1]]] * (n - 1)
    phrases = {'phrases': [[[0, 2, 'animals', 1]]] * per, 'boxes': {'1': [[1, 2, 3, 4]]}}
    texts = dict(
        captions=captions,
        ids=[f'{name}{i}' for i in range(n)],
        triples=map(json.dumps, triples),
        phrases=[json.dumps(phrases)] * n,
        probes=[json.dumps(PROBE | {'image': i}) for i in range(3)],
    )
    for key, items in texts.items():
        lines(path_of(root, name, key), items)


def store_copies(root, others, ids='repeated'):
    "Features once a caption; others 'stored': the other files too; ids once an image or 'repeated'."
    arrays = ('boxes', 'sizes', 'labels', 'scores') if others == 'stored' else ()
    for key in ('features', *arrays):
        path = path_of(root, 'train', key)
        np.save(path, np.load(path).repeat(5, 0))
    texts = ('triples',) if others == 'stored' else ()
    if ids == 'repeated':
        texts += ('ids',)
    for key in texts:
        path = path_of(root, 'train', key)
        once = path.read_text(encoding='utf-8').splitlines()
        lines(path, [line for line in once for _ in range(5)])


def one_line(fault, says):
    assert '\n' not in str(fault) and re.search(says, str(fault)), fault
    # and how to mend it
    assert '; ' in str(fault)


# Faults: (what is broken, how, what the line must say)


def save(key, change):
    def breaks(root):
        path = path_of(root, 'train', key)
        a = change(np.load(path))
        np.save(path, a)

    return breaks


def put(index, value):
    def change(a):
        a[index] = value
        return a

    return change


def text(key, change):
    def breaks(root):
        path = path_of(root, 'train', key)
        lines(path, change(path.read_text(encoding='utf-8').split('\n')[:-1]))

    return breaks


def raw(key, change):
    def breaks(root):
        path = path_of(root, 'train', key)
        path.write_bytes(change(path.read_bytes()))

    return breaks


def remove(key):
    return lambda root: path_of(root, 'train', key).unlink()


def line(n, value):
    return lambda x: x[:n] + [value] + x[n + 1 :]


def phrase(**change):
    value = {'phrases': [[]] * 5, 'boxes': {}} | change
    return text('phrases', line(1, json.dumps(value)))


def probe(**change):
    value = PROBE | change
    return text('probes', line(1, json.dumps(value)))


OPENING = {  # found when a split is opened
    'no features': (remove('features'), 'train_ims.npy: this file is missing'),
    'no captions': (remove('captions'), 'train_caps.txt: this file is missing'),
    'no ids': (remove('ids'), 'train_ids.txt: this file is missing'),
    'no sizes': (
        remove('sizes'),
        'train_img_sizes.npy: this file is missing, and train_boxes.npy needs it',
    ),
    'no predicates': (
        remove('predicates'),
        'predicates.txt: this file is missing, and train_triples.jsonl needs it',
    ),
    'truncated': (
        raw('features', lambda b: b[:-10]),
        r'train_ims.npy: is cut off: 502 of 512 bytes; copy',
    ),
    'header only': (raw('features', lambda b: b[:70]), 'train_ims.npy: not an .npy array'),
    'empty file': (raw('features', lambda b: b''), 'train_ims.npy: not an .npy array'),
    'a pickle': (
        raw('features', lambda b: b'\x80\x04K\x01.' + b),
        'train_ims.npy: not an .npy array',
    ),
    'objects': (
        lambda root: np.save(root / 'train_ims.npy', np.full((N, R, D), None, dtype=object)),
        'train_ims.npy: holds pickled Python objects, which are never loaded',
    ),
    'rank': (
        save('features', lambda a: a[:, 0]),
        r'train_ims.npy: has shape \(6, 8\); expected floating-point numbers of shape \(N, R, D\)',
    ),
    'whole numbers': (
        save('features', lambda a: a.astype(np.int32)),
        'train_ims.npy: has type int32; expected floating',
    ),
    'no images': (save('features', lambda a: a[:0]), 'train_ims.npy: is empty, with shape'),
    'labels shape': (
        save('labels', lambda a: a[:, :3]),
        r'train_labels.npy: has shape \(6, 3\); expected integers of shape \(N, 4\)',
    ),
    'labels type': (
        save('labels', lambda a: a * 0.5),
        'train_labels.npy: has type float64; expected integers',
    ),
    'boxes rows': (
        save('boxes', lambda a: a[:5]),
        r'train_boxes.npy: has shape \(5, 4, 4\); expected numbers of shape \(6, 4, 4\)',
    ),
    'sizes width': (save('sizes', lambda a: a[:, :1]), r'train_img_sizes.npy: has shape'),
    'caption missing': (
        text('captions', lambda x: x[1:]),
        'train_caps.txt: 29 captions do not divide by 6 images; '
        'find the missing or surplus line, or write .* train_cap_image.npy',
    ),
    'not utf-8': (
        raw('captions', lambda b: b.replace(b'dog number 1', b'caf\xe9 number 1', 1)),
        'train_caps.txt: line 6: byte 0xe9 is not UTF-8; save',
    ),
    'empty caption': (text('captions', line(7, '  ')), 'train_caps.txt: line 8 is empty'),
    'blank at the end': (
        text('captions', lambda x: x + ['']),
        'train_caps.txt: line 31 is empty; .* blank line at the end',
    ),
    'empty captions': (raw('captions', lambda b: b''), 'train_caps.txt: is empty'),
    'bytes literal': (
        text('captions', line(3, "b'a dog in the snow'")),
        "train_caps.txt: line 4 is a printed Python bytes object, b'a dog in the snow'...; decode",
    ),
    'bytes literal 2': (
        text('captions', line(29, 'B"a dog\'s hat"')),
        'train_caps.txt: line 30 is a printed Python bytes object',
    ),
    'ids number': (text('ids', lambda x: x[:-1]), 'train_ids.txt: 5 ids for 6 feature rows'),
    'ids twice': (
        text('ids', line(4, 'train1')),
        "train_ids.txt: line 5 repeats the id 'train1' of line 2",
    ),
    'ids empty': (text('ids', line(4, '')), 'train_ids.txt: line 5 is empty'),
    'map range': (
        lambda root: np.save(root / 'train_cap_image.npy', np.arange(30) % 7),
        'train_cap_image.npy: row 6: there is no image 6; expected 0 to 5',
    ),
    'map negative': (
        lambda root: np.save(root / 'train_cap_image.npy', np.arange(30) % 6 - 1),
        'train_cap_image.npy: row 0: there is no image -1',
    ),
    'map length': (
        lambda root: np.save(root / 'train_cap_image.npy', np.arange(6)),
        r'train_cap_image.npy: has shape \(6,\); expected integers of shape \(30\)',
    ),
    'silent image': (
        lambda root: np.save(root / 'train_cap_image.npy', np.arange(30) % 5),
        'train_cap_image.npy: image 5 has no caption',
    ),
    'triples lines': (
        text('triples', lambda x: x[:-1]),
        'train_triples.jsonl: 5 lines for 6 images',
    ),
    'phrases lines': (
        text('phrases', lambda x: x * 2),
        'train_phrases.jsonl: 12 lines for 6 images',
    ),
}
READING = {  # found when it is read, and by check
    'nan': (
        save('features', put((4, 2, 3), np.nan)),
        r'train_ims.npy: row 4 \(image train4\): region 2, dimension 3 is nan; '
        'features must be finite',
    ),
    'inf': (
        save('features', put((5, 0, 0), -np.inf)),
        r'train_ims.npy: row 5 \(image train5\): region 0, dimension 0 is -inf',
    ),
    'no region': (
        save('features', put(3, 0)),
        r'train_ims.npy: row 3 \(image train3\) is all zeros: it has no region',
    ),
    'inside out': (
        save('boxes', put((2, 1), (50, 10, 40, 60))),
        r'train_boxes.npy: row 2 \(image train2\), region 1: '
        r'box \[50.0, 10.0, 40.0, 60.0\] is inside out',
    ),
    'outside': (
        save('boxes', put((2, 1), (50, 10, 101.5, 60))),
        r'train_boxes.npy: row 2 .* leaves its picture; expected x0 <= x1 <= 100, y0 <= y1 <= 101',
    ),
    'above the top': (
        save('boxes', put((0, 0), (5, -2, 10, 60))),
        'train_boxes.npy: row 0 .* leaves its picture',
    ),
    'box nan': (save('boxes', put((0, 0, 2), np.nan)), 'train_boxes.npy: row 0 .* is inside out'),
    'size zero': (
        save('sizes', put((1, 0), 0)),
        r'train_img_sizes.npy: row 1: width and height are \[0.0, 101.0\]',
    ),
    'class': (
        save('labels', put((1, 0), 3)),
        'train_labels.npy: row 1, region 0: there is no class 3; expected -1 to 2',
    ),
    'class -2': (
        save('labels', put((1, 0), -2)),
        'train_labels.npy: row 1, region 0: there is no class -2',
    ),
}
LINES = {  # found when the line is asked for, and by check
    'triples json': (
        text('triples', line(2, '[[0, 1, 2')),
        'train_triples.jsonl: line 3 is not JSON',
    ),
    'triples blank': (text('triples', line(2, '')), 'train_triples.jsonl: line 3 is not JSON'),
    'triples form': (
        text('triples', line(2, '[[0, 1, 2]]')),
        r'train_triples.jsonl: line 3: triple \[0, 1, 2\]; expected \[\[subject row',
    ),
    'triples row': (
        text('triples', line(2, '[[0, 1, 4, 0.5]]')),
        'train_triples.jsonl: line 3: triple .* points outside the regions; rows go from 0 to 3',
    ),
    'triples float row': (
        text('triples', line(2, '[[0.0, 1, 3, 0.5]]')),
        'train_triples.jsonl: line 3: triple .* points outside',
    ),
    'predicate': (
        text('triples', line(2, '[[0, 2, 1, 0.5]]')),
        'train_triples.jsonl: line 3: .* there is no predicate 2; predicates.txt has 2 lines',
    ),
    'predicate name': (
        text('triples', line(2, '[[0, "on", 1, 0.5]]')),
        'train_triples.jsonl: line 3: .* there is no predicate on',
    ),
    'confidence': (
        text('triples', line(2, '[[0, 1, 1, NaN]]')),
        'train_triples.jsonl: line 3: .* confidence nan',
    ),
    'triples no list': (
        text('triples', line(2, '{}')),
        r'train_triples.jsonl: line 3: \{\}; expected',
    ),
    'phrases form': (
        text('phrases', line(1, '[]')),
        r'train_phrases.jsonl: line 2: \[\]; expected \{"phrases"',
    ),
    'phrases captions': (
        phrase(phrases=[[]] * 4),
        'train_phrases.jsonl: line 2: spans for 4 captions, but the image has 5',
    ),
    'span': (
        phrase(phrases=[[], [], [[3, 10, 'x', 1]], [], []]),
        r'train_phrases.jsonl: line 2: span .* in caption line 8, which has 9 words',
    ),
    'span backwards': (
        phrase(phrases=[[[3, 3, 'x', 1]], [], [], [], []]),
        'train_phrases.jsonl: line 2: span .* expected 0 <= start < end',
    ),
    'span form': (
        phrase(phrases=[[[3, 4]], [], [], [], []]),
        r'train_phrases.jsonl: line 2: span \[3, 4\]; expected \[start, end, type, chain\]',
    ),
    'span no list': (phrase(phrases=[7, [], [], [], []]), 'train_phrases.jsonl: line 2: span 7'),
    'phrase box': (
        phrase(boxes={'3': [[5, 5, 4, 9]]}),
        'train_phrases.jsonl: line 2: boxes of chain 3',
    ),
    'phrase box text': (
        phrase(boxes={'3': [[5, None, 4, 9]]}),
        'train_phrases.jsonl: line 2: boxes of chain 3',
    ),
    'phrase box form': (phrase(boxes={'3': 7}), 'train_phrases.jsonl: line 2: boxes of chain 3: 7'),
    'probes json': (
        text('probes', line(1, '{"image": 0, "kind": "obj')),
        'train_probes.jsonl: line 2 is not JSON',
    ),
    'probes key': (probe(extra=1), 'train_probes.jsonl: line 2: .*; expected .*"image": row'),
    'probes lack': (
        text('probes', line(1, '{"image": 0}')),
        r'train_probes.jsonl: line 2: \{\'image\': 0\}; expected',
    ),
    'probes image': (
        probe(image=6),
        'train_probes.jsonl: line 2: there is no image 6; rows go from 0 to 5',
    ),
    'probes empty': (probe(false=' '), 'train_probes.jsonl: line 2: .*; expected'),
    'probes same': (
        probe(false='a dog'),
        'train_probes.jsonl: line 2: the true and the false sentence are the same',
    ),
}
