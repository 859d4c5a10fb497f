"What a match rests on: removing an edge costs what the figures say, and the drawing shows the dearest."

import matplotlib.pyplot as plt
import torch

from imtm_lite.data import Split
from imtm_lite.explain import draw_edges, edge_influence, strongest, without_edges
from imtm_lite.files import shipped
from tests.matchers import make, ragged


@torch.no_grad()
def test_influence_is_what_removing_an_edge_costs():
    model = make('cmsei', {}, torch.float64)
    regions, captions = ragged(torch.float64)
    one = regions[0]
    sentence = model.encode_captions(captions[0])
    falls = edge_influence(model, one, captions[0], size=3)
    graphs = model.graphs_of(one)
    assert falls.keys() == graphs.keys()
    before = float(model.match(model.image_codes(one, graphs), sentence))
    for name, graph in graphs.items():
        edges = graph[0].any(-1)
        assert not falls[name][~edges].any()
        for i, j in edges.nonzero().tolist():
            poorer = graphs | {name: graph.clone()}
            poorer[name][0, i, j] = 0
            after = float(model.match(model.image_codes(one, poorer), sentence))
            assert abs(before - after - float(falls[name][i, j])) < 1e-6


def test_without_graphs_there_is_nothing_to_take_out():
    model = make('cmsei', dict(spatial='none', semantic=False), torch.float64)
    regions, captions = ragged(torch.float64)
    assert edge_influence(model, regions[0], captions[0]) == {}


def test_every_copy_lacks_its_own_edge():
    graphs = dict(spatial=torch.ones(1, 3, 3, 2), semantic=torch.ones(1, 3, 3, 4))
    copies = without_edges(graphs, 'semantic', torch.tensor([0, 2]), torch.tensor([1, 0]))
    assert copies['spatial'].shape == (2, 3, 3, 2)
    assert copies['spatial'].all()
    gone = (copies['semantic'] == 0).all(-1).nonzero().tolist()
    assert gone == [[0, 0, 1], [1, 2, 0]]
    assert graphs['semantic'].all()


def test_the_strongest_edges():
    fall = torch.tensor([[0, 0.3, -1], [0.5, 0, 0], [0, 0, 0]])
    assert strongest(fall, 1) == [(1, 0)]
    assert strongest(fall, 5) == [(1, 0), (0, 1)]
    assert strongest(fall, 50) == [(1, 0), (0, 1)]


def test_a_drawing_names_predicates_of_the_scene_graph():
    sample = Split(shipped('sample'), 'train')
    s, p, o, _ = sample.triples[5][0]
    fall = torch.zeros(len(sample.boxes[5]), len(sample.boxes[5]))
    fall[o, s] = 1
    fig, ax = plt.subplots()
    draw_edges(ax, dict(spatial=fall, semantic=fall), sample, 5)
    texts = [text.get_text() for text in ax.texts]
    plt.close(fig)
    assert sample.predicates[p] in ''.join(texts)
    assert len(ax.lines) == 4  # two boxes for each of the two arrows
