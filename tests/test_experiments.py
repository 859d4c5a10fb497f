"One runner for experiments: what is declared, trained once, shared by processes, and kept in a record."

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imtm_lite.checkpoints import build, load
from imtm_lite.data import Split
from imtm_lite.files import SettingError, shipped
from imtm_lite.gallery import probe_accuracy, split_scores
from imtm_lite.phrases import named_parser
from imtm_lite.recall import evaluate
from imtm_lite.recipes import arguments_for
from imtm_lite.results import figure, made_by, read_experiment, table
from imtm_lite.runs import Log
from imtm_lite.text import Vocab
from imtm_lite.workshop import experiments
from imtm_lite.workshop.cli import main
from imtm_lite.workshop.experiments import (
    CANDIDATES,
    DATA,
    EXPERIMENTS,
    FIELDS,
    FOLD_DEV,
    MEASURES,
    RATES,
    Experiment,
    Place,
    Row,
    claim_of,
    corrupted,
    drawn,
    every,
    fingerprint,
    is_held,
    keep,
    list_rows,
    measure_recall,
    measure_tolerance,
    probe_counts,
    run_experiment,
    run_folder,
    stages_of,
    state,
    training_view,
    write_view,
)

ROOT = Path(__file__).parent.parent
TINY = '''
from imtm_lite.workshop import experiments
from imtm_lite.workshop.experiments import Experiment, Row
experiments.EXPERIMENTS['tiny'] = Experiment(
    'tiny', 'Does the runner run?', on='a tiny world', data='world', split='test', passes={passes},
    seeds=(0, 1), sizes=dict(train=40, dev=10, test=10), measures=('recall', 'probes', 'grounding'),
    arguments=dict(width=8, word_width=8), settings=dict(size={size}, min_freq=2),
    rows=(Row('vse', 'vse'), Row('scan', 'scan', dict(direction='i2t'))))
'''
PROGRAM = '\nfrom imtm_lite.workshop.cli import main\nmain()\n'


def command(place: Path, *words, passes: int = 1, size: int = 20) -> list[str]:
    where = ['--out', str(place / 'out'), '--results', str(place / 'results'), '--device', 'cpu']
    return [
        sys.executable,
        '-c',
        TINY.format(passes=passes, size=size) + PROGRAM,
        'experiment',
        'tiny',
        *where,
        *words,
    ]


def run(*arguments, **how):
    return subprocess.run(command(*arguments, **how), capture_output=True, text=True)


@pytest.fixture
def tiny(monkeypatch):
    "The same experiment, in this process."
    monkeypatch.setattr(experiments, 'EXPERIMENTS', dict(EXPERIMENTS))
    namespace = {}
    exec(TINY.format(passes=1, size=20), namespace)
    return experiments.EXPERIMENTS['tiny']


def declare(experiment: Experiment):
    experiments.EXPERIMENTS[experiment.name] = experiment


# what is declared


