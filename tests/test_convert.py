"The field's files into the layout: exact round trips against plain readers, interruptions at any moment, faults, and pickles that want to run something."

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imtm_lite.data import Split
from imtm_lite.files import DataError
from imtm_lite.workshop import convert as c
from imtm_lite.workshop.check import check
from imtm_lite.workshop.relations import detector_size

NAMES = ('1000', '1001', '1002', '1003', '1004', '1005')
CAPTIONS = {
    '1000': ['A dog runs.', 'A brown  dog.'],
    '1001': ['Two men\nsit.', 'Men on a bench.'],
    '1002': ['A red car.', "A car by the man's tree."],
    '1003': ['A cat.', 'A cat sleeps.'],
    '1004': ['Café "au lait", hot.', 'Coffee.'],
    '1005': ['A boat.', 'Boats at sea.'],
}
SPLITS = dict(zip(NAMES, ('train', 'test', 'train', 'val', 'train', 'test')))


def karpathy(path, **more):
    images = [
        dict(
            imgid=i,
            filename=f'{n}.jpg',
            split=SPLITS[n],
            sentences=[dict(raw=r, tokens=[]) for r in CAPTIONS[n]],
            **more,
        )
        for i, n in enumerate(NAMES)
    ]
    path.write_text(json.dumps(dict(images=images, dataset='toy')))
    return path


def picture(name, n, width=8, seed=0):
    "size, boxes, features of a picture, the same for the same name."
    rng = np.random.default_rng([int(name), n, seed])
    w, h = (500, 375) if int(name) % 2 else (375, 500)
    xy = rng.uniform(0, 0.6, (n, 2)) * (w, h)
    return (
        (w, h),
        np.concatenate([xy, xy + rng.uniform(0.1, 0.4, (n, 2)) * (w, h)], 1).astype('f4'),
        rng.random((n, width)).astype('f4'),
    )


def line(name, n, lxmert=False, python3=False):
    (w, h), boxes, features = picture(name, n)

    def b64(a):
        text = base64.b64encode(a.tobytes())
        return repr(text) if python3 else text.decode()

    if not lxmert:
        return '\t'.join([name, str(w), str(h), str(n), b64(boxes), b64(features)])
    labels = np.arange(n, dtype='i8')
    scores = np.linspace(0.9, 0.1, n).astype('f4')
    return '\t'.join(
        [
            f'COCO_val2014_{int(name):012d}',
            str(h),
            str(w),
            b64(labels),
            b64(scores),
            b64(labels),
            b64(scores),
            str(n),
            b64(boxes),
            b64(features),
        ]
    )


def table(path, names, n=3, end='\r\n', **how):
    path.write_text(''.join(line(x, n, **how) + end for x in names), newline='')
    return path


@pytest.fixture
def data(tmp_path):
    "Captions and ids of three splits."
    c.convert_karpathy(karpathy(tmp_path / 'dataset.json'), tmp_path / 'data')
    return tmp_path / 'data'


@pytest.fixture
def full(data, tmp_path):
    "With features and boxes too."
    c.convert_bottom_up(table(tmp_path / 'all.tsv', NAMES), out=data)
    return data


def tree(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def refused(f, *args, **how):
    with pytest.raises(DataError) as fault:
        f(*args, **how)
    assert '\n' not in str(fault.value)
    return str(fault.value)


# --- filling


@pytest.mark.parametrize('seed', range(12))
def test_a_filling_that_is_interrupted_anywhere_ends_as_one_that_is_not(tmp_path, seed):
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 12))
    every = int(rng.integers(1, 5))
    want = rng.random((rows, 3, 2)).astype('f4')
    order = rng.permutation(rows).tolist()
    # three calls die after so many rows
    for kill in [*rng.integers(0, rows + 1, 3).tolist(), None]:
        f = c.Filling(
            tmp_path, 's', 'boxes', rows=rows, columns=dict(boxes=((3, 2), 'f4')), every=every
        )
        for i in [i for i in order if str(i) not in f.done][:kill]:
            f.put(str(i), i, boxes=want[i])
        if kill is None:
            f.finish()
            break
        # what waited is lost
        for a in f.arrays.values():
            a.file.close()
        assert not (tmp_path / 's_boxes.npy').exists()
    np.testing.assert_array_equal(np.load(tmp_path / 's_boxes.npy'), want)
    assert [p.name for p in tmp_path.iterdir()] == ['s_boxes.npy']


def test_a_torn_journal_line_is_forgotten(tmp_path):
    how = dict(rows=3, columns=dict(boxes=((1,), 'f4')))
    with c.Filling(tmp_path, 's', 'boxes', **how) as f:
        f.put('a', 0, boxes=np.ones(1))
        f.put('b', 1, boxes=np.ones(1))
    journal = tmp_path / 's_boxes.journal.partial'
    journal.write_bytes(journal.read_bytes()[:-4])
    with c.Filling(tmp_path, 's', 'boxes', **how) as f:
        assert f.done == {'a': 0}
    with c.Filling(tmp_path, 's', 'boxes', **how) as f:
        f.put('b', 1, boxes=np.full(1, 2))
        f.put('c', 2, boxes=np.full(1, 3))
        f.finish()
    assert np.load(tmp_path / 's_boxes.npy').ravel().tolist() == [1, 2, 3]


def test_killed_while_files_get_their_names(tmp_path):
    how = dict(rows=2, columns=dict(boxes=((4,), 'f4'), sizes=((2,), 'i4')))
    with c.Filling(tmp_path, 's', 'boxes', **how) as f:
        for i in range(2):
            f.put(str(i), i, boxes=np.full(4, i), sizes=np.full(2, i))
    # one of two renamed
    os.replace(tmp_path / 's_boxes.npy.partial', tmp_path / 's_boxes.npy')
    with c.Filling(tmp_path, 's', 'boxes', **how) as f:
        assert len(f.done) == 2
        f.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['s_boxes.npy', 's_img_sizes.npy']
    assert np.load(tmp_path / 's_boxes.npy').tolist() == [[0] * 4, [1] * 4] and np.load(
        tmp_path / 's_img_sizes.npy'
    ).tolist() == [[0, 0], [1, 1]]


