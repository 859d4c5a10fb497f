"""CMSEI and Hire: equal to their plain forms, with gradients.

Each ablation switches off what it says, and data that lacks a file is refused.
"""

import inspect
import shutil

import pytest
import torch
import torch.nn.functional as F

from imtm_lite.checkpoints import build, check_fits, load
from imtm_lite.data import Split
from imtm_lite.files import CheckpointError, DataError, SettingError
from imtm_lite.models.cmsei import CMSEI, LEVELS, last_of
from imtm_lite.models.hire import ORDERS, Hire
from imtm_lite.regions import Regions
from imtm_lite.runs import train
from imtm_lite.spatial import pairs
from tests.matchers import changed, close, close_with_gradients, make, ragged, scores_of


def received_plain(layer, v, edges):
    "What arrives at one region along its edges (R, K)."
    W = layer.send.weight.unflatten(0, (-1, v.shape[1]))
    message = torch.zeros_like(v[0])
    for j, k in edges.nonzero().tolist():
        sent = torch.einsum('b,bde,e->d', layer.mix[k], W, v[j]) + layer.edge[k]
        message = message + edges[j, k] * sent
    return message / max(1.0, float(edges.sum()))


def reason_plain(layer, v, graph):
    "Relational convolution for one picture, edge by edge."
    out = []
    for i in range(len(v)):
        message = received_plain(layer, v, graph[i])
        out.append(F.normalize(v[i] + layer.out.weight @ F.relu(message), dim=0))
    return torch.stack(out)


def look_plain(x, y, temperature):
    "SCAN's weights of each of x over y."
    scaled = F.leaky_relu(x @ y.T, 0.1)
    return (temperature * scaled / scaled.norm(dim=0)).softmax(-1)


def choose_whole_plain(v, t, sentence, chosen, count):
    "Without object-word attention: the sentence chose objects, and the picture chooses words."
    picture = F.normalize(v.mean(0), dim=0)
    counted = (count * t @ picture).softmax(0) @ t
    by_sentence = F.cosine_similarity(sentence, chosen, dim=0)
    by_picture = F.cosine_similarity(picture, counted, dim=0)
    return (by_sentence + by_picture) / 2


def weighed_plain(model, v, t):
    "Nothing is refined: one picture (R, D) after reasoning and one sentence (T, D), no padding."
    choose, count = (level * model.config[name] for name, level in LEVELS.items())
    sentence = F.normalize(t.mean(0), dim=0)
    chosen = (choose * v @ sentence).softmax(0) @ v
    if not model.config['object_word']:
        return choose_whole_plain(v, t, sentence, chosen, count)
    share = (count * t @ F.normalize(chosen, dim=0)).softmax(0)
    contexts = look_plain(t, v, model.config['temperature']) @ v
    return sum(share[j] * F.cosine_similarity(t[j], contexts[j], dim=0) for j in range(len(t)))


def told_plain(model, x, message, who):
    "x plus a message of length one, as loud as the gate is open."
    if who not in model.gate:
        return x
    gate = model.gate[who]
    message = message / message.norm()
    cosine = x @ message / x.norm()
    return x + torch.sigmoid(gate.slope * cosine + gate.bias) * message


def looks_plain(model, v, t):
    "Of words over regions (T, R), of regions over words (R, T)."
    if model.config['object_word']:
        over_regions = look_plain(t, v, model.config['temperature'])
        return over_regions, look_plain(v, t, model.config['object_temperature'])
    return v.new_full((len(t), len(v)), 1 / len(v)), v.new_full((len(v), len(t)), 1 / len(t))


def agreement_plain(x, over, y):
    "Mean cosine of each of x with its weighted sum of y."
    cosines = [F.cosine_similarity(x[i], over[i] @ y, dim=0) for i in range(len(x))]
    return sum(cosines) / len(x)