@pytest.mark.parametrize('experiment', EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_declared_rows_are_distinct_have_equal_passes_and_can_be_built(experiment):
    names = [row.name for row in experiment.rows]
    assert len(set(names)) == len(names) and not any(',' in name for name in names)
    assert (
        experiment.data in DATA and set(experiment.measures) <= set(MEASURES) and experiment.seeds
    )
    prints = [fingerprint(experiment, row) for row in experiment.rows]
    assert len(set(prints)) == len(prints), 'two rows train the same'
    small = dict(
        region_width=8, words=8, predicates=2, width=8, word_width=8, heads=2, feedforward=16
    )
    for row in experiment.rows if experiment.passes else ():
        stages = stages_of(experiment, row)
        assert (
            sum(stage['epochs'] for stage in stages) == experiment.passes
            and stages[-1]['model'] == row.system
        )
        # a linear rate has no decays
        steps = [stage for stage in stages if stage.get('schedule') != 'linear']
        assert all(max(stage.get('decay_at', (0,))) < stage['epochs'] for stage in steps), row.name
        for stage in stages:
            build(stage['model'], stage['arguments'] | arguments_for(stage['model'], small))


def test_unequal_passes_and_unknown_arguments_are_refused(tiny):
    long = replace(
        tiny,
        rows=(Row('camp', 'camp', stages=(dict(model='camp-stage1', epochs=1), dict(epochs=1))),),
    )
    with pytest.raises(SettingError, match='camp: 2 passes, but all rows have 1'):
        stages_of(long, long.rows[0])
    with pytest.raises(SettingError, match="scan has no argument 'gate'"):
        stages_of(tiny, Row('scan', 'scan', dict(gate='none')))
    assert stages_of(replace(long, passes=2), long.rows[0])[0]['model'] == 'camp-stage1'
    with pytest.raises(SettingError, match="no model 'nothing'"):
        stages_of(tiny, Row('camp', 'camp', stages=(dict(model='nothing'),)))


def test_a_fingerprint_knows_what_changes_the_training_and_nothing_else(tiny):
    row = tiny.rows[1]
    same = fingerprint(tiny, row)
    for name in ('name', 'about', 'on'):
        assert fingerprint(replace(tiny, **{name: 'other'}), replace(row, name='another')) == same
    assert (
        fingerprint(
            replace(tiny, measures=('recall',), split='dev', data='next world', seeds=(7,)), row
        )
        == same
    )
    other = [
        replace(row, part=0.5),
        replace(row, settings=dict(lr=1.0)),
        replace(row, arguments={}),
    ]
    changed = [
        replace(tiny, dev=0.5),
        replace(tiny, sizes=dict(train=20, dev=10, test=10)),
        replace(tiny, arguments=dict(width=16)),
    ]
    prints = [same, *(fingerprint(tiny, r) for r in other), *(fingerprint(e, row) for e in changed)]
    assert len(set(prints)) == len(prints)


def test_experiments_that_ask_for_the_same_training_share_it():
    shared = [
        ('world', 'camp paper', 'camp-ablation', 'camp'),
        ('flickr8k', 'camp paper', 'camp-ablation-flickr8k', 'camp'),
        ('world', 'hire', 'hire-tolerance', 'hire'),
        ('world', 'cmsei', 'cmsei-ablation', 'cmsei'),
        ('world', 'ssamt', 'ssamt-ablation', 'ssamt'),
        ('flickr8k', 'ssamt', 'ssamt-data', '100 %'),
        ('flickr8k', 'ssamt', 'ssamt-scores', 'ssamt'),
        ('world', 'vse', 'first-look', 'vse'),
    ]
    for first, row, second, other in shared:
        prints = [
            fingerprint(EXPERIMENTS[e], next(r for r in EXPERIMENTS[e].rows if r.name == name))
            for e, name in ((first, row), (second, other))
        ]
        assert prints[0] == prints[1], (first, row, second, other)


# running


def test_a_tiny_experiment_runs_is_skipped_when_done_and_makes_its_table(tiny, tmp_path):
    how = dict(out=tmp_path / 'out', results=tmp_path / 'results', device='cpu')
    said = []
    record = run_experiment('tiny', tell=said.append, library='here', **how)
    assert [(row['name'], row['seed']) for row in record['rows']] == [
        ('vse', 0),
        ('vse', 1),
        ('scan', 0),
        ('scan', 1),
    ]
    assert record == json.loads((tmp_path / 'results/tiny.json').read_text())
    assert (
        sum('pass 1, dev rSum' in line for line in said) == 4
        and sum(': done, rSum' in line for line in said) == 4
    )
    place = Place(tmp_path / 'out', tmp_path / 'results')
    for made in record['rows']:
        check_row(made)
        row = next(r for r in tiny.rows if r.name == made['name'])
        folder = run_folder(tiny, row, made['seed'], place)
        test = Split(tmp_path / f"out/worlds/world{made['seed']}-40-10-10", 'test')
        matcher, vocab, card = load(folder)
        found = evaluate(
            split_scores(matcher, test, vocab), torch.from_numpy(test.caption_image)
        )
        assert (
            made['i2t'] == list(found.i2t)
            and made['t2i'] == list(found.t2i)
            and made['rsum'] == found.rsum
        )
        assert (
            made['dev']
            == [line['dev']['rsum'] for line in Log(folder / 'log.jsonl').lines() if 'dev' in line]
            and len(made['dev']) == 1
        )
        accuracy = probe_accuracy(matcher, test, vocab)
        assert {k: v for k, v in made['probes'].items() if k != 'chasing'} == pytest.approx(
            accuracy
        )
        assert (
            made['seconds'] > 0 and made['library'] == 'here' and made['data'] == test.fingerprint()
        )
        health = [line['health'] for line in Log(folder / 'log.jsonl').lines() if 'health' in line]
        assert made['health'] == health[-1] and health[-1]
        assert (made['grounding'] is None) == (made['name'] == 'vse')
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.safetensors')}
    again = []
    assert (
        run_experiment('tiny', tell=again.append, **how) == record
        and len(again) == 4
        and all('done before' in line for line in again)
    )
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.safetensors')} == stamps
    lines = table(record).split('\n')
    rsums = [row['rsum'] for row in record['rows'] if row['name'] == 'scan']
    assert (
        len(lines) == 4
        and f'{sum(rsums) / 2:.1f} ± {abs(rsums[0] - rsums[1]) / 2:.1f}' in lines[3]
        and lines[3].startswith('| scan | 2 |')
    )
    assert 'imtm experiment tiny' in made_by(record) and 'seeds 0, 1; library here' in made_by(
        record
    )


def test_a_changed_row_is_done_again_and_the_others_stay(tiny, tmp_path):
    how = dict(
        out=tmp_path / 'out',
        results=tmp_path / 'results',
        device='cpu',
        seeds=[0],
        tell=lambda line: None,
    )
    before = run_experiment('tiny', **how)
    declare(replace(tiny, rows=(tiny.rows[0], Row('scan', 'scan', dict(direction='t2i')))))
    place = Place(tmp_path / 'out', tmp_path / 'results')
    states = [
        state(experiments.EXPERIMENTS['tiny'], row, 0, place)
        for row in experiments.EXPERIMENTS['tiny'].rows
    ]
    assert states == ['done', 'changed']
    after = run_experiment('tiny', **how)
    assert (
        after['rows'][0] == before['rows'][0]
        and after['rows'][1]['arguments'] == dict(direction='t2i')
        and len(after['rows']) == 2
    )
    declare(
        replace(experiments.EXPERIMENTS['tiny'], measures=('recall',))
    )  # measured anew, and not trained anew
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.safetensors')}
    assert (
        'probes' in before['rows'][0] and run_experiment('tiny', **how)['rows'][0]['probes'] is None
    )
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.safetensors')} == stamps


def test_again_forgets_the_run_of_the_row_and_of_no_other(tiny, tmp_path):
    how = dict(
        out=tmp_path / 'out',
        results=tmp_path / 'results',
        device='cpu',
        seeds=[0],
        tell=lambda line: None,
    )
    before = run_experiment('tiny', **how)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('best.safetensors')}
    after = run_experiment('tiny', rows=['vse'], again=True, library='newer', **how)
    assert [row['library'] == 'newer' for row in after['rows']] == [True, False] and len(
        after['rows']
    ) == 2
    assert (
        after['rows'][0]['rsum'] == before['rows'][0]['rsum']
        and after['rows'][1] == before['rows'][1]
    )
    changed = [p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp]
    assert len(changed) == 1 and 'vse-' in str(changed[0])


