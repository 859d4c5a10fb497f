"Several processes that share a batch train the model that one process trains: losses, gradients, logs, kills."

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback

import pytest
import torch
import torch.distributed as dist

from imtm_lite import load
from imtm_lite.checkpoints import MODELS, TASKS, read_checkpoint
from imtm_lite.data import Batch, Split, batches
from imtm_lite.encoders import Codes
from imtm_lite.gallery import score_split, split_recall, split_scores
from imtm_lite.losses import HardestBCE, Triplet
from imtm_lite.phrases import Entity, PhraseLabels, TextGraph
from imtm_lite.processes import Processes
from imtm_lite.runs import Log, train
from imtm_lite.tasks import Task
from imtm_lite.text import Vocab
from tests.matchers import make, ragged

RUN = dict(
    arguments=dict(width=16, word_width=8),
    epochs=2,
    size=7,
    lr=5e-4,
    per_image=1,
    min_freq=2,
    decay_at=(1,),
    soft_epochs=1,
    device='cpu',
    progress=False,
    save_every=5,
)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def work(function, rank, count, port, arguments, fault):
    "One process of a group, as torchrun would have started it."
    os.environ |= dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        OMP_NUM_THREADS='1',
    )
    torch.set_num_threads(1)
    try:
        function(rank, count, *arguments)
    except BaseException:
        fault.write_text(traceback.format_exc())
        raise


def start(count, function, *arguments, fault):
    "A group of processes; all come from one server, which has imported the library once."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['imtm_lite.runs', 'transformers.models.bert.modeling_bert'])
    port = free_port()
    group = [
        context.Process(target=work, args=(function, rank, count, port, arguments, fault))
        for rank in range(count)
    ]
    for p in group:
        p.start()
    return group


def together(count, function, *arguments, folder):
    "Run `function(rank, count, *arguments)` in so many processes; a fault of one is a fault of the test."
    group = start(count, function, *arguments, fault=folder / 'fault.txt')
    fault = folder / 'fault.txt'
    end = time.time() + 120
    while any(p.exitcode is None for p in group) and not fault.exists() and time.time() < end:
        time.sleep(0.02)
    for p in group:
        if p.exitcode is None and (fault.exists() or time.time() > end):
            p.kill()
        p.join()
    assert not fault.exists(), fault.read_text()
    assert [p.exitcode for p in group] == [0] * count


# ---------------------------------------------------------------- losses and gradients


def losses_and_gradients(task, batch):
    torch.manual_seed(0)  # wrong pairs that are drawn: the same ones
    losses = task(batch)
    losses['total'].backward()
    task.processes.mean_gradients(task.matcher.parameters())
    gradients = {name: p.grad for name, p in task.matcher.named_parameters()}
    task.matcher.zero_grad()
    return losses, gradients


def labels_of(n):
    "Four phrases a caption, all different."
    phrases = [tuple(Entity(0, 1, f'{c}{p}') for p in range(4)) for c in range(n)]
    return PhraseLabels([TextGraph(('a',), entities) for entities in phrases], range(n))


def compare(rank, count, sizes, variants):
    "Every model: this group's losses and gradients beside those of one process."
    dist.init_process_group('gloo')
    processes = Processes(rank, count)
    for name, arguments, criterion, frozen, memory in variants:
        for n in sizes:
            torch.manual_seed(n)
            matcher, (regions, captions) = (
                make(name, arguments, torch.float64).train(),
                ragged(torch.float64, images=n, captions=n),
            )
            for k, p in matcher.named_parameters():
                p.requires_grad_(not k.startswith(frozen))
            how = dict(memory=memory)
            if name == 'ssamt':
                how['labels'] = labels_of(n)
            kind = TASKS.get(name, Task)
            alone = kind(matcher, criterion, **how)
            shared = kind(matcher, criterion, processes=processes, **how)
            # the first two of three pairs are of one picture
            image = torch.arange(n).sub(int(n > 2)).clamp(min=0)
            own = processes.share(n)
            want, gradients = losses_and_gradients(
                alone, Batch(regions, captions, image, image, torch.arange(n))
            )
            got, found = losses_and_gradients(
                shared, Batch(regions[own], captions[own], image, image, torch.arange(n))
            )
            assert want.keys() == got.keys() and want['total'] > 0
            for k in want:
                torch.testing.assert_close(got[k], want[k], rtol=1e-12, atol=0)
            for k, g in gradients.items():
                assert (g is None) == (found[k] is None) == k.startswith(frozen), (name, k)
                if g is not None:
                    torch.testing.assert_close(
                        found[k],
                        g,
                        rtol=1e-9,
                        atol=1e-11,
                        msg=lambda m: f'{name}, {n} pairs, {k}: {m}',
                    )
    dist.destroy_process_group()