def refined_plain(model, v, t):
    "Every vector formed: one picture (R, D) after reasoning and one sentence (T, D)."
    over_regions, over_words = looks_plain(model, v, t)
    objects = [told_plain(model, v[i], over_words[i] @ t, 'object') for i in range(len(v))]
    words = [told_plain(model, t[j], over_regions[j] @ v, 'word') for j in range(len(t))]
    sentence = sum(t) / len(t)
    picture = sum(v) / len(v)
    objects = torch.stack([told_plain(model, each, sentence, 'sentence') for each in objects])
    words = torch.stack([told_plain(model, each, picture, 'image') for each in words])
    by_word = agreement_plain(words, over_regions, objects)
    by_object = agreement_plain(objects, over_words, words)
    return (by_word + by_object) / 2


def reasoned_plain(model, v, graphs):
    "Regions (R, D) of one picture after explicit reasoning."
    for name, graph in graphs.items():
        for layer in model.reasoning[name]:
            v = reason_plain(layer, v, graph)
    return v


SWITCHES = ('object_word', 'object_sentence', 'word_image')
FORMS = [
    {},
    dict(spatial='polar', layers=2),
    dict(spatial='none'),
    dict(semantic=False),
    *({name: False} for name in SWITCHES),
    dict(temperature=4.0, object_temperature=6.0),
    dict(spatial='binary', weighted=False),
    dict(spatial='binary', weighted=False, threshold=0.3, combined=True),
    dict.fromkeys(SWITCHES, False),
]


def plain_scores(model, regions, images, sentences):
    "All pairs of some pictures and sentences, one at a time and without padding."
    plain = refined_plain if model.config['refine'] else weighed_plain
    graphs = model.graphs_of(regions)
    v = model.regions(regions)
    scores = torch.empty(len(images), len(sentences), dtype=v.dtype)
    for b, n in enumerate(regions.mask.sum(1).tolist()):
        own = {name: graph[b, :n, :n] for name, graph in graphs.items()}
        x = reasoned_plain(model, v[b, :n], own)
        for c, real in enumerate(sentences.mask):
            scores[b, c] = plain(model, x, sentences.x[c][real])
    return scores


@pytest.mark.parametrize('refine', (True, False))
@pytest.mark.parametrize('arguments', FORMS, ids=str)
def test_cmsei_equals_its_plain_form_on_ragged_input_with_gradients(arguments, refine):
    model = make('cmsei', arguments | dict(refine=refine), torch.float64)
    regions, captions = ragged(torch.float64, images=3, captions=4)
    images = model.encode_images(regions)
    sentences = model.encode_captions(captions)
    fast = model.match(images, sentences)
    plain = plain_scores(model, regions, images, sentences)
    close_with_gradients(model, fast, plain)


@pytest.mark.parametrize('name', ['cmsei', 'hire'])
def test_every_part_can_be_switched_off_alone_and_counts(name):
    "Each switch changes the scores, from everything on and from everything else off."
    regions, captions = ragged(torch.float64)
    off = dict.fromkeys(SWITCHES, False) | dict(spatial='none', semantic=False)
    whole = make(name, {}, torch.float64)
    # they begin nearly closed
    for gate in whole.gate.values():
        gate.bias.data.zero_()

    def scores(arguments):
        matcher = make(name, arguments, torch.float64)
        matcher.load_state_dict(whole.state_dict(), strict=False)
        return scores_of(matcher, regions, captions)

    for switch, without in off.items():
        alone = {k: v for k, v in off.items() if k != switch}
        assert (scores({}) - scores({switch: without})).abs().max() > 1e-4, switch
        assert (scores(off) - scores(alone)).abs().max() > 1e-4, switch


def test_closed_gates_leave_scan_in_both_directions():
    model = make('cmsei', dict(spatial='none', semantic=False), torch.float64)
    regions, captions = ragged(torch.float64)
    scan = make('scan', dict(direction='both'), torch.float64)
    scan.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('gate')})
    for gate in model.gate.values():
        gate.bias.data.fill_(-torch.inf)
    want = scores_of(scan, regions, captions)
    close(scores_of(model, regions, captions), want)