def test_a_row_that_fails_does_not_stop_the_others(tiny, tmp_path):
    declare(replace(tiny, rows=(Row('bad', 'scan', dict(direction='up')), tiny.rows[0])))
    said = []
    with pytest.raises(SettingError, match='tiny: 1 failed: bad, seed 0'):
        run_experiment(
            'tiny', out=tmp_path, results=tmp_path, seeds=[0], device='cpu', tell=said.append
        )
    assert "bad, seed 0: FAILED: scan: direction is" in said[0]
    assert [row['name'] for row in read_experiment(tmp_path, 'tiny')['rows']] == ['vse']


def test_stages_follow_each_other_and_their_curves_are_one(tiny, tmp_path):
    stages = dict(model='camp-stage1', epochs=2), dict(epochs=1, criterion='bce')
    declare(
        replace(tiny, passes=3, rows=(Row('camp', 'camp', dict(form='released'), stages=stages),))
    )
    [made] = run_experiment(
        'tiny', out=tmp_path, results=tmp_path, seeds=[0], device='cpu', tell=lambda line: None
    )['rows']
    run = run_folder(
        experiments.EXPERIMENTS['tiny'],
        experiments.EXPERIMENTS['tiny'].rows[0],
        0,
        Place(tmp_path, tmp_path),
    )
    first, last = (
        [line['dev']['rsum'] for line in Log(folder / 'log.jsonl').lines() if 'dev' in line]
        for folder in (run / 'stage1', run)
    )
    assert (
        made['dev'] == first + last
        and len(first) == 2
        and load(run).card['start']
        and load(run).card['model'] == 'camp'
    )


