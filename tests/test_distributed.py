"Several processes that share a batch train the model that one process trains."

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
from imtm_lite.runs import train
from imtm_lite.tasks import Task
from imtm_lite.text import Vocab
from tests.matchers import close, make, ragged
from tests.runs import card_of, log_of, same_tensors, tensors_of

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

# ---------------------------------------------------------------- groups of processes


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


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
    group = []
    for rank in range(count):
        what = (function, rank, count, port, arguments, fault)
        group.append(context.Process(target=work, args=what))
        group[-1].start()
    return group


def running(group):
    return [process for process in group if process.exitcode is None]


def together(count, function, *arguments, folder):
    "Run `function(rank, count, *arguments)` in so many processes; what fails in one fails here."
    fault = folder / 'fault.txt'
    group = start(count, function, *arguments, fault=fault)
    end = time.time() + 120
    while running(group) and not fault.exists() and time.time() < end:
        time.sleep(0.02)
    if fault.exists() or time.time() > end:
        for process in running(group):
            process.kill()
    for process in group:
        process.join()
    assert not fault.exists(), fault.read_text()
    assert [process.exitcode for process in group] == [0] * count


def joined(rank, count):
    "This process, once it has found the others."
    dist.init_process_group('gloo')
    return Processes(rank, count)


# ---------------------------------------------------------------- losses and gradients


def losses_and_gradients(task, batch):
    torch.manual_seed(0)  # wrong pairs that are drawn: the same ones
    losses = task(batch)
    losses['total'].backward()
    task.processes.mean_gradients(task.matcher.parameters())
    gradients = {name: each.grad for name, each in task.matcher.named_parameters()}
    task.matcher.zero_grad()
    return losses, gradients


def labels_of(n):
    "Four phrases a caption, all different."
    graphs = []
    for c in range(n):
        entities = tuple(Entity(0, 1, f'{c}{phrase}') for phrase in range(4))
        graphs.append(TextGraph(('a',), entities))
    return PhraseLabels(graphs, range(n))


def tasks_of(name, matcher, criterion, n, memory, processes):
    "The task of one process and that of the group."
    how = dict(memory=memory)
    if name == 'ssamt':
        how['labels'] = labels_of(n)
    kind = TASKS.get(name, Task)
    alone = kind(matcher, criterion, **how)
    return alone, kind(matcher, criterion, processes=processes, **how)


def batch_of(regions, captions, share, image):
    "A batch of which this process has its share."
    caption = torch.arange(len(image))
    return Batch(regions[share], captions[share], image, image, caption)


def compare_one(processes, n, name, arguments, criterion, frozen, memory):
    "Losses and gradients of this group beside those of one process, of n pairs."
    torch.manual_seed(n)
    matcher = make(name, arguments, torch.float64).train()
    for parameter_name, parameter in matcher.named_parameters():
        parameter.requires_grad_(not parameter_name.startswith(frozen))
    tasks = tasks_of(name, matcher, criterion, n, memory, processes)
    # the first two of three pairs are of one picture
    image = torch.arange(n).sub(int(n > 2)).clamp(min=0)
    gradients = same_losses(*tasks, ragged(torch.float64, images=n, captions=n), image)
    for parameter_name, gradient in gradients.items():
        assert (gradient is None) == parameter_name.startswith(frozen), parameter_name


def same_losses(alone, shared, pairs, image, gradient_rtol=1e-9):
    "What one process computes of a whole batch and the group of shares; the gradients."
    whole = batch_of(*pairs, slice(None), image)
    share = batch_of(*pairs, shared.processes.share(len(image)), image)
    want, want_gradients = losses_and_gradients(alone, whole)
    losses, gradients = losses_and_gradients(shared, share)
    assert want['total'] > 0
    close(losses, want, atol=0, rtol=1e-12)
    close(known(gradients), known(want_gradients), atol=1e-10, rtol=gradient_rtol)
    return gradients


