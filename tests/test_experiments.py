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

from imtm_lite.checkpoints import Loaded, build, load
from imtm_lite.data import Split
from imtm_lite.files import DataError, SettingError, shipped
from imtm_lite.gallery import probe_accuracy, split_scores
from imtm_lite.phrases import named_parser
from imtm_lite.recall import evaluate
from imtm_lite.recipes import arguments_for
from imtm_lite.results import figure, made_by, read_experiment, table
from imtm_lite.runs import Log, train
from imtm_lite.text import Reader, Vocab
from imtm_lite.workshop import experiments
from imtm_lite.workshop.cli import main
from imtm_lite.workshop.experiments import (
    CANDIDATE_COUNTS,
    DATA,
    EXPERIMENTS,
    FIELDS,
    FOLD_DEV,
    MEASURES,
    RATES,
    Experiment,
    Place,
    Trial,
    claim_of,
    corrupted,
    dev_curve,
    drawn_share,
    even_share,
    find_experiment,
    is_held,
    keep,
    last_health,
    list_rows,
    measure_recall,
    measure_tolerance,
    probe_counts,
    read_graphs,
    run_experiment,
    run_fingerprint,
    run_folder,
    stages_of,
    state,
    training_view,
    whole_folder,
    write_view,
)

ROOT = Path(__file__).parent.parent
TINY = """
from imtm_lite.workshop import experiments
from imtm_lite.workshop.experiments import Experiment, Trial

experiments.EXPERIMENTS['tiny'] = Experiment(
    'tiny',
    'Does the runner run?',
    on='a tiny world',
    data='world',
    split='test',
    passes={passes},
    seeds=(0, 1),
    sizes=dict(train=40, dev=10, test=10),
    measures=('recall', 'probes', 'grounding'),
    arguments=dict(width=8, word_width=8),
    settings=dict(size={size}, min_freq=2),
    rows=(Trial('vse', 'vse'), Trial('scan', 'scan', dict(direction='i2t'))),
)
"""
PROGRAM = """
from imtm_lite.workshop.cli import main

main()
"""


def command(place: Path, *words, passes: int = 1, size: int = 20) -> list[str]:
    "The program with one experiment more, a tiny one."
    where = ['--out', str(place / 'out'), '--results', str(place / 'results'), '--device', 'cpu']
    code = TINY.format(passes=passes, size=size) + PROGRAM
    return [sys.executable, '-c', code, 'experiment', 'tiny', *where, *words]


def run(*arguments, **how):
    return subprocess.run(command(*arguments, **how), capture_output=True, text=True)


@pytest.fixture
def tiny(monkeypatch):
    "The same experiment, in this process."
    monkeypatch.setattr(experiments, 'EXPERIMENTS', dict(EXPERIMENTS))
    exec(TINY.format(passes=1, size=20), {})
    return experiments.EXPERIMENTS['tiny']


def declare(experiment: Experiment) -> Experiment:
    experiments.EXPERIMENTS[experiment.name] = experiment
    return experiment


def silent(line):
    pass


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / 'out', tmp_path / 'results')


@pytest.fixture
def how(place):
    "Where an experiment of this process runs, without a word."
    return dict(out=place.out, results=place.results, device='cpu', tell=silent)


def stamps_of(folder: Path, name: str = '*.safetensors') -> dict[Path, int]:
    "When checkpoints were written."
    return {path: path.stat().st_mtime_ns for path in folder.rglob(name)}


def row_of(experiment: Experiment, name: str) -> Trial:
    [row] = [row for row in experiment.rows if row.name == name]
    return row


def lines_with(run: Path, key: str) -> list:
    "What a run's log says of something."
    return [line[key] for line in Log(run / 'log.jsonl').lines() if key in line]


# what is declared