def test_gates_open_as_far_as_vector_and_message_agree():
    model = make('cmsei', {}, torch.float64)
    regions, captions = ragged(torch.float64)
    images = model.encode_images(regions)
    sentences = model.encode_captions(captions)
    B = len(images)
    C = len(sentences)
    owners = dict(object=images.x[:, None], word=sentences.x[None])
    masks = dict(
        object=images.mask[:, None].expand(-1, C, -1), word=sentences.mask.expand(B, -1, -1)
    )
    gates = model.gates(images, sentences)
    messages = model.messages_of(images, sentences)
    for who, opened, heard in zip(('object', 'word'), gates, messages):
        assert opened.shape == heard.shape[:3]
        cosine = F.cosine_similarity(owners[who], heard, dim=-1)
        want = torch.sigmoid(model.gate[who].slope * cosine + model.gate[who].bias)
        real = masks[who]
        close(opened[real], want[real], atol=1e-10)
    silent = make('cmsei', dict(object_word=False), torch.float64)
    assert silent.gates(images, sentences) is None


def test_stages_end_with_what_is_matched():
    model = make('cmsei', {}, torch.float64)
    regions, _ = ragged(torch.float64)
    stages = model.stages(regions)
    assert list(stages) == ['encoded', 'spatial', 'semantic']
    assert torch.equal(last_of(stages), model.encode_images(regions).x)


def test_combined_edges_are_those_of_either_graph():
    regions, _ = ragged(torch.float64)
    yes_or_no = dict(spatial='binary', weighted=False, threshold=0.3)
    apart = make('cmsei', yes_or_no, torch.float64).graphs_of(regions)
    together = make('cmsei', yes_or_no | dict(combined=True), torch.float64).graphs_of(regions)
    assert list(together) == ['combined']
    assert apart['semantic'].unique().tolist() == [0, 1]
    either = (apart['spatial'] > 0).any(-1) | (apart['semantic'] > 0).any(-1)
    assert torch.equal(together['combined'][..., 0], either.double())
    assert either.any()
    assert not either.all()


@pytest.mark.parametrize('order', ORDERS)
def test_hire_begins_as_cmsei_and_its_orders_differ(order):
    model = make('hire', dict(order=order), torch.float64)
    regions, _ = ragged(torch.float64)

    def reasoned(order):
        model.config['order'] = order
        return last_of(model.stages(regions))

    others = [reasoned(other) for other in ORDERS]
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(others, others[1:]))
    torch.nn.init.zeros_(model.implicit.attend.out.weight)  # as a new layer is
    v = model.regions(regions)
    want = last_of(model.explicit(v, regions.mask, model.graphs_of(regions)))
    if order == 'parallel':
        want = F.normalize(v + want, dim=-1)
    close(reasoned(order), want)


def test_a_setting_of_hire_is_declared_once():
    ours = inspect.signature(Hire).parameters
    theirs = inspect.signature(CMSEI).parameters
    assert set(ours) - set(theirs) == {'order', 'heads', 'centred'}
    for name, parameter in theirs.items():
        assert ours[name] == parameter
    model = make('hire', {}, torch.float64)
    assert set(model.config) == set(ours)
    with pytest.raises(TypeError, match='colour'):
        Hire(region_width=3, words=9, predicates=2, width=8, colour='red')


def mean_cosine(v, mask):
    return (v @ v.mT)[pairs(mask)].mean().item()


def test_implicit_reasoning_keeps_regions_apart():
    "Opened at random, the centred layer leaves regions about as alike as they were."
    torch.manual_seed(0)
    regions, _ = ragged(torch.float64)
    alike = {}
    for centred in (True, False):
        model = make('hire', dict(centred=centred), torch.float64)
        torch.nn.init.normal_(model.implicit.attend.out.weight, std=0.3)
        stages = model.stages(regions)
        alike[centred] = mean_cosine(stages['implicit'], regions.mask)
        if centred:
            before = mean_cosine(stages['encoded'], regions.mask)
    assert alike[True] < before + 0.05 < alike[False]


