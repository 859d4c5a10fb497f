"What a match rests on: edges that are taken out, and the phrase that fits least."

import matplotlib.pyplot as plt
import pytest
import torch

from imtm_lite.data import Split
from imtm_lite.explain import (
    blame,
    blame_accuracy,
    draw_edges,
    edge_influence,
    strongest,
    without_edges,
)
from imtm_lite.files import shipped
from imtm_lite.models.ssamt import SSAMT
from imtm_lite.phrases import chunk
from imtm_lite.text import Captions, Reader, Vocab
from tests.matchers import make, ragged

# ---------------------------------------------------------------- edges


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
    subject, predicate, thing, _ = sample.triples[5][0]
    fall = torch.zeros(len(sample.boxes[5]), len(sample.boxes[5]))
    fall[thing, subject] = 1
    fig, ax = plt.subplots()
    draw_edges(ax, dict(spatial=fall, semantic=fall), sample, 5)
    texts = [text.get_text() for text in ax.texts]
    plt.close(fig)
    assert sample.predicates[predicate] in ''.join(texts)
    assert len(ax.lines) == 4  # two boxes for each of the two arrows


# ---------------------------------------------------------------- phrases


@pytest.fixture(scope='module')
def sample():
    return Split(shipped('sample'), 'train')


@pytest.fixture(scope='module')
def speaking(sample):
    "An SSAMT, and who reads sentences for it."
    torch.manual_seed(1)
    reader = Reader(Vocab.build(sample.captions, 1), chunk)
    facts = dict(region_width=sample.features.shape[2], words=len(reader.vocab))
    matcher = SSAMT(width=8, heads=2, feedforward=12, **facts).eval()
    for parameter in matcher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return matcher, reader


@torch.no_grad()
def agreement_plain(matcher, reader, sample, row, sentence):
    "How well each phrase of one sentence fits one picture."
    codes = matcher.encode_captions(Captions.from_text([sentence], reader))
    picture = matcher.encode_images(sample.regions([row]))
    agreement = matcher.phrase_agreement(picture, codes)[0]
    return agreement[codes.exists[0]].tolist()


def lowest(numbers):
    return numbers.index(min(numbers))


def test_blame_begins_with_the_phrase_that_fits_least(sample, speaking):
    matcher, reader = speaking
    for probe in sample.probes:
        agreement = agreement_plain(matcher, reader, sample, probe['image'], probe['false'])
        assert len(agreement) == len(chunk(probe['false']).units)
        blamed = blame(matcher, sample, reader, probe['image'], probe['false'])
        cosines = [cosine for _, cosine in blamed]
        assert cosines == pytest.approx(sorted(agreement), abs=1e-5)


def answer_plain(matcher, reader, sample, probe):
    "Right, by chance, in the true sentence; None where all phrases or none are culprits."
    keys = chunk(probe['false']).keys
    known = chunk(probe['true']).keys
    culprits = [unit for unit, key in enumerate(keys) if key not in known]
    if not culprits or len(culprits) == len(keys):
        return None
    in_false = agreement_plain(matcher, reader, sample, probe['image'], probe['false'])
    in_true = agreement_plain(matcher, reader, sample, probe['image'], probe['true'])
    return lowest(in_false) in culprits, len(culprits) / len(keys), lowest(in_true) in culprits


def test_blame_accuracy_by_hand(sample, speaking):
    matcher, reader = speaking
    answers = {}
    for probe in sample.probes:
        answer = answer_plain(matcher, reader, sample, probe)
        if answer is not None:
            answers.setdefault(probe['kind'], []).append(answer)
    table = blame_accuracy(matcher, sample, reader)
    assert table.keys() == answers.keys()
    assert len(table) > 1
    for kind, of_kind in answers.items():
        number, *percent = table[kind]
        assert number == len(of_kind)
        want = [100 * sum(column) / number for column in zip(*of_kind)]
        assert percent == pytest.approx(want)
