"""Graph reasoning: loops over edges, and an independent implementation.

Order of regions, padding, regions without an edge, gradients, faults.
"""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from imtm_lite.reasoning import (
    REASONING,
    GatedReasoning,
    ImplicitReasoning,
    MaskedAttention,
    RelationalConvolution,
)
from imtm_lite.spatial import pairs

B = 5
R = 7
D = 12
K = 6
LAYERS = {
    'convolution': lambda: RelationalConvolution(D, K),
    'one basis': lambda: RelationalConvolution(D, K, bases=1),
    'gated': lambda: GatedReasoning(D, K, bases=3),
    'implicit': lambda: ImplicitReasoning(D),
    'biased': lambda: ImplicitReasoning(D, K, heads=3),
    'uncentred': lambda: ImplicitReasoning(D, centred=False),
}
ALL = pytest.mark.parametrize('kind', LAYERS)
EXPLICIT = pytest.mark.parametrize('kind', ['convolution', 'one basis', 'gated'])


def make(kind):
    "A layer in double precision with no parameter left at zero."
    layer = LAYERS[kind]().double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return layer


def ragged(seed=0):
    """Unit vectors, weighted edges, a mask.

    The first picture is full, the third empty, region 1 of each has no edge.
    """
    g = torch.Generator().manual_seed(seed)
    n = torch.randint(3, R + 1, (B,), generator=g)
    n[0] = R
    n[2] = 0
    mask = torch.arange(R) < n[:, None]
    v = F.normalize(torch.randn(B, R, D, generator=g, dtype=torch.float64), dim=-1)
    graph = torch.rand(B, R, R, K, generator=g, dtype=torch.float64)
    graph = graph * (torch.rand(B, R, R, K, generator=g) < 0.25) * pairs(mask)[..., None]
    graph[:, 1] = 0
    graph[:, :, 1] = 0
    return v * mask[..., None], graph, mask


def message_by_loops(layer, v, graph, i):
    "One region of one picture: vectors (R, D), graph (R, R, K)."
    matrices = layer.send.weight.view(-1, D, D)
    total = torch.zeros(D, dtype=torch.float64)
    for j in range(len(v)):
        for k in range(graph.shape[-1]):
            if graph[i, j, k] == 0:
                continue
            W = sum(layer.mix[k, b] * matrices[b] for b in range(len(matrices)))
            total = total + graph[i, j, k] * (W @ v[j] + layer.edge[k])
    return total


def explicit_by_loops(layer, v, graph, i):
    m = message_by_loops(layer, v, graph, i) / max(float(graph[i].sum()), 1.0)
    m = m.clamp(min=0)
    add = layer.out.weight @ m
    if isinstance(layer, GatedReasoning):
        W_v = layer.gate.weight[:, :D]
        W_m = layer.gate.weight[:, D:]
        add = add / (1 + torch.exp(-(W_v @ v[i] + W_m @ m + layer.gate.bias)))
    return (v[i] + add) / (v[i] + add).norm()


def head_by_loops(layer, h, asking, y, bias):
    "What head h makes of y (K, D) for one asking vector (D,); bias (K,)."
    d = D // layer.heads
    own = slice(h * d, h * d + d)
    q = layer.query.weight[own] @ asking
    logits = [float(q @ (layer.key.weight[own] @ z)) / math.sqrt(d) for z in y]
    weights = [math.exp(logit + float(b)) for logit, b in zip(logits, bias)]
    return sum(w / sum(weights) * (layer.value.weight[own] @ z) for w, z in zip(weights, y))


def attend_by_loops(layer, x, y, bias):
    "x (L, D) over y (K, D), bias (heads, L, K)."
    out = []
    for i in range(len(x)):
        heads = [head_by_loops(layer, h, x[i], y, bias[h, i]) for h in range(layer.heads)]
        out.append(layer.out.weight @ torch.cat(heads))
    return torch.stack(out)


def bias_by_loops(layer, graph):
    "(R, R, K) -> (heads, R, R)"
    n = len(graph)
    bias = torch.zeros(layer.attend.heads, n, n, dtype=torch.float64)
    if layer.bias is not None:
        for i, j, k in graph.nonzero().tolist():
            for h in range(layer.attend.heads):
                bias[h, i, j] += float(graph[i, j, k] * layer.bias[k, h])
    return bias


def implicit_by_loops(layer, v, graph, i):
    x = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * layer.norm.weight + layer.norm.bias
    update = attend_by_loops(layer.attend, x, x, bias_by_loops(layer, graph))
    new = v[i] + update[i]
    if layer.centred:
        new = new - sum(update) / len(v)
    return new / new.norm()


