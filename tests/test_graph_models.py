"CMSEI and Hire: equal to their plain forms with gradients, each ablation switches off what it says, and data that lacks a file is refused."
import shutil

import pytest
import torch
import torch.nn.functional as F

from imtm_lite.data import DataError, Split
from imtm_lite.models.cmsei import edge_influence
from imtm_lite.models.hire import ORDERS
from imtm_lite.regions import Regions
from imtm_lite.train import CheckpointError, SettingError, build, check_fits, load, train
from tests.test_matchers import changed, make, ragged


def reason_plain(layer, v, graph):
    "Relational convolution for one picture, edge by edge."
    W, out = layer.send.weight.unflatten(0, (-1, v.shape[1])), []
    for i in range(len(v)):
        m = sum((graph[i, j, k] * (torch.einsum('b,bde,e->d', layer.mix[k], W, v[j]) + layer.edge[k]) for j, k in graph[i].nonzero().tolist()), torch.zeros_like(v[i]))
        out.append(F.normalize(v[i] + layer.out.weight @ F.relu(m / max(1., float(graph[i].sum()))), dim=0))
    return torch.stack(out)


def pair_plain(model, v, t, graphs):
    "Score of one picture and one sentence without padding; v (R, D) before reasoning."
    for name, graph in graphs.items():
        for layer in model.reasoning[name]: v = reason_plain(layer, v, graph)
    s = F.normalize(t.mean(0), dim=0)
    alpha = (model.levels[0] * v @ s).softmax(0)
    g = F.normalize(alpha @ v, dim=0)
    beta = (model.levels[1] * t @ g).softmax(0)
    scaled = F.leaky_relu(t @ v.T, .1)
    scaled = scaled / scaled.norm(dim=0, keepdim=True)
    a = (model.temperature * scaled).softmax(-1)
    return sum(beta[j] * F.cosine_similarity(t[j], a[j] @ v, dim=0) for j in range(len(t)))


@pytest.mark.parametrize('arguments', [{}, dict(spatial='polar', layers=2), dict(spatial='none'), dict(semantic=False), dict(object_sentence=0.), dict(word_image=0.)], ids=str)
def test_cmsei_equals_its_plain_form_on_ragged_input_with_gradients(arguments):
    model, (regions, captions) = make('cmsei', arguments, torch.float64), ragged(torch.float64, images=3, captions=4)
    images, sentences = model.encode_images(regions), model.encode_captions(captions)
    fast = model.match(images, sentences)
    graphs, v = {n: f(regions) for n, f in model.graphs.items()}, model.regions(regions)
    n = regions.mask.sum(1).tolist()
    plain = torch.stack([torch.stack([pair_plain(model, v[b, :n[b]], sentences.x[c][sentences.mask[c]], {k: g[b, :n[b], :n[b]] for k, g in graphs.items()})
                                      for c in range(4)]) for b in range(3)])
    torch.testing.assert_close(fast, plain, atol=1e-12, rtol=0)
    weight, parameters = torch.randn_like(fast), list(model.parameters())
    a, b = (torch.autograd.grad((s * weight).sum(), parameters, retain_graph=True, allow_unused=True) for s in (fast, plain))
    for x, y in zip(a, b):
        assert (x is None) == (y is None)
        if x is not None: torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize('order', ORDERS)
def test_hire_begins_as_cmsei_and_its_orders_differ(order):
    model, (regions, _) = make('hire', dict(order=order), torch.float64), ragged(torch.float64)
    graphs, v = {n: f(regions) for n, f in model.graphs.items()}, model.regions(regions)
    others = []
    for other in ORDERS:
        model.config['order'] = other
        others.append(model.reason(v, regions.mask, graphs))
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(others, others[1:]))
    torch.nn.init.zeros_(model.implicit.attend.out.weight)                     # as a new layer is
    model.config['order'] = order
    explicit = model.explicit(v, regions.mask, graphs)
    want = F.normalize(v + explicit, dim=-1) if order == 'parallel' else explicit
    torch.testing.assert_close(model.reason(v, regions.mask, graphs), want, atol=1e-12, rtol=0)


def test_influence_is_what_removing_an_edge_costs():
    model, (regions, captions) = make('cmsei', {}, torch.float64), ragged(torch.float64)
    one, said = regions[0], captions[0]
    falls, graphs = edge_influence(model, one, said, size=3), {n: f(one) for n, f in model.graphs.items()}
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
    for arguments, ignored in ((dict(spatial='none'), ('boxes', 'sizes')), (dict(semantic=False), ('triples', 'confidence'))):
        model = make('cmsei', arguments, torch.float64)
        bare = Regions(**{k: t for k, t in regions.items() if k not in ignored})
        torch.testing.assert_close(model.encode_images(bare).x, model.encode_images(regions).x, atol=0, rtol=0)
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
    train('hire', world, out, arguments=dict(width=8, word_width=8), epochs=1, size=40, per_image=1, progress=False, device='cpu')
    return out


def copy(world, tmp_path): return shutil.copytree(world, tmp_path / 'world', ignore=shutil.ignore_patterns('pictures'))


def test_a_checkpoint_rebuilds_graphs_and_order(run, world):
    matcher = load(run)
    assert matcher.needs == ('boxes', 'triples') and matcher.card['predicates'] == Split(world, 'train').predicates and matcher.config['order'] == 'implicit-explicit'
    check_fits(matcher, Split(world, 'dev'))


@pytest.mark.parametrize('file,needed', [('{s}_boxes.npy', {}), ('{s}_triples.jsonl', {}), ('{s}_triples.jsonl', dict(spatial='none'))], ids=str)
@pytest.mark.parametrize('split', ['train', 'dev'])
def test_training_refuses_data_without_the_files_it_needs(file, needed, split, world, tmp_path):
    data = copy(world, tmp_path)
    (data / file.format(s=split)).unlink()
    with pytest.raises(DataError, match=f'{file.format(s=split)}: this file is missing, and cmsei needs it'):
        train('cmsei', data, tmp_path / 'run', arguments=dict(width=8, word_width=8, **needed), epochs=1, progress=False, device='cpu')
    assert not (tmp_path / 'run').exists()


def test_a_checkpoint_refuses_data_it_cannot_read(run, world, tmp_path):
    matcher, data = load(run), copy(world, tmp_path)
    words = (data / 'predicates.txt').read_text().split('\n')
    (data / 'predicates.txt').write_text('\n'.join([words[1], words[0], *words[2:]]))
    with pytest.raises(CheckpointError, match='predicates.txt: other predicates'): check_fits(matcher, Split(data, 'test'))
    (data / 'test_triples.jsonl').unlink()
    with pytest.raises(DataError, match='test_triples.jsonl: this file is missing, and hire needs it'): check_fits(matcher, Split(data, 'test'))


def test_bad_arguments_are_one_line():
    facts = dict(region_width=4, words=9, predicates=3, width=8)
    for model, wrong in (('cmsei', dict(spatial='round')), ('cmsei', dict(reasoning='magic')), ('hire', dict(order='both')), ('hire', dict(heads=3)), ('cmsei', dict(order='parallel'))):
        with pytest.raises(SettingError) as fault: build(model, facts | wrong)
        assert '\n' not in str(fault.value)