def test_a_filling_is_shortened_and_never_takes_a_name_that_is_taken(tmp_path, monkeypatch):
    how = dict(rows=1000, columns=dict(boxes=((2,), 'f4')))
    with c.Filling(tmp_path, 's', 'boxes', **how) as f:
        f.put('a', 0, boxes=np.ones(2))
        f.put('b', None, 'broken')
        f.put('c', 1, boxes=np.full(2, 2))
        assert f.notes == {'b': 'broken'}
        f.finish(rows=2)
    a = np.load(tmp_path / 's_boxes.npy')
    assert a.tolist() == [[1, 1], [2, 2]] and (tmp_path / 's_boxes.npy').stat().st_size < 200
    assert 'is there already' in refused(c.Filling, tmp_path, 's', 'boxes', **how)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 10))
    assert 'and the disk has' in refused(c.Filling, tmp_path, 't', 'boxes', **how)


def test_other_settings_are_refused(tmp_path):
    with c.Filling(tmp_path, 's', 'boxes', rows=3, columns=dict(boxes=((1,), 'f4'))):
        pass
    assert 'other settings' in refused(
        c.Filling, tmp_path, 's', 'boxes', rows=4, columns=dict(boxes=((1,), 'f4'))
    )


# --- JSON, names

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=['Cs'])),
    lambda v: (
        st.lists(v, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=['Cs'])), v, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.text('abc', min_size=1), values, max_size=5),
    st.lists(values, max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_streamed_json_is_json(tmp_path_factory, members, images, chunk, indent, ascii_):
    path = tmp_path_factory.mktemp('json') / 'x.json'
    path.write_text(
        json.dumps(members | dict(images=images), indent=indent, ensure_ascii=ascii_),
        encoding='utf-8',
    )
    got = list(c.stream_json(path, 'images', chunk=chunk))
    assert [v for k, v in got if k == 'images'] == images and {
        k: v for k, v in got if k != 'images'
    } == members
    assert dict(c.stream_json(path, chunk=chunk)) == members | dict(images=images)


@pytest.mark.parametrize('chunk', range(1, 9))
def test_numbers_are_not_cut(tmp_path, chunk):
    (tmp_path / 'x.json').write_text('{"images": [-1.5e+16, 12, 3E-2, 0.5, -7], "a": 1.25}')
    assert [v for _, v in c.stream_json(tmp_path / 'x.json', 'images', chunk=chunk)] == [
        -1.5e16,
        12,
        0.03,
        0.5,
        -7,
        1.25,
    ]


@pytest.mark.parametrize(
    'text', ['', '[1]', '{"a": 1', '{"a" 1}', '{"images": [1, 2', '{"a": 1,}', '{"images": 3}']
)
def test_broken_json_is_one_line(tmp_path, text):
    (tmp_path / 'x.json').write_text(text)
    assert 'is not JSON' in refused(lambda: list(c.stream_json(tmp_path / 'x.json', 'images')))


def test_streaming_holds_one_element(tmp_path):
    # 20 MB
    (tmp_path / 'x.json').write_text(json.dumps(dict(images=[dict(a=['x' * 1000] * 10)] * 2000)))
    tracemalloc.start()
    n = sum(1 for _ in c.stream_json(tmp_path / 'x.json', 'images'))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 2000 and most < 2 * 2**20


def test_names_of_one_picture():
    assert {
        c.image_key(x)
        for x in ('COCO_val2014_000000000042.jpg', 42, ' 42\n', '/a/b/0042.JPEG', 'C:\\x\\42.png')
    } == {'42'}
    assert (
        c.image_key('1000268201_693b08cb0e.jpg') == '1000268201'
        and c.image_key('0') == '0'
        and c.image_key('my_photo_01.png') == 'my_photo_01'
    )


# --- Karpathy


def test_karpathy_gives_what_the_json_says(data):
    for ours, theirs in (('train', 'train'), ('dev', 'val'), ('test', 'test')):
        names = [n for n in NAMES if SPLITS[n] == theirs]
        assert (data / f'{ours}_ids.txt').read_text().split() == names
        assert (data / f'{ours}_caps.txt').read_text(encoding='utf-8').split('\n')[:-1] == [
            ' '.join(x.split()) for n in names for x in CAPTIONS[n]
        ]
    assert not list(data.glob('*.partial')) and not list(data.glob('*cap_image*'))


def test_coco_has_restval_testall_and_more_than_five_captions(tmp_path):
    images = [
        dict(
            cocoid=7 + i,
            filename=f'COCO_val2014_{7 + i:012d}.jpg',
            split=s,
            sentences=[dict(raw=f'{i} {k}') for k in range(n)] + [dict(raw=' ')],
        )
        for i, (s, n) in enumerate((('train', 5), ('restval', 7), ('val', 6), ('test', 5)))
    ]
    (tmp_path / 'coco.json').write_text(json.dumps(dict(dataset='coco', images=images)))
    said = c.convert_karpathy(tmp_path / 'coco.json', tmp_path / 'five')
    assert (tmp_path / 'five/train_ids.txt').read_text() == '7\n8\n' and (
        tmp_path / 'five/testall_ids.txt'
    ).read_text() == '10\n'
    assert (tmp_path / 'five/train_caps.txt').read_text().count(
        '\n'
    ) == 10 and 'train: 2 images, 10 captions, 2 empty ones left out' in said
    c.convert_karpathy(tmp_path / 'coco.json', tmp_path / 'all', per_image=0)
    assert np.load(tmp_path / 'all/train_cap_image.npy').tolist() == [0] * 5 + [1] * 7
    c.convert_karpathy(tmp_path / 'coco.json', tmp_path / 'without', restval=False)
    assert (tmp_path / 'without/train_ids.txt').read_text() == '7\n'


def test_karpathy_twice_changes_nothing_and_another_one_is_refused(data, tmp_path):
    before = tree(data)
    assert all('there already' in s for s in c.convert_karpathy(tmp_path / 'dataset.json', data))
    (tmp_path / 'other.json').write_text(
        (tmp_path / 'dataset.json').read_text().replace('A boat.', 'A ship.')
    )
    assert 'with another content' in refused(c.convert_karpathy, tmp_path / 'other.json', data)
    assert tree(data) == before


@pytest.mark.parametrize(
    'images, said',
    [
        ([dict(split='train', filename='1.jpg', sentences=[])], 'has no caption'),
        ([dict(split='elsewhere', filename='1.jpg', sentences=[dict(raw='x')])], 'elsewhere'),
        ([dict(split='train', sentences=[dict(raw='x')])], 'filename'),
        ([7], 'images[0]'),
        ([], 'no images'),
    ],
)
def test_karpathy_faults_leave_nothing_behind(tmp_path, images, said):
    (tmp_path / 'x.json').write_text(json.dumps(dict(images=images)))
    assert said in refused(c.convert_karpathy, tmp_path / 'x.json', tmp_path / 'out')
    assert list((tmp_path / 'out').iterdir()) == []


def test_flickr8k_keeps_its_file_names_as_ids(tmp_path):
    (tmp_path / 'f8k.json').write_text(
        json.dumps(
            dict(
                images=[
                    dict(
                        split='train',
                        filename='2513260012_03d33305cf.jpg',
                        sentences=[dict(raw='A dog .')],
                    )
                ]
            )
        )
    )
    c.convert_karpathy(tmp_path / 'f8k.json', tmp_path / 'out')
    assert (tmp_path / 'out/train_ids.txt').read_text() == '2513260012_03d33305cf\n'


# --- bottom-up


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('how', [{}, dict(end='\n'), dict(python3=True)])
def test_bottom_up_round_trip(data, tmp_path, half, how):
    c.convert_bottom_up(table(tmp_path / 'x.tsv', NAMES[::-1], **how), out=data, half=half)
    for s in ('train', 'dev', 'test'):
        split = Split(data, s)
        for row, name in enumerate(split.ids):
            size, boxes, features = picture(name, 3)
            np.testing.assert_array_equal(
                split.features[row], features.astype('f2' if half else 'f4')
            )
            np.testing.assert_array_equal(split.boxes[row], boxes)
            assert tuple(split.sizes[row]) == size
    assert check(data).ok and not list(data.glob('*.partial'))


def test_adaptive_tables_are_padded_only_when_asked(data, tmp_path):
    counts = dict(zip(NAMES, (2, 5, 1, 3, 4, 5)))
    (tmp_path / 'x.tsv').write_text(''.join(line(n, k) + '\n' for n, k in counts.items()))
    assert '--regions' in refused(c.convert_bottom_up, tmp_path / 'x.tsv', out=data)
    for p in data.glob('*.partial'):
        p.unlink()
    assert 'room for 4' in refused(c.convert_bottom_up, tmp_path / 'x.tsv', out=data, regions=4)
    for p in data.glob('*.partial'):
        p.unlink()
    c.convert_bottom_up(tmp_path / 'x.tsv', out=data, regions=6)
    split = Split(data, 'train')
    regions = split.regions(slice(None))
    assert (
        regions.mask.sum(1).tolist() == [counts[n] for n in split.ids]
        and regions.mask.shape[1] == 6
    )
    for row, name in enumerate(split.ids):
        np.testing.assert_array_equal(
            split.features[row][: counts[name]], picture(name, counts[name])[2]
        )
        assert (
            not split.features[row][counts[name] :].any()
            and not split.boxes[row][counts[name] :].any()
        )


def test_lxmert_tables_bring_labels_and_confidences(data, tmp_path):
    c.convert_bottom_up(table(tmp_path / 'x.tsv', NAMES, lxmert=True), out=data, regions=4)
    split = Split(data, 'test')
    assert split.labels.tolist() == [[0, 1, 2, -1]] * 2
    np.testing.assert_allclose(split.scores[0], [0.9, 0.5, 0.1, 0], rtol=1e-6)
    # width first, although the file has the height first
    assert tuple(split.sizes[0]) == picture('1001', 3)[0]


def npz(folder, names, n=3, info=True):
    folder.mkdir()
    for name in names:
        (w, h), boxes, features = picture(name, n)
        more = (
            dict(
                info=dict(
                    image_id=name,
                    image_h=h,
                    num_boxes=n,
                    objects_id=np.arange(n),
                    objects_conf=np.linspace(0.9, 0.1, n).astype('f4'),
                )
            )
            if info
            else {}
        )
        np.savez_compressed(
            folder / f'{name}.npz', x=features, bbox=boxes, num_bbox=n, image_h=h, image_w=w, **more
        )
    return folder


@pytest.mark.parametrize('info', [True, False])
def test_a_folder_of_npz_files_is_as_good_as_a_table(data, tmp_path, info):
    shutil.copytree(data, tmp_path / 'table')
    c.convert_bottom_up(table(tmp_path / 'x.tsv', NAMES), out=tmp_path / 'table')
    c.convert_bottom_up(npz(tmp_path / 'npz', NAMES, info=info), out=data)
    ours = tree(data)
    assert {k: v for k, v in ours.items() if 'labels' not in k and 'scores' not in k} == tree(
        tmp_path / 'table'
    ) and ('train_labels.npy' in ours) == info
    # 0 is the background there
    if info:
        assert Split(data, 'train').labels.tolist() == [[-1, 0, 1]] * 3
    assert check(data).ok


def test_npz_files_that_are_broken_or_want_to_run_something(data, tmp_path):
    folder = npz(tmp_path / 'npz', NAMES)
    mark = tmp_path / 'it-ran'
    good = (folder / '1000.npz').read_bytes()
    for broken in (b'', b'no', good[:200], good[:-80]):
        (folder / '1000.npz').write_bytes(broken)
        assert '1000.npz: ' in refused(c.convert_bottom_up, folder, out=data)
    np.savez(folder / '1000.npz', x=np.zeros((3, 8)), bbox=np.zeros((2, 4)), image_h=1, image_w=1)
    assert 'features (3, 8) and boxes (2, 4)' in refused(c.convert_bottom_up, folder, out=data)
    np.savez(
        folder / '1000.npz',
        x=np.ones((3, 8)),
        bbox=np.zeros((3, 4)),
        image_h=1,
        image_w=1,
        info=np.array(Runs((os.system, (f'touch {mark}',))), dtype=object),
    )
    assert (
        'is not looked up' in refused(c.convert_bottom_up, folder, out=data) and not mark.exists()
    )
    (folder / '1000.npz').write_bytes(good)
    c.convert_bottom_up(folder, out=data)  # goes on
    assert 'holds no .npz' in refused(
        c.convert_bottom_up, tmp_path / 'data' / '..' / 'x', out=npz_less(tmp_path)
    )


def npz_less(tmp_path):
    (tmp_path / 'x').mkdir()
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'bare/test_ids.txt').write_text('1\n')
    return tmp_path / 'bare'