def known(gradients):
    "Without parameters that do not move."
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def compare(rank, count, sizes, variants):
    processes = joined(rank, count)
    for variant in variants:
        for n in sizes:
            try:
                compare_one(processes, n, *variant)
            except AssertionError as fault:
                raise AssertionError(f'{variant[0]}, {n} pairs') from fault
    dist.destroy_process_group()


CRITERIA = {'camp': HardestBCE(), 'cmsei': Triplet(hardest=False)}
# what is dropped differs from process to process
STILL = {name: dict(dropout=0.0) for name in ('ssamt-intra', 'ssamt')}
# of its second phase
FROZEN = {'ssamt': ('intra',)}


def variant_of(name):  # model, arguments, criterion, what is frozen, memory
    criterion = CRITERIA.get(name, Triplet())
    return name, STILL.get(name, {}), criterion, FROZEN.get(name, ('nothing',)), None


VARIANTS = [variant_of(name) for name in MODELS]
ATTENTION = ('regions', 'words', 'messages')
VARIANTS += [
    ('camp', dict(form='released'), HardestBCE(hardest=False), ATTENTION, 0),
    ('ssamt', dict(weights=[1.0, 1.0, 3.0], dropout=0.0), Triplet(), ('intra',), 0),
    ('cmsei', dict(object_word=False), Triplet(), ('regions',), None),
]


# of two pairs the third process has none
@pytest.mark.parametrize('count,sizes', [(2, (5,)), (3, (4, 2))])
def test_losses_and_gradients_are_those_of_one_process(count, sizes, tmp_path):
    together(count, compare, sizes, VARIANTS, folder=tmp_path)


def text_model(rank, count, architecture):
    processes = joined(rank, count)
    torch.manual_seed(0)
    # eval: no dropout
    matcher = make('scan', dict(text=architecture), torch.float64).eval()
    tasks = tasks_of('scan', matcher, Triplet(), 5, None, processes)
    pairs = ragged(torch.float64, images=5, captions=5)
    same_losses(*tasks, pairs, torch.arange(5), gradient_rtol=1e-8)
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


# ---------------------------------------------------------------- shares


def join_shares(rank, count):
    processes = joined(rank, count)
    asked = sum(range(1, count + 1))  # by everybody, summed
    for n in range(1, 8):
        whole = torch.arange(2.0 * n).view(n, 2)
        x = whole[processes.share(n)].clone().requires_grad_()
        codes = processes.join(Codes(a=x, b=x[:, 0] > 2), n)
        assert codes.a.equal(whole)
        assert codes.b.equal(whole[:, 0] > 2)
        assert processes.join(x, n).equal(whole)
        (codes.a * (rank + 1)).sum().backward()
        mine = processes.sizes(n)[rank]
        assert x.grad[:mine].eq(asked).all()
        assert not x.grad[mine:].any()
    assert processes.agree(f'said by {rank}') == 'said by 0'
    dist.destroy_process_group()


def test_shares_are_joined_with_gradients(tmp_path):
    together(3, join_shares, folder=tmp_path)


@pytest.mark.parametrize('n', range(1, 12))
@pytest.mark.parametrize('count', [1, 2, 3, 5])
def test_shares_are_everything_once(count, n):
    sizes = Processes(0, count).sizes(n)
    assert max(sizes) - min(sizes) <= 1
    items = []
    for rank, size in enumerate(sizes):
        share = range(n)[Processes(rank, count).share(n)]
        assert len(share) == max(1, size)
        items += share[:size]
    assert items == list(range(n))


def test_batches_of_a_share_read_their_own_pictures_alone(world):
    split = Split(world, 'train')
    vocab = Vocab.build(split.captions, 2)
    order = dict(size=7, seed=0, epoch=0, per_image=1)
    feeds = [batches(split, vocab, share=Processes(rank, 3).share, **order) for rank in range(3)]
    for whole, *shares in zip(batches(split, vocab, **order), *feeds, strict=True):
        features = []
        tokens = []
        for share, size in zip(shares, Processes(0, 3).sizes(len(whole))):
            assert len(share) == len(whole)
            assert share.caption.equal(whole.caption)
            assert share.image.equal(whole.image)
            features.append(share.regions.features[:size])
            tokens.append(share.captions.tokens[:size])
        assert torch.cat(features).equal(whole.regions.features)
        assert torch.cat(tokens).equal(whole.captions.tokens)