@pytest.mark.parametrize('experiment', EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_declared_rows_are_distinct_and_named(experiment):
    names = [row.name for row in experiment.rows]
    assert len(set(names)) == len(names)
    assert not any(',' in name for name in names)
    assert experiment.data in DATA
    assert set(experiment.measures) <= set(MEASURES)
    assert experiment.seeds
    prints = [run_fingerprint(experiment, row) for row in experiment.rows]
    assert len(set(prints)) == len(prints), 'two rows train the same'


@pytest.mark.parametrize('experiment', EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_declared_rows_have_equal_passes_and_can_be_built(experiment):
    small = dict(region_width=8, words=8, predicates=2)
    small |= dict(width=8, word_width=8, heads=2, feedforward=16)
    for row in experiment.rows if experiment.passes else ():
        stages = stages_of(experiment, row)
        assert sum(stage['epochs'] for stage in stages) == experiment.passes
        assert stages[-1]['model'] == row.system
        for stage in stages:
            # a linear rate has no decays
            if stage.get('schedule') != 'linear':
                assert max(stage.get('decay_at', (0,))) < stage['epochs'], row.name
            build(stage['model'], stage['arguments'] | arguments_for(stage['model'], small))


def test_unequal_passes_and_unknown_arguments_are_refused(tiny):
    stages = (dict(model='camp-stage1', epochs=1), dict(epochs=1))
    camp = Trial('camp', 'camp', stages=stages)
    with pytest.raises(SettingError, match='camp: 2 passes, but all rows have 1'):
        stages_of(tiny, camp)
    assert stages_of(replace(tiny, passes=2), camp)[0]['model'] == 'camp-stage1'
    with pytest.raises(SettingError, match="scan has no argument 'gate'"):
        stages_of(tiny, Trial('scan', 'scan', dict(gate='none')))
    with pytest.raises(SettingError, match="no model 'nothing'"):
        stages_of(tiny, Trial('camp', 'camp', stages=(dict(model='nothing'),)))


def test_a_fingerprint_knows_what_changes_the_training_and_nothing_else(tiny):
    row = tiny.rows[1]
    mark = run_fingerprint(tiny, row)
    for name in ('name', 'about', 'on'):
        experiment = replace(tiny, **{name: 'other'})
        assert run_fingerprint(experiment, replace(row, name='another')) == mark
    measured = replace(tiny, measures=('recall',), split='dev', data='next world', seeds=(7,))
    assert run_fingerprint(measured, row) == mark
    changed = [
        (tiny, replace(row, share=0.5)),
        (tiny, replace(row, settings=dict(lr=1.0))),
        (tiny, replace(row, arguments={})),
        (replace(tiny, dev=0.5), row),
        (replace(tiny, sizes=dict(train=20, dev=10, test=10)), row),
        (replace(tiny, arguments=dict(width=16)), row),
    ]
    prints = {run_fingerprint(*pair) for pair in changed}
    assert len(prints) == len(changed)
    assert mark not in prints


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

    def mark(name, row):
        return run_fingerprint(EXPERIMENTS[name], row_of(EXPERIMENTS[name], row))

    for first, row, second, other in shared:
        assert mark(first, row) == mark(second, other), (first, row, second, other)


# running


def test_a_tiny_experiment_runs_and_its_record_is_complete(tiny, place, how):
    told = []
    record = run_experiment('tiny', library='here', **how | dict(tell=told.append))
    pairs = [(entry['name'], entry['seed']) for entry in record['rows']]
    assert pairs == [('vse', 0), ('vse', 1), ('scan', 0), ('scan', 1)]
    assert record == json.loads((place.results / 'tiny.json').read_text())
    assert sum('pass 1, dev rSum' in line for line in told) == 4
    assert sum(': done, rSum' in line for line in told) == 4
    for entry in record['rows']:
        check_entry(entry)
        check_figures(entry, tiny, place)
        assert entry['library'] == 'here'
        assert (entry['grounding'] is None) == (entry['name'] == 'vse')


def check_figures(entry: dict, tiny: Experiment, place: Place):
    "They must be those of the run, measured again."
    run = run_folder(tiny, row_of(tiny, entry['name']), entry['seed'], place)
    test = Split(place.out / f'worlds/world{entry["seed"]}-40-10-10', 'test')
    matcher, vocab, _ = load(run)
    scores = split_scores(matcher, test, vocab)
    recall = evaluate(scores, torch.from_numpy(test.caption_image))
    assert entry['i2t'] == list(recall.i2t)
    assert entry['t2i'] == list(recall.t2i)
    assert entry['rsum'] == recall.rsum
    probes = dict(entry['probes'])
    probes.pop('chasing', None)
    assert probes == pytest.approx(probe_accuracy(matcher, test, vocab))
    curve = lines_with(run, 'dev')
    assert entry['dev'] == [dev['rsum'] for dev in curve]
    assert len(curve) == 1
    health = lines_with(run, 'health')[-1]
    assert health
    assert entry['health'] == health
    assert entry['seconds'] > 0
    assert entry['data'] == test.fingerprint()


def test_what_is_done_is_skipped_and_the_table_has_means(tiny, tmp_path, how):
    record = run_experiment('tiny', library='here', **how)
    stamps = stamps_of(tmp_path)
    told = []
    assert run_experiment('tiny', **how | dict(tell=told.append)) == record
    assert len(told) == 4
    assert all('done before' in line for line in told)
    assert stamps_of(tmp_path) == stamps
    lines = table(record).split('\n')
    assert len(lines) == 4
    assert lines[3].startswith('| scan | 2 |')
    one, two = [entry['rsum'] for entry in record['rows'] if entry['name'] == 'scan']
    assert f'{(one + two) / 2:.1f} ± {abs(one - two) / 2:.1f}' in lines[3]
    assert 'imtm experiment tiny' in made_by(record)
    assert 'seeds 0, 1; library here' in made_by(record)


def test_a_changed_row_is_done_again_and_the_others_stay(tiny, tmp_path, place, how):
    before = run_experiment('tiny', seeds=[0], **how)
    other_way = Trial('scan', 'scan', dict(direction='t2i'))
    changed = declare(replace(tiny, rows=(tiny.rows[0], other_way)))
    assert [state(changed, row, 0, place) for row in changed.rows] == ['done', 'changed']
    after = run_experiment('tiny', seeds=[0], **how)
    assert len(after['rows']) == 2
    assert after['rows'][0] == before['rows'][0]
    assert after['rows'][1]['arguments'] == dict(direction='t2i')
    # measured anew, and not trained anew
    declare(replace(changed, measures=('recall',)))
    stamps = stamps_of(tmp_path)
    assert before['rows'][0]['probes'] is not None
    assert run_experiment('tiny', seeds=[0], **how)['rows'][0]['probes'] is None
    assert stamps_of(tmp_path) == stamps


def test_again_forgets_the_run_of_the_row_and_of_no_other(tiny, tmp_path, how):
    before = run_experiment('tiny', seeds=[0], **how)['rows']
    stamps = stamps_of(tmp_path, 'best.safetensors')
    anew = dict(seeds=[0], rows=['vse'], again=True, library='newer')
    after = run_experiment('tiny', **anew, **how)['rows']
    assert [entry['library'] == 'newer' for entry in after] == [True, False]
    assert after[0]['rsum'] == before[0]['rsum']
    assert after[1] == before[1]
    now = stamps_of(tmp_path, 'best.safetensors')
    [changed] = [path for path in stamps if now[path] != stamps[path]]
    assert 'vse-' in str(changed)


def test_a_row_that_fails_does_not_stop_the_others(tiny, place, how):
    bad = Trial('bad', 'scan', dict(direction='up'))
    declare(replace(tiny, rows=(bad, tiny.rows[0])))
    told = []
    with pytest.raises(SettingError, match='tiny: 1 failed: bad, seed 0'):
        run_experiment('tiny', seeds=[0], **how | dict(tell=told.append))
    assert 'bad, seed 0: FAILED: scan: direction is' in told[0]
    [entry] = read_experiment(place.results, 'tiny')['rows']
    assert entry['name'] == 'vse'


def test_stages_follow_each_other_and_their_curves_are_one(tiny, place, how):
    stages = dict(model='camp-stage1', epochs=2), dict(epochs=1, criterion='bce')
    camp = Trial('camp', 'camp', dict(form='released'), stages=stages)
    experiment = declare(replace(tiny, passes=3, rows=(camp,)))
    [entry] = run_experiment('tiny', seeds=[0], **how)['rows']
    run = run_folder(experiment, camp, 0, place)
    first = [dev['rsum'] for dev in lines_with(run / 'stage1', 'dev')]
    last = [dev['rsum'] for dev in lines_with(run, 'dev')]
    assert len(first) == 2
    assert entry['dev'] == first + last
    card = load(run).card
    assert card['start']
    assert card['model'] == 'camp'


def test_health_is_the_last_of_the_log(tmp_path):
    log = Log(tmp_path / 'log.jsonl')
    log.write(step=1, health=dict(spread=1.0))
    log.write(step=2, dev=dict(rsum=3.0))
    log.write(step=2, health=dict(spread=0.5))
    assert last_health(tmp_path, 1) == dict(spread=0.5)
    assert dev_curve(tmp_path, 1) == [3.0]


# interrupted, and several at once


def test_a_killed_run_goes_on_to_the_same_figures(tmp_path):
    how = dict(passes=3, size=4)
    words = ['--rows', 'scan', '--seeds', '0']
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = subprocess.Popen(command(tmp_path / 'cut', *words, **how), **quiet)
    while killed.poll() is None and not list(tmp_path.rglob('last.safetensors')):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert list(tmp_path.rglob('last.safetensors'))
    assert not (tmp_path / 'cut/results/tiny.json').exists()
    assert 'scan                         0 begun' in run(tmp_path / 'cut', '--list', **how).stdout
    entries = []
    for name in ('cut', 'whole'):
        out = run(tmp_path / name, *words, **how)
        assert out.returncode == 0, out.stderr
        entries += read_experiment(tmp_path / name / 'results', 'tiny')['rows']
    cut, whole = entries
    assert len(cut['dev']) == 3
    for key in ('i2t', 't2i', 'rsum', 'dev', 'probes', 'grounding', 'fingerprint'):
        assert cut[key] == whole[key], key


def test_two_processes_share_an_experiment(tmp_path):
    words = command(tmp_path, passes=2, size=4)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(words, **pipes) for _ in range(2)]
    printed = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sum(out.count(': done, rSum') for out, _ in printed) == 4
    entries = read_experiment(tmp_path / 'results', 'tiny')['rows']
    assert len(entries) == 4
    assert all(len(entry['dev']) == 2 for entry in entries)
    logs = list(tmp_path.rglob('log.jsonl'))
    assert len(logs) == 4
    assert all(len(lines_with(log.parent, 'dev')) == 2 for log in logs)


HOLD = """
import sys, time
from pathlib import Path
from imtm_lite.workshop.experiments import locked

with locked(Path(sys.argv[1])):
    Path(sys.argv[2]).touch()
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    "A process that holds the lock of a file."
    started = []

    def hold(path: Path):
        mark = tmp_path / 'held'
        words = [sys.executable, '-c', HOLD, str(path), str(mark)]
        started.append(subprocess.Popen(words))
        while not mark.exists():
            time.sleep(0.05)
        return started[0]

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_claim_ends_with_its_process(tiny, place, how, holder):
    row = tiny.rows[0]
    claim = claim_of(run_folder(tiny, row, 0, place))
    process = holder(claim)
    assert is_held(claim)
    assert state(tiny, row, 0, place) == 'running'
    listed = list_rows('tiny', out=place.out, results=place.results)
    assert 'vse                          0 running' in listed
    told = []
    only = dict(rows=['vse'], seeds=[0])
    run_experiment('tiny', **only, **how | dict(tell=told.append))
    assert told == ['tiny, vse, seed 0: another process is at it']
    assert not (place.results / 'tiny.json').exists()
    process.kill()
    process.wait()
    assert not is_held(claim)
    assert state(tiny, row, 0, place) == 'to do'
    run_experiment('tiny', **only, **how)
    assert state(tiny, row, 0, place) == 'done'


WRITE = """
import sys
from pathlib import Path

place = experiments.Place(Path(sys.argv[1]), Path(sys.argv[2]))
first = int(sys.argv[3])
for seed in range(first, first + 10):
    experiments.keep(experiments.EXPERIMENTS['tiny'], dict(name='vse', seed=seed), place)
"""


def test_many_processes_may_write_one_record(tiny, place):
    code = TINY.format(passes=1, size=20) + WRITE
    words = [sys.executable, '-c', code, str(place.out), str(place.results)]
    writers = [subprocess.Popen([*words, first]) for first in ('0', '10')]
    assert [writer.wait() for writer in writers] == [0, 0]
    entries = read_experiment(place.results, 'tiny')['rows']
    assert [entry['seed'] for entry in entries] == list(range(20))
    keep(tiny, dict(name='vse', seed=3, rsum=1.0), place)
    entries = read_experiment(place.results, 'tiny')['rows']
    assert len(entries) == 20
    assert entries[3]['rsum'] == 1.0


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / 'data') as folder:
        (folder / 'half').touch()
        raise KeyboardInterrupt
    assert not (tmp_path / 'data').exists()
    with whole_folder(tmp_path / 'data') as folder:
        (folder / 'whole').touch()
    assert [path.name for path in tmp_path.rglob('*')] == ['data', 'whole']


# another split, some of the pictures, folds


def test_another_split_is_a_record_of_its_own_and_shares_the_run(tiny, tmp_path, place, how):
    only = dict(rows=['vse'], seeds=[0])
    run_experiment('tiny', **only, **how)
    stamps = stamps_of(tmp_path)
    record = run_experiment('tiny', split='dev', **only, **how)
    assert stamps_of(tmp_path) == stamps
    assert record['name'] == 'tiny-dev'
    assert record['command'] == 'imtm experiment tiny --split dev'
    [entry] = record['rows']
    assert entry['split'] == 'dev'
    assert entry['rsum'] == entry['dev'][0]
    assert (place.results / 'tiny-dev.json').is_file()


def test_views_hold_the_chosen_pictures(world, tmp_path):
    chosen = dict(train=drawn_share(80, 0.25, seed=1), dev=even_share(24, 0.2))
    write_view(world, tmp_path / 'view', chosen)
    for name, rows in chosen.items():
        full = Split(world, name)
        view = Split(tmp_path / 'view', name)
        assert view.n_images == len(rows)
        assert view.ids == [full.ids[row] for row in rows]
        assert view.classes == full.classes
        assert view.predicates == full.predicates
        for k, row in enumerate(rows):
            check_same_picture(view, k, full, row)


def check_same_picture(view: Split, k: int, full: Split, row: int):
    captions = [view.captions[i] for i in view.captions_of(k)]
    assert captions == [full.captions[i] for i in full.captions_of(row)]
    for key in ('features', 'boxes', 'sizes', 'labels', 'scores'):
        assert np.array_equal(getattr(view, key)[k], getattr(full, key)[row])
    for key in ('triples', 'phrases'):
        assert getattr(view, key)[k] == getattr(full, key)[row]


def test_a_split_that_stays_whole_is_linked(world, tmp_path):
    write_view(world, tmp_path / 'view', dict(train=None, dev=even_share(24, 0.2)))
    view = Split(tmp_path / 'view', 'train')
    assert view.fingerprint() == Split(world, 'train').fingerprint()
    assert view.probes is not None
    assert (tmp_path / 'view/train_ims.npy').is_symlink()


def test_shares_are_nested_and_belong_to_the_seed():
    def share(size, seed=3):
        return set(drawn_share(100, size, seed).tolist())

    quarters = [share(size) for size in (0.25, 0.5, 0.75, 1.0)]
    assert list(map(len, quarters)) == [25, 50, 75, 100]
    assert all(smaller < larger for smaller, larger in zip(quarters, quarters[1:]))
    assert share(0.25) == quarters[0]
    assert share(0.25, seed=4) != quarters[0]


def test_even_shares_are_spaced_and_never_empty():
    assert len(even_share(1000, 0.2)) == 200
    assert even_share(1000, 0.2)[0] == 0
    assert len(even_share(3, 0.01)) == 1


def test_a_row_trains_on_its_share_and_dev_is_whole_in_the_end(tiny, place, how):
    rows = (Trial('half', 'vse', share=0.5), Trial('all', 'vse'))
    declare(replace(tiny, dev=0.5, rows=rows))
    record = run_experiment('tiny', seeds=[0], split='dev', **how)
    experiment = find_experiment('tiny', 'dev')
    data = place.out / 'worlds/world0-40-10-10'
    sizes = []
    for row in experiment.rows:
        view = training_view(experiment, row, 0, data, place)
        splits = {name: Split(view, name) for name in ('train', 'dev')}
        sizes.append([split.n_images for split in splits.values()])
        card = load(run_folder(experiment, row, 0, place)).card
        assert card['data']['train'] == splits['train'].fingerprint()
    assert sizes == [[20, 5], [40, 5]]
    full = Split(data, 'dev').fingerprint()
    assert all(entry['data'] == full for entry in record['rows'])


def graph_line(number: int, rng) -> dict:
    corners = rng.uniform(0, 50, (4, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 50, (4, 2))], 1)
    labels = [str(label) for label in rng.choice(['man', 'dog', 'hat', 'tree'], 4)]
    captions = []
    for label in labels:
        captions.append(dict(text=f'A {label} is here .', triples=[[label, 'near', 'tree']]))
    return dict(
        id=number,
        boxes=boxes.round(1).tolist(),
        labels=labels,
        captions=captions,
        triples=[[0, 'near', 1], [2, 'on', 3]],
    )


def write_graph_file(path: Path, n: int) -> Path:
    "A file of the form of f30k_graphs/val.jsonl."
    rng = np.random.default_rng(0)
    lines = [json.dumps(graph_line(number, rng)) for number in range(n)]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path


def test_folds_are_disjoint_and_in_the_layout(tmp_path):
    path = write_graph_file(tmp_path / 'val.jsonl', FOLD_DEV + 60)
    place = Place(tmp_path / 'out', tmp_path, path)
    tests = []
    for seed in range(2):
        root, same = DATA['graphs'](EXPERIMENTS['symbolic'], seed, place)
        assert root == same
        splits = [Split(root, name) for name in ('train', 'dev', 'test')]
        ids = [set(split.ids) for split in splits]
        assert len(set.union(*ids)) == FOLD_DEV + 60 == sum(map(len, ids))
        assert len(ids[1]) == FOLD_DEV
        assert splits[2].triples[0] == [[0, 0, 1, 1.0], [2, 1, 3, 1.0]]
        assert splits[2].features.shape[2] == 4 + 5
        tests.append(ids[2])
    assert not tests[0] & tests[1]


def test_rows_of_a_fold_run_and_parsers_are_held_against_its_triples(tiny, tmp_path, how):
    path = write_graph_file(tmp_path / 'val.jsonl', FOLD_DEV + 60)
    small = dict(arguments=dict(width=8, word_width=8), settings=dict(size=20, min_freq=1))
    symbolic = EXPERIMENTS['symbolic']
    declare(replace(symbolic, passes=1, rows=symbolic.rows[:2], **small))
    entries = run_experiment('symbolic', seeds=[0], data=path, **how)['rows']
    assert [entry['name'] for entry in entries] == ['scan', 'cmsei']
    assert all(entry['rsum'] > 0 for entry in entries)
    [entry] = run_experiment('phrases-agreement', rows=['chunker'], data=path, **how)['rows']
    assert 0 <= figure(entry, 'agreement/objects/its_in_ours') <= 100
    assert entry['rsum'] is None


def test_a_file_of_graphs_that_cannot_be_read_is_one_line(tmp_path):
    path = tmp_path / 'val.jsonl'
    path.write_text('{}\nnothing\n')
    with pytest.raises(DataError, match='val.jsonl: cannot be read .*; expected a file of JSON'):
        read_graphs(path)


def test_parsers_are_compared_on_annotated_captions(world, how):
    record = run_experiment('phrases', rows=['chunker', 'gold'], data=world, **how)
    chunker, gold = record['rows']
    assert 50 < figure(chunker, 'spans/recall') <= 100
    assert figure(gold, 'spans/recall') is None
    for entry in record['rows']:
        loose = figure(entry, 'labels/contained/mismatched objects')
        strict = figure(entry, 'labels/equal keys/mismatched objects')
        assert loose <= strict


# measures


@pytest.fixture(scope='module')
def hire(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('hire')
    small = dict(arguments=dict(width=16, word_width=8, heads=2), size=20, per_image=1)
    train('hire', world, out, epochs=1, min_freq=2, device='cpu', progress=False, **small)
    return load(out)


def test_a_corrupted_graph_is_always_the_same(world):
    test = Split(world, 'test')
    wrong = corrupted(test, 0.8, 0)
    regions = test.regions(range(24))
    first = wrong.regions(range(24))
    second = wrong.regions(range(24))
    assert torch.equal(first.triples, second.triples)
    assert torch.equal(first.features, regions.features)
    assert not torch.equal(first.triples, regions.triples)
    assert not torch.equal(first.triples, corrupted(test, 0.8, 1).regions(range(24)).triples)


def test_tolerance_begins_with_the_graph_as_it_is(world, hire):
    test = Split(world, 'test')
    recall = measure_recall(hire, test, 0)
    assert measure_recall(hire, corrupted(test, 0.0, 0), 0) == recall
    tolerance = measure_tolerance(hire, test, 0)['tolerance']
    assert list(tolerance) == list(map(str, RATES))
    assert tolerance['0.0']['rsum'] == recall['rsum']
    counts = probe_counts(hire, test)
    percents = {kind: 100 * right / asked for kind, (right, asked) in counts.items()}
    assert tolerance['0.0']['probes'] == percents
    assert counts['chasing'][1] <= counts['who-does-what'][1]


def test_scales_and_blame_are_of_ssamt_alone(world, hire):
    test = Split(world, 'test')
    assert MEASURES['scales'](hire, test, 0) == {}
    assert MEASURES['blame'](hire, test, 0) == {}
    words = Vocab.build(test.captions, 1)
    small = dict(region_width=128, words=len(words), width=8, heads=2, feedforward=16)
    matcher = build('ssamt', small).eval()
    loaded = Loaded(matcher, Reader(words, named_parser('chunker')), {})
    scales = MEASURES['scales'](loaded, test, 0)['scales']
    assert set(scales) == {'global', 'local', 'phrase'}
    for both_ways in scales.values():
        assert all(0 <= share <= 100 for share in both_ways)


def test_first_look_is_measured_for_both_stages(world, hire):
    shares = MEASURES['first_look'](hire, Split(world, 'test'), 0)['first_look']
    assert set(shares) == {'best regions', 'mean vectors'}
    for by_count in shares.values():
        assert list(by_count) == list(map(str, CANDIDATE_COUNTS))
        # 24 pictures are all candidates
        assert by_count['50'] == 100


# bad input


@pytest.fixture
def refused(place, capsys, monkeypatch):
    "The one line that the program ends with."

    def call(*words):
        where = ('--out', place.out, '--results', place.results)
        monkeypatch.setattr(sys, 'argv', ['imtm', 'experiment', *map(str, (*words, *where))])
        with pytest.raises(SystemExit) as end:
            main()
        message = capsys.readouterr().err
        assert end.value.code == 2, message
        assert message.startswith('imtm: '), message
        assert message.count('\n') == 1, message
        return message

    return call


def test_wrong_names_and_seeds_are_one_line_before_anything_is_written(place, refused, tmp_path):
    assert all(name in refused('flicker') for name in EXPERIMENTS)
    message = refused('world', '--rows', 'clip')
    assert all(row.name in message for row in EXPERIMENTS['world'].rows)
    assert "no row 'clip'" in refused('world', '--rows', 'clip', '--list')
    assert 'no row' in refused('world', '--rows', 'clip', '--table')
    assert 'seeds are whole numbers' in refused('world', '--seeds', 'a')
    assert 'a seed is 0 or more' in refused('world', '--seeds=-1')
    graphs = write_graph_file(tmp_path / 'graphs.jsonl', 3)
    message = refused('symbolic', '--seeds', 5, '--data', graphs)
    assert 'a seed is a fold, 0 to 4' in message
    assert not place.out.exists()
    assert not place.results.exists()


def test_missing_files_are_one_line_before_anything_is_written(world, place, refused, tmp_path):
    bare = tmp_path / 'bare'
    bare.mkdir()
    for path in world.iterdir():
        if 'triples' not in path.name:
            (bare / path.name).symlink_to(path)
    nowhere = tmp_path / 'nowhere'
    assert 'flickr8k needs data: imtm experiment flickr8k --data DIR' in refused('flickr8k')
    assert 'there is no such folder' in refused('flickr8k', '--data', nowhere)
    assert 'there is no such file' in refused('symbolic', '--data', nowhere)
    assert 'there is no such file' in refused('phrases-agreement', '--data', world)
    message = refused('flickr8k', '--split', 'testall', '--data', world)
    assert 'testall_ims.npy: this file is missing' in message
    message = refused('flickr8k', '--data', bare)
    assert 'train_triples.jsonl: this file is missing, and flickr8k, cmsei needs it' in message
    assert not place.out.exists()
    assert not place.results.exists()


def test_figures_of_other_data_are_not_mixed(tiny, world, how):
    small = dict(passes=1, seeds=(0,), arguments=dict(width=8), settings=dict(size=20))
    declare(replace(EXPERIMENTS['flickr8k'], rows=(Trial('vse', 'vse'),), **small))
    [entry] = run_experiment('flickr8k', data=world, **how)['rows']
    assert entry['data'] == Split(world, 'dev').fingerprint()
    reason = 'has figures of other data than .*keep them apart with --results'
    with pytest.raises(SettingError, match=reason):
        run_experiment('flickr8k', data=shipped('sample'), **how)


def test_the_command_lists_experiments_rows_and_tables(tmp_path):
    out = run(tmp_path, '--list')
    assert out.returncode == 0
    assert out.stdout.split('\n')[0] == 'vse                          0 to do, 1 to do'
    assert 'no row is done yet' in run(tmp_path, '--table').stdout
    out = run(tmp_path, '--rows', 'vse', '--seeds', '0')
    assert out.returncode == 0, out.stderr
    assert '| vse | 1 |' in out.stdout
    assert 'pass 1, dev rSum' in out.stdout
    assert '\r' not in out.stdout + out.stderr
    assert run(tmp_path, '--table').stdout in out.stdout
    assert 'vse                          0 done, 1 to do' in run(tmp_path, '--list').stdout


# records that are there


def check_entry(entry: dict):
    "The schema of an entry of a record."
    assert set(FIELDS) <= set(entry), set(FIELDS) - set(entry)
    for key in ('name', 'system', 'split', 'library'):
        assert isinstance(entry[key], str), key
    for key in ('seed', 'passes'):
        assert type(entry[key]) is int, key
    assert isinstance(entry['arguments'], dict)
    if entry['rsum'] is not None:
        check_recalls(entry)
    if entry['passes']:
        assert len(entry['dev']) == entry['passes']
        assert entry['seconds'] > 0
    assert all(0 <= share <= 100 for share in (entry['probes'] or {}).values())
    assert entry['grounding'] is None or {'phrases', 'pointing', 'iou'} <= set(entry['grounding'])
    assert entry['health'] is None or isinstance(entry['health'], dict)


def check_recalls(entry: dict):
    for way in ('i2t', 't2i'):
        recalls = entry[way]
        assert len(recalls) == 3
        assert recalls == sorted(recalls)
        assert 0 <= recalls[0] <= recalls[2] <= 100
    assert entry['rsum'] == pytest.approx(sum(entry['i2t'] + entry['t2i']))


def records() -> list[Path]:
    "Of experiments; other files there have other forms."
    paths = sorted((ROOT / 'data/results').glob('*.json'))
    return [path for path in paths if isinstance(json.loads(path.read_text()).get('rows'), list)]


@pytest.mark.parametrize('path', records(), ids=lambda path: path.stem)
def test_every_record_has_the_schema(path):
    record = json.loads(path.read_text())
    assert record['name'] == path.stem
    for entry in record['rows']:
        check_entry(entry)
    pairs = {(entry['name'], entry['seed']) for entry in record['rows']}
    assert len(pairs) == len(record['rows'])
    names = {name for name, _ in pairs}
    assert table(record).count('\n') == 1 + len(names)
