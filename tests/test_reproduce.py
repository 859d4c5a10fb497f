"One command from the files of a paper's row to its record, through interruptions, seeds and dry runs."

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from imtm_lite.checkpoints import load, read_checkpoint
from imtm_lite.data import Split
from imtm_lite.files import CheckpointError, SettingError
from imtm_lite.gallery import split_scores
from imtm_lite.recall import PROTOCOLS, Protocol, evaluate
from imtm_lite.recipes import RECIPES
from imtm_lite.results import ROWS, files_of, page, read_records, report
from imtm_lite.runs import train
from imtm_lite.workshop.cli import main
from imtm_lite.workshop.printing import commit
from imtm_lite.workshop.reproduce import (
    DRY,
    DRY_STAGES,
    SPLIT_SIZES,
    differences,
    dry_data,
    hours,
    mean_scores,
    open_splits,
    record_path,
    reproduce,
    session,
    sessions,
)

PROGRAM = 'from imtm_lite.workshop.cli import main; main()'
QUIET = dict(device='cpu', progress=False)


def as_json(value):
    "As it comes back from a file."
    return json.loads(json.dumps(value))


def scores_of(run: Path, split: Split):
    matcher, vocab, _ = load(run)
    return split_scores(matcher, split, vocab)


def rsum_of(scores, split: Split) -> float:
    return evaluate(scores, torch.from_numpy(split.caption_image)).rsum


