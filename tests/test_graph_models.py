"CMSEI and Hire: equal to their plain forms with gradients, each ablation switches off what it says, and data that lacks a file is refused."

import shutil

import pytest
import torch
import torch.nn.functional as F

from imtm_lite.checkpoints import build, check_fits, load
from imtm_lite.data import Split
from imtm_lite.explain import edge_influence
from imtm_lite.files import CheckpointError, DataError, SettingError
from imtm_lite.models.cmsei import LEVELS
from imtm_lite.models.hire import ORDERS
from imtm_lite.regions import Regions
from imtm_lite.runs import train
from tests.test_matchers import changed, make, ragged, scores_of


def reason_plain(layer, v, graph):
    "Relational convolution for one picture, edge by edge."
    W = layer.send.weight.unflatten(0, (-1, v.shape[1]))
    out = []
    for i in range(len(v)):
        m = sum(
            (
                graph[i, j, k] * (torch.einsum('b,bde,e->d', layer.mix[k], W, v[j]) + layer.edge[k])
                for j, k in graph[i].nonzero().tolist()
            ),
            torch.zeros_like(v[i]),
        )
        out.append(
            F.normalize(
                v[i] + layer.out.weight @ F.relu(m / max(1.0, float(graph[i].sum()))), dim=0
            )
        )
    return torch.stack(out)


def look_plain(x, y, temperature):
    "SCAN's weights of each of x over y."
    scaled = F.leaky_relu(x @ y.T, 0.1)
    return (temperature * scaled / scaled.norm(dim=0)).softmax(-1)


def weighed_plain(model, v, t):
    "The form that refines nothing: one picture (R, D) after reasoning and one sentence (T, D), no padding."
    choose, count = (level * model.config[name] for name, level in LEVELS.items())
    s = F.normalize(t.mean(0), dim=0)
    alpha = (choose * v @ s).softmax(0)
    if not model.config['object_word']:
        g = F.normalize(v.mean(0), dim=0)
        beta = (count * t @ g).softmax(0)
        return (
            F.cosine_similarity(s, alpha @ v, dim=0) + F.cosine_similarity(g, beta @ t, dim=0)
        ) / 2
    g = F.normalize(alpha @ v, dim=0)
    beta = (count * t @ g).softmax(0)
    a = look_plain(t, v, model.config['temperature'])
    return sum(beta[j] * F.cosine_similarity(t[j], a[j] @ v, dim=0) for j in range(len(t)))


def refined_plain(model, v, t):
    "Objects and words refine each other, every vector formed: one picture (R, D) after reasoning and one sentence (T, D)."
    R = len(v)
    T = len(t)
    on = model.config
    if on['object_word']:
        over_regions = look_plain(t, v, on['temperature'])
        over_words = look_plain(v, t, on['object_temperature'])
    else:
        over_regions = torch.full((T, R), 1 / R).to(v)
        over_words = torch.full((R, T), 1 / T).to(v)

    def told(x, message, gate):  # x plus a message of length one, as loud as the gate is open
        if gate not in model.gate:
            return x
        message = message / message.norm()
        cosine = x @ message / x.norm()
        return x + torch.sigmoid(model.gate[gate].slope * cosine + model.gate[gate].bias) * message

    objects = [
        told(v[r], sum(over_words[r, j] * t[j] for j in range(T)), 'object') for r in range(R)
    ]
    words = [told(t[j], sum(over_regions[j, r] * v[r] for r in range(R)), 'word') for j in range(T)]
    objects = [told(o, sum(t) / T, 'sentence') for o in objects]
    words = [told(w, sum(v) / R, 'image') for w in words]
    by_word = sum(
        F.cosine_similarity(words[j], sum(over_regions[j, r] * objects[r] for r in range(R)), dim=0)
        for j in range(T)
    )
    by_object = sum(
        F.cosine_similarity(objects[r], sum(over_words[r, j] * words[j] for j in range(T)), dim=0)
        for r in range(R)
    )
    return (by_word / T + by_object / R) / 2


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
    dict(zip(SWITCHES, (False,) * 3)),
]


