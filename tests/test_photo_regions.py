"A folder of photographs through a detector: every file has one treatment, and a row depends on nothing but its picture."

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from imtm_lite.data import Split
from imtm_lite.files import DataError
from imtm_lite.workshop import photos as p
from imtm_lite.workshop.check import check

transformers = pytest.importorskip('transformers')


def save_yolos(folder, seed=0, width=16, queries=6, **more):
    torch.manual_seed(seed)
    config = transformers.YolosConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=queries,
        initializer_range=0.5,
        num_labels=3,
        id2label={0: 'dog', 1: 'man', 2: 'tree'},
        **more,
    )
    transformers.YolosForObjectDetection(config).save_pretrained(folder)
    transformers.YolosImageProcessor(size=dict(shortest_edge=32, longest_edge=64)).save_pretrained(
        folder
    )
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
    transformers.DetrImageProcessor(size=dict(shortest_edge=32, longest_edge=64)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    return save_yolos(tmp_path_factory.mktemp('detector'))


def shot(w=60, h=40, mode='RGB', seed=0):
    picture = Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (h // 4, w // 4, 3), dtype=np.uint8)
    ).resize((w, h))
    ImageDraw.Draw(picture).rectangle([0, h // 2, w // 3, h], fill='red')
    return picture.convert(mode)


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / 'album'
    (folder / 'sub').mkdir(parents=True)
    (folder / '.hidden').mkdir()
    shot().save(folder / 'red_dog-01.png')
    shot(seed=1).save(folder / 'sub/red_dog-01.png')
    shot(40, 70, seed=2).save(folder / 'tall.jpg')
    (folder / 'cut.jpg').write_bytes((folder / 'tall.jpg').read_bytes()[:-300])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'text.gif').write_text('hello')
    shot(8, 8).save(folder / 'tiny.png')
    shot(16, 640).save(folder / 'strip.png')
    shot().save(folder / '.hidden/x.png')
    shot().save(folder / '.y.png')
    (folder / 'phone.heic').write_bytes(b'\0\0\0\x18ftypheic')
    (folder / 'notes.txt').write_text('no picture')
    return folder


GOOD = ['red_dog-01.png', 'sub/red_dog-01.png', 'tall.jpg']
BAD = ['cut.jpg', 'empty.png', 'phone.heic', 'strip.png', 'text.gif', 'tiny.png']


def refused(f, *args, **how):
    with pytest.raises(DataError) as fault:
        f(*args, **how)
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
    np.testing.assert_array_equal(p.upright(tmp_path / 'x.png'), right)


def test_grey_palette_alpha_16_bits_cmyk_and_moving_pictures(tmp_path):
    right = np.asarray(shot())
    for mode, file in (
        ('L', 'l.png'),
        ('P', 'p.png'),
        ('1', 'b.png'),
        ('LA', 'la.png'),
        ('CMYK', 'c.tif'),
    ):
        shot(mode=mode).save(tmp_path / file)
        got = p.upright(tmp_path / file)
        assert got.mode == 'RGB' and got.size == (60, 40)
    np.testing.assert_array_equal(
        p.upright(tmp_path / 'l.png'), np.asarray(shot(mode='L'))[..., None].repeat(3, 2)
    )
    clear = shot(mode='RGBA')
    clear.putalpha(0)
    clear.save(tmp_path / 'clear.png')
    assert (np.asarray(p.upright(tmp_path / 'clear.png')) == 255).all()
    half = shot(mode='RGBA')
    half.putalpha(128)
    half.save(tmp_path / 'half.png')
    np.testing.assert_allclose(
        np.asarray(p.upright(tmp_path / 'half.png'), float),
        right.astype(float) * 128 / 255 + 127,
        atol=1.5,
    )
    Image.fromarray((np.asarray(shot(mode='L')).astype(np.uint16) * 257)).save(
        tmp_path / 'deep.png'
    )
    np.testing.assert_array_equal(
        np.asarray(p.upright(tmp_path / 'deep.png'))[..., 0], np.asarray(shot(mode='L'))
    )
    shot(mode='P').save(tmp_path / 'm.gif', save_all=True, append_images=[Image.new('P', (60, 40))])
    assert np.asarray(p.upright(tmp_path / 'm.gif')).std() > 10


def test_large_pictures_become_small(tmp_path):
    shot(400, 200).save(tmp_path / 'x.png')
    assert p.upright(tmp_path / 'x.png', 100).size == (100, 50) and p.upright(
        tmp_path / 'x.png', 1000
    ).size == (400, 200)


def test_files_of_a_folder(album):
    assert p.picture_files(album) == sorted(GOOD + BAD)
    assert 'no such folder' in refused(p.picture_files, album / 'nowhere')


# --- detectors


@pytest.mark.parametrize('save', [save_yolos, save_rtdetr, save_detr])
def test_detectors_say_what_transformers_reads_from_them(tmp_path, save):
    d = p.Detector(save(tmp_path))
    picture = shot(90, 50, seed=5)
    with torch.no_grad():
        out = d.model(d.processor(images=picture, return_tensors='pt')['pixel_values'])
    Q = out.logits.shape[1]
    theirs = d.processor.post_process_object_detection(
        out,
        threshold=0.0,
        target_sizes=[(50, 90)],
        **dict(use_focal_loss=True) if save is save_rtdetr else {},
    )[0]
    ours = d(picture, regions=Q)
    assert ours['features'].shape == (Q, 16) and (np.diff(ours['scores']) <= 0).all()
    order = theirs['scores'].argsort(descending=True)
    assert ours['labels'][0] == theirs['labels'][order[0]]
    np.testing.assert_allclose(ours['scores'][0], theirs['scores'][order[0]], rtol=1e-5)
    np.testing.assert_allclose(
        ours['boxes'][0],
        theirs['boxes'][order[0]].clamp(torch.zeros(4), torch.tensor([90.0, 50, 90, 50])),
        atol=1e-3,
    )
    # that one lists the classes of a query one by one: only the best compares
    if save is not save_rtdetr:
        np.testing.assert_array_equal(ours['labels'], theirs['labels'][order])
        np.testing.assert_allclose(ours['scores'], theirs['scores'][order], rtol=1e-5)
    few = d(picture, regions=3)
    for k in ours:
        np.testing.assert_array_equal(few[k], ours[k][:3])


@pytest.mark.parametrize('save', [save_yolos, save_rtdetr, save_detr])
def test_features_are_the_states_from_which_class_and_box_are_read(tmp_path, save):
    d = p.Detector(save(tmp_path))
    ours = d(shot(seed=3), regions=99)
    head = {
        save_yolos: lambda m: m.class_labels_classifier,
        save_detr: lambda m: m.class_labels_classifier,
        save_rtdetr: lambda m: m.model.decoder.class_embed[-1],
    }[save](d.model)
    with torch.no_grad():
        logits = head(torch.from_numpy(ours['features']))
    scores = logits.sigmoid() if save is save_rtdetr else logits.softmax(1)[:, :-1]
    np.testing.assert_allclose(scores.max(1).values, ours['scores'], rtol=1e-4)
    np.testing.assert_array_equal(scores.argmax(1), ours['labels'])


def test_detectors_that_cannot_be_used_are_one_line(tmp_path, detector):
    assert 'gives no detector' in refused(p.Detector, tmp_path / 'nowhere')
    bare = shutil.copytree(detector, tmp_path / 'bare')
    (bare / 'preprocessor_config.json').unlink()
    assert 'preprocessor_config.json' in refused(p.Detector, bare)
    pickled = shutil.copytree(detector, tmp_path / 'pickled')
    (pickled / 'model.safetensors').unlink()
    torch.save(p.Detector(detector).model.state_dict(), pickled / 'pytorch_model.bin')
    assert 'model.safetensors' in refused(p.Detector, pickled)
    bert = tmp_path / 'bert'
    shutil.copytree(detector, bert)
    transformers.BertModel(
        transformers.BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            vocab_size=9,
        )
    ).save_pretrained(bert)
    assert 'gives no detector' in refused(p.Detector, bert)
    from safetensors.torch import load_file, save_file

    cut = shutil.copytree(detector, tmp_path / 'cut')
    weights = load_file(cut / 'model.safetensors')
    del weights['vit.embeddings.detection_tokens']
    save_file(weights, cut / 'model.safetensors', metadata=dict(format='pt'))
    assert 'lacks 1 weights' in refused(p.Detector, cut)


# --- a folder


def test_a_folder_becomes_a_split(album, detector, tmp_path):
    said = p.write_photos(album, tmp_path / 'data', detector=detector, regions=4)
    assert said[0] == 'test: 3 pictures' and said[1].startswith('6 left out')
    split = Split(tmp_path / 'data', 'test')
    d = p.Detector(detector)
    assert (
        split.ids == GOOD
        and split.captions == ['red dog 01', 'red dog 01', 'tall']
        and split.classes == ['dog', 'man', 'tree']
    )
    for row, name in enumerate(split.ids):
        alone = d(p.upright(album / name), regions=4)
        for key in ('features', 'boxes', 'labels', 'scores'):
            np.testing.assert_array_equal(getattr(split, key)[row], alone[key])
        assert split.picture(row).size == tuple(split.sizes[row]) == Image.open(album / name).size
    assert [
        x.split('\t')[0] for x in (tmp_path / 'data/test_left_out.txt').read_text().split('\n')[:-1]
    ] == BAD
    assert check(tmp_path / 'data').ok and not list((tmp_path / 'data').rglob('*.partial'))
    assert (
        split.features.any((1, 2)).all()
        and np.abs(split.features[0] - split.features[1]).max() > 1e-3
    )


def test_a_detector_of_few_queries_gives_few_regions(album, detector, tmp_path):
    p.write_photos(album, tmp_path / 'data', detector=detector, half=True, pictures=False)
    split = Split(tmp_path / 'data', 'test')
    assert (
        split.features.shape == (3, 6, 16)
        and split.features.dtype == np.float16
        and not (tmp_path / 'data/pictures').exists()
    )


def test_a_folder_that_is_interrupted_goes_on(album, detector, tmp_path, monkeypatch):
    p.write_photos(album, tmp_path / 'whole', detector=detector)
    good = p.upright
    calls = []

    def dies(path, side):
        calls.append(path.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return good(path, side)

    monkeypatch.setattr(p, 'upright', dies)
    with pytest.raises(KeyboardInterrupt):
        p.write_photos(album, tmp_path / 'data', detector=detector)
    assert not list((tmp_path / 'data').glob('test_*.npy'))
    assert 'other settings' in refused(
        p.write_photos, album, tmp_path / 'data', detector=detector, side=50
    )
    p.write_photos(album, tmp_path / 'data', detector=detector)
    assert len(calls) == len(GOOD + BAD) + 1
    tree = lambda folder: {
        x.relative_to(folder).as_posix(): x.read_bytes() for x in folder.rglob('*') if x.is_file()
    }
    assert tree(tmp_path / 'data') == tree(tmp_path / 'whole')
    shot(seed=9).save(album / 'new.png')
    assert p.write_photos(album, tmp_path / 'data', detector=detector) == [
        'test: 3 pictures are there already; 1 are new since, the first is new.png: convert into a folder of its own'
    ]


def test_captions_of_photographs(album, detector, tmp_path):
    (tmp_path / 'caps.tsv').write_text(
        'tall.jpg\tA  tall tree.\nred_dog-01.png\tA dog.\ntall.jpg\tA tree.\n'
    )
    p.write_photos(
        album, tmp_path / 'data', detector=detector, split='train', captions=tmp_path / 'caps.tsv'
    )
    split = Split(tmp_path / 'data', 'train')
    assert [[split.captions[c] for c in split.captions_of(row)] for row in range(3)] == [
        ['A dog.'],
        ['red dog 01'],
        ['A tall tree.', 'A tree.'],
    ]
    for text, said in (
        ('x.png\thello\n', 'line 1: there is no picture x.png'),
        ('tall.jpg hello\n', 'expected: path'),
        ('tall.jpg\t \n', 'expected: path'),
    ):
        (tmp_path / 'bad.tsv').write_text(text)
        assert said in refused(
            p.write_photos,
            album,
            tmp_path / 'other',
            detector=detector,
            captions=tmp_path / 'bad.tsv',
        )


def test_folder_faults(album, detector, tmp_path):
    assert 'lies inside' in refused(p.write_photos, album, album / 'data', detector=detector)
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert 'holds no pictures' in refused(
        p.write_photos, empty, tmp_path / 'data', detector=detector
    )
    (empty / 'x.jpg').write_bytes(b'no')
    assert 'none of the 1 pictures can be read' in refused(
        p.write_photos, empty, tmp_path / 'data', detector=detector
    )
    p.write_photos(album, tmp_path / 'two', detector=detector)
    other = save_yolos(tmp_path / 'other', seed=1)
    config = (other / 'config.json').read_text().replace('"dog"', '"cat"')
    (other / 'config.json').write_text(config)
    assert 'other classes' in refused(
        p.write_photos, album, tmp_path / 'two', detector=other, split='dev'
    )


def test_file_names_that_no_line_can_hold_are_left_out(detector, tmp_path):
    folder = tmp_path / 'album'
    folder.mkdir()
    shot().save(folder / 'good.png')
    for name in ('two\nlines.png', ' blank.png'):
        shot().save(folder / name)
    shot().save(os.fsencode(str(folder)) + b'/caf\xe9.png', format='PNG')
    p.write_photos(folder, tmp_path / 'data', detector=detector)
    assert Split(tmp_path / 'data', 'test').ids == ['good.png']
    lines = (tmp_path / 'data/test_left_out.txt').read_text(encoding='utf-8').split('\n')
    assert len(lines) == 4 and any(x.startswith("'two\\nlines.png'") for x in lines)
    assert p.write_photos(folder, tmp_path / 'data', detector=detector) == [
        'test: 1 pictures are there already'
    ]


def test_nothing_needs_torchvision_or_timm(album, detector, tmp_path):
    p.write_photos(album, tmp_path / 'data', detector=detector)
    assert type(p.Detector(detector).processor).__name__.endswith('Pil')


def test_photographs_are_searched_by_a_matcher_of_the_same_detector(
    album, detector, tmp_path, monkeypatch, capsys
):
    from imtm_lite.workshop.cli import main

    def imtm(*words):
        monkeypatch.setattr(sys, 'argv', ['imtm', *map(str, words)])
        with pytest.raises(SystemExit) as out:
            main()
        return out.value.code, *capsys.readouterr()

    for split in ('train', 'dev', 'test'):
        code, out, err = imtm(
            'regions', album, '--detector', detector, '--out', tmp_path / 'data', '--split', split
        )
        assert code == 0 and 'trained on features of' in ' '.join(out.split()), err
    code, out, err = imtm(
        'train',
        'scan',
        '--data',
        tmp_path / 'data',
        '--out',
        tmp_path / 'run',
        '--epochs',
        1,
        '--size',
        2,
        '--min-freq',
        1,
        '--set',
        'width=8',
        '--set',
        'word_width=4',
        '--device',
        'cpu',
    )
    assert code == 0, err
    code, out, err = imtm(
        'search',
        tmp_path / 'run',
        'a red dog',
        '--data',
        tmp_path / 'data',
        '--top',
        3,
        '--out',
        tmp_path / 'found.png',
    )
    assert (
        code == 0
        and all(name in out for name in GOOD)
        and (tmp_path / 'found.png').stat().st_size > 3000
    ), err
    code, out, err = imtm(
        'regions', album, '--detector', tmp_path / 'none', '--out', tmp_path / 'x'
    )
    assert code == 2 and 'gives no detector' in err