@pytest.fixture
def refused(monkeypatch, capsys):
    "The one line that the program ends with."

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['imtm', 'reproduce', *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        message = capsys.readouterr().err
        assert end.value.code == 2, message
        assert message.startswith('imtm: '), message
        assert message.count('\n') == 1, message
        return message

    return call


# data


@pytest.mark.parametrize('name', ['camp-coco-1k', 'hire-f30k'])
def test_dry_data_has_the_files_of_its_row_and_no_others(name, tmp_path):
    row = ROWS[name]
    root = dry_data(row, tmp_path)
    wanted = set()
    for file in files_of(row):
        for split in ('train', 'dev', row.split):
            wanted.add(file.replace(f'{{train,dev,{row.split}}}', split))
    assert {path.name for path in root.iterdir()} == wanted
    splits = open_splits(row, root, sized=False)
    for split in splits.values():
        assert split.features.shape[1:] == (36, 2048)
        assert (np.bincount(split.caption_image) == 5).all()
    # of the paper's data it lacks nothing but pictures
    lines = differences(row, splits)
    assert len(lines) == 3
    assert all('pictures instead of' in line for line in lines)
    assert DRY['test'] % PROTOCOLS[row.protocol].folds == 0


def test_dry_data_is_made_once_and_whole(tmp_path):
    row = ROWS['camp-f30k']
    # somebody else's, or what an interrupted call left: never touched
    theirs = tmp_path / 'camp-f30k-data.7.partial'
    theirs.mkdir()
    root = dry_data(row, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    assert dry_data(row, tmp_path) == root
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == stamps
    assert sorted(path.name for path in tmp_path.iterdir()) == ['camp-f30k-data', theirs.name]


def test_sizes_are_warned_about_or_refused(world):
    row = ROWS['camp-f30k']
    lines = differences(row, open_splits(row, world, sized=False))
    for line in (
        'train: 80 pictures instead of 29,000',
        'dev: 24 pictures instead of 1,014',
        'test: 12 regions x 128 instead of 36 x 2048',
    ):
        assert line in lines
    with pytest.raises(SettingError, match='camp-f30k: protocol f30k-1k is defined on 1000 images'):
        open_splits(row, world)


def test_refusals_are_one_line_before_anything_is_written(world, tmp_path, refused):
    out = tmp_path / 'out'
    left_out = shutil.ignore_patterns('test_triples*', 'pictures')
    bare = shutil.copytree(world, tmp_path / 'bare', ignore=left_out)
    message = refused('clip-f30k', '--out', out)
    for name in ('clip-f30k', 'camp-f30k', 'hire-coco-5k'):
        assert name in message
    message = refused('camp-f30k', '--out', out)
    assert '--data, a folder with {train,dev,test}_ims.npy' in message
    for row, data, reason in (
        ('camp-f30k', tmp_path / 'nowhere', 'nowhere: there is no such folder'),
        ('camp-f30k', world, '1000 images'),
        ('camp-coco-5k', world, 'testall_ims.npy: this file is missing'),
        ('cmsei-f30k', bare, 'test_triples.jsonl: this file is missing, and cmsei-f30k needs it'),
    ):
        assert reason in refused(row, '--out', out, '--data', data)
    for wrong in (dict(seeds=0), dict(ensemble=0)):
        with pytest.raises(SettingError, match='1 (seed|run) or more, not 0'):
            reproduce('camp-f30k', world, out, **wrong)
    assert not out.exists()


# runs


def test_an_ensemble_is_the_mean_of_the_score_matrices(world, tmp_path):
    quick = dict(arguments=dict(width=16, word_width=8), epochs=1, size=20, per_image=1)
    runs = [tmp_path / 'seed0', tmp_path / 'seed1']
    for seed, run in enumerate(runs):
        train('scan', world, run, seed=seed, min_freq=2, **quick, **QUIET)
    test = Split(world, 'test')
    first, second = (scores_of(run, test) for run in runs)
    assert not torch.equal(first, second)
    assert torch.equal(mean_scores(runs, test), (first + second) / 2)
    assert torch.equal(mean_scores(runs[:1], test), first)


def test_hours_are_counted_session_by_session(tmp_path):
    with session(tmp_path):
        time.sleep(0.1)
    # one that never comes to its end
    killed = session(tmp_path)
    killed.__enter__()
    begin = sessions(tmp_path)[1][0]
    (tmp_path / 'log.jsonl').write_text('{}\n')
    last = (tmp_path / 'log.jsonl').stat().st_mtime
    time.sleep(0.1)
    with session(tmp_path):
        pass
    spans = sessions(tmp_path)
    assert len(spans) == 3
    assert spans[1] == [begin, max(begin, last)]
    assert hours(tmp_path) == sum(end - begin for begin, end in spans) / 3600
    assert 0.1 <= 3600 * hours(tmp_path) < spans[2][1] - spans[0][0]


@pytest.fixture
def small_row(monkeypatch):
    "ssamt-f30k at the sizes of the tests' world, with a preset for seconds."
    stage = dict(model='ssamt', size=40, per_image=1, epochs=1, min_freq=2)
    stage['arguments'] = dict(width=16, heads=2, feedforward=16)
    monkeypatch.setitem(RECIPES['ssamt'], 'f30k', [stage])
    monkeypatch.setitem(PROTOCOLS, 'f30k-1k', Protocol('f30k-1k', 24, 120))
    monkeypatch.setitem(SPLIT_SIZES, 'f30k', dict(train=80, dev=24, test=24))
    monkeypatch.setattr('imtm_lite.workshop.reproduce.REGIONS', (12, 128))


def test_a_real_run_goes_from_the_files_to_the_page(world, tmp_path, small_row, monkeypatch):
    out = tmp_path / 'out'
    record = reproduce('ssamt-f30k', world, out, seeds=2, **QUIET)
    assert record['differences'] == []
    assert record['verdict'].startswith('below: ')
    assert read_records(out) == {'ssamt-f30k': as_json(record)}
    test = Split(world, 'test')
    run = out / 'ssamt-f30k/seed1'
    assert load(run).card['settings']['seed'] == 1
    rsums = [seed['rsum'] for seed in record['seeds']]
    assert rsums[1] == rsum_of(scores_of(run, test), test)
    [line] = [line for line in page(out).split('\n') if '`ssamt-f30k`' in line]
    assert '2 seeds, library' in line
    assert f'{np.mean(rsums):.1f} ±' in line
    assert record['verdict'] in line
    monkeypatch.setitem(SPLIT_SIZES, 'f30k', dict(train=29_000, dev=24, test=24))
    again = reproduce('ssamt-f30k', world, out, **QUIET)
    assert again['verdict'] == "no verdict: not the paper's data"


def test_other_data_leaves_record_and_runs_alone(world, tmp_path, small_row):
    out = tmp_path / 'out'
    reproduce('ssamt-f30k', world, out, **QUIET)
    record = (out / 'reproduce-ssamt-f30k.json').read_bytes()
    other = shutil.copytree(world, tmp_path / 'other', ignore=shutil.ignore_patterns('pictures'))
    captions = (world / 'dev_caps.txt').read_text()
    (other / 'dev_caps.txt').write_text(captions.replace(' is ', ' was ', 1))
    with pytest.raises(CheckpointError, match='choose another folder'):
        reproduce('ssamt-f30k', other, out, **QUIET)
    assert (out / 'reproduce-ssamt-f30k.json').read_bytes() == record


def test_ssamt_dry_run_with_seeds_and_an_ensemble(tmp_path):
    how = dict(out=tmp_path, dry=True, **QUIET)
    told = []
    one = reproduce('ssamt-coco-5k', tell=told.append, **how)
    check_dry_record(one, record_path(ROWS['ssamt-coco-5k'], tmp_path, True))
    assert len(told) == 1
    runs = tmp_path / 'dry-run/ssamt-coco'
    stamp = (runs / 'seed0/best.safetensors').stat().st_mtime_ns
    # trains seed 1, and takes seed 0 as it is
    [both] = reproduce('ssamt-coco-5k', ensemble=2, **how)['seeds']
    assert (runs / 'seed0/best.safetensors').stat().st_mtime_ns == stamp
    assert both['members'] == [0, 1]
    test = Split(tmp_path / 'dry-run/ssamt-coco-data', 'testall')
    scores = [scores_of(runs / name, test) for name in ('seed0', 'seed1')]
    assert both['rsum'] == rsum_of(torch.stack(scores).mean(0), test)
    # trains nothing
    two = reproduce('ssamt-coco-5k', seeds=2, **how)
    assert two['seeds'][0] == as_json(one['seeds'][0])
    assert [seed['members'] for seed in two['seeds']] == [[0], [1]]
    assert ' ± ' in report(two)
    # a seed that was not asked for again stays
    assert reproduce('ssamt-coco-5k', **how)['seeds'] == as_json(two['seeds'])
    # the same runs, in five folds
    [folds] = reproduce('ssamt-coco-1k', **how)['seeds']
    assert folds['checkpoints'] == one['seeds'][0]['checkpoints']
    assert folds['rsum'] > one['seeds'][0]['rsum']
    shutil.rmtree(tmp_path)


def check_dry_record(record: dict, path: Path):
    "Of ssamt-coco-5k."
    assert as_json(record) == json.loads(path.read_text())
    assert record['dry']
    assert len(record['seeds']) == 1
    assert record['changes'] == DRY_STAGES
    assert [stage['model'] for stage in record['stages']] == ['ssamt-intra', 'ssamt']
    assert set(record['data']['fingerprints']) == {'train', 'dev', 'testall'}
    text = report(record)
    for words in ('DRY RUN', 'no verdict', 'two phases'):
        assert words in text
    for words in ('424.5', 'matches'):
        assert words not in text


def test_camp_dry_run_goes_through_every_stage_at_full_width(tmp_path):
    words = ['reproduce', 'camp-f30k', '--dry-run', '--out', tmp_path, '--device', 'cpu']
    out = subprocess.run([sys.executable, '-c', PROGRAM, *words], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    path = record_path(ROWS['camp-f30k'], tmp_path, True)
    assert 'DRY RUN' in out.stdout
    assert 'no verdict' in out.stdout
    assert '466.9' not in out.stdout
    assert str(path) in out.stdout.replace('\n', '')
    record = json.loads(path.read_text())
    assert [stage['model'] for stage in record['stages']] == ['camp']
    assert all(stage['epochs'] == 1 for stage in record['stages'])
    card, _ = read_checkpoint(tmp_path / 'dry-run/camp-f30k/seed0/best.safetensors')
    assert card['config']['width'] == 1024
    assert record['dry']
    assert record['verdict'].startswith('no verdict')
    assert record['seeds'][0]['versions']['imtm_lite'] == commit()
    assert record['seeds'][0]['hours'][0] > 0
    shutil.rmtree(tmp_path)


# several stages, in seconds
NARROW = """
from imtm_lite.recipes import RECIPES

stages = RECIPES['camp']['f30k'] = RECIPES['camp']['f30k-released']
for stage in stages:
    stage['arguments']['width'] = 64
"""


def narrow_camp(out: Path) -> list[str]:
    words = ['reproduce', 'camp-f30k', '--dry-run', '--out', str(out), '--device', 'cpu']
    return [sys.executable, '-c', NARROW + PROGRAM, *words]


def kill_after(command: list[str], file: Path):
    "Start a program, and end it the hard way as soon as a file is there."
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, **silent)
    while process.poll() is None and not file.is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert file.is_file()


def test_a_killed_run_goes_on_to_the_same_figures(tmp_path):
    run = tmp_path / 'cut/dry-run/camp-f30k/seed0'
    kill_after(narrow_camp(tmp_path / 'cut'), run / 'stage1/last.safetensors')
    assert not record_path(ROWS['camp-f30k'], tmp_path / 'cut', True).exists()
    stamp = (run / 'stage1/best.safetensors').stat().st_mtime_ns
    seeds = []
    weights = []
    for name in ('cut', 'whole'):
        out = subprocess.run(narrow_camp(tmp_path / name), capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        path = record_path(ROWS['camp-f30k'], tmp_path / name, True)
        seeds.append(json.loads(path.read_text())['seeds'][0])
        best = tmp_path / name / 'dry-run/camp-f30k/seed0/best.safetensors'
        weights.append(read_checkpoint(best)[1])
    # not trained again
    assert (run / 'stage1/best.safetensors').stat().st_mtime_ns == stamp
    cut, whole = seeds
    assert (cut['i2t'], cut['t2i']) == (whole['i2t'], whole['t2i'])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert len(sessions(run)) == 2
    assert cut['hours'] == [round(hours(run), 4)]