@ALL
@pytest.mark.parametrize('seed', range(3))
def test_equal_to_loops(kind, seed):
    layer = make(kind)
    v, graph, mask = ragged(seed)
    loops = implicit_by_loops if isinstance(layer, ImplicitReasoning) else explicit_by_loops
    with torch.no_grad():
        got = layer(v, graph, mask)
        want = torch.zeros_like(v)
        for b in range(B):
            n = int(mask[b].sum())
            for i in range(n):
                want[b, i] = loops(layer, v[b, :n], graph[b, :n, :n], i)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert (got - v).abs().max() > 0.05  # it did something


@EXPLICIT
def test_messages_equal_loops(kind):
    layer = make(kind)
    v, graph, _ = ragged()
    with torch.no_grad():
        want = torch.zeros_like(v)
        for b, i in product(range(B), range(R)):
            want[b, i] = message_by_loops(layer, v[b], graph[b], i)
        torch.testing.assert_close(layer.messages(v, graph), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize('bases', [1, 3])
def test_messages_equal_torch_geometric(bases):
    RGCNConv = pytest.importorskip('torch_geometric.nn').RGCNConv
    layer = RelationalConvolution(D, K, bases=bases).double()
    v, graph, _ = ragged()
    theirs = RGCNConv(D, D, K, num_bases=bases, aggr='sum', root_weight=False, bias=False).double()
    with torch.no_grad():
        layer.edge.zero_()  # theirs has none
        # theirs multiplies from the right
        theirs.weight.copy_(layer.send.weight.view(bases, D, D).mT)
        theirs.comp.copy_(layer.mix)
        graph = (graph > 0).double()  # nor has it weights
        # a full picture, flow from j to i
        i, j, relation = graph[0].nonzero().T
        assert len(i) > 10
        want = theirs(v[0], torch.stack([j, i]), relation)
        torch.testing.assert_close(layer.messages(v, graph)[0], want, atol=1e-12, rtol=0)


@ALL
def test_order_of_regions_does_not_matter(kind):
    layer = make(kind)
    v, graph, mask = ragged()
    order = torch.randperm(R)
    mixed = layer(v[:, order], graph[:, order][:, :, order], mask[:, order])
    torch.testing.assert_close(mixed, layer(v, graph, mask)[:, order], atol=1e-12, rtol=0)


@ALL
def test_padding_is_zero_and_changes_nothing(kind):
    layer = make(kind)
    v, graph, mask = ragged()
    out = layer(v, graph, mask)
    assert not out[~mask].any()
    assert out.norm(dim=-1)[mask].sub(1).abs().max() < 1e-12
    # alone and without its padding
    for b in (0, 1, 3, 4):
        n = int(mask[b].sum())
        alone = layer(v[b : b + 1, :n], graph[b : b + 1, :n, :n], mask[b : b + 1, :n])
        torch.testing.assert_close(alone[0], out[b, :n], atol=1e-12, rtol=0)


@EXPLICIT
def test_a_region_without_an_edge_stays_as_it_is(kind):
    layer = make(kind)
    v, graph, mask = ragged()
    torch.testing.assert_close(layer(v, graph, mask)[:, 1], v[:, 1], atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(v, graph * 0, mask), v, atol=1e-12, rtol=0)


def who_reaches(through, v):
    "(R, R) of the first picture: how much v[j] matters to through(v)[i]."
    v.requires_grad_()
    rows = []
    for i in range(R):
        told = through(v)[0, i].square() @ torch.rand(D).double()
        gradient = torch.autograd.grad(told, v)[0]
        rows.append(gradient[0].norm(dim=-1))
    return torch.stack(rows)


@EXPLICIT
def test_messages_come_from_neighbours_only(kind):
    layer = make(kind)
    v, graph, mask = ragged()
    step = (graph[0].sum(-1) > 0) | torch.eye(R, dtype=torch.bool)
    once = who_reaches(lambda v: layer(v, graph, mask), v)
    assert torch.equal(once > 1e-12, step)
    twice = who_reaches(lambda v: layer(layer(v, graph, mask), graph, mask), v)
    assert torch.equal(twice > 1e-12, step.float() @ step.float() > 0)  # two layers: two steps


@EXPLICIT
def test_relation_and_direction_count(kind):
    layer = LAYERS[kind]().double()  # as it starts
    v, _, mask = ragged()
    # the matrices alone must do
    with torch.no_grad():
        layer.edge.zero_()
    graphs = torch.zeros(3, R, R, K, dtype=torch.float64)
    # always the same two regions
    graphs[0, 0, 1, 2] = 1
    graphs[1, 0, 1, 3] = 1
    graphs[2, 1, 0, 2] = 1
    a, b, turned = (layer(v[:1], graph[None], mask[:1])[0] for graph in graphs)
    assert (a[0] - b[0]).abs().max() > 0.01
    assert torch.equal(a[1:], b[1:])
    assert (a[0] - v[0, 0]).abs().max() > 0.01
    assert torch.equal(turned[0], F.normalize(v[0, 0], dim=-1))
    assert (turned[1] - v[0, 1]).abs().max() > 0.01


@EXPLICIT
def test_weights_are_shares_unless_they_are_few(kind):
    layer = make(kind)
    v, graph, mask = ragged()
    # all sums above 1: only the ratios count
    strong = graph * 50
    torch.testing.assert_close(
        layer(v, strong * 3, mask), layer(v, strong, mask), atol=1e-12, rtol=0
    )
    # sums below 1: a faint edge says little
    weak = layer(v, graph * 1e-3, mask) - v
    assert 0 < weak.abs().max() < 1e-2


def plain_and_biased():
    "The same implicit layer without relations and with them."
    plain = make('uncentred')
    biased = ImplicitReasoning(D, K, centred=False).double()
    assert biased.load_state_dict(plain.state_dict(), strict=False).missing_keys == ['bias']
    return plain, biased


def test_the_bias_of_implicit_reasoning_starts_at_zero():
    v, graph, mask = ragged()
    plain, biased = plain_and_biased()
    # no relations: the graph is not looked at
    assert torch.equal(plain(v, None, mask), plain(v, graph, mask))
    torch.testing.assert_close(biased(v, graph, mask), plain(v, None, mask), atol=1e-12, rtol=0)


def test_a_large_bias_decides_who_is_heard():
    v, graph, mask = ragged()
    _, biased = plain_and_biased()
    with torch.no_grad():
        biased.bias.fill_(1000.0)
    v.requires_grad_()
    for i in range(R):
        told = biased(v, graph, mask)[0, i] @ torch.rand(D).double()
        matters = torch.autograd.grad(told, v)[0][0].norm(dim=-1) > 1e-12
        heard = set(matters.nonzero().flatten().tolist()) - {i}
        weight = graph[0, i].sum(-1)
        want = {int(weight.argmax())} if weight.any() else set(range(R)) - {i}
        assert heard == want


def test_what_all_regions_receive_alike_changes_nothing():
    layer = make('implicit')
    v, _, mask = ragged()
    # everybody listens to everybody alike
    with torch.no_grad():
        layer.attend.query.weight.zero_()
    torch.testing.assert_close(layer(v, None, mask), v, atol=1e-12, rtol=0)
    layer.centred = False
    assert (layer(v, None, mask) - v).abs().max() > 0.05


def test_implicit_reasoning_starts_as_the_identity():
    v, graph, mask = ragged()
    for layer in (ImplicitReasoning(D), ImplicitReasoning(D, K)):
        torch.testing.assert_close(layer.double()(v, graph, mask), v, atol=1e-12, rtol=0)
        layer(v, graph, mask).sum().backward()
        assert layer.attend.out.weight.grad.any()  # and can leave


@pytest.mark.parametrize('shape', [(3, 5, 8), (3, 1, 8), (1, 5, 8), (5, 8)])
def test_attention_equals_loops(shape):
    layer = MaskedAttention(D, heads=3).double().requires_grad_(False)
    x = torch.randn(3, 5, D).double()
    y = torch.randn(3, 8, D).double()
    mask = torch.rand(shape) < 0.5
    bias = torch.randn(3, 3, 5, 8).double()
    mask[..., 0, :] = torch.arange(8) == 3  # one choice: its value
    if shape[-2] > 1:
        mask[..., 1, :] = False
    full = mask.expand(3, 5, 8)
    want = torch.zeros(3, 5, D).double()
    for n, i in full.any(-1).nonzero().tolist():
        may = full[n, i]
        one = attend_by_loops(layer, x[n, i : i + 1], y[n, may], bias[n, :, i : i + 1, may])
        want[n, i] = one[0]
    torch.testing.assert_close(layer(x, y, mask, bias), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x, y, mask), layer(x, y, mask, bias * 0), atol=1e-12, rtol=0)


