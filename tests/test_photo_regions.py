"""A folder of photographs through a detector.

Every file has one treatment, and a row depends on nothing but its picture.
"""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import imtm_lite
from imtm_lite.data import Split
from imtm_lite.files import DataError
from imtm_lite.workshop import photos
from imtm_lite.workshop.check import check

transformers = pytest.importorskip('transformers')


def save_yolos(folder, seed=0):
    torch.manual_seed(seed)
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=6,
        initializer_range=0.5,
        num_labels=3,
        id2label={0: 'dog', 1: 'man', 2: 'tree'},
    )
    transformers.YolosForObjectDetection(config).save_pretrained(folder)
    processor = transformers.YolosImageProcessor(size=dict(shortest_edge=32, longest_edge=64))
    processor.save_pretrained(folder)
    return folder


def save_rtdetr(folder):
    torch.manual_seed(0)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type='basic',
        out_features=['stage2', 'stage3', 'stage4'],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        d_model=16,
        encoder_hidden_dim=16,
        encoder_in_channels=[12, 16, 20],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_layers=1,
        num_queries=8,
        num_labels=3,
        decoder_in_channels=[16] * 3,
        num_denoising=0,
    )
    transformers.RTDetrForObjectDetection(config).save_pretrained(folder)
    transformers.RTDetrImageProcessor(size=dict(height=64, width=64)).save_pretrained(folder)
    return folder


def save_detr(folder):
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type='basic',
        out_features=['stage4'],
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=7,
        num_labels=3,
    )
    transformers.DetrForObjectDetection(config).save_pretrained(folder)
    processor = transformers.DetrImageProcessor(size=dict(shortest_edge=32, longest_edge=64))
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    return save_yolos(tmp_path_factory.mktemp('detector'))