# of two pairs the third process has none
@pytest.mark.parametrize('count,sizes', [(2, (5,)), (3, (4, 2))])
def test_losses_and_gradients_are_those_of_one_process(count, sizes, tmp_path):
    criteria = {'camp': HardestBCE(), 'cmsei': Triplet(hardest=False)}
    # what is dropped differs from process to process
    still = {name: dict(dropout=0.0) for name in ('ssamt-intra', 'ssamt')}
    # of its second phase
    fixed = {'ssamt': ('intra',)}
    variants = [
        (
            name,
            still.get(name, {}),
            criteria.get(name, Triplet()),
            fixed.get(name, ('nothing',)),
            None,
        )
        for name in MODELS
    ]
    variants += [
        (
            'camp',
            dict(form='released'),
            HardestBCE(hardest=False),
            ('regions', 'words', 'messages'),
            0,
        ),
        ('ssamt', dict(weights=[1.0, 1.0, 3.0], dropout=0.0), Triplet(), ('intra',), 0),
        ('cmsei', dict(object_word=False), Triplet(), ('regions',), None),
    ]
    together(count, compare, sizes, variants, folder=tmp_path)


def text_model(rank, count, architecture):
    dist.init_process_group('gloo')
    processes = Processes(rank, count)
    n = 5
    torch.manual_seed(0)
    # eval: no dropout
    matcher, (regions, captions) = (
        make('scan', dict(text=architecture), torch.float64).eval(),
        ragged(torch.float64, images=n, captions=n),
    )
    alone = Task(matcher, Triplet())
    shared = Task(matcher, Triplet(), processes=processes)
    row = torch.arange(n)
    own = processes.share(n)
    want, gradients = losses_and_gradients(alone, Batch(regions, captions, row, row, row))
    got, found = losses_and_gradients(shared, Batch(regions[own], captions[own], row, row, row))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, gradients, rtol=1e-8, atol=1e-10)
    dist.destroy_process_group()