def test_two_tables_one_after_the_other_or_at_once(data, tmp_path):
    first = table(tmp_path / 'a.tsv', NAMES[:4])
    second = table(tmp_path / 'b.tsv', NAMES[3:])
    shutil.copytree(data, tmp_path / 'once')
    c.convert_bottom_up(first, second, out=tmp_path / 'once')
    assert 'test_ims.npy: 1 of 2 images are not in the source, the first is 1005' in refused(
        c.convert_bottom_up, first, out=data
    )
    assert (
        (data / 'dev_ims.npy').exists()
        and not (data / 'train_ims.npy').exists()
        and not (data / 'test_ims.npy').exists()
    )
    c.convert_bottom_up(second, out=data)
    assert tree(data) == tree(tmp_path / 'once')
    before = tree(data)
    assert c.convert_bottom_up(first, out=data) == ['all is there already'] and tree(data) == before


def test_going_on_with_other_settings_is_refused(data, tmp_path):
    half = table(tmp_path / 'a.tsv', NAMES[:1])
    refused(c.convert_bottom_up, half, out=data)
    assert 'other settings' in refused(c.convert_bottom_up, half, out=data, regions=7)
    assert 'other settings' in refused(c.convert_bottom_up, half, out=data, half=True)


def test_killed_in_the_middle_it_goes_on(data, tmp_path, monkeypatch):
    table(tmp_path / 'x.tsv', NAMES)
    shutil.copytree(data, tmp_path / 'whole')
    c.convert_bottom_up(tmp_path / 'x.tsv', out=tmp_path / 'whole')
    good = c.tsv_row
    calls = []

    def dies(row):
        calls.append(row[:4])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return good(row)

    monkeypatch.setattr(c, 'tsv_row', dies)
    with pytest.raises(KeyboardInterrupt):
        c.convert_bottom_up(tmp_path / 'x.tsv', out=data)
    assert not list(data.glob('*_ims.npy')) and list(data.glob('*.partial'))
    c.convert_bottom_up(tmp_path / 'x.tsv', out=data)
    # what was done is not decoded again
    assert calls[4:] == [n.encode() for n in NAMES[3:]]
    assert tree(data) == tree(tmp_path / 'whole')