def shot(w=60, h=40, mode='RGB', seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (h // 4, w // 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((w, h))
    ImageDraw.Draw(picture).rectangle([0, h // 2, w // 3, h], fill='red')
    return picture.convert(mode)


def save_bad_pictures(folder):
    "Files that call themselves pictures, and are left out."
    shot(40, 70, seed=2).save(folder / 'cut.jpg')
    (folder / 'cut.jpg').write_bytes((folder / 'cut.jpg').read_bytes()[:-300])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'phone.heic').write_bytes(b'\0\0\0\x18ftypheic')
    shot(16, 640).save(folder / 'strip.png')
    (folder / 'text.gif').write_text('hello')
    shot(8, 8).save(folder / 'tiny.png')


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / 'album'
    (folder / 'sub').mkdir(parents=True)
    (folder / '.hidden').mkdir()
    shot().save(folder / 'red_dog-01.png')
    shot(seed=1).save(folder / 'sub/red_dog-01.png')
    shot(40, 70, seed=2).save(folder / 'tall.jpg')
    save_bad_pictures(folder)
    # no pictures of the album
    shot().save(folder / '.hidden/x.png')
    shot().save(folder / '.y.png')
    (folder / 'notes.txt').write_text('no picture')
    return folder


GOOD = ['red_dog-01.png', 'sub/red_dog-01.png', 'tall.jpg']
BAD = ['cut.jpg', 'empty.png', 'phone.heic', 'strip.png', 'text.gif', 'tiny.png']


def refused(work, *args, **how):
    with pytest.raises(DataError) as fault:
        work(*args, **how)
    assert '\n' not in str(fault.value)
    return str(fault.value)


# --- pictures


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_exif_orientation_stands_upright(tmp_path, orientation):
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    right = shot()
    exif = Image.Exif()
    exif[0x0112] = orientation
    (right if undo is None else right.transpose(undo)).save(tmp_path / 'x.png', exif=exif)
    np.testing.assert_array_equal(photos.upright(tmp_path / 'x.png'), right)


@pytest.mark.parametrize(
    'mode, name',
    [('L', 'l.png'), ('P', 'p.png'), ('1', 'b.png'), ('LA', 'la.png'), ('CMYK', 'c.tif')],
)
def test_grey_palette_alpha_and_cmyk_become_rgb(tmp_path, mode, name):
    shot(mode=mode).save(tmp_path / name)
    picture = photos.upright(tmp_path / name)
    assert picture.mode == 'RGB' and picture.size == (60, 40)


def test_grey_is_three_times_the_same(tmp_path):
    grey = np.asarray(shot(mode='L'))
    Image.fromarray(grey).save(tmp_path / 'l.png')
    picture = photos.upright(tmp_path / 'l.png')
    np.testing.assert_array_equal(picture, grey[..., None].repeat(3, 2))


def test_sixteen_bits_become_eight(tmp_path):
    grey = np.asarray(shot(mode='L'))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'deep.png')
    picture = photos.upright(tmp_path / 'deep.png')
    np.testing.assert_array_equal(np.asarray(picture)[..., 0], grey)


def test_what_is_transparent_lies_on_white(tmp_path):
    picture = shot(mode='RGBA')
    picture.putalpha(0)
    picture.save(tmp_path / 'clear.png')
    assert (np.asarray(photos.upright(tmp_path / 'clear.png')) == 255).all()
    picture = shot(mode='RGBA')
    picture.putalpha(128)
    picture.save(tmp_path / 'half.png')
    on_white = np.asarray(photos.upright(tmp_path / 'half.png'), float)
    wanted = np.asarray(shot(), float) * 128 / 255 + 127
    np.testing.assert_allclose(on_white, wanted, atol=1.5)


def test_of_moving_pictures_the_first_counts(tmp_path):
    second = Image.new('P', (60, 40))
    shot(mode='P').save(tmp_path / 'm.gif', save_all=True, append_images=[second])
    assert np.asarray(photos.upright(tmp_path / 'm.gif')).std() > 10


def test_large_pictures_become_small(tmp_path):
    shot(400, 200).save(tmp_path / 'x.png')
    assert photos.upright(tmp_path / 'x.png', 100).size == (100, 50)
    assert photos.upright(tmp_path / 'x.png', 1000).size == (400, 200)


def test_files_of_a_folder(album):
    assert photos.picture_files(album) == sorted(GOOD + BAD)
    assert 'no such folder' in refused(photos.picture_files, album / 'nowhere')


# --- detectors


def read_by_transformers(detector, picture, **how):
    "What transformers reads from the detector: best first, boxes inside the picture."
    pixels = detector.processor(images=picture, return_tensors='pt')['pixel_values']
    with torch.no_grad():
        output = detector.model(pixels)
    (theirs,) = detector.processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[picture.size[::-1]], **how
    )
    order = theirs['scores'].argsort(descending=True)
    theirs = {key: column[order] for key, column in theirs.items()}
    edges = torch.tensor(2 * picture.size, dtype=torch.float32)
    theirs['boxes'] = theirs['boxes'].clamp(torch.zeros(4), edges)
    return theirs


@pytest.mark.parametrize('save', [save_yolos, save_rtdetr, save_detr])
def test_detectors_say_what_transformers_reads_from_them(tmp_path, save):
    detector = photos.Detector(save(tmp_path))
    picture = shot(90, 50, seed=5)
    how = dict(use_focal_loss=True) if save is save_rtdetr else {}
    theirs = read_by_transformers(detector, picture, **how)
    ours = detector(picture, regions=99)
    # that one lists the classes of a query one by one: only the best compares
    compared = slice(1) if save is save_rtdetr else slice(None)
    np.testing.assert_array_equal(ours['labels'][compared], theirs['labels'][compared])
    np.testing.assert_allclose(ours['scores'][compared], theirs['scores'][compared], rtol=1e-5)
    np.testing.assert_allclose(ours['boxes'][0], theirs['boxes'][0], atol=1e-3)


@pytest.mark.parametrize('save', [save_yolos, save_rtdetr, save_detr])
def test_regions_are_the_best_queries(tmp_path, save):
    detector = photos.Detector(save(tmp_path))
    picture = shot(90, 50, seed=5)
    queries = {save_yolos: 6, save_rtdetr: 8, save_detr: 7}[save]
    ours = detector(picture, regions=99)
    assert ours['features'].shape == (queries, 16)
    assert (np.diff(ours['scores']) <= 0).all()
    few = detector(picture, regions=3)
    for key in ours:
        np.testing.assert_array_equal(few[key], ours[key][:3])


def class_head(detector, save):
    if save is save_rtdetr:
        return detector.model.model.decoder.class_embed[-1]
    return detector.model.class_labels_classifier


@pytest.mark.parametrize('save', [save_yolos, save_rtdetr, save_detr])
def test_features_are_the_states_from_which_class_and_box_are_read(tmp_path, save):
    detector = photos.Detector(save(tmp_path))
    ours = detector(shot(seed=3), regions=99)
    with torch.no_grad():
        logits = class_head(detector, save)(torch.from_numpy(ours['features']))
    scores = logits.sigmoid() if save is save_rtdetr else logits.softmax(1)[:, :-1]
    np.testing.assert_allclose(scores.max(1).values, ours['scores'], rtol=1e-4)
    np.testing.assert_array_equal(scores.argmax(1), ours['labels'])


def test_a_detector_that_is_not_there_is_one_line(tmp_path):
    assert 'gives no detector' in refused(photos.Detector, tmp_path / 'nowhere')


def test_a_detector_without_its_processor_is_one_line(tmp_path, detector):
    bare = shutil.copytree(detector, tmp_path / 'bare')
    (bare / 'preprocessor_config.json').unlink()
    assert 'preprocessor_config.json' in refused(photos.Detector, bare)


def test_pickled_weights_are_not_loaded(tmp_path, detector):
    pickled = shutil.copytree(detector, tmp_path / 'pickled')
    (pickled / 'model.safetensors').unlink()
    weights = photos.Detector(detector).model.state_dict()
    torch.save(weights, pickled / 'pytorch_model.bin')
    assert 'model.safetensors' in refused(photos.Detector, pickled)


def test_a_model_that_is_no_detector_is_one_line(tmp_path, detector):
    bert = shutil.copytree(detector, tmp_path / 'bert')
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    transformers.BertModel(config).save_pretrained(bert)
    assert 'gives no detector' in refused(photos.Detector, bert)


def test_a_detector_that_lacks_weights_is_one_line(tmp_path, detector):
    cut = shutil.copytree(detector, tmp_path / 'cut')
    weights = load_file(cut / 'model.safetensors')
    del weights['vit.embeddings.detection_tokens']
    save_file(weights, cut / 'model.safetensors', metadata=dict(format='pt'))
    assert 'lacks 1 weights' in refused(photos.Detector, cut)


# --- a folder


@pytest.fixture
def converted(album, detector, tmp_path):
    "The album in the layout."
    photos.write_photos(album, tmp_path / 'data', detector=detector, regions=4)
    return tmp_path / 'data'


def test_a_folder_becomes_a_split(album, detector, tmp_path):
    data = tmp_path / 'data'
    report = photos.write_photos(album, data, detector=detector, regions=4)
    assert report[0] == 'test: 3 pictures' and report[1].startswith('6 left out')
    split = Split(data, 'test')
    assert split.ids == GOOD
    assert split.captions == ['red dog 01', 'red dog 01', 'tall']
    assert split.classes == ['dog', 'man', 'tree']
    lines = (data / 'test_left_out.txt').read_text().split('\n')[:-1]
    assert [line.split('\t')[0] for line in lines] == BAD
    assert check(data).ok and not list(data.rglob('*.partial'))


def test_a_row_depends_on_nothing_but_its_picture(album, converted, detector):
    split = Split(converted, 'test')
    look = photos.Detector(detector)
    for row, name in enumerate(split.ids):
        alone = look(photos.upright(album / name), regions=4)
        for key in ('features', 'boxes', 'labels', 'scores'):
            np.testing.assert_array_equal(getattr(split, key)[row], alone[key])
        size = Image.open(album / name).size
        assert split.picture(row).size == tuple(split.sizes[row]) == size
    assert split.features.any((1, 2)).all()
    assert np.abs(split.features[0] - split.features[1]).max() > 1e-3


def test_how_it_was_made_is_written_down(converted, detector):
    about = json.loads((converted / 'test_detector.json').read_text())
    assert about['made_by'] == f'imtm_lite {imtm_lite.__version__}'
    assert about['detector'] == str(detector)
    assert (about['side'], about['asked']) == (1333, 4)


def test_a_detector_of_few_queries_gives_few_regions(album, detector, tmp_path):
    photos.write_photos(album, tmp_path / 'data', detector=detector, half=True, pictures=False)
    split = Split(tmp_path / 'data', 'test')
    assert split.features.shape == (3, 6, 16) and split.features.dtype == np.float16
    assert not (tmp_path / 'data/pictures').exists()


def dies_at(monkeypatch, call):
    "Let the reading of pictures be interrupted at a call; gives the list of calls."
    good = photos.upright
    calls = []

    def dies(path, side):
        calls.append(path.name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return good(path, side)

    monkeypatch.setattr(photos, 'upright', dies)
    return calls


def tree(folder):
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_folder_that_is_interrupted_goes_on(album, detector, tmp_path, monkeypatch):
    data = tmp_path / 'data'
    photos.write_photos(album, tmp_path / 'whole', detector=detector)
    calls = dies_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        photos.write_photos(album, data, detector=detector)
    assert not list(data.glob('test_*.npy'))
    message = refused(photos.write_photos, album, data, detector=detector, side=50)
    assert 'other settings' in message
    photos.write_photos(album, data, detector=detector)
    assert len(calls) == len(GOOD + BAD) + 1
    assert tree(data) == tree(tmp_path / 'whole')


def test_new_pictures_of_a_folder_that_is_whole_are_told(album, converted, detector):
    shot(seed=9).save(album / 'new.png')
    (line,) = photos.write_photos(album, converted, detector=detector)
    assert line == (
        'test: 3 pictures are there already; 1 are new since, the first is new.png: '
        'convert into a folder of its own'
    )


def test_captions_of_photographs(album, detector, tmp_path):
    path = tmp_path / 'caps.tsv'
    path.write_text('tall.jpg\tA  tall tree.\nred_dog-01.png\tA dog.\ntall.jpg\tA tree.\n')
    how = dict(detector=detector, split='train', captions=path)
    photos.write_photos(album, tmp_path / 'data', **how)
    split = Split(tmp_path / 'data', 'train')
    assert split.captions == ['A dog.', 'red dog 01', 'A tall tree.', 'A tree.']
    assert split.caption_image.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(
    'text, message',
    [
        ('x.png\thello\n', 'line 1: there is no picture x.png'),
        ('tall.jpg hello\n', 'expected: path'),
        ('tall.jpg\t \n', 'expected: path'),
    ],
)
def test_captions_that_are_wrong_are_one_line(album, detector, tmp_path, text, message):
    path = tmp_path / 'bad.tsv'
    path.write_text(text)
    how = dict(detector=detector, captions=path)
    assert message in refused(photos.write_photos, album, tmp_path / 'other', **how)


def test_folder_faults(album, detector, tmp_path):
    for inside in (album, album / 'data'):
        assert 'lies inside' in refused(photos.write_photos, album, inside, detector=detector)
    empty = tmp_path / 'empty'
    empty.mkdir()
    how = dict(out=tmp_path / 'data', detector=detector)
    assert 'holds no pictures' in refused(photos.write_photos, empty, **how)
    (empty / 'x.jpg').write_bytes(b'no')
    message = refused(photos.write_photos, empty, **how)
    assert 'none of the 1 pictures can be read, the first: not readable: cannot' in message


def test_all_splits_have_the_same_classes(album, converted, tmp_path):
    other = save_yolos(tmp_path / 'other', seed=1)
    config = (other / 'config.json').read_text().replace('"dog"', '"cat"')
    (other / 'config.json').write_text(config)
    how = dict(detector=other, split='dev')
    assert 'other classes' in refused(photos.write_photos, album, converted, **how)


def test_file_names_that_no_line_can_hold_are_left_out(detector, tmp_path):
    folder = tmp_path / 'album'
    folder.mkdir()
    shot().save(folder / 'good.png')
    for name in ('two\nlines.png', ' blank.png'):
        shot().save(folder / name)
    shot().save(os.fsencode(str(folder)) + b'/caf\xe9.png', format='PNG')
    photos.write_photos(folder, tmp_path / 'data', detector=detector)
    assert Split(tmp_path / 'data', 'test').ids == ['good.png']
    lines = (tmp_path / 'data/test_left_out.txt').read_text(encoding='utf-8').split('\n')
    assert len(lines) == 4
    assert any(line.startswith("'two\\nlines.png'") for line in lines)
    again = photos.write_photos(folder, tmp_path / 'data', detector=detector)
    assert again == ['test: 1 pictures are there already']


def test_nothing_needs_torchvision_or_timm(detector):
    assert type(photos.Detector(detector).processor).__name__.endswith('Pil')


@pytest.fixture
def imtm(monkeypatch, capsys):
    "The program in this process: exit code, output, errors."
    from imtm_lite.workshop.cli import main

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['imtm', *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


def test_photographs_are_searched_by_a_matcher_of_the_same_detector(
    imtm, album, detector, tmp_path
):
    data = tmp_path / 'data'
    for split in ('train', 'dev', 'test'):
        words = ('regions', album, '--detector', detector, '--out', data, '--split', split)
        code, output, errors = imtm(*words)
        assert code == 0 and 'trained on features of' in ' '.join(output.split()), errors
    small = '--epochs 1 --size 2 --min-freq 1 --set width=8 --set word_width=4 --device cpu'
    run = tmp_path / 'run'
    code, _, errors = imtm('train', 'scan', '--data', data, '--out', run, *small.split())
    assert code == 0, errors
    page = tmp_path / 'found.png'
    words = ('search', run, 'a red dog', '--data', data, '--top', 3, '--out', page)
    code, output, errors = imtm(*words)
    assert code == 0 and all(name in output for name in GOOD), errors
    assert page.stat().st_size > 3000


def test_a_detector_that_is_not_there_is_one_line_of_the_command(imtm, album, tmp_path):
    words = ('--detector', tmp_path / 'none', '--out', tmp_path / 'x')
    code, _, errors = imtm('regions', album, *words)
    assert code == 2 and 'gives no detector' in errors
