"The `imtm` program as a person meets it: output, pictures, one line and exit code 2 for faults."

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from imtm_lite.checkpoints import read_checkpoint
from imtm_lite.data import Split

IMTM = [sys.executable, '-c', 'from imtm_lite.workshop.cli import main; main()']


def imtm(*words, **kw):
    return subprocess.run([*IMTM, *map(str, words)], capture_output=True, text=True, **kw)


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('cli') / 'camp'
    done = imtm(
        'train',
        'camp',
        '--data',
        world,
        '--out',
        out,
        '--preset',
        'demo-released',
        '--epochs',
        '1/1',
        '--size',
        20,
        '--set',
        'width=16',
        '--set',
        'word_width=8',
        '--min-freq',
        2,
    )
    assert done.returncode == 0, done.stderr
    assert (
        'stage 1: camp-stage1' in done.stdout
        and 'dev i2t and t2i' in done.stdout
        and 'next: imtm eval' in done.stdout
    )
    return out


def test_help_has_examples():
    for command in ('world', 'check', 'triples', 'train', 'eval', 'ground', 'search', 'demo'):
        assert f'imtm {command}' in ' '.join(imtm(command, '--help').stdout.split()), command


def test_doctor_says_a_line_each():
    out = imtm('doctor')
    assert out.returncode == 0 and out.stdout.count('\n') >= 10 and 'mini detector' in out.stdout


def test_doctor_of_a_run_prints_figures_and_alarms(world, run, tmp_path):
    out = imtm('doctor', run, '--data', world)
    said = ' '.join(out.stdout.split())
    assert out.returncode == 0, out.stderr
    assert all(
        x in said
        for x in (
            'epoch 1',
            'best now',
            'dev rsum',
            'gate regions own',
            'score spread others',
            'gradient max',
            '; try ',
        )
    ), said
    assert 'best now' not in imtm('doctor', run).stdout
    one_line(imtm('doctor', tmp_path), 'no log.jsonl there')


def test_settings_of_the_schedule_reach_the_run(world, tmp_path):
    words = [
        '--schedule',
        'linear',
        '--warmup',
        2,
        '--updates',
        6,
        '--accumulate',
        2,
        '--instances',
        200,
        '--drop-regions',
        0.2,
        '--drop-words',
        0.1,
        '--candidates',
        'none',
    ]
    out = imtm(
        'train',
        'vse',
        '--data',
        world,
        '--out',
        tmp_path / 'run',
        '--set',
        'width=16',
        '--min-freq',
        2,
        *words,
    )
    assert out.returncode == 0, out.stderr
    card = read_checkpoint(tmp_path / 'run/last.safetensors')[0]
    want = dict(
        schedule='linear',
        warmup=2,
        updates=6,
        accumulate=2,
        instances=200,
        drop_regions=0.2,
        drop_words=0.1,
        candidates=None,
    )
    assert {k: card['settings'][k] for k in want} == want and card['step'] == 6


def test_world_of_a_shape_with_other_numbers(tmp_path):
    out = imtm('world', tmp_path / 'w', '--shape', 'f30k', '--train', 40, '--dev', 10, '--test', 10)
    assert out.returncode == 0 and '40 + 10 + 10 pictures' in ' '.join(out.stdout.split()), (
        out.stderr
    )
    for name, n in (('train', 40), ('dev', 10), ('test', 10)):
        split = Split(tmp_path / 'w', name)
        assert (
            split.features.shape == (n, 36, 2048)
            and split.features.dtype == np.float16
            and len(split.captions) == 5 * n
        )
    assert not (tmp_path / 'w' / 'pictures').exists()
    for words in (
        ('--shape', 'f8k'),
        ('--width', 100),
        ('--train', -1),
        ('--regions', 0),
        ('--workers', -1),
    ):
        one_line(imtm('world', tmp_path / 'v', *words), str(words[1]))
    one_line(
        imtm('world', tmp_path / 'v', '--shape', 'coco', '--train', 800_000, '--regions', 10_000),
        'GB free',
    )
    assert not (tmp_path / 'v').exists()


def test_check_of_the_world(world):
    out = imtm('check', world)
    assert out.returncode == 0 and 'train' in out.stdout


def test_eval_prints_what_it_measured_and_writes_json(world, run, tmp_path):
    out = imtm('eval', run, '--data', world, '--json', tmp_path / 'r.json')
    assert out.returncode == 0, out.stderr
    result = json.loads((tmp_path / 'r.json').read_text())
    assert {
        'i2t',
        't2i',
        'rsum',
        'probes',
        'protocol',
        'seed',
        'fingerprint',
        'library',
        'split',
    } <= result.keys()
    assert 'protocol plain' in ' '.join(out.stdout.split())