def test_with_a_transformer_for_the_words(tmp_path):
    pytest.importorskip('transformers')
    small = dict(
        model_type='bert',
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    together(2, text_model, small, folder=tmp_path)


def join_parts(rank, count):
    dist.init_process_group('gloo')
    processes = Processes(rank, count)
    for n in range(1, 8):
        whole = torch.arange(2.0 * n).view(n, 2)
        x = whole[processes.share(n)].clone().requires_grad_()
        codes = processes.join(Codes(a=x, b=x[:, 0] > 2), n)
        assert (
            codes.a.equal(whole)
            and codes.b.equal(whole[:, 0] > 2)
            and processes.join(x, n).equal(whole)
        )
        (codes.a * (rank + 1)).sum().backward()
        mine = processes.sizes(n)[rank]
        # everybody's asking, summed
        assert x.grad[:mine].eq(sum(range(1, count + 1))).all() and not x.grad[mine:].any()
    assert processes.agree(f'said by {rank}') == 'said by 0'
    dist.destroy_process_group()


def test_parts_are_joined_with_gradients(tmp_path):
    together(3, join_parts, folder=tmp_path)


def test_shares_are_everything_once():
    for count in (1, 2, 3, 5):
        for n in range(1, 12):
            shares = [range(n)[Processes(r, count).share(n)] for r in range(count)]
            sizes = Processes(0, count).sizes(n)
            assert [i for s, k in zip(shares, sizes) for i in s[:k]] == list(range(n)) and max(
                sizes
            ) - min(sizes) <= 1
            assert all(len(s) == max(1, k) for s, k in zip(shares, sizes))


def test_batches_of_a_share_read_their_own_pictures_alone(world):
    split = Split(world, 'train')
    vocab = Vocab.build(split.captions, 2)
    order = dict(size=7, seed=0, epoch=0, per_image=1)
    one, two, three = (
        list(batches(split, vocab, share=Processes(r, 3).share, **order)) for r in range(3)
    )
    for whole, *parts in zip(batches(split, vocab, **order), one, two, three):
        assert all(
            p.caption.equal(whole.caption) and p.image.equal(whole.image) and len(p) == len(whole)
            for p in parts
        )
        sizes = Processes(0, 3).sizes(len(whole))
        assert torch.cat([p.regions.features[:k] for p, k in zip(parts, sizes)]).equal(
            whole.regions.features
        )
        assert torch.cat([p.captions.tokens[:k] for p, k in zip(parts, sizes)]).equal(
            whole.captions.tokens
        )


# ---------------------------------------------------------------- whole runs


def run(rank, count, *arguments):
    (model, data, out), more = arguments[:3], arguments[3]
    train(model, data, out, **RUN | more)


def logs_agree(a, b):
    a, b = (Log(p / 'log.jsonl').lines() for p in (a, b))
    numbers = lambda line: (
        {k: v for k, v in line.items() if k not in ('dev', 'health', 'alarms')}
        | line.get('dev', {})
    )
    assert len(a) == len(b) > 2 and any('loss' in x for x in a)
    for x, y in zip(a, b):
        assert x.get('alarms') == y.get('alarms')
        # written with four digits
        assert x.get('health', {}) == pytest.approx(y.get('health', {}), rel=2e-3, abs=2e-4)
        x = numbers(x)
        y = numbers(y)
        assert x.keys() == y.keys()
        for k in x:
            assert x[k] == pytest.approx(y[k], abs=1e-5, rel=1e-5), (k, x, y)


def weights(path):
    return {k: v for k, v in read_checkpoint(path)[1].items() if k.startswith('model.')}


def test_killed_in_the_middle_two_processes_go_on_to_the_undisturbed_end(world, tmp_path):
    whole = tmp_path / 'whole'
    killed = tmp_path / 'killed'
    last = tmp_path / 'killed/last.safetensors'
    train('vse', world, tmp_path / 'one', **RUN)
    together(2, run, 'vse', world, whole, {}, folder=tmp_path)
    # one process and two: 80 pictures in batches of 7
    logs_agree(tmp_path / 'one', whole)
    for name in ('last', 'best'):
        torch.testing.assert_close(
            weights(whole / f'{name}.safetensors'),
            weights(tmp_path / f'one/{name}.safetensors'),
            rtol=0,
            atol=1e-4,
        )

    group = start(2, run, 'vse', world, killed, dict(save_every=1), fault=tmp_path / 'killed.txt')
    end = time.time() + 120
    # a checkpoint is whole at any moment
    step = lambda: read_checkpoint(last)[0]['step'] if last.exists() else 0
    while step() < 15 and time.time() < end and all(p.exitcode is None for p in group):
        pass
    for p in group:
        os.kill(p.pid, signal.SIGKILL)
    for p in group:
        p.join()
    card, tensors = read_checkpoint(last)
    assert 15 <= card['step'] < 24 and (card['epoch'], card['skip']) == (1, card['step'] - 12)
    assert len(tensors['random']) == 2 * len(torch.get_rng_state())
    together(2, run, 'vse', world, killed, dict(resume=True), folder=tmp_path)
    a, b = (read_checkpoint(p / 'last.safetensors')[1] for p in (whole, killed))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    assert Log(whole / 'log.jsonl').lines() == Log(killed / 'log.jsonl').lines()

    # and one process may take over
    train('vse', world, killed, **RUN | dict(resume=True, epochs=3))
    assert read_checkpoint(last)[0]['epoch'] == 3


def dev_scores(rank, count, data, out, file):
    matcher, vocab, card = load(out)
    dev = Split(data, 'dev')
    dist.init_process_group('gloo')
    scores = split_scores(matcher, dev, vocab, processes=Processes(rank, count))
    if rank == count - 1:
        torch.save(scores, file)
    dist.destroy_process_group()


def first_look(images, captions):
    return images.vector[:, :8] @ captions.vector[:, :8].T


def two_looks(rank, count, data, out, file):
    matcher, vocab, card = load(out)
    dev = Split(data, 'dev')
    dist.init_process_group('gloo')
    matcher.first_scores = first_look
    found = score_split(matcher, dev, vocab, candidates=3, processes=Processes(rank, count))
    if rank == count - 1:
        torch.save(found, file)
    dist.destroy_process_group()


@pytest.mark.parametrize('count', [3, 5])
def test_candidates_are_chosen_among_everybodys_pictures(world, tmp_path, count):
    train('vse', world, tmp_path / 'run', **RUN | dict(epochs=1))
    matcher, vocab, card = load(tmp_path / 'run')
    dev = Split(world, 'dev')
    matcher.first_scores = first_look
    scores, record = score_split(matcher, dev, vocab, candidates=3)
    together(count, two_looks, world, tmp_path / 'run', tmp_path / 'found.pt', folder=tmp_path)
    got, said = torch.load(tmp_path / 'found.pt')
    torch.testing.assert_close(got, scores, rtol=0, atol=1e-6)
    assert said == record and record['scored'] == 'reranked'


# 2 processes draw other numbers than one
RICH = dict(
    epochs=3,
    accumulate=2,
    instances=120,
    drop_words=0.1,
    drop_regions=0.1,
    schedule='linear',
    warmup=2,
)


def test_two_processes_with_parts_and_dropping_repeat_themselves(world, tmp_path):
    together(2, run, 'vse', world, tmp_path / 'whole', RICH, folder=tmp_path)
    together(2, run, 'vse', world, tmp_path / 'cut', RICH | dict(save_every=1), folder=tmp_path)
    a, b = (read_checkpoint(tmp_path / n / 'last.safetensors')[1] for n in ('whole', 'cut'))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    without = RICH | dict(drop_words=0.0, drop_regions=0.0)
    together(2, run, 'vse', world, tmp_path / 'two', without, folder=tmp_path)
    train('vse', world, tmp_path / 'one', **RUN | without)
    logs_agree(tmp_path / 'one', tmp_path / 'two')


def test_torchrun_trains_all_stages_and_the_scores_of_a_split_are_shared_out(world, tmp_path):
    line = [
        'train',
        'camp',
        '--data',
        world,
        '--preset',
        'demo-released',
        '--epochs',
        '1',
        '--size',
        '15',
        '--per-image',
        '1',
        '--min-freq',
        '2',
        '--set',
        'width=16',
        '--set',
        'word_width=8',
        '--device',
        'cpu',
    ]
    out = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            '-m',
            'imtm_lite.workshop.cli',
            *map(str, line),
            '--out',
            tmp_path / 'two',
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    # one speaks for all
    assert out.stdout.count('best checkpoint') == out.stdout.count('preset demo-released') == 1
    matcher, vocab, card = load(tmp_path / 'two')
    dev = Split(world, 'dev')
    assert card['start'] and (tmp_path / 'two/stage1/best.safetensors').exists()
    together(5, dev_scores, world, tmp_path / 'two', tmp_path / 'scores.pt', folder=tmp_path)
    torch.testing.assert_close(
        torch.load(tmp_path / 'scores.pt'),
        split_scores(matcher, dev, vocab),
        rtol=0,
        atol=1e-6,
    )
    line = [
        'eval',
        tmp_path / 'two',
        '--data',
        world,
        '--split',
        'dev',
        '--device',
        'cpu',
        '--json',
        tmp_path / 'eval.json',
    ]
    out = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            '-m',
            'imtm_lite.workshop.cli',
            *map(str, line),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0 and out.stdout.count('protocol plain') == 1, out.stderr
    assert json.loads((tmp_path / 'eval.json').read_text())['rsum'] == pytest.approx(
        split_recall(matcher, dev, vocab).rsum
    )


def test_a_fault_in_one_process_ends_all_of_them(world, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(f'''
import os, sys
from imtm_lite.files import SettingError
from imtm_lite.runs import train
try: train('scan', {str(world)!r}, {str(tmp_path / 'out')!r}, **{RUN!r} | dict(epochs=10**6, criterion='triplet' if os.environ['RANK'] == '0' else 'none'))
except SettingError as fault: print(f'imtm: {{fault}}', file=sys.stderr); sys.exit(2)
''')
    out = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            script,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode != 0 and out.stderr.count("imtm: criterion cannot be 'none'") == 1
