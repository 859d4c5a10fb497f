"""The field's files into the layout.

Exact round trips against plain readers, interruptions at any moment, faults, and pickles that
want to run something.
"""

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc

import ijson
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imtm_lite.data import Split
from imtm_lite.files import DataError
from imtm_lite.workshop import convert
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


def sentences(*texts):
    return [dict(raw=text, tokens=[]) for text in texts]


def karpathy(path):
    images = []
    for i, name in enumerate(NAMES):
        told = sentences(*CAPTIONS[name])
        images.append(dict(imgid=i, filename=f'{name}.jpg', split=SPLITS[name], sentences=told))
    path.write_text(json.dumps(dict(images=images, dataset='toy')))
    return path


def picture(name, n, width=8, seed=0):
    "size, boxes, features of a picture, the same for the same name."
    rng = np.random.default_rng([int(name), n, seed])
    size = (500, 375) if int(name) % 2 else (375, 500)
    corner = rng.uniform(0, 0.6, (n, 2)) * size
    opposite = corner + rng.uniform(0.1, 0.4, (n, 2)) * size
    boxes = np.concatenate([corner, opposite], 1).astype('f4')
    return size, boxes, rng.random((n, width)).astype('f4')


def base64_of(array, python3=False):
    text = base64.b64encode(array.tobytes())
    # what Python 3 writes without decoding
    return repr(text) if python3 else text.decode()


def line(name, n, python3=False):
    (width, height), *arrays = picture(name, n)
    boxes, features = (base64_of(array, python3) for array in arrays)
    return '\t'.join([name, str(width), str(height), str(n), boxes, features])


def lxmert_line(name, n):
    (width, height), *arrays = picture(name, n)
    labels = base64_of(np.arange(n, dtype='i8'))
    scores = base64_of(np.linspace(0.9, 0.1, n).astype('f4'))
    size = [str(height), str(width)]
    file_name = f'COCO_val2014_{int(name):012d}'
    boxes, features = map(base64_of, arrays)
    return '\t'.join([file_name, *size, labels, scores, labels, scores, str(n), boxes, features])


def table(path, names, n=3, end='\r\n', write=line, **how):
    path.write_text(''.join(write(name, n, **how) + end for name in names), newline='')
    return path


@pytest.fixture
def data(tmp_path):
    "Captions and ids of three splits."
    convert.convert_karpathy(karpathy(tmp_path / 'dataset.json'), tmp_path / 'data')
    return tmp_path / 'data'


@pytest.fixture
def full(data, tmp_path):
    "With features and boxes too."
    convert.convert_bottom_up(table(tmp_path / 'all.tsv', NAMES), out=data)
    return data


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(work, *args, **how):
    with pytest.raises(DataError) as fault:
        work(*args, **how)
    assert '\n' not in str(fault.value)
    return str(fault.value)


def begin_anew(folder):
    for path in folder.glob('*.partial'):
        path.unlink()


# --- filling


def fill_until(folder, wanted, order, every, rows):
    "Fill so many rows and die: what waited is lost. None: to the end."
    columns = dict(boxes=(wanted.shape[1:], 'f4'))
    filling = convert.Filling(folder, 's', 'boxes', rows=len(wanted), columns=columns, every=every)
    for i in [i for i in order if str(i) not in filling.done][:rows]:
        filling.put(str(i), i, boxes=wanted[i])
    if rows is None:
        filling.finish()
    for array in filling.arrays.values():
        array.close()


@pytest.mark.parametrize('seed', range(12))
def test_a_filling_that_is_interrupted_anywhere_ends_as_one_that_is_not(tmp_path, seed):
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 12))
    every = int(rng.integers(1, 5))
    wanted = rng.random((rows, 3, 2)).astype('f4')
    order = rng.permutation(rows).tolist()
    # three calls die after so many rows
    for until in rng.integers(0, rows + 1, 3).tolist():
        fill_until(tmp_path, wanted, order, every, until)
        assert not (tmp_path / 's_boxes.npy').exists()
    fill_until(tmp_path, wanted, order, every, None)
    np.testing.assert_array_equal(np.load(tmp_path / 's_boxes.npy'), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ['s_boxes.npy']


def test_a_torn_journal_line_is_forgotten(tmp_path):
    how = dict(rows=3, columns=dict(boxes=((1,), 'f4')))
    with convert.Filling(tmp_path, 's', 'boxes', **how) as filling:
        filling.put('a', 0, boxes=np.ones(1))
        filling.put('b', 1, boxes=np.ones(1))
    journal = tmp_path / 's_boxes.journal.partial'
    journal.write_bytes(journal.read_bytes()[:-4])
    with convert.Filling(tmp_path, 's', 'boxes', **how) as filling:
        assert filling.done == {'a': 0}
    with convert.Filling(tmp_path, 's', 'boxes', **how) as filling:
        filling.put('b', 1, boxes=np.full(1, 2))
        filling.put('c', 2, boxes=np.full(1, 3))
        filling.finish()
    assert np.load(tmp_path / 's_boxes.npy').ravel().tolist() == [1, 2, 3]


def test_a_journal_torn_in_its_first_line_begins_anew(tmp_path):
    how = dict(rows=1, columns=dict(boxes=((1,), 'f4')))
    for torn in ('', '{"rows": 1, "col'):
        (tmp_path / 's_boxes.journal.partial').write_text(torn)
        assert convert.Journal.begun(tmp_path, 's', 'boxes') is None
        with convert.Filling(tmp_path, 's', 'boxes', **how) as filling:
            assert filling.done == {}
            filling.put('a', 0, boxes=np.ones(1))
            filling.finish()
        (tmp_path / 's_boxes.npy').unlink()


def test_killed_while_files_get_their_names(tmp_path):
    how = dict(rows=2, columns=dict(boxes=((4,), 'f4'), sizes=((2,), 'i4')))
    with convert.Filling(tmp_path, 's', 'boxes', **how) as filling:
        for i in range(2):
            filling.put(str(i), i, boxes=np.full(4, i), sizes=np.full(2, i))
    # one of two renamed
    os.replace(tmp_path / 's_boxes.npy.partial', tmp_path / 's_boxes.npy')
    with convert.Filling(tmp_path, 's', 'boxes', **how) as filling:
        assert len(filling.done) == 2
        filling.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['s_boxes.npy', 's_img_sizes.npy']
    assert np.load(tmp_path / 's_boxes.npy').tolist() == [[0] * 4, [1] * 4]
    assert np.load(tmp_path / 's_img_sizes.npy').tolist() == [[0, 0], [1, 1]]


def test_a_filling_is_shortened_and_never_takes_a_name_that_is_taken(tmp_path, monkeypatch):
    how = dict(rows=1000, columns=dict(boxes=((2,), 'f4')))
    with convert.Filling(tmp_path, 's', 'boxes', **how) as filling:
        filling.put('a', 0, boxes=np.ones(2))
        filling.put('b', None, 'broken')
        filling.put('c', 1, boxes=np.full(2, 2))
        assert filling.notes == {'b': 'broken'}
        filling.finish(rows=2)
    path = tmp_path / 's_boxes.npy'
    assert np.load(path).tolist() == [[1, 1], [2, 2]]
    assert path.stat().st_size < 200
    assert 'is there already' in refused(convert.Filling, tmp_path, 's', 'boxes', **how)
    full = shutil._ntuple_diskusage(10, 10, 10)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: full)
    assert 'and the disk has' in refused(convert.Filling, tmp_path, 't', 'boxes', **how)