def test_ground_prints_chance_and_best_beside_each_figure(world, run, tmp_path):
    out = imtm('ground', run, '--data', world, '--json', tmp_path / 'g.json')
    assert out.returncode == 0, out.stderr
    figures = json.loads((tmp_path / 'g.json').read_text())['grounding']['all']
    assert figures['phrases'] > 50 and all(
        0 < figures[f'{k} chance'] < figures[f'{k} best'] <= 100 for k in ('pointing', 'iou')
    )
    assert 'chance' in out.stdout and f"{figures['pointing']:.1f}" in out.stdout
    bare = shutil.copytree(
        world, tmp_path / 'bare', ignore=shutil.ignore_patterns('*_phrases*', 'pictures')
    )
    one_line(
        imtm('ground', run, '--data', bare),
        'test_phrases.jsonl: this file is missing, and grounding needs it',
    )


def test_search_draws_a_picture_and_names_unknown_words(world, run, tmp_path):
    out = imtm(
        'search',
        run,
        '--data',
        world,
        'a zzyzx left of a tree',
        '--top',
        3,
        '--out',
        tmp_path / 's.png',
    )
    assert out.returncode == 0, out.stderr
    assert (
        'zzyzx' in out.stdout and '3. ' in out.stdout and (tmp_path / 's.png').stat().st_size > 5000
    )
    two_stages = imtm(
        'search',
        run,
        '--data',
        world,
        'a zzyzx left of a tree',
        '--top',
        3,
        '--out',
        tmp_path / 's.png',
        '--candidates',
        1000,
    )
    assert two_stages.returncode == 0 and two_stages.stdout == out.stdout, two_stages.stderr


def test_demo_leaves_results_checkpoints_log_and_figure(tmp_path):
    out = imtm(
        'demo', '--out', tmp_path / 'demo', '--train', 60, '--dev', 16, '--test', 16, '--epochs', 1
    )
    assert out.returncode == 0, out.stderr
    results = json.loads((tmp_path / 'demo/results.json').read_text())
    assert (
        results['models'].keys() == {'vse', 'scan', 'camp'}
        and {'seconds', 'protocol', 'seed', 'chance'} <= results.keys()
    )
    assert all(
        len(m['i2t']) == len(m['t2i']) == 3 and m['probes'] for m in results['models'].values()
    )
    for file in ('ranking.png', 'camp/best.safetensors', 'camp/log.jsonl', 'vse/best.safetensors'):
        assert (tmp_path / 'demo' / file).is_file()
    again = imtm('demo', '--out', tmp_path / 'demo')
    assert again.returncode == 2 and 'holds a finished demo' in again.stderr


def one_line(out, *said):
    assert out.returncode == 2, out.stdout + out.stderr
    message = [line for line in out.stderr.split('\n') if line.startswith('imtm: ')]
    assert len(message) == 1 and 'Traceback' not in out.stderr, out.stderr
    for s in said:
        assert str(s) in message[0], message[0]


def test_faults_are_one_line_and_exit_code_2(world, run, tmp_path):
    new = tmp_path / 'new'
    one_line(
        imtm('train', 'clip', '--data', world, '--out', new), 'vse, scan, camp, ssamt, cmsei, hire'
    )
    one_line(
        imtm('train', 'camp', '--data', world, '--out', new, '--set', 'gates=none'), 'gates', 'gate'
    )
    one_line(imtm('train', 'camp', '--data', world, '--out', new, '--optimizer', 'lamb'), 'adamw')
    one_line(imtm('train', 'camp', '--data', tmp_path / 'nowhere', '--out', new), 'nowhere')
    one_line(imtm('train', 'camp', '--data', world, '--out', run), '--resume')
    one_line(imtm('eval', run, '--data', world, '--protocol', 'f30k-1k'), '1000 images', 'plain')
    one_line(imtm('eval', tmp_path / 'none', '--data', world), 'none')
    one_line(imtm('search', run, '--data', world, '  '), 'empty')
    one_line(
        imtm('search', run, '--data', world, 'a dog', '--candidates', 2),
        '2 candidates for 5 pictures',
    )
    one_line(imtm('world', world), world.name)
    assert not new.exists()  # nothing half-written


def test_a_broken_data_set_stops_training_in_one_line(world, tmp_path):
    import shutil

    broken = tmp_path / 'broken'
    shutil.copytree(world, broken, ignore=shutil.ignore_patterns('pictures'))
    features = np.load(broken / 'train_ims.npy')
    features[7] = np.nan
    np.save(broken / 'train_ims.npy', features)
    one_line(
        imtm('train', 'vse', '--data', broken, '--out', tmp_path / 'run'), 'train_ims.npy', 'row 7'
    )
    assert imtm('check', broken).returncode == 2


def test_triples_are_guessed_where_there_are_none(world, tmp_path):
    data = shutil.copytree(
        world,
        tmp_path / 'bare',
        ignore=shutil.ignore_patterns('*triples*', 'predicates.txt', 'pictures'),
    )
    one_line(
        imtm('triples', data, '--like', data),
        'train_triples.jsonl: this file is missing, and the relation prior needs it',
    )
    assert not (data / 'predicates.txt').exists()
    out = imtm('triples', data, '--like', world, '--threshold', 0.2)
    assert out.returncode == 0, out.stderr
    found = Split(data, 'test').triples
    assert sum(map(len, found)) > 0 and all(t[3] >= 0.2 for some in found for t in some)
    one_line(imtm('triples', data, '--like', world), 'is there already')