# ---------------------------------------------------------------- whole runs


def run(rank, count, model, data, out, more):
    train(model, data, out, **RUN | more)


def numbers_of(line):
    "What a line of a log says, without what is compared more loosely."
    apart = ('dev', 'health', 'alarms')
    return {name: value for name, value in line.items() if name not in apart} | line.get('dev', {})


def logs_agree(one, other):
    lines = log_of(one)
    assert len(lines) == len(log_of(other)) > 2
    assert any('loss' in line for line in lines)
    for a, b in zip(lines, log_of(other)):
        assert a.get('alarms') == b.get('alarms')
        # written with four digits
        assert a.get('health', {}) == pytest.approx(b.get('health', {}), rel=2e-3, abs=2e-4)
        a = numbers_of(a)
        b = numbers_of(b)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), (name, a, b)


def weights_of(path):
    return {name: x for name, x in tensors_of(path).items() if name.startswith('model.')}


def test_two_processes_train_what_one_trains(world, tmp_path):
    "80 pictures in batches of 7."
    train('vse', world, tmp_path / 'one', **RUN)
    together(2, run, 'vse', world, tmp_path / 'two', {}, folder=tmp_path)
    logs_agree(tmp_path / 'one', tmp_path / 'two')
    for name in ('last.safetensors', 'best.safetensors'):
        one = weights_of(tmp_path / 'one' / name)
        close(weights_of(tmp_path / 'two' / name), one, atol=1e-4)


def kill_at(step, group, last):
    "Kill -9 for all processes once a checkpoint has got so far."
    end = time.time() + 120
    # a checkpoint is whole at any moment
    while len(running(group)) == len(group) and time.time() < end:
        if last.exists() and card_of(last)['step'] >= step:
            break
    for process in group:
        os.kill(process.pid, signal.SIGKILL)
    for process in group:
        process.join()


def test_killed_in_the_middle_two_processes_go_on_to_the_undisturbed_end(world, tmp_path):
    whole = tmp_path / 'whole'
    killed = tmp_path / 'killed'
    last = killed / 'last.safetensors'
    together(2, run, 'vse', world, whole, {}, folder=tmp_path)
    more = dict(save_every=1)
    group = start(2, run, 'vse', world, killed, more, fault=tmp_path / 'killed.txt')
    kill_at(15, group, last)
    card, tensors = read_checkpoint(last)
    assert 15 <= card['step'] < 24
    assert (card['epoch'], card['skip']) == (1, card['step'] - 12)
    assert len(tensors['random']) == 2 * len(torch.get_rng_state())
    together(2, run, 'vse', world, killed, dict(resume=True), folder=tmp_path)
    assert same_tensors(whole / 'last.safetensors', last)
    assert log_of(whole) == log_of(killed)
    # and one process may take over
    train('vse', world, killed, **RUN | dict(resume=True, epochs=3))
    assert card_of(last)['epoch'] == 3


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
    assert same_tensors(tmp_path / 'whole/last.safetensors', tmp_path / 'cut/last.safetensors')
    without = RICH | dict(drop_words=0.0, drop_regions=0.0)
    together(2, run, 'vse', world, tmp_path / 'two', without, folder=tmp_path)
    train('vse', world, tmp_path / 'one', **RUN | without)
    logs_agree(tmp_path / 'one', tmp_path / 'two')


# ---------------------------------------------------------------- scores


def first_look(images, captions):
    return images.vector[:, :8] @ captions.vector[:, :8].T