@pytest.mark.parametrize(
    'broken, said',
    [
        (lambda x: x[:-9], ''),
        (lambda x: x.replace('\t3\t', '\t4\t'), 'for 4 boxes'),
        (lambda x: x.rsplit('\t', 1)[0], '5 columns'),
        (lambda x: x.replace('\t3\t', '\tx\t'), 'invalid literal'),
        (
            lambda x: (
                x.rsplit('\t', 1)[0]
                + '\t'
                + base64.b64encode(np.full((3, 8), np.nan, 'f4').tobytes()).decode()
            ),
            'not finite',
        ),
    ],
)
def test_a_broken_line_is_left_out_and_its_picture_may_come_again(data, tmp_path, broken, said):
    (tmp_path / 'x.tsv').write_text(
        broken(line('1000', 3)) + '\n' + ''.join(line(n, 3) + '\n' for n in NAMES)
    )
    out = c.convert_bottom_up(tmp_path / 'x.tsv', out=data)
    assert (
        out[0].startswith('1 pictures could not be read, the first: x.tsv line 1')
        and said in out[0]
    )
    np.testing.assert_array_equal(Split(data, 'train').features[0], picture('1000', 3)[2])
    shutil.rmtree(data)
    c.convert_karpathy(tmp_path / 'dataset.json', data)
    (tmp_path / 'y.tsv').write_text(
        broken(line('1000', 3)) + '\n' + ''.join(line(n, 3) + '\n' for n in NAMES[1:])
    )
    assert 'y.tsv line 1' in refused(c.convert_bottom_up, tmp_path / 'y.tsv', out=data)


def test_a_picture_may_be_in_two_splits_and_ids_may_repeat(data, tmp_path):
    (data / 'testall_ids.txt').write_text('1001\n1003\n1005\n')
    (data / 'testall_caps.txt').write_text('x\n' * 6)
    # an id a caption, as SCAN's converter would repeat it
    (data / 'dev_ids.txt').write_text('1003\n1003\n')
    c.convert_bottom_up(table(tmp_path / 'x.tsv', NAMES), out=data)
    np.testing.assert_array_equal(
        Split(data, 'testall').features[[0, 2]], Split(data, 'test').features
    )
    assert Split(data, 'dev').ids == ['1003'] and Split(data, 'dev').n_images == 1
    (data / 'more_ids.txt').write_text('1\n2\n1\n')
    assert "the id '1' is there 2 times" in refused(
        c.convert_bottom_up, tmp_path / 'x.tsv', out=data
    )


def test_ids_that_are_numbers_are_translated(tmp_path):
    out = tmp_path / 'data'
    out.mkdir()
    (out / 'test_ids.txt').write_text('5\n1\n')
    (out / 'test_caps.txt').write_text('a\nb\n')
    table(tmp_path / 'x.tsv', NAMES)
    assert '--names' in refused(c.convert_bottom_up, tmp_path / 'x.tsv', out=out)
    c.convert_bottom_up(tmp_path / 'x.tsv', out=out, names=karpathy(tmp_path / 'k.json'))
    np.testing.assert_array_equal(
        Split(out, 'test').features, [picture(n, 3)[2] for n in ('1005', '1001')]
    )
    (tmp_path / 'map.json').write_text(json.dumps({'5': '1005.jpg', '1': '1001.jpg'}))
    assert c.read_names(tmp_path / 'map.json') == {
        k: v for k, v in c.read_names(tmp_path / 'k.json').items() if k in '15'
    }