def test_graphs_are_only_read_where_they_are_used():
    "Without a graph the model neither needs nor notices the file behind it."
    regions, captions = ragged(torch.float64)
    for arguments, ignored in (
        (dict(spatial='none'), ('boxes', 'sizes')),
        (dict(semantic=False), ('triples', 'confidence')),
    ):
        model = make('cmsei', arguments, torch.float64)
        bare = Regions(**{k: t for k, t in regions.items() if k not in ignored})
        assert torch.equal(model.encode_images(bare).x, model.encode_images(regions).x)
        assert ignored[0] not in model.needs
    model = make('cmsei', {}, torch.float64)
    moved = changed(regions, confidence=regions.confidence / 2)
    assert (model.encode_images(moved).x - model.encode_images(regions).x).abs().max() > 1e-6


def test_a_picture_without_triples_passes_through_the_semantic_graph_unchanged():
    model = make('cmsei', dict(spatial='none'), torch.float64)
    regions, _ = ragged(torch.float64)
    bare = changed(regions, triples=torch.full_like(regions.triples, -1))
    close(model.encode_images(bare).x, model.regions(bare))


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    small = dict(width=8, word_width=8)
    quick = dict(epochs=1, size=40, per_image=1, progress=False, device='cpu')
    train('hire', world, out, arguments=small, **quick)
    return out


def copy(world, tmp_path):
    return shutil.copytree(world, tmp_path / 'world', ignore=shutil.ignore_patterns('pictures'))


def test_a_checkpoint_rebuilds_graphs_and_order(run, world):
    loaded = load(run)
    assert loaded.matcher.needs == ('boxes', 'triples')
    assert loaded.card['predicates'] == Split(world, 'train').predicates
    assert loaded.matcher.config['order'] == 'implicit-explicit'
    check_fits(loaded, Split(world, 'dev'))


@pytest.mark.parametrize(
    'file,needed',
    [('{s}_boxes.npy', {}), ('{s}_triples.jsonl', {}), ('{s}_triples.jsonl', dict(spatial='none'))],
    ids=str,
)
@pytest.mark.parametrize('split', ['train', 'dev'])
def test_training_refuses_data_without_the_files_it_needs(file, needed, split, world, tmp_path):
    data = copy(world, tmp_path)
    (data / file.format(s=split)).unlink()
    small = dict(width=8, word_width=8) | needed
    quick = dict(epochs=1, progress=False, device='cpu')
    message = f'{file.format(s=split)}: this file is missing, and cmsei needs it'
    with pytest.raises(DataError, match=message):
        train('cmsei', data, tmp_path / 'run', arguments=small, **quick)
    assert not (tmp_path / 'run').exists()


def test_a_checkpoint_refuses_data_it_cannot_read(run, world, tmp_path):
    loaded = load(run)
    data = copy(world, tmp_path)
    words = (data / 'predicates.txt').read_text().split('\n')
    (data / 'predicates.txt').write_text('\n'.join([words[1], words[0], *words[2:]]))
    with pytest.raises(CheckpointError, match='predicates.txt: other predicates'):
        check_fits(loaded, Split(data, 'test'))
    (data / 'test_triples.jsonl').unlink()
    message = 'test_triples.jsonl: this file is missing, and hire needs it'
    with pytest.raises(DataError, match=message):
        check_fits(loaded, Split(data, 'test'))


def test_bad_arguments_are_one_line():
    facts = dict(region_width=4, words=9, predicates=3, width=8)
    for model, wrong in (
        ('cmsei', dict(spatial='round')),
        ('cmsei', dict(reasoning='magic')),
        ('hire', dict(order='both')),
        ('hire', dict(heads=3)),
        ('cmsei', dict(order='parallel')),
    ):
        with pytest.raises(SettingError) as fault:
            build(model, facts | wrong)
        assert '\n' not in str(fault.value)