def two_looks(rank, count, data, out, file):
    processes = joined(rank, count)
    matcher, vocab, _ = load(out)
    matcher.first_scores = first_look
    scored = score_split(matcher, Split(data, 'dev'), vocab, candidates=3, processes=processes)
    if rank == count - 1:
        torch.save(scored, file)
    dist.destroy_process_group()


@pytest.mark.parametrize('count', [3, 5])
def test_candidates_are_chosen_among_everybodys_pictures(world, tmp_path, count):
    out = tmp_path / 'run'
    train('vse', world, out, **RUN | dict(epochs=1))
    matcher, vocab, _ = load(out)
    matcher.first_scores = first_look
    want, want_record = score_split(matcher, Split(world, 'dev'), vocab, candidates=3)
    assert want_record['scored'] == 'reranked'
    together(count, two_looks, world, out, tmp_path / 'scored.pt', folder=tmp_path)
    scores, record = torch.load(tmp_path / 'scored.pt')
    close(scores, want, atol=1e-6)
    assert record == want_record


def dev_scores(rank, count, data, out, file):
    processes = joined(rank, count)
    matcher, vocab, _ = load(out)
    scores = split_scores(matcher, Split(data, 'dev'), vocab, processes=processes)
    if rank == count - 1:
        torch.save(scores, file)
    dist.destroy_process_group()


# ---------------------------------------------------------------- torchrun

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
IMTM = ['-m', 'imtm_lite.workshop.cli']


def torchrun(*line, timeout=300):
    "A command in two processes."
    command = [*TORCHRUN, *map(str, line)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope='module')
def staged(world, tmp_path_factory):
    "Both stages of CAMP, trained by two processes: the folder, what was printed."
    out = tmp_path_factory.mktemp('staged') / 'camp'
    how = '--epochs 1 --size 15 --per-image 1 --min-freq 2 --set width=16 --set word_width=8'
    where = ['--data', world, '--out', out, '--device', 'cpu', '--preset', 'demo-released']
    done = torchrun(*IMTM, 'train', 'camp', *where, *how.split())
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_torchrun_trains_all_stages_and_one_process_speaks_for_all(staged):
    out, printed = staged
    assert printed.count('best checkpoint') == printed.count('preset demo-released') == 1
    assert load(out).card['start']
    assert (out / 'stage1/best.safetensors').exists()


def test_the_scores_of_a_split_are_shared_out(staged, world, tmp_path):
    out, _ = staged
    matcher, vocab, _ = load(out)
    together(5, dev_scores, world, out, tmp_path / 'scores.pt', folder=tmp_path)
    want = split_scores(matcher, Split(world, 'dev'), vocab)
    close(torch.load(tmp_path / 'scores.pt'), want, atol=1e-6)


def test_torchrun_evaluates(staged, world, tmp_path):
    out, _ = staged
    matcher, vocab, _ = load(out)
    where = ['--data', world, '--split', 'dev', '--device', 'cpu', '--json', tmp_path / 'r.json']
    done = torchrun(*IMTM, 'eval', out, *where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('protocol plain') == 1
    rsum = split_recall(matcher, Split(world, 'dev'), vocab).rsum
    assert json.loads((tmp_path / 'r.json').read_text())['rsum'] == pytest.approx(rsum)


FAULT_IN_ONE = """
import json
import os
import sys

from imtm_lite.files import SettingError
from imtm_lite.runs import train

world, out, settings = sys.argv[1:]
criterion = 'triplet' if os.environ['RANK'] == '0' else 'none'
try:
    train('scan', world, out, criterion=criterion, **json.loads(settings))
except SettingError as fault:
    print(f'imtm: {fault}', file=sys.stderr)
    sys.exit(2)
"""


def test_a_fault_in_one_process_ends_all_of_them(world, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(FAULT_IN_ONE)
    settings = json.dumps(RUN | dict(epochs=10**6))
    done = torchrun(script, world, tmp_path / 'out', settings, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count('imtm: criterion is one of triplet, bce') == 1