def test_memory_does_not_grow_with_the_table(tmp_path):
    def peak(n):
        out = tmp_path / f'n{n}'
        out.mkdir()
        (out / 'test_ids.txt').write_text(''.join(f'{i}\n' for i in range(1, n + 1)))
        rng = np.random.default_rng(0)
        enc = lambda *shape: base64.b64encode(rng.random(shape).astype('f4').tobytes()).decode()
        # 37 kB of features each
        (out / 't.tsv').write_text(
            ''.join(f'{i}\t9\t9\t36\t{enc(36, 4)}\t{enc(36, 256)}\n' for i in range(1, n + 1))
        )
        tracemalloc.start()
        c.convert_bottom_up(out / 't.tsv', out=out)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    # 280 more pictures are 10 MB of features
    assert peak(320) < peak(40) + 2**19


# --- pickles


def test_plain_pickles_are_read(tmp_path):
    kept = dict(
        a=[1, 2.5, None, True, 'é', b'x\xff', (1, (2,)), 2**70],
        b=np.arange(6.0).reshape(2, 3),
        f=np.asfortranarray(np.arange(6, dtype='>i2').reshape(3, 2)),
        s=np.float32(0.25),
        o=np.array([dict(x=1), [2]], dtype=object),
    )
    # 5 has another way for arrays
    for protocol in range(2, 5):
        (tmp_path / 'x').write_bytes(pickle.dumps(kept, protocol))
        got = c.read_pickle(tmp_path / 'x')
        assert got['a'] == kept['a'] and got['s'] == 0.25 and got['o'] == [dict(x=1), [2]]
        np.testing.assert_array_equal(got['b'], kept['b'])
        np.testing.assert_array_equal(got['f'], kept['f'])


class Runs:
    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize('protocol', range(6))
def test_no_pickle_runs_anything(tmp_path, protocol):
    mark = tmp_path / 'it-ran'
    touch = f'open({str(mark)!r}, "w").close()'
    evil = [
        (os.system, (f'touch {mark}',)),
        (eval, (touch,)),
        (exec, (touch,)),
        (__import__, ('os',)),
        (getattr, ('', 'join')),
        (np.frombuffer, (b'1234',)),
        (np.load, (str(mark),)),
        (bytearray, (5,)),
        (subprocess.call, (['touch', str(mark)],)),
    ]
    for how in evil:
        for where in (Runs(how), [dict(a=Runs(how))], np.array([Runs(how)], dtype=object)):
            (tmp_path / 'x').write_bytes(pickle.dumps(where, protocol))
            said = refused(c.read_pickle, tmp_path / 'x')
            assert 'is not looked up' in said and not mark.exists(), said


def test_pickles_by_hand_do_not_run_anything_either(tmp_path):
    "Instructions that pickle.dumps never writes: attributes set on stand-ins, extension codes, foreign names, endless nesting."
    mark = tmp_path / 'it-ran'
    held = b'cnumpy.core.multiarray\n_reconstruct\n'
    for raw in (
        b'ios\nsystem\n.',
        b'cos\nsystem\n.',
        b'\x80\x02\x82\x01.',
        b'\x80\x02Pname\n.',
        b'(' + held + b'}(S"__code__"\nI1\nu\x86b.',
        held + b'N}S"__class__"\nI1\ns\x86b.',
        held + b'(tRN}S"state"\ncos\nsystem\ns\x86b.',
        b'\x80\x04\x8c\x08builtins\x8c\x04eval\x93.',
        b'cnumpy\nndarray\n(tR.',
        b'\x80\x02]q\x00h\x00a.',
        b'',
        b'no pickle',
        pickle.dumps([1])[:-3],
    ):
        (tmp_path / 'x').write_bytes(raw)
        refused(c.read_pickle, tmp_path / 'x')
        assert not mark.exists()
    # a file may write on its stand-in: it is its own
    (tmp_path / 'x').write_bytes(held + b'}S"given"\nI1\nsb.')
    try:
        c.read_pickle(tmp_path / 'x')
    except DataError:
        pass
    (tmp_path / 'y').write_bytes(pickle.dumps(np.arange(3.0), 2))
    assert c.read_pickle(tmp_path / 'y').tolist() == [0, 1, 2]


def test_nested_pickles_do_not_explode(tmp_path):
    x = ['lol']
    for _ in range(60):
        x = [x, x]
    (tmp_path / 'x').write_bytes(pickle.dumps(x))
    got = c.read_pickle(tmp_path / 'x')
    assert got[0] is got[1]


# --- boxes


@pytest.fixture
def gsmn(tmp_path, full):
    folder = tmp_path / 'gsmn'
    folder.mkdir()
    split = Split(full, 'train')
    np.save(folder / 'train_ims_bbx.npy', np.array(split.boxes))
    sizes = np.array(split.sizes)
    np.save(
        folder / 'train_ims_size.npy',
        np.array([dict(image_w=int(w), image_h=int(h)) for w, h in sizes], dtype=object),
        allow_pickle=True,
    )
    wanted = np.array(split.boxes), sizes
    for key in ('boxes', 'img_sizes'):
        (full / f'train_{key}.npy').unlink()
    return folder, wanted


@pytest.mark.parametrize('form', ['pickled', 'records', 'numbers', 'python 2'])
def test_boxes_of_gsmn(gsmn, full, form):
    folder, (boxes, sizes) = gsmn
    if form == 'numbers':
        np.save(folder / 'train_ims_size.npy', sizes)
    if form == 'records':
        np.save(
            folder / 'train_ims_size.npy',
            np.array([(h, w) for w, h in sizes], dtype=[('image_h', 'i4'), ('image_w', 'i4')]),
        )
    if form == 'python 2':
        with (folder / 'train_ims_size.npy').open('wb') as f:
            np.lib.format.write_array_header_1_0(
                f, dict(descr='|O', fortran_order=False, shape=(len(sizes),))
            )
            f.write(
                pickle.dumps(
                    np.array(
                        [dict(image_w=np.int64(w), image_h=np.int64(h)) for w, h in sizes],
                        dtype=object,
                    ),
                    2,
                )
            )
    assert c.convert_boxes(folder, full) == ['train: 3 images']
    np.testing.assert_array_equal(np.load(full / 'train_boxes.npy'), boxes)
    np.testing.assert_array_equal(np.load(full / 'train_img_sizes.npy'), sizes)
    assert c.convert_boxes(folder, full) == ['train: there already'] and check(full).ok