def test_other_settings_are_refused(tmp_path):
    with convert.Filling(tmp_path, 's', 'boxes', rows=3, columns=dict(boxes=((1,), 'f4'))):
        pass
    assert 'other settings' in refused(
        convert.Filling, tmp_path, 's', 'boxes', rows=4, columns=dict(boxes=((1,), 'f4'))
    )


# --- JSON, names

texts = st.text(st.characters(exclude_categories=['Cs']))
floats = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(params=['yajl2_c', 'python'])
def backend(request, monkeypatch):
    "The readers of JSON that ijson may have."
    try:
        reader = ijson.get_backend(request.param)
    except ImportError:
        pytest.skip(f'{request.param} is not here')
    monkeypatch.setattr(ijson, 'basic_parse', reader.basic_parse)


@given(
    st.dictionaries(st.text('abc', min_size=1), values, max_size=5),
    st.lists(values, max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_streamed_json_is_json(tmp_path_factory, backend, members, images, chunk, indent, ascii_):
    path = tmp_path_factory.mktemp('json') / 'x.json'
    whole = members | dict(images=images)
    path.write_text(json.dumps(whole, indent=indent, ensure_ascii=ascii_), encoding='utf-8')
    streamed = list(convert.stream_json(path, 'images', chunk=chunk))
    assert [value for key, value in streamed if key == 'images'] == images
    assert {key: value for key, value in streamed if key != 'images'} == members
    assert dict(convert.stream_json(path, chunk=chunk)) == whole


def test_numbers_keep_their_kind_and_their_digits(tmp_path, backend):
    text = '[1, 1.0, -0, -0.0, 1e3, 0.1, 123456789012345678901234567890, 1e-320, 1e999]'
    (tmp_path / 'x.json').write_text(f'{{"a": {text}}}')
    ((_, numbers),) = convert.stream_json(tmp_path / 'x.json')
    assert repr(numbers) == repr(json.loads(text))


def test_a_byte_order_mark_and_white_space_are_fine(tmp_path, backend):
    (tmp_path / 'x.json').write_text('\ufeff \n{ "é" : 1 }\n\n', encoding='utf-8')
    assert list(convert.stream_json(tmp_path / 'x.json', chunk=2)) == [('é', 1)]


def test_a_key_that_is_there_twice_is_told_twice_and_inside_the_last_one_counts(tmp_path, backend):
    (tmp_path / 'x.json').write_text('{"a": 1, "a": {"b": 1, "b": 2}, "i": [1], "i": [2]}')
    told = list(convert.stream_json(tmp_path / 'x.json', 'i'))
    assert told == [('a', 1), ('a', {'b': 2}), ('i', 1), ('i', 2)]


def test_depth_is_no_trouble(tmp_path, backend):
    depth = 5000
    (tmp_path / 'x.json').write_text('{"a": ' + '[' * depth + ']' * depth + '}')
    ((_, value),) = convert.stream_json(tmp_path / 'x.json')
    for _ in range(depth - 1):
        (value,) = value
    assert value == []


@pytest.mark.parametrize('chunk', range(1, 9))
def test_numbers_are_not_cut(tmp_path, backend, chunk):
    (tmp_path / 'x.json').write_text('{"images": [-1.5e+16, 12, 3E-2, 0.5, -7], "a": 1.25}')
    streamed = convert.stream_json(tmp_path / 'x.json', 'images', chunk=chunk)
    assert [value for _, value in streamed] == [-1.5e16, 12, 0.03, 0.5, -7, 1.25]


BROKEN = [
    '',
    '[1]',
    '{"a": 1',
    '{"a" 1}',
    '{"images": [1, 2',
    '{"a": 1,}',
    '{"images": 3}',
    '{"a": 1} 2',
    '{"a": NaN}',
    '{"a": "\udcff"}',
]


@pytest.mark.parametrize('text', BROKEN)
def test_broken_json_is_one_line(tmp_path, backend, text):
    (tmp_path / 'x.json').write_text(text, encoding='utf-8', errors='surrogateescape')
    message = refused(lambda: list(convert.stream_json(tmp_path / 'x.json', 'images')))
    assert 'x.json: is not JSON (' in message and len(message) < len(str(tmp_path)) + 250


def test_a_fault_in_json_says_after_which_value(tmp_path, backend):
    (tmp_path / 'x.json').write_text('{"a": 1, "images": [1, 2, 3')
    message = refused(lambda: list(convert.stream_json(tmp_path / 'x.json', 'images', chunk=1)))
    assert ', after value 4, of images); expected' in message


def test_json_that_is_not_there_is_one_line(tmp_path):
    message = refused(lambda: list(convert.stream_json(tmp_path / 'x.json')))
    assert message.endswith('cannot be read (No such file or directory); expected a JSON file')


@pytest.mark.skipif(ijson.backend == 'python', reason='ijson without its C part keeps more')
def test_streaming_holds_one_element(tmp_path):
    image = dict(a=['x' * 1000] * 10)
    # 20 MB
    (tmp_path / 'x.json').write_text(json.dumps(dict(images=[image] * 2000)))
    tracemalloc.start()
    n = sum(1 for _ in convert.stream_json(tmp_path / 'x.json', 'images'))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 2000 and most < 2 * 2**20


def test_names_of_one_picture():
    of_coco = ('COCO_val2014_000000000042.jpg', 42, ' 42\n', '/a/b/0042.JPEG', 'C:\\x\\42.png')
    assert {convert.image_key(name) for name in of_coco} == {'42'}
    assert convert.image_key('1000268201_693b08cb0e.jpg') == '1000268201'
    assert convert.image_key('0') == '0'
    assert convert.image_key('my_photo_01.png') == 'my_photo_01'


def test_names_of_a_file_whose_images_have_no_number_are_one_line(tmp_path):
    (tmp_path / 'x.json').write_text('{"images": [{"filename": "1.jpg"}]}')
    assert "an image has no 'imgid'; expected" in refused(convert.read_names, tmp_path / 'x.json')


# --- Karpathy


def test_karpathy_gives_what_the_json_says(data):
    for ours, theirs in (('train', 'train'), ('dev', 'val'), ('test', 'test')):
        names = [name for name in NAMES if SPLITS[name] == theirs]
        texts = sum((CAPTIONS[name] for name in names), [])
        captions = (data / f'{ours}_caps.txt').read_text(encoding='utf-8').split('\n')[:-1]
        assert (data / f'{ours}_ids.txt').read_text().split() == names
        assert captions == [' '.join(text.split()) for text in texts]
    assert not list(data.glob('*.partial')) and not list(data.glob('*cap_image*'))


@pytest.fixture
def coco(tmp_path):
    "A picture in each of the four splits."
    images = []
    for i, (split, n) in enumerate((('train', 5), ('restval', 7), ('val', 6), ('test', 5))):
        told = sentences(*(f'{i} {k}' for k in range(n)), ' ')
        name = f'COCO_val2014_{7 + i:012d}.jpg'
        images.append(dict(cocoid=7 + i, filename=name, split=split, sentences=told))
    (tmp_path / 'coco.json').write_text(json.dumps(dict(dataset='coco', images=images)))
    return tmp_path / 'coco.json'


def test_coco_has_restval_testall_and_more_than_five_captions(coco, tmp_path):
    five = tmp_path / 'five'
    report = convert.convert_karpathy(coco, five)
    assert (five / 'train_ids.txt').read_text() == '7\n8\n'
    assert (five / 'testall_ids.txt').read_text() == '10\n'
    assert (five / 'train_caps.txt').read_text().count('\n') == 10
    assert 'train: 2 images, 10 captions, 2 empty ones left out' in report
    convert.convert_karpathy(coco, tmp_path / 'all', per_image=0)
    assert np.load(tmp_path / 'all/train_cap_image.npy').tolist() == [0] * 5 + [1] * 7
    convert.convert_karpathy(coco, tmp_path / 'without', restval=False)
    assert (tmp_path / 'without/train_ids.txt').read_text() == '7\n'


def test_karpathy_twice_changes_nothing_and_another_one_is_refused(data, tmp_path):
    before = tree(data)
    report = convert.convert_karpathy(tmp_path / 'dataset.json', data)
    assert all('there already' in line for line in report)
    (tmp_path / 'other.json').write_text(
        (tmp_path / 'dataset.json').read_text().replace('A boat.', 'A ship.')
    )
    assert 'with another content' in refused(
        convert.convert_karpathy, tmp_path / 'other.json', data
    )
    assert tree(data) == before


@pytest.mark.parametrize(
    'images, message',
    [
        ([dict(split='train', filename='1.jpg', sentences=[])], 'has no caption'),
        ([dict(split='elsewhere', filename='1.jpg', sentences=sentences('x'))], 'elsewhere'),
        ([dict(split='train', sentences=sentences('x'))], 'filename'),
        ([7], 'images[0]'),
        ([], 'no images'),
    ],
)
def test_karpathy_faults_leave_nothing_behind(tmp_path, images, message):
    (tmp_path / 'x.json').write_text(json.dumps(dict(dataset='toy', images=images)))
    assert message in refused(convert.convert_karpathy, tmp_path / 'x.json', tmp_path / 'out')
    assert list((tmp_path / 'out').iterdir()) == []


def test_flickr8k_keeps_its_file_names_as_ids(tmp_path):
    name = '2513260012_03d33305cf.jpg'
    image = dict(split='train', filename=name, sentences=sentences('A dog .'))
    (tmp_path / 'f8k.json').write_text(json.dumps(dict(images=[image])))
    convert.convert_karpathy(tmp_path / 'f8k.json', tmp_path / 'out')
    assert (tmp_path / 'out/train_ids.txt').read_text() == '2513260012_03d33305cf\n'


# --- bottom-up


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('how', [{}, dict(end='\n'), dict(python3=True)])
def test_bottom_up_round_trip(data, tmp_path, half, how):
    convert.convert_bottom_up(table(tmp_path / 'x.tsv', NAMES[::-1], **how), out=data, half=half)
    for split in (Split(data, 'train'), Split(data, 'dev'), Split(data, 'test')):
        for row, name in enumerate(split.ids):
            size, boxes, features = picture(name, 3)
            kept = features.astype('f2' if half else 'f4')
            np.testing.assert_array_equal(split.features[row], kept)
            np.testing.assert_array_equal(split.boxes[row], boxes)
            assert tuple(split.sizes[row]) == size
    assert check(data).ok and not list(data.glob('*.partial'))


COUNTS = dict(zip(NAMES, (2, 5, 1, 3, 4, 5)))


@pytest.fixture
def adaptive(tmp_path):
    "A table of pictures with unequal numbers of boxes."
    path = tmp_path / 'x.tsv'
    path.write_text(''.join(line(name, n) + '\n' for name, n in COUNTS.items()))
    return path


def test_adaptive_tables_are_padded_only_when_asked(data, adaptive):
    assert '--regions' in refused(convert.convert_bottom_up, adaptive, out=data)
    begin_anew(data)
    assert 'room for 4' in refused(convert.convert_bottom_up, adaptive, out=data, regions=4)


def test_padding_is_zeros(data, adaptive):
    convert.convert_bottom_up(adaptive, out=data, regions=6)
    split = Split(data, 'train')
    mask = split.regions(slice(None)).mask
    assert mask.sum(1).tolist() == [COUNTS[name] for name in split.ids]
    assert mask.shape[1] == 6
    for row, name in enumerate(split.ids):
        n = COUNTS[name]
        np.testing.assert_array_equal(split.features[row][:n], picture(name, n)[2])
        assert not split.features[row][n:].any() and not split.boxes[row][n:].any()


def test_lxmert_tables_bring_labels_and_confidences(data, tmp_path):
    convert.convert_bottom_up(
        table(tmp_path / 'x.tsv', NAMES, write=lxmert_line), out=data, regions=4
    )
    split = Split(data, 'test')
    assert split.labels.tolist() == [[0, 1, 2, -1]] * 2
    np.testing.assert_allclose(split.scores[0], [0.9, 0.5, 0.1, 0], rtol=1e-6)
    # width first, although the file has the height first
    assert tuple(split.sizes[0]) == picture('1001', 3)[0]


def npz(folder, names, n=3, info=True):
    folder.mkdir()
    for name in names:
        (w, h), boxes, features = picture(name, n)
        file = dict(x=features, bbox=boxes, num_bbox=n, image_h=h, image_w=w)
        if info:
            scores = np.linspace(0.9, 0.1, n).astype('f4')
            more = dict(image_id=name, image_h=h, num_boxes=n)
            file['info'] = more | dict(objects_id=np.arange(n), objects_conf=scores)
        np.savez_compressed(folder / f'{name}.npz', **file)
    return folder


@pytest.mark.parametrize('info', [True, False])
def test_a_folder_of_npz_files_is_as_good_as_a_table(data, tmp_path, info):
    shutil.copytree(data, tmp_path / 'table')
    convert.convert_bottom_up(table(tmp_path / 'x.tsv', NAMES), out=tmp_path / 'table')
    convert.convert_bottom_up(npz(tmp_path / 'npz', NAMES, info=info), out=data)
    ours = tree(data)
    more = {name for name in ours if 'labels' in name or 'scores' in name}
    assert {name: ours[name] for name in ours.keys() - more} == tree(tmp_path / 'table')
    assert ('train_labels.npy' in more) == info
    # 0 is the background there
    if info:
        assert Split(data, 'train').labels.tolist() == [[-1, 0, 1]] * 3
    assert check(data).ok


def test_npz_files_that_are_broken(data, tmp_path):
    folder = npz(tmp_path / 'npz', NAMES)
    path = folder / '1000.npz'
    good = path.read_bytes()
    for broken in (b'', b'no', good[:200], good[:-80]):
        path.write_bytes(broken)
        assert '1000.npz: ' in refused(convert.convert_bottom_up, folder, out=data)
    np.savez(path, x=np.zeros((3, 8)), bbox=np.zeros((2, 4)), image_h=1, image_w=1)
    message = refused(convert.convert_bottom_up, folder, out=data)
    assert 'features (3, 8) and boxes (2, 4)' in message
    path.write_bytes(good)
    # goes on
    convert.convert_bottom_up(folder, out=data)


def test_npz_files_that_want_to_run_something(data, tmp_path):
    folder = npz(tmp_path / 'npz', NAMES)
    mark = tmp_path / 'it-ran'
    evil = np.array(Runs((os.system, (f'touch {mark}',))), dtype=object)
    arrays = dict(x=np.ones((3, 8)), bbox=np.zeros((3, 4)), image_h=1, image_w=1)
    np.savez(folder / '1000.npz', **arrays, info=evil)
    assert 'is not looked up' in refused(convert.convert_bottom_up, folder, out=data)
    assert not mark.exists()


def test_a_folder_without_npz_files(data, tmp_path):
    (tmp_path / 'x').mkdir()
    assert 'holds no .npz' in refused(convert.convert_bottom_up, tmp_path / 'x', out=data)
    assert 'no such file' in refused(convert.convert_bottom_up, tmp_path / 'y.tsv', out=data)


def test_two_tables_one_after_the_other_or_at_once(data, tmp_path):
    first = table(tmp_path / 'a.tsv', NAMES[:4])
    second = table(tmp_path / 'b.tsv', NAMES[3:])
    shutil.copytree(data, tmp_path / 'once')
    convert.convert_bottom_up(first, second, out=tmp_path / 'once')
    message = refused(convert.convert_bottom_up, first, out=data)
    assert 'test_ims.npy: 1 of 2 images are not in the source, the first is 1005' in message
    # train and test lack a picture
    assert [path.name for path in data.glob('*_ims.npy')] == ['dev_ims.npy']
    convert.convert_bottom_up(second, out=data)
    assert tree(data) == tree(tmp_path / 'once')
    before = tree(data)
    assert convert.convert_bottom_up(first, out=data) == ['all is there already']
    assert tree(data) == before


def test_going_on_with_other_settings_is_refused(data, tmp_path):
    half = table(tmp_path / 'a.tsv', NAMES[:1])
    refused(convert.convert_bottom_up, half, out=data)
    assert 'other settings' in refused(convert.convert_bottom_up, half, out=data, regions=7)
    assert 'other settings' in refused(convert.convert_bottom_up, half, out=data, half=True)


def dies_at(monkeypatch, name, call):
    "Let a function of the converter be interrupted at a call; gives the list of calls."
    good = getattr(convert, name)
    calls = []

    def dies(*args, **how):
        calls.append(args[0])
        if len(calls) == call:
            raise KeyboardInterrupt
        return good(*args, **how)

    monkeypatch.setattr(convert, name, dies)
    return calls


def test_killed_in_the_middle_it_goes_on(data, tmp_path, monkeypatch):
    table(tmp_path / 'x.tsv', NAMES)
    shutil.copytree(data, tmp_path / 'whole')
    convert.convert_bottom_up(tmp_path / 'x.tsv', out=tmp_path / 'whole')
    calls = dies_at(monkeypatch, 'tsv_row', 4)
    with pytest.raises(KeyboardInterrupt):
        convert.convert_bottom_up(tmp_path / 'x.tsv', out=data)
    assert not list(data.glob('*_ims.npy')) and list(data.glob('*.partial'))
    convert.convert_bottom_up(tmp_path / 'x.tsv', out=data)
    # what was done is not decoded again
    assert [row[:4] for row in calls[4:]] == [name.encode() for name in NAMES[3:]]
    assert tree(data) == tree(tmp_path / 'whole')


GOOD = line('1000', 3)
ALL_BUT_FEATURES = GOOD.rsplit('\t', 1)[0]
NOT_A_NUMBER = base64_of(np.full((3, 8), np.nan, 'f4'))


@pytest.mark.parametrize(
    'broken, message',
    [
        (GOOD[:-9], ''),
        (GOOD.replace('\t3\t', '\t4\t'), 'for 4 boxes'),
        (ALL_BUT_FEATURES, '5 columns'),
        (GOOD.replace('\t3\t', '\tx\t'), 'invalid literal'),
        (f'{ALL_BUT_FEATURES}\t{NOT_A_NUMBER}', 'not finite'),
    ],
)
def test_a_broken_line_is_left_out_and_its_picture_may_come_again(data, tmp_path, broken, message):
    again = [broken] + [line(name, 3) for name in NAMES]
    (tmp_path / 'x.tsv').write_text('\n'.join(again) + '\n')
    report = convert.convert_bottom_up(tmp_path / 'x.tsv', out=data)
    assert report[0].startswith('1 pictures could not be read, the first: x.tsv line 1')
    assert message in report[0]
    np.testing.assert_array_equal(Split(data, 'train').features[0], picture('1000', 3)[2])


def test_a_broken_line_whose_picture_does_not_come_again_is_told(data, tmp_path):
    lines = [ALL_BUT_FEATURES] + [line(name, 3) for name in NAMES[1:]]
    (tmp_path / 'y.tsv').write_text('\n'.join(lines) + '\n')
    message = refused(convert.convert_bottom_up, tmp_path / 'y.tsv', out=data)
    assert '1 of 3 images are not in the source' in message and 'y.tsv line 1: 5 col' in message


def test_a_picture_may_be_in_two_splits_and_ids_may_repeat(data, tmp_path):
    (data / 'testall_ids.txt').write_text('1001\n1003\n1005\n')
    (data / 'testall_caps.txt').write_text('x\n' * 6)
    # an id a caption, as SCAN's converter would repeat it
    (data / 'dev_ids.txt').write_text('1003\n1003\n')
    convert.convert_bottom_up(table(tmp_path / 'x.tsv', NAMES), out=data)
    np.testing.assert_array_equal(
        Split(data, 'testall').features[[0, 2]], Split(data, 'test').features
    )
    assert Split(data, 'dev').ids == ['1003'] and Split(data, 'dev').n_images == 1
    (data / 'more_ids.txt').write_text('1\n2\n1\n')
    assert "the id '1' is there 2 times" in refused(
        convert.convert_bottom_up, tmp_path / 'x.tsv', out=data
    )


def test_ids_that_are_numbers_are_translated(tmp_path):
    out = tmp_path / 'data'
    out.mkdir()
    (out / 'test_ids.txt').write_text('5\n1\n')
    (out / 'test_caps.txt').write_text('a\nb\n')
    table(tmp_path / 'x.tsv', NAMES)
    assert '--names' in refused(convert.convert_bottom_up, tmp_path / 'x.tsv', out=out)
    convert.convert_bottom_up(tmp_path / 'x.tsv', out=out, names=karpathy(tmp_path / 'k.json'))
    wanted = [picture(name, 3)[2] for name in ('1005', '1001')]
    np.testing.assert_array_equal(Split(out, 'test').features, wanted)
    names = {'5': '1005.jpg', '1': '1001.jpg'}
    (tmp_path / 'map.json').write_text(json.dumps(names))
    assert convert.read_names(tmp_path / 'map.json') == names
    assert names.items() <= convert.read_names(tmp_path / 'k.json').items()


def table_of(folder, n):
    "A table of pictures with 37 kB of features each."
    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for i in range(1, n + 1):
        boxes = base64_of(rng.random((36, 4)).astype('f4'))
        features = base64_of(rng.random((36, 256)).astype('f4'))
        lines.append(f'{i}\t9\t9\t36\t{boxes}\t{features}\n')
    (folder / 'test_ids.txt').write_text(''.join(f'{i}\n' for i in range(1, n + 1)))
    (folder / 't.tsv').write_text(''.join(lines))
    return folder


def test_memory_does_not_grow_with_the_table(tmp_path):
    peaks = []
    for n in (40, 320):
        folder = table_of(tmp_path / f'n{n}', n)
        tracemalloc.start()
        convert.convert_bottom_up(folder / 't.tsv', out=folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 280 more pictures are 10 MB of features
    assert peaks[1] < peaks[0] + 2**19


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
        back = convert.read_pickle(tmp_path / 'x')
        assert back['a'] == kept['a'] and back['s'] == 0.25 and back['o'] == [dict(x=1), [2]]
        np.testing.assert_array_equal(back['b'], kept['b'])
        np.testing.assert_array_equal(back['f'], kept['f'])


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
            message = refused(convert.read_pickle, tmp_path / 'x')
            assert 'is not looked up' in message and not mark.exists(), message


def test_pickles_by_hand_do_not_run_anything_either(tmp_path):
    """Instructions that pickle.dumps never writes.

    Attributes set on stand-ins, extension codes, foreign names, endless nesting.
    """
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
        refused(convert.read_pickle, tmp_path / 'x')
        assert not mark.exists()
    # a file may write on its stand-in: it is its own
    (tmp_path / 'x').write_bytes(held + b'}S"given"\nI1\nsb.')
    try:
        convert.read_pickle(tmp_path / 'x')
    except DataError:
        pass
    (tmp_path / 'y').write_bytes(pickle.dumps(np.arange(3.0), 2))
    assert convert.read_pickle(tmp_path / 'y').tolist() == [0, 1, 2]


def test_nested_pickles_do_not_explode(tmp_path):
    nested = ['lol']
    for _ in range(60):
        nested = [nested, nested]
    (tmp_path / 'x').write_bytes(pickle.dumps(nested))
    back = convert.read_pickle(tmp_path / 'x')
    assert back[0] is back[1]


# --- boxes


def records(sizes, number=int):
    return [dict(image_w=number(w), image_h=number(h)) for w, h in sizes]


@pytest.fixture
def gsmn(tmp_path, full):
    folder = tmp_path / 'gsmn'
    folder.mkdir()
    split = Split(full, 'train')
    boxes = np.array(split.boxes)
    sizes = np.array(split.sizes)
    np.save(folder / 'train_ims_bbx.npy', boxes)
    pickled = np.array(records(sizes), dtype=object)
    np.save(folder / 'train_ims_size.npy', pickled, allow_pickle=True)
    for key in ('boxes', 'img_sizes'):
        (full / f'train_{key}.npy').unlink()
    return folder, (boxes, sizes)


def save_as_python_2(path, sizes):
    header = dict(descr='|O', fortran_order=False, shape=(len(sizes),))
    pickled = np.array(records(sizes, np.int64), dtype=object)
    with path.open('wb') as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(pickle.dumps(pickled, 2))


@pytest.mark.parametrize('form', ['pickled', 'records', 'numbers', 'python 2'])
def test_boxes_of_gsmn(gsmn, full, form):
    folder, (boxes, sizes) = gsmn
    path = folder / 'train_ims_size.npy'
    if form == 'numbers':
        np.save(path, sizes)
    if form == 'records':
        kind = [('image_h', 'i4'), ('image_w', 'i4')]
        np.save(path, np.array([(h, w) for w, h in sizes], dtype=kind))
    if form == 'python 2':
        save_as_python_2(path, sizes)
    assert convert.convert_boxes(folder, full) == ['train: 3 images']
    np.testing.assert_array_equal(np.load(full / 'train_boxes.npy'), boxes)
    np.testing.assert_array_equal(np.load(full / 'train_img_sizes.npy'), sizes)
    assert convert.convert_boxes(folder, full) == ['train: there already'] and check(full).ok


@pytest.mark.parametrize('rows', [[dict(image_w=3)] * 3, [1, 2, 3], [[]] * 3])
def test_sizes_without_names(gsmn, full, rows):
    folder, _ = gsmn
    pickled = np.empty(3, dtype=object)
    pickled[:] = rows
    np.save(folder / 'train_ims_size.npy', pickled, allow_pickle=True)
    assert 'holds no image_w and image_h' in refused(convert.convert_boxes, folder, full)


def test_boxes_in_another_order_or_of_other_pictures_are_told(gsmn, full, tmp_path):
    folder, (boxes, sizes) = gsmn
    np.save(folder / 'train_ims_bbx.npy', boxes[..., [1, 0, 3, 2]])
    swapped = boxes[..., [1, 0, 3, 2]]
    edges = np.tile(sizes, 2)[:, None]
    wrong = ((swapped < -1) | (swapped > edges + 1)).any((1, 2)).sum()
    message = refused(convert.convert_boxes, folder, full)
    assert wrong
    assert f'boxes of {wrong} of 3 pictures leave them; in the order yx, of 0' in message
    convert.convert_boxes(folder, full, order='yx')
    np.testing.assert_array_equal(np.load(full / 'train_boxes.npy'), boxes)
    for key in ('boxes', 'img_sizes'):
        (full / f'train_{key}.npy').unlink()
    np.save(folder / 'train_ims_bbx.npy', boxes / np.tile(sizes, 2)[:, None])
    assert 'fractions' in refused(convert.convert_boxes, folder, full)


def test_sizes_are_compared_with_the_pictures(gsmn, full, tmp_path):
    from PIL import Image

    folder, (_, sizes) = gsmn
    (tmp_path / 'pictures').mkdir()
    for name, size in zip(('1000', '1002', '1004'), sizes):
        Image.new('L', tuple(map(int, size))).save(tmp_path / f'pictures/{name}.jpg')
    Image.new('L', (333, 500)).save(tmp_path / 'pictures/1002.jpg')
    message = refused(convert.convert_boxes, folder, full, pictures=tmp_path / 'pictures')
    assert 'sizes of 1 of 3 pictures are not those of the pictures' in message
    assert 'the first: 1002.jpg is 333 x 500, here 375 x 500' in message
    assert not list(full.glob('*partial*'))
    Image.new('L', tuple(map(int, sizes[1]))).save(tmp_path / 'pictures/1002.jpg')
    assert convert.convert_boxes(folder, full, pictures=tmp_path / 'pictures') == [
        'train: 3 images'
    ]


# --- SCAN's folder


@pytest.fixture
def scan_folder(full, tmp_path):
    "SCAN's files as vse_infty arranges them: ids are numbers, some captions printed bytes."
    source = tmp_path / 'f30k'
    shutil.copytree(full, source / 'precomp')
    for path in (source / 'precomp').glob('*_ids.txt'):
        numbers = [NAMES.index(name) for name in path.read_text().split()]
        path.write_text(''.join(f'{number}\n' for number in numbers))
    captions = ('Two men sit.', "Men on a 'bench'.", 'Café.', 'b')
    printed = [repr(caption.encode()) for caption in captions]
    (source / 'precomp/test_caps.txt').write_text('\n'.join(printed) + '\n')
    mapping = {str(i): f'{name}.jpg' for i, name in enumerate(NAMES)}
    (source / 'id_mapping.json').write_text(json.dumps(mapping))
    return source


def test_precomp_names_links_and_mends(full, scan_folder, tmp_path):
    out = tmp_path / 'out'
    convert.convert_precomp(scan_folder, out)
    for name in ('train', 'dev', 'test'):
        assert Split(out, name).ids == Split(full, name).ids
        np.testing.assert_array_equal(Split(out, name).features, Split(full, name).features)
        # no second copy
        there = scan_folder / f'precomp/{name}_ims.npy'
        assert os.path.samefile(out / f'{name}_ims.npy', there)
    assert Split(out, 'test').captions == ['Two men sit.', "Men on a 'bench'.", 'Café.', 'b']
    before = tree(out)
    report = convert.convert_precomp(scan_folder, out)
    assert all('there already' in line for line in report) and tree(out) == before


def test_precomp_is_not_converted_into_itself(scan_folder):
    inside = scan_folder / 'precomp'
    assert 'source itself' in refused(convert.convert_precomp, scan_folder, inside)


def test_precomp_copies_where_the_disk_has_no_links(full, scan_folder, tmp_path, monkeypatch):
    def no_link(*paths):
        raise OSError('another disk')

    monkeypatch.setattr(os, 'link', no_link)
    convert.convert_precomp(scan_folder, tmp_path / 'out')
    ours = (tmp_path / 'out/test_ims.npy').read_bytes()
    assert ours == (full / 'test_ims.npy').read_bytes()
    assert not list((tmp_path / 'out').glob('*.partial'))


# --- scene graphs


def predictions(scaled):
    "Detections that are the regions in another order, and relations among them."
    detections = {}
    for k, name in enumerate(NAMES):
        size, boxes, _ = picture(name, 3)
        ratio = np.tile(np.divide(detector_size(*size), size), 2) if scaled else 1
        detections[str(k)] = dict(
            bbox=(boxes[[2, 0, 1]] * ratio).tolist(),
            bbox_labels=[1, 2, 3],
            bbox_scores=[0.9, 0.8, 0.7],
            rel_pairs=[[0, 1], [1, 2], [2, 0]],
            rel_labels=[1, 0, 2],
            rel_scores=[0.5, 0.9, 0.75],
            rel_all_scores=[[0.1] * 3] * 3,
        )
    return detections


def write_predictions(folder, detections):
    (folder / 'custom_prediction.json').write_text(json.dumps(detections))


@pytest.fixture
def sgb(full, tmp_path):
    folder = tmp_path / 'sgb'
    folder.mkdir()
    write_predictions(folder, predictions(True))
    info = dict(
        idx_to_files=[f'/x/{name}.jpg' for name in NAMES],
        ind_to_classes=['__background__', 'dog', 'man', 'tree'],
        ind_to_predicates=['__background__', 'on', 'near'],
    )
    (folder / 'custom_data_info.json').write_text(json.dumps(info))
    return folder


def test_sgb_gives_relations_to_regions(sgb, full):
    report = convert.convert_sgb(sgb, full)
    assert 'relations left out: 6 (background)' in report
    for split in (Split(full, 'train'), Split(full, 'dev'), Split(full, 'test')):
        # detection 0, 1, 2 are regions 2, 0, 1
        for row in range(split.n_images):
            assert split.triples[row] == [[1, 1, 2, 0.75], [2, 0, 0, 0.5]]
        assert split.labels.tolist() == [[1, 2, 0]] * split.n_images
    assert split.classes == ['dog', 'man', 'tree'] and split.predicates == ['on', 'near']
    assert check(full).ok
    before = tree(full)
    assert convert.convert_sgb(sgb, full) == ['all is there already'] and tree(full) == before


def test_sgb_goes_on_after_an_interruption(sgb, full, tmp_path, monkeypatch):
    shutil.copytree(full, tmp_path / 'whole')
    convert.convert_sgb(sgb, tmp_path / 'whole')
    calls = dies_at(monkeypatch, 'triples_from_detector', 4)
    with pytest.raises(KeyboardInterrupt):
        convert.convert_sgb(sgb, full)
    assert not list(full.glob('*triples.jsonl'))
    convert.convert_sgb(sgb, full)
    assert len(calls) == 7 and tree(full) == tree(tmp_path / 'whole')


def test_a_picture_too_many_or_too_few(sgb, full):
    detections = predictions(True)
    write_predictions(sgb, detections | {'9': detections['0']})
    assert "picture '9' is none of the 6" in refused(convert.convert_sgb, sgb, full)
    begin_anew(full)
    write_predictions(sgb, {key: detections[key] for key in detections if key != '2'})
    message = refused(convert.convert_sgb, sgb, full)
    assert 'train_triples.jsonl: 1 of 3 images are not in the source' in message
    assert 'the first is 1002' in message
    assert 'other settings' in refused(convert.convert_sgb, sgb, full, top=3)
    write_predictions(sgb, detections)
    # goes on
    convert.convert_sgb(sgb, full)


def test_scene_graphs_need_boxes(sgb, full, tmp_path):
    bare = tmp_path / 'bare'
    shutil.copytree(full, bare, ignore=shutil.ignore_patterns('*boxes*'))
    assert 'giving relations to regions needs it' in refused(convert.convert_sgb, sgb, bare)


@pytest.mark.parametrize('lacking', ['rel_pairs', 'bbox_labels', None])
def test_broken_detections(sgb, full, lacking):
    broken = predictions(True)['0'] | dict(rel_labels=[9, 0, 0])
    if lacking:
        broken = {key: value for key, value in predictions(True)['0'].items() if key != lacking}
    write_predictions(sgb, {'0': broken})
    message = refused(convert.convert_sgb, sgb, full)
    assert '1000.jpg: ' in message
    assert ('rel_labels[0] is 9' if lacking is None else 'a detection without') in message


LABELS = ['dog', 'man', 'tree']


def lgsgm_picture(detection):
    "A detection in names."
    labelled = [f'{label}:{k}' for k, label in enumerate(LABELS)]
    rels = []
    for (i, j), label in zip(detection['rel_pairs'], detection['rel_labels']):
        if label:
            rels.append([labelled[i], ['on', 'near'][label - 1], labelled[j]])
    return dict(labels=LABELS, bbox=detection['bbox'], rels=rels)


@pytest.fixture
def joblibs(tmp_path):
    "Two files of three pictures each."
    pictures = [lgsgm_picture(detection) for detection in predictions(False).values()]
    named = [(f'{name}.jpg', told) for name, told in zip(NAMES, pictures)]
    paths = [tmp_path / 'a.joblib', tmp_path / 'b.joblib']
    for path, three in zip(paths, (named[:3], named[3:])):
        path.write_bytes(pickle.dumps(dict(three)))
    return paths


def triples_in_names(split, row):
    return {(i, split.predicates[k], j) for i, k, j, _ in split.triples[row]}


def test_lgsgm_agrees_with_sgb(sgb, joblibs, full, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(full, other)
    convert.convert_sgb(sgb, full)
    convert.convert_lgsgm(*joblibs, out=other)
    assert Split(other, 'train').predicates == ['near', 'on']
    for name in ('train', 'dev', 'test'):
        ours = Split(full, name)
        theirs = Split(other, name)
        for row in range(ours.n_images):
            assert triples_in_names(ours, row) == triples_in_names(theirs, row)
            assert all(confidence == 1 for *_, confidence in theirs.triples[row])
        np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_lgsgm_files_that_are_something_else(tmp_path):
    path = tmp_path / 'x.joblib'
    path.write_bytes(pickle.dumps([1]))
    assert 'is not a dict of pictures' in refused(convert.convert_lgsgm, path, out=tmp_path)
    path.write_bytes(pickle.dumps(dict(x=Runs((os.system, ('true',))))))
    assert 'is not looked up' in refused(convert.convert_lgsgm, path, out=tmp_path)


def test_a_region_far_from_all_detections_has_no_class():
    detection = dict(bbox=[[0, 0, 10, 10], [100, 100, 120, 120]], bbox_labels=[3, 1])
    regions = np.array([[0, 0, 10, 9.0], [50, 50, 60, 60], [99, 99, 121, 121], [0, 0, 0, 0]])
    assert convert.region_labels(regions, detection, 0.5).tolist() == [2, -1, 0, -1]
    nothing = dict(bbox=[], bbox_labels=[])
    assert convert.region_labels(np.zeros((2, 4)), nothing, 0.5).tolist() == [-1, -1]


# --- Entities


def owners(words):
    "The word that each letter belongs to."
    numbers = []
    for i, word in enumerate(words):
        numbers += [i] * sum(character.isalnum() for character in word.lower())
    return numbers


def carry_plain(caption, words, phrases):
    "Every letter has an owner, in either text: phrases are carried over letter by letter."
    ours = owners(caption.split())
    theirs = owners(words)
    spans = []
    for first, n, kind, chain in phrases:
        mine = [mine for mine, their in zip(ours, theirs) if first <= their < first + n]
        if mine:
            spans.append([min(mine), max(mine) + 1, kind, chain])
    return spans


PIECES = ["a", "man", "'s", ",", '"', "t-shirt", "2", "n't", ".", "Ünder", "--"]
spaced = st.tuples(st.sampled_from(PIECES), st.booleans())


@given(st.lists(spaced, min_size=1, max_size=12), st.data())
@settings(max_examples=100, deadline=None)
def test_spans_are_carried_letter_by_letter(pieces, data):
    words = [word for word, _ in pieces]
    caption = ''.join(word + ' ' * space for word, space in pieces).strip()
    first = data.draw(st.integers(0, len(words) - 1))
    n = data.draw(st.integers(1, len(words) - first))
    phrases = [(first, n, 'people', 3), (0, len(words), 'scene', 0)]
    assert convert.carry_spans(caption, words, phrases) == carry_plain(caption, words, phrases)


def test_sentences_of_entities():
    words, phrases = convert.entity_sentence(
        "[/EN#8/people/other Two men] in [/EN#0/notvisual it] 's [/EN#12/clothing green shirts] ."
    )
    assert words == ['Two', 'men', 'in', 'it', "'s", 'green', 'shirts', '.']
    assert phrases == [(0, 2, 'people', 8), (3, 1, 'notvisual', 0), (5, 2, 'clothing', 12)]


def tokenised(text):
    "As Flickr30K Entities writes a caption."
    for sign, apart in (('.', ' .'), (',', ' ,'), ('"', ' `` '), ("'s", " 's")):
        text = text.replace(sign, apart)
    return text.split()


def marked(text, chain):
    "A line of Sentences/*.txt whose first word is a phrase."
    first, *rest = tokenised(text)
    return f'[/EN#{chain}/people {first}] {" ".join(rest)}'


def thing(*names, box=None, more=''):
    "An object of Annotations/*.xml."
    text = ''.join(f'<name>{name}</name>' for name in names)
    if box:
        sides = zip(('xmin', 'ymin', 'xmax', 'ymax'), box)
        numbers = ''.join(f'<{side}>{number}</{side}>' for side, number in sides)
        text += f'<bndbox>{numbers}</bndbox>'
    return f'<object>{text}{more}</object>'


@pytest.fixture
def entities(tmp_path):
    folder = tmp_path / 'flickr30k_entities'
    for name in ('Sentences', 'Annotations'):
        (folder / name).mkdir(parents=True)
    scene = thing(50, more='<scene>1</scene><nobndbox>0</nobndbox>')
    for chain, name in enumerate(NAMES, 1):
        lines = ''.join(marked(text, chain) + '\n' for text in CAPTIONS[name])
        (folder / f'Sentences/{name}.txt').write_text(lines, encoding='utf-8')
        two = thing(chain, 99, box=(1, 2, 30, 40)) + thing(chain, box=(5, 5, 6, 6))
        annotation = f'<annotation>{two}{scene}</annotation>'
        (folder / f'Annotations/{name}.xml').write_text(annotation)
    return folder


def test_entities_round_trip(entities, full):
    assert convert.convert_entities(entities, full) == [
        'dev: 1 images, 2 of 2 captions have phrases',
        'test: 2 images, 4 of 4 captions have phrases',
        'train: 3 images, 6 of 6 captions have phrases',
    ]
    for split in (Split(full, 'train'), Split(full, 'dev'), Split(full, 'test')):
        for row, name in enumerate(split.ids):
            chain = NAMES.index(name) + 1
            boxes = {str(chain): [[0, 1, 29, 39], [4, 4, 5, 5]], '99': [[0, 1, 29, 39]]}
            phrases = [[[0, 1, 'people', chain]]] * 2
            assert split.phrases[row] == dict(phrases=phrases, boxes=boxes)
    assert check(full).ok and convert.convert_entities(entities, full) == ['all is there already']


def test_entities_need_no_features_and_go_on(entities, data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / 'whole')
    convert.convert_entities(entities, tmp_path / 'whole')
    calls = dies_at(monkeypatch, 'entity_boxes', 5)
    with pytest.raises(KeyboardInterrupt):
        convert.convert_entities(entities, data)
    convert.convert_entities(entities, data)
    assert len(calls) == 7 and tree(data) == tree(tmp_path / 'whole')


def test_captions_that_entities_do_not_have(entities, data, tmp_path):
    captions = (data / 'train_caps.txt').read_text(encoding='utf-8').split('\n')
    changed = '\n'.join(['Something else.'] + captions[1:])
    (data / 'train_caps.txt').write_text(changed, encoding='utf-8')
    report = convert.convert_entities(entities, data)
    assert 'train: 3 images, 5 of 6 captions have phrases' in report
    first = (data / 'train_phrases.jsonl').read_text().split('\n')[0]
    assert json.loads(first)['phrases'][0] == []
    (data / 'test_phrases.jsonl').unlink()
    (data / 'test_caps.txt').write_text('x\ny\nz\nBoats at sea.\n')
    assert '3 of 4 captions are no sentence' in refused(convert.convert_entities, entities, data)
    assert not (data / 'test_phrases.jsonl').exists()


def test_entities_files_that_are_missing(entities, data):
    (entities / 'Sentences/1003.txt').unlink()
    assert '1003.txt: this file is missing' in refused(convert.convert_entities, entities, data)
    (entities / 'Sentences/1003.txt').write_text('A cat .\n')
    (entities / 'Annotations/1003.xml').unlink()
    assert '1003.xml: this file is missing' in refused(convert.convert_entities, entities, data)
    assert 'there is no such folder' in refused(convert.convert_entities, data, data)


@pytest.mark.parametrize(
    'good, broken',
    [
        ('</object></annotation>', ''),
        ('<xmin>1<', '<xmin>x<'),
        ('<xmin>1<', '<xmin>31<'),
        ('<ymax>40</ymax>', ''),
    ],
)
def test_broken_annotations(entities, data, good, broken):
    path = entities / 'Annotations/1003.xml'
    assert good in path.read_text()
    path.write_text(path.read_text().replace(good, broken))
    message = refused(convert.convert_entities, entities, data)
    assert '1003.xml: is not a good annotation' in message


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
    assert check(data).ok
    assert Split(data, 'train').features.dtype == np.float16
    assert Split(data, 'train').phrases is not None


@pytest.mark.parametrize(
    'words, message',
    [
        (
            ('karpathy', 'dataset.json', '--half'),
            'karpathy: has no option --half; it has --per-image, --restval',
        ),
        (('tsv', 'x'), 'there is no such kind'),
        (('karpathy', 'dataset.json', 'x'), '2 sources; expected one'),
        (('bottom-up', 'x.tsv'), 'holds no {s}_ids.txt'),
    ],
)
def test_faults_of_the_command_are_one_line(imtm, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    karpathy(tmp_path / 'dataset.json')
    code, _, errors = imtm('convert', *words, '--out', 'data')
    lines = [line for line in errors.split('\n') if line.startswith('imtm: ')]
    assert code == 2 and len(lines) == 1 and message in lines[0], errors