@pytest.mark.parametrize('biased', [False, True])
def test_attention_to_nothing_is_zero_with_finite_gradients(biased):
    layer = MaskedAttention(D)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[0] = False
    mask[1, 2] = False
    x = torch.randn(2, 5, D, requires_grad=True)
    y = torch.randn(2, 6, D, requires_grad=True)
    bias = torch.randn(2, 4, 5, 6, requires_grad=True)
    out = layer(x, y, mask, bias if biased else None)
    assert not out[0].any()
    assert not out[1, 2].any()
    assert out[1, 1].any()
    out.square().sum().backward()
    for leaf in [x, y, *layer.parameters()] + [bias] * biased:
        assert leaf.grad.isfinite().all() and leaf.grad.any()
    assert not y.grad[0].any()


def bare(q, k, v, attn_mask):
    "A kernel that makes NaN of a row without a choice."
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    else:
        logits = logits + attn_mask
    return logits.softmax(-1) @ v


@pytest.mark.parametrize('biased', [False, True])
def test_any_kernel_will_do(biased, monkeypatch):
    "Zeros for a row without a choice do not hang on the implementation that PyTorch picks."
    layer = MaskedAttention(D).double()
    mask = torch.rand(3, 5, 6) < 0.5
    mask[0] = False
    mask[1, 2] = False
    x = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 6, D, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True) if biased else None
    leaves = [x, y] + [bias] * biased
    want = layer(x, y, mask, bias)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', bare)
    got = layer(x, y, mask, bias)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    ours = torch.autograd.grad(want.square().sum(), leaves)
    theirs = torch.autograd.grad(got.square().sum(), leaves)
    torch.testing.assert_close(theirs, ours, atol=1e-12, rtol=0)