def test_health_is_the_last_of_the_log(tmp_path):
    log = Log(tmp_path / 'log.jsonl')
    log.write(step=1, health=dict(spread=1.0))
    log.write(step=2, dev=dict(rsum=3.0))
    log.write(step=2, health=dict(spread=0.5))
    assert experiments.last_health(tmp_path, 1) == dict(spread=0.5) and experiments.dev_curve(
        tmp_path, 1
    ) == [3.0]


def test_a_killed_run_goes_on_to_the_same_figures(tmp_path):
    how = dict(passes=3, size=4)
    killed = subprocess.Popen(
        command(tmp_path / 'cut', '--rows', 'scan', '--seeds', '0', **how),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while killed.poll() is None and not list(tmp_path.rglob('last.safetensors')):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (
        list(tmp_path.rglob('last.safetensors'))
        and not (tmp_path / 'cut/results/tiny.json').exists()
    )
    assert 'scan                         0 begun' in run(tmp_path / 'cut', '--list', **how).stdout
    rows = []
    for name in ('cut', 'whole'):
        out = run(tmp_path / name, '--rows', 'scan', '--seeds', '0', **how)
        assert out.returncode == 0, out.stderr
        rows += read_experiment(tmp_path / name / 'results', 'tiny')['rows']
    same = [
        {
            key: row[key]
            for key in ('i2t', 't2i', 'rsum', 'dev', 'probes', 'grounding', 'fingerprint')
        }
        for row in rows
    ]
    assert same[0] == same[1] and len(rows[0]['dev']) == 3


def test_two_processes_share_an_experiment(tmp_path):
    both = [
        subprocess.Popen(
            command(tmp_path, passes=2, size=4),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(out.count(': done, rSum') for out, _ in said) == 4
    record = read_experiment(tmp_path / 'results', 'tiny')
    assert len(record['rows']) == 4 and all(len(row['dev']) == 2 for row in record['rows'])
    logs = list(tmp_path.rglob('log.jsonl'))
    assert len(logs) == 4 and all(
        sum('dev' in line for line in Log(log).lines()) == 2 for log in logs
    )


def test_a_claim_ends_with_its_process(tiny, tmp_path):
    place = Place(tmp_path / 'out', tmp_path / 'results')
    row = tiny.rows[0]
    claim = claim_of(run_folder(tiny, row, 0, place))
    mark = tmp_path / 'mark'
    code = f'''
import time
from pathlib import Path
from imtm_lite.workshop.experiments import locked
with locked(Path({str(claim)!r})):
    Path({str(mark)!r}).touch()
    time.sleep(600)
'''
    holder = subprocess.Popen([sys.executable, '-c', code])
    while not mark.exists():
        time.sleep(0.05)
    said = []
    try:
        assert (
            is_held(claim)
            and state(tiny, row, 0, place) == 'running'
            and 'vse                          0 running'
            in list_rows('tiny', out=place.out, results=place.results)
        )
        run_experiment(
            'tiny',
            rows=['vse'],
            seeds=[0],
            out=place.out,
            results=place.results,
            device='cpu',
            tell=said.append,
        )
        assert (
            said == ['tiny, vse, seed 0: another process is at it']
            and not (place.results / 'tiny.json').exists()
        )
    finally:
        holder.kill()
        holder.wait()
    assert not is_held(claim) and state(tiny, row, 0, place) == 'to do'
    run_experiment(
        'tiny',
        rows=['vse'],
        seeds=[0],
        out=place.out,
        results=place.results,
        device='cpu',
        tell=said.append,
    )
    assert state(tiny, row, 0, place) == 'done'


def test_many_processes_may_write_one_record(tiny, tmp_path):
    place = Place(tmp_path / 'out', tmp_path / 'results')
    code = (
        TINY.format(passes=1, size=20)
        + f'''
import sys
from pathlib import Path
place = experiments.Place(Path({str(place.out)!r}), Path({str(place.results)!r}))
for seed in range(int(sys.argv[1]), int(sys.argv[1]) + 10):
    experiments.keep(experiments.EXPERIMENTS['tiny'], dict(name='vse', seed=seed), place)
'''
    )
    writers = [subprocess.Popen([sys.executable, '-c', code, str(first)]) for first in (0, 10)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [row['seed'] for row in read_experiment(place.results, 'tiny')['rows']] == list(
        range(20)
    )
    keep(tiny, dict(name='vse', seed=3, rsum=1.0), place)
    assert len(read_experiment(place.results, 'tiny')['rows']) == 20


# another split, some of the pictures, folds


def test_another_split_is_a_record_of_its_own_and_shares_the_run(tiny, tmp_path):
    how = dict(
        rows=['vse'],
        seeds=[0],
        out=tmp_path / 'out',
        results=tmp_path / 'results',
        device='cpu',
        tell=lambda line: None,
    )
    run_experiment('tiny', **how)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.safetensors')}
    record = run_experiment('tiny', split='dev', **how)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.safetensors')} == stamps
    assert (
        record['name'] == 'tiny-dev'
        and record['rows'][0]['split'] == 'dev'
        and record['command'] == 'imtm experiment tiny --split dev'
    )
    assert (
        record['rows'][0]['rsum'] == record['rows'][0]['dev'][0]
        and (tmp_path / 'results/tiny-dev.json').is_file()
    )


def test_views_hold_the_chosen_pictures(world, tmp_path):
    chosen = dict(train=drawn(80, 0.25, seed=1), dev=every(24, 0.2))
    write_view(world, tmp_path / 'view', chosen)
    for name, rows in chosen.items():
        whole = Split(world, name)
        some = Split(tmp_path / 'view', name)
        assert some.n_images == len(rows) and some.ids == [whole.ids[row] for row in rows]
        assert some.classes == whole.classes and some.predicates == whole.predicates
        for k, row in enumerate(rows):
            assert [some.captions[c] for c in some.captions_of(k)] == [
                whole.captions[c] for c in whole.captions_of(row)
            ]
            for key in ('features', 'boxes', 'sizes', 'labels', 'scores'):
                assert np.array_equal(getattr(some, key)[k], getattr(whole, key)[row])
            for key in ('triples', 'phrases'):
                assert getattr(some, key)[k] == getattr(whole, key)[row]
    write_view(world, tmp_path / 'linked', dict(train=None, dev=chosen['dev']))
    assert Split(tmp_path / 'linked', 'train').fingerprint() == Split(world, 'train').fingerprint()
    assert (tmp_path / 'linked/train_ims.npy').is_symlink() and Split(
        tmp_path / 'linked', 'train'
    ).probes is not None


def test_shares_are_nested_and_belong_to_the_seed():
    quarters = [set(drawn(100, part, seed=3).tolist()) for part in (0.25, 0.5, 0.75, 1.0)]
    assert [len(some) for some in quarters] == [25, 50, 75, 100] and all(
        a < b for a, b in zip(quarters, quarters[1:])
    )
    assert (
        set(drawn(100, 0.25, seed=4).tolist()) != quarters[0]
        and (drawn(100, 0.25, 3) == drawn(100, 0.25, 3)).all()
    )
    assert len(every(1000, 0.2)) == 200 and every(1000, 0.2)[0] == 0 and len(every(3, 0.01)) == 1


def test_a_row_trains_on_its_share_and_dev_is_whole_in_the_end(tiny, tmp_path):
    declare(replace(tiny, dev=0.5, rows=(Row('half', 'vse', part=0.5), Row('all', 'vse'))))
    how = dict(
        seeds=[0], out=tmp_path, results=tmp_path, device='cpu', tell=lambda line: None, split='dev'
    )
    record = run_experiment('tiny', **how)
    experiment = experiments.find_experiment('tiny', 'dev')
    place = Place(tmp_path, tmp_path)
    data = tmp_path / 'worlds/world0-40-10-10'
    sizes = []
    for row in experiment.rows:
        view = training_view(experiment, row, 0, data, place)
        sizes.append((Split(view, 'train').n_images, Split(view, 'dev').n_images))
        assert (
            load(run_folder(experiment, row, 0, place)).card['data']['train']
            == Split(view, 'train').fingerprint()
        )
    assert sizes == [(20, 5), (40, 5)] and all(
        row['data'] == Split(data, 'dev').fingerprint() for row in record['rows']
    )


def graphs(path: Path, n: int) -> Path:
    "A file of the form of f30k_graphs/val.jsonl."
    rng = np.random.default_rng(0)
    with open(path, 'w', encoding='utf-8') as file:
        for i in range(n):
            corners = rng.uniform(0, 50, (4, 2))
            boxes = (
                np.concatenate([corners, corners + rng.uniform(5, 50, (4, 2))], 1).round(1).tolist()
            )
            labels = [str(x) for x in rng.choice(['man', 'dog', 'hat', 'tree'], 4)]
            captions = [
                dict(text=f'A {label} is here .', triples=[[label, 'near', 'tree']])
                for label in labels
            ]
            file.write(
                json.dumps(
                    dict(
                        id=i,
                        boxes=boxes,
                        labels=labels,
                        captions=captions,
                        triples=[[0, 'near', 1], [2, 'on', 3]],
                    )
                )
                + '\n'
            )
    return path


def test_folds_are_disjoint_and_rows_of_a_fold_run(tiny, tmp_path):
    path = graphs(tmp_path / 'val.jsonl', FOLD_DEV + 60)
    place = Place(tmp_path / 'out', tmp_path, path)
    declare(
        replace(
            EXPERIMENTS['symbolic'],
            passes=1,
            arguments=dict(width=8, word_width=8),
            settings=dict(size=20, min_freq=1),
            rows=EXPERIMENTS['symbolic'].rows[:2],
        )
    )
    tests = []
    for seed in range(2):
        root, same = DATA['graphs'](experiments.EXPERIMENTS['symbolic'], seed, place)
        splits = {name: Split(root, name) for name in ('train', 'dev', 'test')}
        ids = [set(split.ids) for split in splits.values()]
        assert (
            root == same
            and len(set.union(*ids)) == FOLD_DEV + 60 == sum(map(len, ids))
            and len(ids[1]) == FOLD_DEV
        )
        assert (
            splits['test'].triples[0] == [[0, 0, 1, 1.0], [2, 1, 3, 1.0]]
            and splits['test'].features.shape[2] == 4 + 5
        )
        tests.append(ids[2])
    assert not tests[0] & tests[1]
    record = run_experiment(
        'symbolic',
        seeds=[0],
        data=path,
        out=tmp_path / 'out',
        results=tmp_path,
        device='cpu',
        tell=lambda line: None,
    )
    assert [row['name'] for row in record['rows']] == ['scan', 'cmsei'] and all(
        row['rsum'] > 0 for row in record['rows']
    )
    agreed = run_experiment(
        'phrases-agreement',
        rows=['chunker'],
        data=path,
        out=tmp_path / 'out',
        results=tmp_path,
        tell=lambda line: None,
    )
    assert (
        0 <= figure(agreed['rows'][0], 'agreement/objects/its_in_ours') <= 100
        and agreed['rows'][0]['rsum'] is None
    )


def test_parsers_are_compared_on_annotated_captions(tiny, world, tmp_path):
    record = run_experiment(
        'phrases',
        rows=['chunker', 'gold'],
        data=world,
        out=tmp_path,
        results=tmp_path,
        tell=lambda line: None,
    )
    chunker, gold = record['rows']
    assert 50 < figure(chunker, 'spans/recall') <= 100 and figure(gold, 'spans/recall') is None
    for row in record['rows']:
        assert figure(row, 'labels/contained/mismatched objects') <= figure(
            row, 'labels/equal keys/mismatched objects'
        )


# measures


@pytest.fixture(scope='module')
def hire(world, tmp_path_factory):
    from imtm_lite.runs import train

    out = tmp_path_factory.mktemp('hire')
    train(
        'hire',
        world,
        out,
        arguments=dict(width=16, word_width=8, heads=2),
        size=20,
        per_image=1,
        epochs=1,
        min_freq=2,
        device='cpu',
        progress=False,
    )
    return load(out)


def test_a_corrupted_graph_is_the_same_for_recall_and_probes(world, hire):
    test = Split(world, 'test')
    assert measure_recall(hire, corrupted(test, 0.0, 0), 0) == measure_recall(hire, test, 0)
    wrong = corrupted(test, 0.8, 0)
    first = wrong.regions(range(24))
    second = wrong.regions(range(24))
    assert torch.equal(first.triples, second.triples) and not torch.equal(
        first.triples, test.regions(range(24)).triples
    )
    assert torch.equal(first.features, test.regions(range(24)).features)
    assert not torch.equal(corrupted(test, 0.8, 1).regions(range(24)).triples, first.triples)
    found = measure_tolerance(hire, test, 0)['tolerance']
    assert (
        list(found) == [str(rate) for rate in RATES]
        and found['0.0']['rsum'] == measure_recall(hire, test, 0)['rsum']
    )
    counts = probe_counts(hire, test)
    assert {k: 100 * right / asked for k, (right, asked) in counts.items()} == found['0.0'][
        'probes'
    ]
    assert counts['chasing'][1] <= counts['who-does-what'][1]


def test_scales_and_blame_are_of_ssamt_alone(world, hire):
    test = Split(world, 'test')
    assert MEASURES['scales'](hire, test, 0) == MEASURES['blame'](hire, test, 0) == {}
    words = Vocab.build(test.captions, 1)
    small = dict(region_width=128, words=len(words), width=8, heads=2, feedforward=16)
    matcher = build('ssamt', small).eval()
    words.parser = named_parser('chunker')
    vocab = words
    found = MEASURES['scales'](matcher, test, 0)['scales']
    assert set(found) == {'global', 'local', 'phrase'} and all(
        0 <= x <= 100 for way in found.values() for x in way
    )


def test_first_look_is_measured_for_both_stages(world, hire):
    found = MEASURES['first_look'](hire, Split(world, 'test'), 0)['first_look']
    assert set(found) == {'best regions', 'mean vectors'} and all(
        list(r) == [str(n) for n in CANDIDATES] for r in found.values()
    )
    assert all(100 == r['50'] for r in found.values())  # 24 pictures are all candidates


# bad input


def one_line(capsys, monkeypatch, *words) -> str:
    monkeypatch.setattr(sys, 'argv', ['imtm', 'experiment', *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith('imtm: ') and said.count('\n') == 1, said
    return said


def test_bad_input_is_one_line_before_anything_is_written(world, tmp_path, capsys, monkeypatch):
    def refused(*words):
        return one_line(
            capsys,
            monkeypatch,
            *words,
            '--out',
            tmp_path / 'out',
            '--results',
            tmp_path / 'results',
        )

    assert all(name in refused('flicker') for name in EXPERIMENTS)
    assert all(row.name in refused('world', '--rows', 'clip') for row in EXPERIMENTS['world'].rows)
    assert "no row 'clip'" in refused('world', '--rows', 'clip', '--list') and 'no row' in refused(
        'world', '--rows', 'clip', '--table'
    )
    assert 'seeds are whole numbers' in refused(
        'world', '--seeds', 'a'
    ) and 'a seed is 0 or more' in refused('world', '--seeds=-1')
    assert 'flickr8k needs data: imtm experiment flickr8k --data DIR' in refused('flickr8k')
    assert 'there is no such folder' in refused('flickr8k', '--data', tmp_path / 'nowhere')
    assert 'there is no such file' in refused('symbolic', '--data', tmp_path / 'nowhere')
    assert 'a seed is a fold, 0 to 4' in refused(
        'symbolic', '--seeds', 5, '--data', graphs(tmp_path / 'g.jsonl', 3)
    )
    assert 'testall_ims.npy: this file is missing' in refused(
        'flickr8k', '--split', 'testall', '--data', world
    )
    bare = tmp_path / 'bare'
    bare.mkdir()
    for path in world.iterdir():
        if 'triples' not in path.name:
            (bare / path.name).symlink_to(path)
    assert 'train_triples.jsonl: this file is missing, and flickr8k, cmsei needs it' in refused(
        'flickr8k', '--data', bare
    )
    assert 'there is no such file' in refused('phrases-agreement', '--data', world)
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'results').exists()


def test_figures_of_other_data_are_not_mixed(tiny, world, tmp_path):
    declare(
        replace(
            EXPERIMENTS['flickr8k'],
            passes=1,
            rows=(Row('vse', 'vse'),),
            seeds=(0,),
            arguments=dict(width=8),
            settings=dict(size=20),
        )
    )
    record = run_experiment(
        'flickr8k',
        data=world,
        out=tmp_path / 'out',
        results=tmp_path,
        device='cpu',
        tell=lambda line: None,
    )
    assert record['rows'][0]['data'] == Split(world, 'dev').fingerprint()
    sample = shipped('sample')
    with pytest.raises(
        SettingError, match='has figures of other data than .*keep them apart with --results'
    ):
        run_experiment(
            'flickr8k', data=sample, out=tmp_path / 'out', results=tmp_path, device='cpu'
        )


def test_the_command_lists_experiments_rows_and_tables(tmp_path):
    out = run(tmp_path, '--list')
    assert (
        out.returncode == 0
        and out.stdout.split('\n')[0] == 'vse                          0 to do, 1 to do'
    )
    assert 'no row is done yet' in run(tmp_path, '--table').stdout
    out = run(tmp_path, '--rows', 'vse', '--seeds', '0')
    assert (
        out.returncode == 0
        and '| vse | 1 |' in out.stdout
        and 'pass 1, dev rSum' in out.stdout
        and '\r' not in out.stdout + out.stderr
    ), out.stderr
    assert run(tmp_path, '--table').stdout in out.stdout
    assert 'vse                          0 done, 1 to do' in run(tmp_path, '--list').stdout


# records that are there


def check_row(made: dict):
    "The schema of an entry of a record."
    assert set(FIELDS) <= set(made), set(FIELDS) - set(made)
    for key in ('name', 'system', 'split', 'library'):
        assert isinstance(made[key], str), key
    assert (
        isinstance(made['arguments'], dict)
        and type(made['seed']) is int
        and type(made['passes']) is int
    )
    for way in ('i2t', 't2i'):
        assert (
            made[way] is None
            or len(made[way]) == 3
            and all(0 <= x <= 100 for x in made[way])
            and made[way] == sorted(made[way])
        )
    if made['rsum'] is not None:
        assert made['rsum'] == pytest.approx(sum(made['i2t'] + made['t2i']))
    if made['passes']:
        assert len(made['dev']) == made['passes'] and made['seconds'] > 0
    assert made['probes'] is None or all(0 <= x <= 100 for x in made['probes'].values())
    assert made['grounding'] is None or {'phrases', 'pointing', 'iou'} <= set(made['grounding'])
    assert made['health'] is None or isinstance(made['health'], dict)


def records() -> list[Path]:
    found = sorted((ROOT / 'data/results').glob('*.json'))
    return [path for path in found if isinstance(json.loads(path.read_text()).get('rows'), list)]


@pytest.mark.parametrize('path', records(), ids=lambda path: path.stem)
def test_every_record_has_the_schema(path):
    record = json.loads(path.read_text())
    assert record['name'] == path.stem
    for made in record['rows']:
        check_row(made)
    pairs = [(made['name'], made['seed']) for made in record['rows']]
    assert len(set(pairs)) == len(pairs) and table(record).count('\n') == 1 + len(
        {name for name, _ in pairs}
    )