def test_boxes_in_another_order_or_of_other_pictures_are_told(gsmn, full, tmp_path):
    folder, (boxes, sizes) = gsmn
    np.save(folder / 'train_ims_bbx.npy', boxes[..., [1, 0, 3, 2]])
    wrong = sum(
        ((b[:, [1, 0, 3, 2]] < -1) | (b[:, [1, 0, 3, 2]] > np.tile(s, 2) + 1)).any()
        for b, s in zip(boxes, sizes)
    )
    assert wrong and f'boxes of {wrong} of 3 pictures leave them; in the order yx, of 0' in refused(
        c.convert_boxes, folder, full
    )
    c.convert_boxes(folder, full, order='yx')
    np.testing.assert_array_equal(np.load(full / 'train_boxes.npy'), boxes)
    for key in ('boxes', 'img_sizes'):
        (full / f'train_{key}.npy').unlink()
    np.save(folder / 'train_ims_bbx.npy', boxes / np.tile(sizes, 2)[:, None])
    assert 'fractions' in refused(c.convert_boxes, folder, full)


def test_sizes_are_compared_with_the_pictures(gsmn, full, tmp_path):
    from PIL import Image

    folder, (_, sizes) = gsmn
    (tmp_path / 'pictures').mkdir()
    for name, size in zip(('1000', '1002', '1004'), sizes):
        Image.new('L', tuple(map(int, size))).save(tmp_path / f'pictures/{name}.jpg')
    Image.new('L', (333, 500)).save(tmp_path / 'pictures/1002.jpg')
    assert (
        'sizes of 1 of 3 pictures are not those of the pictures, the first: 1002.jpg is 333 x 500, here 375 x 500'
        in refused(c.convert_boxes, folder, full, pictures=tmp_path / 'pictures')
    )
    assert not list(full.glob('*partial*'))
    Image.new('L', tuple(map(int, sizes[1]))).save(tmp_path / 'pictures/1002.jpg')
    assert c.convert_boxes(folder, full, pictures=tmp_path / 'pictures') == ['train: 3 images']


# --- SCAN's folder


def test_precomp_names_links_and_mends(full, tmp_path):
    source = tmp_path / 'f30k'
    shutil.copytree(full, source / 'precomp')
    for s in ('train', 'dev', 'test'):
        ids = (full / f'{s}_ids.txt').read_text().split()
        (source / f'precomp/{s}_ids.txt').write_text(''.join(f'{NAMES.index(i)}\n' for i in ids))
    (source / 'precomp/test_caps.txt').write_text(
        '\n'.join(repr(x.encode()) for x in ('Two men sit.', "Men on a 'bench'.", 'Café.', 'b'))
        + '\n'
    )
    (source / 'id_mapping.json').write_text(
        json.dumps({str(i): f'{n}.jpg' for i, n in enumerate(NAMES)})
    )
    out = tmp_path / 'out'
    c.convert_precomp(source, out)
    for s in ('train', 'dev', 'test'):
        assert Split(out, s).ids == Split(full, s).ids
        np.testing.assert_array_equal(Split(out, s).features, Split(full, s).features)
        # no second copy
        assert os.path.samefile(out / f'{s}_ims.npy', source / f'precomp/{s}_ims.npy')
    assert Split(out, 'test').captions == ['Two men sit.', "Men on a 'bench'.", 'Café.', 'b']
    before = tree(out)
    assert all('there already' in x for x in c.convert_precomp(source, out)) and tree(out) == before
    assert 'source itself' in refused(c.convert_precomp, source, source / 'precomp')


# --- scene graphs


def predictions(full, scale, names=NAMES):
    "Detections that are the regions in another order, and relations among them."
    found = {}
    for k, name in enumerate(names):
        size, boxes, _ = picture(name, 3)
        ratio = np.divide(detector_size(*size), size)[[0, 1, 0, 1]] if scale else 1
        found[str(k)] = dict(
            bbox=(boxes[[2, 0, 1]] * ratio).tolist(),
            bbox_labels=[1, 2, 3],
            bbox_scores=[0.9, 0.8, 0.7],
            rel_pairs=[[0, 1], [1, 2], [2, 0]],
            rel_labels=[1, 0, 2],
            rel_scores=[0.5, 0.9, 0.75],
            rel_all_scores=[[0.1] * 3] * 3,
        )
    return found


@pytest.fixture
def sgb(full, tmp_path):
    folder = tmp_path / 'sgb'
    folder.mkdir()
    (folder / 'custom_prediction.json').write_text(json.dumps(predictions(full, True)))
    (folder / 'custom_data_info.json').write_text(
        json.dumps(
            dict(
                idx_to_files=[f'/x/{n}.jpg' for n in NAMES],
                ind_to_classes=['__background__', 'dog', 'man', 'tree'],
                ind_to_predicates=['__background__', 'on', 'near'],
            )
        )
    )
    return folder


def test_sgb_gives_relations_to_regions(sgb, full):
    said = c.convert_sgb(sgb, full)
    assert 'relations left out: 6 (background)' in said
    for s in ('train', 'dev', 'test'):
        split = Split(full, s)
        # detection 0, 1, 2 are regions 2, 0, 1
        for row in range(split.n_images):
            assert split.triples[row] == [[1, 1, 2, 0.75], [2, 0, 0, 0.5]]
        assert split.labels.tolist() == [[1, 2, 0]] * split.n_images
    assert (
        split.classes == ['dog', 'man', 'tree']
        and split.predicates == ['on', 'near']
        and check(full).ok
    )
    before = tree(full)
    assert c.convert_sgb(sgb, full) == ['all is there already'] and tree(full) == before