def test_attention_takes_a_bias_of_another_type(monkeypatch):
    layer = MaskedAttention(D).bfloat16()
    mask = torch.rand(3, 5, 6) < 0.7
    kernel = F.scaled_dot_product_attention
    x = torch.randn(3, 5, D)
    y = torch.randn(3, 6, D)
    bias = torch.randn(3, 4, 5, 6)

    def strict(q, k, v, attn_mask):  # as on a GPU
        assert attn_mask.dtype == q.dtype
        return kernel(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', strict)
    got = layer(x.bfloat16(), y.bfloat16(), mask, bias)
    torch.testing.assert_close(got.float(), layer.float()(x, y, mask, bias), atol=0.05, rtol=0)


@ALL
def test_gradients_are_finite(kind):
    # picture 2 has no region, region 1 no edge
    layer = make(kind)
    v, graph, mask = ragged()
    v.requires_grad_()
    graph.requires_grad_()
    (layer(v, graph, mask) @ torch.rand(D).double()).sum().backward()
    leaves = [v, *layer.parameters()]
    if kind not in ('implicit', 'uncentred'):
        leaves.append(graph)
    for leaf in leaves:
        assert leaf.grad.isfinite().all() and leaf.grad.any()
    assert not v.grad[~mask].any()


@ALL
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_smaller_types(kind, dtype):
    layer = make(kind)
    v, graph, mask = ragged()
    want = layer(v, graph, mask)
    got = layer.to(dtype)(v.to(dtype), graph.to(dtype), mask)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


@ALL
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_a_graph_of_another_type(kind, dtype):
    layer = make(kind).to(dtype)
    v, graph, mask = ragged()
    v = v.to(dtype)
    for other in (torch.float16, torch.float64):
        given = graph.to(other)
        assert torch.equal(layer(v, given, mask), layer(v, given.to(dtype), mask))


@ALL
@pytest.mark.parametrize('B, R', [(0, 7), (3, 0)])
def test_nothing_to_do(kind, B, R):
    v = torch.zeros(B, R, D).double()
    graph = torch.zeros(B, R, R, K).double()
    mask = torch.ones(B, R, dtype=torch.bool)
    assert make(kind)(v, graph, mask).shape == (B, R, D)


@ALL
def test_nothing_is_made_on_another_device(kind):
    v, graph, mask = (t.to('meta') for t in ragged())
    assert make(kind).to('meta')(v, graph, mask).shape == (B, R, D)


def test_bases_share_matrices():
    def count(layer):
        return sum(p.numel() for p in layer.parameters())

    convolution = 4 * 64 * 64 + 140 * 4 + 140 * 64 + 64 * 64
    assert count(RelationalConvolution(64, 140)) == convolution
    assert count(GatedReasoning(64, 140)) == convolution + 2 * 64 * 64 + 64
    assert set(REASONING) == {'convolution', 'gated'}
    for build in REASONING.values():
        assert build(D, K, bases=2).mix.shape == (K, 2)


def test_faults_are_one_line():
    v, graph, mask = ragged()
    for call, message in [
        (lambda: RelationalConvolution(D, 0), 'at least one relation'),
        (lambda: GatedReasoning(D, 3, bases=0), 'basis'),
        (lambda: MaskedAttention(D, heads=5), '5 heads cannot share a width of 12'),
        (lambda: MaskedAttention(D, heads=0), 'heads'),
        (lambda: ImplicitReasoning(D, -1), 'relations'),
        (lambda: ImplicitReasoning(D, K).double()(v, None, mask), 'graph of 0 relations'),
        (
            lambda: RelationalConvolution(D, 1).double()(v, graph, mask),
            'graph of 6 relations for a layer of 1',
        ),
        (
            lambda: ImplicitReasoning(D, 2).double()(v, graph, mask),
            'graph of 6 relations for a layer of 2',
        ),
    ]:
        with pytest.raises(ValueError, match=message) as fault:
            call()
        assert '\n' not in str(fault.value)
