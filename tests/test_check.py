"Checking a data set: every fault of a folder, told once, however large the folder is."

import re

import numpy as np
import pytest

import imtm_lite.workshop.check as module
from imtm_lite.data import Split
from imtm_lite.files import DataError
from imtm_lite.workshop.check import check
from tests.layout import LINES, OPENING, READING, N, lines, one_line, put, save, store_copies, tiny


@pytest.fixture
def root(tmp_path):
    return tiny(tiny(tmp_path / 'set'), 'dev', 3)


@pytest.mark.parametrize('case', OPENING)
def test_faults_of_opening_are_reported(root, case):
    breaks, says = OPENING[case]
    breaks(root)
    assert any(re.search(says, str(problem)) for problem in check(root).problems)


@pytest.mark.parametrize('case', READING | LINES)
def test_faults_of_reading_are_reported_and_nothing_else(root, case):
    breaks, says = (READING | LINES)[case]
    breaks(root)
    assert [bool(re.search(says, str(problem))) for problem in check(root).problems] == [True]


def test_a_minimal_split_is_fine(root):
    for path in root.iterdir():
        if not path.name.endswith(('_ims.npy', '_caps.txt', '_ids.txt')):
            path.unlink()
    report = check(root)
    assert report.ok and any('triples' in line and 'cmsei' in line for line in report.absent)


@pytest.mark.parametrize('others', ['stored', 'images'])
def test_redundant_files_are_fine(root, others):
    store_copies(root, others)
    assert check(root).ok


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match='there is no such folder'):
        check(tmp_path / 'x')
    with pytest.raises(DataError, match='no split found'):
        check(tmp_path)


def test_copies_that_differ(root):
    "Beyond the first and the last image, which opening compares."
    features = np.load(root / 'train_ims.npy').repeat(5, 0)
    lines(root / 'train_ids.txt', [f'train{i // 5}' for i in range(5 * N)])
    features[12] += 1
    np.save(root / 'train_ims.npy', features)
    problem = check(root).problems[0]
    assert 'rows 10 and 12 should be copies of image train2, but differ' in str(problem)


def test_undeclared_copies(tmp_path):
    root = tiny(tmp_path / 'set', n=30, per=1)
    features = np.load(root / 'train_ims.npy')
    np.save(root / 'train_ims.npy', features[:6].repeat(5, 0))
    assert 'seem to be the same as the one before' in str(check(root).problems[0])


def test_boxes_within_the_tolerance_are_fine(root):
    save('boxes', put((2, 1), (50, -0.9, 100.9, 60)))(root)
    assert check(root).ok


def test_check(root):
    report = check(root)
    assert report.ok and list(report.table) == ['train', 'dev']
    assert 'no problems found' in str(report)
    train = report.table['train']
    dev = report.table['dev']
    assert train['regions x width'] == '4 x 8' and dev['triples an image'] == '1.3'
    # "dev", one word of nine
    assert train['unknown words'] == '0.00 %' and dev['unknown words'] == '11.11 %'
    lines(root / 'dev_ids.txt', ['train1', 'x', 'y'])
    assert '1 ids of dev occur in train too, for example train1' in str(check(root))


def test_check_lists_all(root):
    for case in ('nan', 'inside out', 'class'):
        READING[case][0](root)
    for case in ('triples row', 'span', 'probes same'):
        LINES[case][0](root)
    (root / 'dev_caps.txt').write_bytes(b'\xff')
    report = check(root)
    assert len(report.problems) == 7 and not report.ok and str(report).count('train_') == 6
    assert 'no problems' not in str(report)


def test_check_tells_of_copies(root):
    "Features stored once a caption are read once; the report says how much of the file is copies."
    assert 'are copies' not in str(check(root))
    features = np.load(root / 'train_ims.npy')
    split = Split(root, 'train')
    per = len(split.captions) // split.n_images
    assert per > 1
    np.save(root / 'train_ims.npy', features.repeat(per, 0))
    report = check(root)
    assert report.ok
    assert report.table['train']['images'] == str(len(features))
    assert report.table['train']['stored as'].endswith(f'x{per}')
    assert f'train_ims.npy stores each image {per} times' in str(report)


@pytest.fixture
def pictured(root):
    "The second image is 40 by 20, and its boxes are within."
    split = Split(root, 'train')
    sizes = np.array(split.sizes)
    sizes[1] = 40, 20
    np.save(root / 'train_img_sizes.npy', sizes)
    boxes = np.array(split.boxes)
    boxes[1] = [0, 0, 9, 9]
    np.save(root / 'train_boxes.npy', boxes)
    (root / 'pictures').mkdir()
    return root


@pytest.mark.parametrize('size', [(20, 10), (10, 5), (41, 20)])
def test_pictures_of_another_scale_are_fine(pictured, size):
    "And pictures that are not there are not missed."
    Image = pytest.importorskip('PIL.Image')
    Image.new('RGB', size).save(pictured / 'pictures' / 'train1.png')
    report = check(pictured)
    assert report.ok and report.table['train']['sizes fit'] == '1 pictures'


@pytest.mark.parametrize('size', [(10, 20), (15, 10)])
def test_pictures_of_other_proportions_are_not(pictured, size):
    Image = pytest.importorskip('PIL.Image')
    Image.new('RGB', size).save(pictured / 'pictures' / 'train1.png')
    report = check(pictured)
    assert not report.ok
    width, height = size
    one_line(
        report.problems[0],
        r'train_img_sizes.npy: row 1 \(image train1\): 40 x 20, '
        f'but its picture is {width} x {height}; the proportions of 1 of 1 pictures differ',
    )


def test_check_in_pieces(root, monkeypatch):
    "However small the pieces, the report is the same."
    want = str(check(root))
    sizes = []

    def two_at_a_time(split):
        for start in range(0, split.n_images, 2):
            rows = np.arange(start, min(start + 2, split.n_images))
            sizes.append(len(rows))
            yield rows

    monkeypatch.setattr(module, 'rows_in_chunks', two_at_a_time)
    assert str(check(root)) == want
    assert set(sizes) == {1, 2}
