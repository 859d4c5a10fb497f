"The papers' rows: what is listed, what matches, and one command from the files to a record."

import json
import re
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
from imtm_lite.files import CheckpointError, DataError, SettingError
from imtm_lite.gallery import split_scores
from imtm_lite.recall import PROTOCOLS, Protocol, evaluate
from imtm_lite.recipes import RECIPES
from imtm_lite.results import (
    PAPERS,
    ROWS,
    compare,
    elsewhere,
    files,
    find_row,
    listing,
    needs,
    page,
    read_records,
    report,
    spread,
    verdict,
)
from imtm_lite.runs import train
from imtm_lite.workshop.cli import commit, main
from imtm_lite.workshop.reproduce import (
    DRY,
    DRY_STAGES,
    PICTURES,
    differences,
    dry_data,
    hours,
    mean_scores,
    open_splits,
    record_path,
    reproduce,
    sessions,
    write_json,
)

ROOT = Path(__file__).parent.parent
IMTM = [sys.executable, '-c', 'from imtm_lite.workshop.cli import main; main()']


@pytest.fixture
def refused(monkeypatch, capsys):
    "The one line that the program ends with."

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['imtm', 'reproduce', *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.startswith('imtm: ') and message.count('\n') == 1, (
            message
        )
        return message

    return call


def seed(number, six):
    return dict(
        seed=number,
        members=[number],
        i2t=list(six[:3]),
        t2i=list(six[3:]),
        rsum=float(sum(six)),
        hours=[1.5],
        device='a device',
        precision='no',
        fingerprints=dict(train='a', dev='b', test='c'),
        checkpoints=['d'],
        versions=dict(imtm_lite='0'),
    )


def record(name, *sixes, **more):
    row = ROWS[name]
    made = (
        dict(
            row=name,
            dry=False,
            ensemble=1,
            source=row.source,
            settings=row.settings,
            changes={},
            differences=[],
            data=dict(pictures={}),
            seeds=[seed(k, s) for k, s in enumerate(sixes)],
        )
        | more
    )
    return made | dict(verdict=verdict(find_row(name, made['ensemble']), made))


# what is listed


def test_rows_are_complete_and_their_sums_right():
    assert set(ROWS) == {
        f'{m}-{g}'
        for m in ('camp', 'ssamt', 'cmsei', 'hire')
        for g in ('f30k', 'coco-1k', 'coco-5k')
    }
    with_figures = {name for name, row in ROWS.items() if row.figures}
    assert with_figures == {name for name in ROWS if name.startswith(('camp', 'ssamt'))}
    for name in with_figures:
        assert (
            len(ROWS[name].figures) == 6 and abs(sum(ROWS[name].figures) - ROWS[name].rsum) < 0.15
        )
        assert all(a < b < c for a, b, c in (ROWS[name].figures[:3], ROWS[name].figures[3:]))
    for row in ROWS.values():
        assert (
            row.protocol in PROTOCOLS
            and PROTOCOLS[row.protocol].images == PICTURES[row.data][row.split]
            and row.source
            and row.settings
        )


def test_the_list_names_every_row_its_source_and_whose_settings_stand_in():
    out = subprocess.run([*IMTM, 'reproduce'], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout == listing() + '\n'
    lines = {
        line.split()[0]: line
        for line in out.stdout.split('\n')
        if line.split() and line.split()[0] in ROWS
    }
    assert set(lines) == set(ROWS)
    assert '466.9' in lines['camp-f30k'] and not re.search(r'\d\.\d', lines['hire-f30k'])
    for said in (
        'performance.md of the repository',
        'no figure confirmed by a source',
        'two phases',
        '3SHNet',
        'names no data set',
        '--ensemble 2',
    ):
        assert said in out.stdout, said


def test_the_page_lists_every_row_and_what_it_waits_for():
    text = page(ROOT / 'data/results')
    assert [line.split('`')[1] for line in text.split('\n')[2:]][: len(ROWS)] == list(ROWS)
    for line in text.split('\n')[2:]:
        assert line.count('|') == 7 and ('not run: needs `' in line) != ('library' in line)
        if line.startswith('| `hire'):
            assert 'no figure confirmed by a source' in line
    lesson = json.loads((ROOT / 'nbs/19_results.ipynb').read_text())
    shown = [
        ''.join(o['data']['text/markdown'])
        for c in lesson['cells']
        for o in c.get('outputs', [])
        if 'text/markdown' in o.get('data', {})
    ]
    assert any(text in s for s in shown) and any(
        elsewhere(ROOT / 'data/results') in s for s in shown
    ), 'run nbs/19_results.ipynb'
    assert text in (ROOT / 'README.md').read_text(), 'run nbs/index.ipynb and make readme'


# verdicts


def test_verdicts_on_hand_made_figures():
    row = ROWS['camp-f30k']
    shifted = lambda *by: np.add(row.figures, by)
    assert compare(row.figures, row.figures) == (0, 'matches')
    assert (
        compare(row.figures, shifted(1, 1, 1, 1, 1, 1))[1]
        == compare(row.figures, shifted(-6, 0, 0, 0, 0, 0))[1]
        == 'matches'
    )
    assert compare(row.figures, shifted(1, 1, 1, 1, 1, 1.01))[1] == 'above'
    assert compare(row.figures, shifted(-3, -3, 0, 0, 0, -0.1))[1] == 'below'
    # the sums are nearly equal, the figures are not
    assert compare(row.figures, shifted(3, 3, 3, -3, -3, -3.1)) == (
        pytest.approx(18.1 / 6),
        'below',
    )
    wide = record(
        'camp-f30k',
        shifted(3, 3, 3, 3, 3, 3),
        shifted(-3, -3, -3, -3, -3, -3),
        shifted(0.3, 0.3, 0.3, 0.3, 0.3, 0.3),
    )
    # of the mean over the seeds
    assert verdict(row, wide).startswith('matches: 0.1 points')


@pytest.mark.parametrize(
    'name, more, said',
    [
        ('hire-f30k', {}, 'no figure confirmed'),
        ('camp-f30k', dict(ensemble=2), 'single model'),
        ('camp-f30k', dict(dry=True), 'dry run'),
        (
            'camp-f30k',
            dict(differences=['train: 3 pictures instead of 29,000']),
            "not the paper's data",
        ),
    ],
)
def test_no_verdict_where_there_is_nothing_to_compare(name, more, said):
    made = record(name, ROWS['camp-f30k'].figures, **more)
    assert (
        made['verdict'].startswith('no verdict')
        and said in made['verdict']
        and 'matches' not in report(made)
    )
    # the line of differences from the paper's figures
    assert ('difference' in report(made)) == ('differences' in more)


def test_report_has_paper_ours_difference_and_spread():
    six = ROWS['camp-f30k'].figures
    text = report(record('camp-f30k', np.add(six, 0.5), np.subtract(six, 0.1), np.add(six, 0.2)))
    table = {line.split('  ')[0]: line for line in text.split('\n')}
    assert '68.1' in table['paper'] and '466.9' in table['paper']
    assert (
        '68.3 ± 0.3' in table['ours']
        and '468.1 ± 1.8' in table['ours']
        and '+0.2' in table['difference']
        and '+1.2' in table['difference']
    )
    assert (
        'matches: 0.2 points' in text
        and text.count('1.50 hours on a device') == 3
        and 'train a dev b test c' in text
        and 'performance.md' in text
    )
    assert spread([1.0, 2.0, 6.0]) == '3.0 ± 3.0' and spread([2.0]) == '2.0'


def test_records_enter_the_page_and_dry_runs_do_not(tmp_path):
    six = ROWS['ssamt-f30k'].figures
    write_json(tmp_path / 'reproduce-ssamt-f30k.json', record('ssamt-f30k', six))
    write_json(
        tmp_path / 'reproduce-hire-f30k-ensemble2.json', record('hire-f30k', six, ensemble=2)
    )
    lines = {line.split('`')[1]: line for line in page(tmp_path).split('\n')[2:]}
    assert (
        'matches' in lines['ssamt-f30k']
        and lines['ssamt-f30k'].count('**488.7**') == 2
        and len(lines) == len(ROWS) + 1
    )
    assert 'no verdict' in lines['hire-f30k-ensemble2'] and 'not run' in lines['hire-f30k']
    write_json(tmp_path / 'reproduce-camp-f30k.json', record('camp-f30k', six, dry=True))
    with pytest.raises(DataError, match='reproduce-camp-f30k.json: is the record of a dry run'):
        read_records(tmp_path)


# files


def test_what_a_row_is_made_from():
    assert {m: needs(m) for m in PAPERS} == dict(
        camp=(), ssamt=(), cmsei=('boxes', 'triples'), hire=('boxes', 'triples')
    )
    assert files(ROWS['camp-coco-5k']) == [
        '{train,dev,testall}_ims.npy',
        '{train,dev,testall}_caps.txt',
        '{train,dev,testall}_ids.txt',
    ]
    assert {'predicates.txt', '{train,dev,test}_img_sizes.npy'} < set(files(ROWS['hire-f30k']))


@pytest.mark.parametrize('name', ['camp-coco-1k', 'hire-f30k'])
def test_dry_data_has_the_files_of_its_row_and_no_others(name, tmp_path):
    row = ROWS[name]
    root = dry_data(row, tmp_path)
    brace = lambda f: [
        f.replace('{train,dev,' + row.split + '}', s) for s in ('train', 'dev', row.split)
    ]
    assert {p.name for p in root.iterdir()} == {x for f in files(row) for x in brace(f)}
    splits = open_splits(row, root, sized=False)
    assert {s.features.shape[1:] for s in splits.values()} == {(36, 2048)} and all(
        (np.bincount(s.caption_image) == 5).all() for s in splits.values()
    )
    # of the paper's data it lacks nothing but pictures
    found = differences(row, splits)
    assert len(found) == 3 and all('pictures instead of' in line for line in found)
    assert DRY['test'] % PROTOCOLS[row.protocol].folds == 0


def test_sizes_are_warned_about_or_refused(world):
    found = '\n'.join(
        differences(ROWS['camp-f30k'], open_splits(ROWS['camp-f30k'], world, sized=False))
    )
    for said in (
        'train: 80 pictures instead of 29,000',
        'dev: 24 pictures instead of 1,014',
        'test: 12 regions x 128 instead of 36 x 2048',
    ):
        assert said in found
    with pytest.raises(SettingError, match='camp-f30k: protocol f30k-1k is defined on 1000 images'):
        open_splits(ROWS['camp-f30k'], world)


def test_refusals_are_one_line_before_anything_is_written(world, tmp_path, refused):
    out = tmp_path / 'out'
    bare = shutil.copytree(
        world, tmp_path / 'bare', ignore=shutil.ignore_patterns('test_triples*', 'pictures')
    )
    assert all(
        x in refused('clip-f30k', '--out', out) for x in ('clip-f30k', 'camp-f30k', 'hire-coco-5k')
    )
    assert '--data, a folder with {train,dev,test}_ims.npy' in refused('camp-f30k', '--out', out)
    assert 'nowhere: there is no such folder' in refused(
        'camp-f30k', '--out', out, '--data', tmp_path / 'nowhere'
    )
    assert '1000 images' in refused('camp-f30k', '--out', out, '--data', world)
    assert 'testall_ims.npy: this file is missing' in refused(
        'camp-coco-5k', '--out', out, '--data', world
    )
    assert 'test_triples.jsonl: this file is missing, and cmsei-f30k needs it' in refused(
        'cmsei-f30k', '--out', out, '--data', bare
    )
    for wrong in (dict(seeds=0), dict(ensemble=0)):
        with pytest.raises(SettingError, match='1 (seed|run) or more, not 0'):
            reproduce('camp-f30k', world, out, **wrong)
    assert not out.exists()


# runs


def test_an_ensemble_is_the_mean_of_the_score_matrices(world, tmp_path):
    quick = dict(
        arguments=dict(width=16, word_width=8),
        epochs=1,
        size=20,
        per_image=1,
        min_freq=2,
        progress=False,
        device='cpu',
    )
    for s in (0, 1):
        train('scan', world, tmp_path / f'seed{s}', seed=s, **quick)
    runs = [tmp_path / 'seed0', tmp_path / 'seed1']
    test = Split(world, 'test')
    a, b = (split_scores(m, test, m.vocab) for m in map(load, runs))
    assert not torch.equal(a, b)
    assert torch.equal(mean_scores(runs, test), (a + b) / 2) and torch.equal(
        mean_scores(runs[:1], test), a
    )


def test_a_real_run_goes_from_the_files_to_the_page(world, tmp_path, monkeypatch):
    "The row's own names, at the world's sizes and with a preset for seconds."
    stage = dict(
        model='ssamt',
        arguments=dict(width=16, heads=2, feedforward=16),
        size=40,
        per_image=1,
        epochs=1,
        min_freq=2,
    )
    monkeypatch.setitem(RECIPES['ssamt'], 'f30k', [stage])
    monkeypatch.setitem(PROTOCOLS, 'f30k-1k', Protocol('f30k-1k', 24, 120))
    monkeypatch.setitem(PICTURES, 'f30k', dict(train=80, dev=24, test=24))
    monkeypatch.setattr('imtm_lite.results.REGIONS', (12, 128))
    how = dict(out=tmp_path / 'out', device='cpu', progress=False)
    made = reproduce('ssamt-f30k', world, seeds=2, **how)
    assert (
        made['differences'] == []
        and made['verdict'].startswith('below: ')
        and read_records(tmp_path / 'out') == {'ssamt-f30k': json.loads(json.dumps(made))}
    )
    test = Split(world, 'test')
    m = load(tmp_path / 'out/ssamt-f30k/seed1')
    assert (
        made['seeds'][1]['rsum']
        == evaluate(split_scores(m, test, m.vocab), torch.from_numpy(test.caption_image)).rsum
        and m.card['settings']['seed'] == 1
    )
    line = next(x for x in page(tmp_path / 'out').split('\n') if '`ssamt-f30k`' in x)
    assert (
        '2 seeds, library' in line
        and f"{np.mean([s['rsum'] for s in made['seeds']]):.1f} ±" in line
        and made['verdict'] in line
    )
    monkeypatch.setitem(PICTURES, 'f30k', dict(train=29_000, dev=24, test=24))
    assert reproduce('ssamt-f30k', world, **how)['verdict'] == "no verdict: not the paper's data"
    other = shutil.copytree(world, tmp_path / 'other', ignore=shutil.ignore_patterns('pictures'))
    (other / 'dev_caps.txt').write_text(
        (world / 'dev_caps.txt').read_text().replace(' is ', ' was ', 1)
    )
    before = (tmp_path / 'out/reproduce-ssamt-f30k.json').read_bytes()
    with pytest.raises(CheckpointError, match='choose another folder'):
        reproduce('ssamt-f30k', other, **how)
    assert (tmp_path / 'out/reproduce-ssamt-f30k.json').read_bytes() == before


def test_ssamt_dry_run_with_seeds_and_an_ensemble(tmp_path):
    how = dict(out=tmp_path, dry=True, device='cpu', progress=False)
    told = []
    one = reproduce('ssamt-coco-5k', tell=told.append, **how)
    path = record_path(ROWS['ssamt-coco-5k'], tmp_path, True)
    assert (
        json.loads(path.read_text()) == json.loads(json.dumps(one))
        and one['dry']
        and len(one['seeds']) == len(told) == 1
    )
    assert (
        one['changes'] == DRY_STAGES
        and [s['model'] for s in one['stages']] == ['ssamt-intra', 'ssamt']
        and set(one['data']['fingerprints']) == {'train', 'dev', 'testall'}
    )
    text = report(one)
    assert (
        'DRY RUN' in text
        and 'no verdict' in text
        and 'two phases' in text
        and '424.5' not in text
        and 'matches' not in text
    )
    runs = tmp_path / 'dry-run/ssamt-coco'
    test = Split(tmp_path / 'dry-run/ssamt-coco-data', 'testall')
    stamp = (runs / 'seed0/best.safetensors').stat().st_mtime_ns
    # trains seed 1, and takes seed 0 as it is
    both = reproduce('ssamt-coco-5k', ensemble=2, **how)
    assert (runs / 'seed0/best.safetensors').stat().st_mtime_ns == stamp and both['seeds'][0][
        'members'
    ] == [0, 1]
    scores = torch.stack(
        [split_scores(m, test, m.vocab) for m in (load(runs / 'seed0'), load(runs / 'seed1'))]
    ).mean(0)
    assert both['seeds'][0]['rsum'] == evaluate(scores, torch.from_numpy(test.caption_image)).rsum
    two = reproduce('ssamt-coco-5k', seeds=2, **how)  # trains nothing
    assert two['seeds'][0] == json.loads(json.dumps(one['seeds'][0])) and [
        s['members'] for s in two['seeds']
    ] == [[0], [1]]
    assert ' ± ' in report(two) and reproduce('ssamt-coco-5k', **how)['seeds'] == json.loads(
        json.dumps(two['seeds'])
    )
    # the same runs, in five folds
    folds = reproduce('ssamt-coco-1k', **how)
    assert (
        folds['seeds'][0]['checkpoints'] == one['seeds'][0]['checkpoints']
        and folds['seeds'][0]['rsum'] > one['seeds'][0]['rsum']
    )
    shutil.rmtree(tmp_path)


def test_camp_dry_run_goes_through_every_stage_at_full_width(tmp_path):
    out = subprocess.run(
        [*IMTM, 'reproduce', 'camp-f30k', '--dry-run', '--out', tmp_path, '--device', 'cpu'],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    path = record_path(ROWS['camp-f30k'], tmp_path, True)
    assert (
        'DRY RUN' in out.stdout
        and 'no verdict' in out.stdout
        and '466.9' not in out.stdout
        and str(path) in ''.join(out.stdout.split('\n'))
    )
    made = json.loads(path.read_text())
    assert [s['model'] for s in made['stages']] == ['camp'] and all(
        s['epochs'] == 1 for s in made['stages']
    )
    assert (
        read_checkpoint(tmp_path / 'dry-run/camp-f30k/seed0/best.safetensors')[0]['config']['width']
        == 1024
    )
    assert (
        made['dry']
        and made['verdict'].startswith('no verdict')
        and made['seeds'][0]['versions']['imtm_lite'] == commit()
        and made['seeds'][0]['hours'][0] > 0
    )
    shutil.rmtree(tmp_path)


# several stages, in seconds
NARROW = "from imtm_lite.train import RECIPES\nstages = RECIPES['camp']['f30k'] = RECIPES['camp']['f30k-released']\nfor stage in stages: stage['arguments']['width'] = 64\n"


def test_a_killed_run_goes_on_to_the_same_figures(tmp_path):
    command = lambda name: [
        sys.executable,
        '-c',
        NARROW + IMTM[2],
        'reproduce',
        'camp-f30k',
        '--dry-run',
        '--out',
        str(tmp_path / name),
        '--device',
        'cpu',
    ]
    folder = tmp_path / 'cut/dry-run/camp-f30k/seed0'
    path = record_path(ROWS['camp-f30k'], tmp_path / 'cut', True)
    killed = subprocess.Popen(command('cut'), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not (folder / 'stage1/last.safetensors').is_file():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (folder / 'stage1/last.safetensors').is_file() and not path.exists()
    stamp = (folder / 'stage1/best.safetensors').stat().st_mtime_ns
    for name in ('cut', 'whole'):
        out = subprocess.run(command(name), capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
    # not trained again
    assert (folder / 'stage1/best.safetensors').stat().st_mtime_ns == stamp
    got, want = (
        json.loads(record_path(ROWS['camp-f30k'], tmp_path / name, True).read_text())['seeds'][0]
        for name in ('cut', 'whole')
    )
    assert (got['i2t'], got['t2i']) == (want['i2t'], want['t2i'])
    weights = [
        read_checkpoint(tmp_path / name / 'dry-run/camp-f30k/seed0/best.safetensors')[1]
        for name in ('cut', 'whole')
    ]
    assert all(torch.equal(w, weights[1][k]) for k, w in weights[0].items())
    assert len(sessions(folder)) == 2 and got['hours'] == [round(hours(folder), 4)]