def test_sgb_goes_on_after_an_interruption(sgb, full, tmp_path, monkeypatch):
    shutil.copytree(full, tmp_path / 'whole')
    c.convert_sgb(sgb, tmp_path / 'whole')
    good = c.triples_from_detector
    calls = []

    def dies(*args, **how):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return good(*args, **how)

    monkeypatch.setattr(c, 'triples_from_detector', dies)
    with pytest.raises(KeyboardInterrupt):
        c.convert_sgb(sgb, full)
    assert not list(full.glob('*triples.jsonl'))
    c.convert_sgb(sgb, full)
    assert len(calls) == 7 and tree(full) == tree(tmp_path / 'whole')


def test_scene_graph_faults(sgb, full, data, tmp_path):
    found = json.loads((sgb / 'custom_prediction.json').read_text())

    def write(x):
        (sgb / 'custom_prediction.json').write_text(json.dumps(x))

    write(found | {'9': found['0']})
    assert "picture '9' is none of the 6" in refused(c.convert_sgb, sgb, full)
    for p in full.glob('*.partial'):
        p.unlink()
    write({k: v for k, v in found.items() if k != '2'})
    assert 'train_triples.jsonl: 1 of 3 images are not in the source, the first is 1002' in refused(
        c.convert_sgb, sgb, full
    )
    assert 'other settings' in refused(c.convert_sgb, sgb, full, top=3)
    write(found)
    c.convert_sgb(sgb, full)  # goes on
    bare = tmp_path / 'bare'
    shutil.copytree(full, bare, ignore=shutil.ignore_patterns('*boxes*', '*triples*', '*labels*'))
    assert 'giving relations to regions needs it' in refused(c.convert_sgb, sgb, bare)
    for broken in (
        {k: v for k, v in found['0'].items() if k != 'rel_pairs'},
        {k: v for k, v in found['0'].items() if k != 'bbox_labels'},
        found['0'] | dict(rel_labels=[9, 0, 0]),
    ):
        again = tmp_path / 'again'
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(full, again, ignore=shutil.ignore_patterns('*triples*', '*labels*'))
        write({'0': broken})
        assert '1000.jpg' in refused(c.convert_sgb, sgb, again)


def test_lgsgm_agrees_with_sgb(sgb, full, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(full, other)
    c.convert_sgb(sgb, full)
    names = ['dog', 'man', 'tree']
    predicates = ['on', 'near']
    pictures = {
        f'{n}.jpg': dict(
            labels=names,
            bbox=p['bbox'],
            rels=[
                [f'{names[s]}:{s}', predicates[l - 1], f'{names[o]}:{o}']
                for (s, o), l in zip(p['rel_pairs'], p['rel_labels'])
                if l
            ],
        )
        for n, p in zip(NAMES, predictions(full, False).values())
    }
    for part, some in (('a', NAMES[:3]), ('b', NAMES[3:])):
        (tmp_path / f'{part}.joblib').write_bytes(
            pickle.dumps({f'{n}.jpg': pictures[f'{n}.jpg'] for n in some})
        )
    c.convert_lgsgm(tmp_path / 'a.joblib', tmp_path / 'b.joblib', out=other)
    assert Split(other, 'train').predicates == ['near', 'on']
    for s in ('train', 'dev', 'test'):
        a = Split(full, s)
        b = Split(other, s)
        for row in range(a.n_images):
            assert {(i, a.predicates[p], j) for i, p, j, _ in a.triples[row]} == {
                (i, b.predicates[p], j) for i, p, j, _ in b.triples[row]
            } and all(t[3] == 1 for t in b.triples[row])
        np.testing.assert_array_equal(a.labels, b.labels)
    (tmp_path / 'c.joblib').write_bytes(pickle.dumps([1]))
    assert 'is not a dict of pictures' in refused(
        c.convert_lgsgm, tmp_path / 'c.joblib', out=tmp_path
    )
    (tmp_path / 'd.joblib').write_bytes(pickle.dumps(dict(x=Runs((os.system, ('true',))))))
    assert 'is not looked up' in refused(c.convert_lgsgm, tmp_path / 'd.joblib', out=tmp_path)


def test_a_region_far_from_all_detections_has_no_class():
    found = dict(bbox=[[0, 0, 10, 10], [100, 100, 120, 120]], bbox_labels=[3, 1])
    assert c.region_labels(
        np.array([[0, 0, 10, 9.0], [50, 50, 60, 60], [99, 99, 121, 121], [0, 0, 0, 0]]), found, 0.5
    ).tolist() == [2, -1, 0, -1]
    assert c.region_labels(np.zeros((2, 4)), dict(bbox=[], bbox_labels=[]), 0.5).tolist() == [
        -1,
        -1,
    ]


# --- Entities


def carry_plain(caption, words, phrases):
    "Every letter has an owner, in either text: phrases are carried over letter by letter."

    def owners(text):
        return [i for i, w in enumerate(text) for ch in w.lower() if ch.isalnum()]

    ours = owners(caption.split())
    theirs = owners(words)
    out = []
    for first, n, kind, chain in phrases:
        mine = [o for o, t in zip(ours, theirs) if first <= t < first + n]
        if mine:
            out.append([min(mine), max(mine) + 1, kind, chain])
    return out


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["a", "man", "'s", ",", '"', "t-shirt", "2", "n't", ".", "Ünder", "--"]
            ),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_spans_are_carried_letter_by_letter(parts, draw):
    words = [w for w, _ in parts]
    caption = ''.join(w + ' ' * space for w, space in parts).strip()
    first = draw.draw(st.integers(0, len(words) - 1))
    phrases = [
        (first, draw.draw(st.integers(1, len(words) - first)), 'people', 3),
        (0, len(words), 'scene', 0),
    ]
    assert c.carry_spans(caption, words, phrases) == carry_plain(caption, words, phrases)


def test_sentences_of_entities():
    words, phrases = c.entity_sentence(
        "[/EN#8/people/other Two men] in [/EN#0/notvisual it] 's [/EN#12/clothing green shirts] ."
    )
    assert words == ['Two', 'men', 'in', 'it', "'s", 'green', 'shirts', '.'] and phrases == [
        (0, 2, 'people', 8),
        (3, 1, 'notvisual', 0),
        (5, 2, 'clothing', 12),
    ]