@pytest.mark.parametrize('refine', (True, False))
@pytest.mark.parametrize('arguments', FORMS, ids=str)
def test_cmsei_equals_its_plain_form_on_ragged_input_with_gradients(arguments, refine):
    model, (regions, captions) = (
        make('cmsei', arguments | dict(refine=refine), torch.float64),
        ragged(torch.float64, images=3, captions=4),
    )
    images = model.encode_images(regions)
    sentences = model.encode_captions(captions)
    fast = model.match(images, sentences)
    graphs = {n: f(regions) for n, f in model.graphs.items()}
    v = model.regions(regions)
    plain = torch.empty_like(fast)
    for b, n in enumerate(regions.mask.sum(1).tolist()):
        x = reasoned_plain(model, v[b, :n], {k: g[b, :n, :n] for k, g in graphs.items()})
        for c, said in enumerate(sentences.mask):
            plain[b, c] = (refined_plain if refine else weighed_plain)(
                model, x, sentences.x[c][said]
            )
    torch.testing.assert_close(fast, plain, atol=1e-12, rtol=0)
    weight = torch.randn_like(fast)
    parameters = list(model.parameters())
    a, b = (
        torch.autograd.grad((s * weight).sum(), parameters, retain_graph=True, allow_unused=True)
        for s in (fast, plain)
    )
    # None: loops that met no edge
    for parameter, x, y in zip(parameters, a, b):
        x, y = (torch.zeros_like(parameter) if g is None else g for g in (x, y))
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize('name', ['cmsei', 'hire'])
def test_every_part_can_be_switched_off_alone_and_counts(name):
    "From everything on and from everything else off, each switch changes the scores, and only the switched part's parameters go."
    regions, captions = ragged(torch.float64)
    off = dict(zip(SWITCHES, (False,) * 3)) | dict(spatial='none', semantic=False)
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
    model, (regions, captions) = (
        make('cmsei', dict(spatial='none', semantic=False), torch.float64),
        ragged(torch.float64),
    )
    scan = make('scan', dict(direction='both'), torch.float64)
    scan.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('gate')})
    for gate in model.gate.values():
        gate.bias.data.fill_(-torch.inf)
    torch.testing.assert_close(
        scores_of(model, regions, captions), scores_of(scan, regions, captions), atol=1e-12, rtol=0
    )


def test_gates_and_messages_are_those_of_the_match():
    model, (regions, captions) = make('cmsei', {}, torch.float64), ragged(torch.float64)
    images = model.encode_images(regions)
    sentences = model.encode_captions(captions)
    of_objects, of_words = model.gates(images, sentences)
    to_objects, to_words = model.messages_of(images, sentences)
    for gates, messages, own, gate in (
        (of_objects, to_objects, images.x[:, None], 'object'),
        (of_words, to_words, sentences.x[None], 'word'),
    ):
        assert gates.shape == messages.shape[:3]
        want = torch.sigmoid(
            model.gate[gate].slope * F.cosine_similarity(own, messages, dim=-1)
            + model.gate[gate].bias
        )
        real = (
            (images.mask[:, None] & torch.ones(len(captions), 1, dtype=torch.bool))
            if gate == 'object'
            else sentences.mask.expand(len(regions), -1, -1)
        )
        torch.testing.assert_close(gates[real], want[real], atol=1e-10, rtol=0)
    assert make('cmsei', dict(object_word=False), torch.float64).gates(images, sentences) is None
    stages = model.stages(regions)
    assert list(stages) == ['encoded', 'spatial', 'semantic'] and torch.equal(
        stages['semantic'], images.x
    )


def test_combined_edges_are_those_of_either_graph():
    regions, _ = ragged(torch.float64)
    one, two = (
        make(
            'cmsei',
            dict(spatial='binary', weighted=False, threshold=0.3, combined=c),
            torch.float64,
        ).graphs
        for c in (True, False)
    )
    either = (two['spatial'](regions) > 0).any(-1) | (two['semantic'](regions) > 0).any(-1)
    assert list(one) == ['combined'] and torch.equal(
        one['combined'](regions)[..., 0], either.double()
    )
    assert (
        two['semantic'](regions).unique().tolist() == [0, 1] and either.any() and not either.all()
    )


@pytest.mark.parametrize('order', ORDERS)
def test_hire_begins_as_cmsei_and_its_orders_differ(order):
    model, (regions, _) = make('hire', dict(order=order), torch.float64), ragged(torch.float64)

    def reasoned(order):
        model.config['order'] = order
        *_, v = model.stages(regions).values()
        return v

    others = [reasoned(other) for other in ORDERS]
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(others, others[1:]))
    torch.nn.init.zeros_(model.implicit.attend.out.weight)  # as a new layer is
    graphs = {name: build(regions) for name, build in model.graphs.items()}
    *_, explicit = model.explicit(model.regions(regions), regions.mask, graphs).values()
    want = (
        F.normalize(model.regions(regions) + explicit, dim=-1) if order == 'parallel' else explicit
    )
    torch.testing.assert_close(reasoned(order), want, atol=1e-12, rtol=0)


