"The `imtm` program as a person meets it: output, pictures, one line and exit status 2 for faults."

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import typer

from imtm_lite.checkpoints import read_checkpoint
from imtm_lite.data import Split
from imtm_lite.recall import PROTOCOLS
from imtm_lite.recipes import RECIPES
from imtm_lite.runs import LEARNING
from imtm_lite.workshop import cli, printing
from imtm_lite.workshop.convert import CONVERTERS
from imtm_lite.world.scenes import Noise
from imtm_lite.world.write import SHAPES

IMTM = [sys.executable, '-c', 'from imtm_lite.workshop.cli import main; main()']
COMMANDS = typer.main.get_command(cli.app).commands


def imtm(*words, **how):
    return subprocess.run([*IMTM, *map(str, words)], capture_output=True, text=True, **how)


@pytest.fixture
def here(monkeypatch, capsys):
    "The same in this process, for what ends before anything is computed."

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['imtm', *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr()
        return subprocess.CompletedProcess(words, end.value.code, out.out, out.err)

    return call


def one_line(out, *expected):
    assert out.returncode == 2, out.stdout + out.stderr
    message = [line for line in out.stderr.splitlines() if line.startswith('imtm: ')]
    assert len(message) == 1 and 'Traceback' not in out.stderr, out.stderr
    for words in expected:
        assert str(words) in message[0], message[0]


def flat(text):
    "Without what depends on the width of the screen."
    return ' '.join(text.split())


def help_of(command, option):
    "The line of help of an option or an argument."
    return next(p.help for p in COMMANDS[command].params if p.name == option)


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('cli') / 'camp'
    small = ('--set', 'width=16', '--set', 'word_width=8', '--min-freq', 2, '--size', 20)
    stages = ('--preset', 'demo-released', '--epochs', '1/1')
    done = imtm('train', 'camp', '--data', world, '--out', out, *stages, *small)
    assert done.returncode == 0, done.stderr
    for words in ('stage 1: camp-stage1', 'dev i2t and t2i', 'next: imtm eval'):
        assert words in done.stdout
    return out


def test_help_comes_without_torch():
    program = """
import sys
from imtm_lite.workshop.cli import app
from typer.main import get_command
for name in (None, *get_command(app).commands):
    try:
        app([name, '--help'] if name else ['--help'])
    except SystemExit as end:
        assert not end.code
heavy = {'torch', 'numpy', 'matplotlib', 'accelerate'} & set(sys.modules)
assert not heavy, heavy
"""
    out = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_help_has_examples(here):
    for command in COMMANDS.keys() - {'course'}:
        assert f'imtm {command}' in flat(here(command, '--help').stdout), command


def test_help_names_what_there_is():
    "The lists that stand in the help, because the modules that know them take seconds to import."
    for model in RECIPES:
        assert model in help_of('train', 'model') and model in help_of('demo', 'models')
    for protocol in PROTOCOLS:
        assert protocol in help_of('eval', 'protocol')
    for kind in CONVERTERS:
        assert kind in help_of('convert', 'kind')
    for shape in SHAPES:
        assert shape in help_of('world', 'shape')
    shown = {p.name: p.show_default for p in COMMANDS['world'].params}
    assert float(shown['jitter']) == Noise().jitter
    assert float(shown['wrong_relation']) == Noise().wrong_relation


def test_every_setting_of_training_is_an_option():
    own = {'seed', 'precision'}  # of the command, because a preset does not have them
    assert set(cli.SETTING_HELP) == set(LEARNING) - own
    names = {p.name for p in COMMANDS['train'].params}
    assert names >= set(LEARNING) and 'settings' not in names


def test_unknown_words_are_not_lost_in_the_help():
    out = imtm('train', '--help', env=os.environ | dict(COLUMNS='160'))
    assert 'rarer words become <unk>' in flat(out.stdout)


def test_tables_print_cells_letter_by_letter(capsys):
    cells = ('[red]', '<unk>', '[/]', r'\[x]')
    printing.print_table('[bold]title', ('[head]', 'b', 'c', 'd'), [cells], last=cells)
    out = capsys.readouterr().out
    assert '[bold]title' in out and '[head]' in out
    for cell in cells:
        assert out.count(cell) == 2, cell


def test_settings_as_typed():
    assert cli.parse_setting('lr', '5e-4/1e-3') == [5e-4, 1e-3]
    assert cli.parse_setting('decay_at', '10,15') == (10, 15)
    assert cli.parse_setting('frozen', 'words,regions') == ('words', 'regions')
    assert cli.parse_setting('updates', 'none') is None
    assert cli.parse_setting('criterion', 'bce') == 'bce'
    assert cli.parse_setting('distinct', 'False') is False
    assert cli.parse_argument('text=a/b') == ('text', 'a/b')
    with pytest.raises(cli.SettingError, match='one value'):
        cli.parse_argument('gate=none/scalar')
    with pytest.raises(cli.SettingError, match='name=value'):
        cli.parse_argument('gate')


def test_doctor_says_a_line_each():
    out = imtm('doctor')
    assert out.returncode == 0 and out.stdout.count('\n') >= 10 and 'mini detector' in out.stdout


def test_doctor_of_a_run_prints_figures_and_alarms(here, world, run, tmp_path):
    out = imtm('doctor', run, '--data', world)
    assert out.returncode == 0, out.stderr
    figures = ('dev rsum', 'gate regions own', 'score spread others', 'gradient max')
    for words in ('epoch 1', 'best now', *figures, '; try '):
        assert words in flat(out.stdout), words
    assert 'best now' not in imtm('doctor', run).stdout
    one_line(here('doctor', tmp_path), 'no log.jsonl there')


def test_settings_of_the_schedule_reach_the_run(world, tmp_path):
    settings = dict(schedule='linear', warmup=2, updates=6, accumulate=2, instances=200)
    settings |= dict(drop_regions=0.2, drop_words=0.1, candidates=None)
    words = ['--set', 'width=16', '--min-freq', 2]
    for name, value in settings.items():
        words += [f'--{name.replace("_", "-")}', 'none' if value is None else value]
    out = imtm('train', 'vse', '--data', world, '--out', tmp_path / 'run', *words)
    assert out.returncode == 0, out.stderr
    card = read_checkpoint(tmp_path / 'run/last.safetensors')[0]
    assert {name: card['settings'][name] for name in settings} == settings and card['step'] == 6


def test_world_of_a_shape_with_other_numbers(tmp_path):
    out = imtm('world', tmp_path / 'w', '--shape', 'f30k', '--train', 40, '--dev', 10, '--test', 10)
    assert out.returncode == 0, out.stderr
    assert '40 + 10 + 10 pictures' in flat(out.stdout)
    for name, n in (('train', 40), ('dev', 10), ('test', 10)):
        split = Split(tmp_path / 'w', name)
        assert split.features.shape == (n, 36, 2048) and split.features.dtype == np.float16
        assert len(split.captions) == 5 * n
    assert not (tmp_path / 'w' / 'pictures').exists()


def test_a_world_that_cannot_be_is_refused_before_it_is_begun(here, tmp_path):
    wrong = dict(shape='f8k', width=100, train=-1, regions=0, workers=-1)
    for name, value in wrong.items():
        one_line(here('world', tmp_path / 'v', f'--{name}', value), value)
    huge = ('--shape', 'coco', '--train', 800_000, '--regions', 10_000)
    one_line(here('world', tmp_path / 'v', *huge), 'GB free')
    assert not (tmp_path / 'v').exists()


def test_check_of_the_world(world):
    out = imtm('check', world)
    assert out.returncode == 0 and 'train' in out.stdout


def test_eval_prints_what_it_measured_and_writes_json(world, run, tmp_path):
    out = imtm('eval', run, '--data', world, '--json', tmp_path / 'r.json')
    assert out.returncode == 0, out.stderr
    result = json.loads((tmp_path / 'r.json').read_text())
    figures = {'i2t', 't2i', 'rsum', 'probes'}
    assert figures | {'protocol', 'seed', 'fingerprint', 'library', 'split'} <= result.keys()
    assert 'protocol plain' in flat(out.stdout)
    program = imtm('eval', run, '--data', world, '--json', '-')
    assert program.returncode == 0, program.stderr
    assert json.loads(program.stdout) == result


def test_ground_prints_chance_and_best_beside_each_figure(here, world, run, tmp_path):
    out = imtm('ground', run, '--data', world, '--json', tmp_path / 'g.json')
    assert out.returncode == 0, out.stderr
    figures = json.loads((tmp_path / 'g.json').read_text())['grounding']['all']
    assert figures['phrases'] > 50
    for name in ('pointing', 'iou'):
        assert 0 < figures[f'{name} chance'] < figures[f'{name} best'] <= 100
    assert 'chance' in out.stdout and f"{figures['pointing']:.1f}" in out.stdout
    hidden = shutil.ignore_patterns('*_phrases*', 'pictures')
    bare = shutil.copytree(world, tmp_path / 'bare', ignore=hidden)
    expected = 'test_phrases.jsonl: this file is missing, and grounding needs it'
    one_line(here('ground', run, '--data', bare), expected)


def test_search_draws_a_picture_and_names_unknown_words(world, run, tmp_path):
    picture = tmp_path / 's.png'
    words = (run, 'a zzyzx left of a tree', '--data', world, '--top', 3, '--out', picture)
    out = imtm('search', *words)
    assert out.returncode == 0, out.stderr
    assert 'zzyzx' in out.stdout and '3. ' in out.stdout and picture.stat().st_size > 5000
    two_stages = imtm('search', *words, '--candidates', 1000)
    assert two_stages.returncode == 0, two_stages.stderr
    assert two_stages.stdout == out.stdout


def test_demo_leaves_results_checkpoints_log_and_figure(here, tmp_path):
    small = ('--train', 60, '--dev', 16, '--test', 16, '--epochs', 1)
    out = imtm('demo', '--out', tmp_path / 'demo', *small)
    assert out.returncode == 0, out.stderr
    results = json.loads((tmp_path / 'demo/results.json').read_text())
    assert {'seconds', 'protocol', 'seed', 'chance'} <= results.keys()
    assert results['models'].keys() == {'vse', 'scan', 'camp'}
    for figures in results['models'].values():
        assert len(figures['i2t']) == len(figures['t2i']) == 3 and figures['probes']
    for file in ('ranking.png', 'camp/best.safetensors', 'camp/log.jsonl', 'vse/best.safetensors'):
        assert (tmp_path / 'demo' / file).is_file()
    one_line(here('demo', '--out', tmp_path / 'demo'), 'holds a finished demo')


def test_faults_are_one_line_and_exit_status_2(here, world, run, tmp_path):
    new = tmp_path / 'new'
    train = ('train', 'camp', '--out', new)
    systems = 'vse, scan, camp, ssamt, cmsei, hire'
    one_line(here('train', 'clip', '--data', world, '--out', new), systems)
    one_line(here(*train, '--data', world, '--set', 'gates=none'), 'gates', 'gate')
    one_line(here(*train, '--data', world, '--optimizer', 'lamb'), 'adamw')
    one_line(here(*train, '--data', tmp_path / 'nowhere'), 'nowhere')
    one_line(here('train', 'camp', '--data', world, '--out', run), '--resume')
    one_line(here('eval', run, '--data', world, '--protocol', 'f30k-1k'), '1000 images', 'plain')
    one_line(imtm('eval', tmp_path / 'none', '--data', world), 'none')
    one_line(here('search', run, '--data', world, '  '), 'empty')
    too_few = here('search', run, '--data', world, 'a dog', '--candidates', 2)
    one_line(too_few, '2 candidates for 5 pictures')
    one_line(here('world', world), world.name)
    one_line(here('experiment', 'world', '--list', '--seeds', 'x'), "not 'x'")
    assert not new.exists()  # nothing half-written


def test_a_broken_data_set_stops_training_in_one_line(here, world, tmp_path):
    broken = tmp_path / 'broken'
    shutil.copytree(world, broken, ignore=shutil.ignore_patterns('pictures'))
    features = np.load(broken / 'train_ims.npy')
    features[7] = np.nan
    np.save(broken / 'train_ims.npy', features)
    out = here('train', 'vse', '--data', broken, '--out', tmp_path / 'run')
    one_line(out, 'train_ims.npy', 'row 7')
    assert here('check', broken).returncode == 2


def test_triples_are_guessed_where_there_are_none(here, world, tmp_path):
    hidden = shutil.ignore_patterns('*triples*', 'predicates.txt', 'pictures')
    data = shutil.copytree(world, tmp_path / 'bare', ignore=hidden)
    expected = 'train_triples.jsonl: this file is missing, and the relation prior needs it'
    one_line(here('triples', data, '--like', data), expected)
    assert not (data / 'predicates.txt').exists()
    out = imtm('triples', data, '--like', world, '--threshold', 0.2)
    assert out.returncode == 0, out.stderr
    confidences = []
    for triples in Split(data, 'test').triples:
        confidences += [triple[3] for triple in triples]
    assert confidences and min(confidences) >= 0.2
    one_line(here('triples', data, '--like', world), 'is there already')