@pytest.fixture
def entities(tmp_path):
    folder = tmp_path / 'flickr30k_entities'
    for part in ('Sentences', 'Annotations'):
        (folder / part).mkdir(parents=True)
    for k, name in enumerate(NAMES):
        lines = []
        for text in CAPTIONS[name]:
            first, *rest = (
                ' '.join(text.split())
                .replace('.', ' .')
                .replace(',', ' ,')
                .replace('"', ' `` ')
                .replace("'s", " 's")
                .split()
            )
            lines.append(f'[/EN#{k + 1}/people {first}] {" ".join(rest)}')
        (folder / f'Sentences/{name}.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
        (folder / f'Annotations/{name}.xml').write_text(
            f'<annotation><object><name>{k + 1}</name><name>99</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>'
            f'<object><name>{k + 1}</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>6</xmax><ymax>6</ymax></bndbox></object><object><name>50</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>'
        )
    return folder


def test_entities_round_trip(entities, full):
    said = c.convert_entities(entities, full)
    assert said == [
        'dev: 1 images, 2 of 2 captions have phrases',
        'test: 2 images, 4 of 4 captions have phrases',
        'train: 3 images, 6 of 6 captions have phrases',
    ]
    for s in ('train', 'dev', 'test'):
        split = Split(full, s)
        for row, name in enumerate(split.ids):
            k = NAMES.index(name) + 1
            assert split.phrases[row] == dict(
                phrases=[[[0, 1, 'people', k]]] * 2,
                boxes={str(k): [[0, 1, 29, 39], [4, 4, 5, 5]], '99': [[0, 1, 29, 39]]},
            )
    assert check(full).ok and c.convert_entities(entities, full) == ['all is there already']


def test_entities_need_no_features_and_go_on(entities, data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / 'whole')
    c.convert_entities(entities, tmp_path / 'whole')
    good = c.entity_boxes
    calls = []

    def dies(path):
        calls.append(path.stem)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return good(path)

    monkeypatch.setattr(c, 'entity_boxes', dies)
    with pytest.raises(KeyboardInterrupt):
        c.convert_entities(entities, data)
    c.convert_entities(entities, data)
    assert len(calls) == 7 and tree(data) == tree(tmp_path / 'whole')


def test_captions_that_entities_do_not_have(entities, data, tmp_path):
    caps = (data / 'train_caps.txt').read_text(encoding='utf-8').split('\n')
    (data / 'train_caps.txt').write_text(
        '\n'.join(['Something else.'] + caps[1:]), encoding='utf-8'
    )
    assert 'train: 3 images, 5 of 6 captions have phrases' in c.convert_entities(entities, data)
    assert json.loads((data / 'train_phrases.jsonl').read_text().split('\n')[0])['phrases'][0] == []
    (data / 'test_phrases.jsonl').unlink()
    (data / 'test_caps.txt').write_text('x\ny\nz\nBoats at sea.\n')
    assert '3 of 4 captions are no sentence' in refused(c.convert_entities, entities, data)
    assert not (data / 'test_phrases.jsonl').exists()


def test_entities_faults(entities, data):
    (entities / 'Sentences/1003.txt').rename(entities / 'Sentences/x.txt')
    assert '1003.txt: this file is missing' in refused(c.convert_entities, entities, data)
    (entities / 'Sentences/x.txt').rename(entities / 'Sentences/1003.txt')
    good = (entities / 'Annotations/1003.xml').read_text()
    for broken in (
        good[:-30],
        good.replace('<xmin>1<', '<xmin>x<'),
        good.replace('<xmin>1<', '<xmin>31<'),
        good.replace('<ymax>40</ymax>', ''),
    ):
        (entities / 'Annotations/1003.xml').write_text(broken)
        assert '1003.xml: is not a good annotation' in refused(c.convert_entities, entities, data)
    assert 'there is no such folder' in refused(c.convert_entities, data, data)


# --- the command


@pytest.fixture
def imtm(monkeypatch, capsys):
    "The program in this process: exit code, output, errors."
    from imtm_lite.workshop.cli import main

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['imtm', *map(str, words)])
        with pytest.raises(SystemExit) as out:
            main()
        return out.value.code, *capsys.readouterr()

    return run


def test_help_has_examples(imtm):
    for command in ('convert', 'regions'):
        code, out, _ = imtm(command, '--help')
        assert code == 0 and f'imtm {command} ' in ' '.join(out.split())


def test_the_whole_way_by_command(imtm, tmp_path, entities):
    karpathy(tmp_path / 'dataset.json')
    table(tmp_path / 'a.tsv', NAMES[:3])
    table(tmp_path / 'b.tsv', NAMES[3:])
    data = tmp_path / 'data'
    for words in (
        ('karpathy', tmp_path / 'dataset.json'),
        ('bottom-up', tmp_path / 'a.tsv', tmp_path / 'b.tsv', '--half'),
        ('entities', entities),
    ):
        code, out, err = imtm('convert', *words, '--out', data)
        assert code == 0 and 'imtm check' in out, err
    assert (
        check(data).ok
        and Split(data, 'train').features.dtype == np.float16
        and Split(data, 'train').phrases is not None
    )


def test_faults_of_the_command_are_one_line(imtm, tmp_path):
    karpathy(tmp_path / 'dataset.json')
    for words, said in (
        (
            ('karpathy', tmp_path / 'dataset.json', '--half'),
            'karpathy: has no option --half; it has --per-image, --restval',
        ),
        (('tsv', tmp_path / 'x'), 'there is no such kind'),
        (('karpathy', tmp_path / 'dataset.json', tmp_path / 'x'), '2 sources; expected one'),
        (('bottom-up', tmp_path / 'x.tsv'), 'holds no {s}_ids.txt'),
    ):
        code, _, err = imtm('convert', *words, '--out', tmp_path / 'data')
        message = [x for x in err.split('\n') if x.startswith('imtm: ')]
        assert code == 2 and len(message) == 1 and said in message[0], err