def test_implicit_reasoning_keeps_regions_apart():
    "Opened at random, the centred layer leaves the regions of a picture about as alike as they were; the uncentred one does not."
    torch.manual_seed(0)
    regions, _ = ragged(torch.float64)
    alike = {}
    for centred in (True, False):
        model = make('hire', dict(centred=centred), torch.float64)
        torch.nn.init.normal_(model.implicit.attend.out.weight, std=0.3)
        stages = model.stages(regions)
        for name in ('encoded', 'implicit'):
            real = (
                regions.mask[:, :, None] & regions.mask[:, None] & ~torch.eye(5, dtype=torch.bool)
            )
            alike[centred, name] = (stages[name] @ stages[name].mT)[real].mean().item()
    assert alike[True, 'implicit'] < alike[True, 'encoded'] + 0.05 < alike[False, 'implicit']


def test_influence_is_what_removing_an_edge_costs():
    model, (regions, captions) = make('cmsei', {}, torch.float64), ragged(torch.float64)
    one = regions[0]
    said = captions[0]
    falls = edge_influence(model, one, said, size=3)
    graphs = {n: f(one) for n, f in model.graphs.items()}
    with torch.no_grad():
        before = model.match(model.image_codes(one, graphs), model.encode_captions(said))
        for name in graphs:
            edges = graphs[name][0].any(-1)
            assert not falls[name][~edges].any()
            for i, j in edges.nonzero().tolist():
                gone = {n: g.clone() for n, g in graphs.items()}
                gone[name][0, i, j] = 0
                after = model.match(model.image_codes(one, gone), model.encode_captions(said))
                assert abs(float(before - after) - float(falls[name][i, j])) < 1e-6


def test_graphs_are_only_read_where_they_are_used():
    "Without a graph the model neither needs nor notices the file behind it."
    regions, captions = ragged(torch.float64)
    for arguments, ignored in (
        (dict(spatial='none'), ('boxes', 'sizes')),
        (dict(semantic=False), ('triples', 'confidence')),
    ):
        model = make('cmsei', arguments, torch.float64)
        bare = Regions(**{k: t for k, t in regions.items() if k not in ignored})
        torch.testing.assert_close(
            model.encode_images(bare).x, model.encode_images(regions).x, atol=0, rtol=0
        )
        assert ignored[0] not in model.needs
    model = make('cmsei', {}, torch.float64)
    moved = changed(regions, confidence=regions.confidence / 2)
    assert (model.encode_images(moved).x - model.encode_images(regions).x).abs().max() > 1e-6


def test_a_picture_without_triples_passes_through_the_semantic_graph_unchanged():
    model, (regions, _) = make('cmsei', dict(spatial='none'), torch.float64), ragged(torch.float64)
    bare = changed(regions, triples=torch.full_like(regions.triples, -1))
    torch.testing.assert_close(model.encode_images(bare).x, model.regions(bare), atol=1e-12, rtol=0)


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    train(
        'hire',
        world,
        out,
        arguments=dict(width=8, word_width=8),
        epochs=1,
        size=40,
        per_image=1,
        progress=False,
        device='cpu',
    )
    return out


def copy(world, tmp_path):
    return shutil.copytree(world, tmp_path / 'world', ignore=shutil.ignore_patterns('pictures'))


def test_a_checkpoint_rebuilds_graphs_and_order(run, world):
    matcher, vocab, card = load(run)
    assert (
        matcher.needs == ('boxes', 'triples')
        and card['predicates'] == Split(world, 'train').predicates
        and matcher.config['order'] == 'implicit-explicit'
    )
    check_fits(matcher, Split(world, 'dev'))


@pytest.mark.parametrize(
    'file,needed',
    [('{s}_boxes.npy', {}), ('{s}_triples.jsonl', {}), ('{s}_triples.jsonl', dict(spatial='none'))],
    ids=str,
)
@pytest.mark.parametrize('split', ['train', 'dev'])
def test_training_refuses_data_without_the_files_it_needs(file, needed, split, world, tmp_path):
    data = copy(world, tmp_path)
    (data / file.format(s=split)).unlink()
    with pytest.raises(
        DataError, match=f'{file.format(s=split)}: this file is missing, and cmsei needs it'
    ):
        train(
            'cmsei',
            data,
            tmp_path / 'run',
            arguments=dict(width=8, word_width=8, **needed),
            epochs=1,
            progress=False,
            device='cpu',
        )
    assert not (tmp_path / 'run').exists()


def test_a_checkpoint_refuses_data_it_cannot_read(run, world, tmp_path):
    matcher, vocab, card = load(run)
    data = copy(world, tmp_path)
    words = (data / 'predicates.txt').read_text().split('\n')
    (data / 'predicates.txt').write_text('\n'.join([words[1], words[0], *words[2:]]))
    with pytest.raises(CheckpointError, match='predicates.txt: other predicates'):
        check_fits(matcher, Split(data, 'test'))
    (data / 'test_triples.jsonl').unlink()
    with pytest.raises(
        DataError, match='test_triples.jsonl: this file is missing, and hire needs it'
    ):
        check_fits(matcher, Split(data, 'test'))


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
