"Graph reasoning: loops over edges, an independent implementation, order of regions, padding, regions without an edge, gradients, faults."

import math

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
    "Unit vectors, weighted edges; the first picture is full, the third empty, region 1 of each has no edge."
    g = torch.Generator().manual_seed(seed)
    n = torch.randint(3, R + 1, (B,), generator=g)
    n[0], n[2] = R, 0
    mask = torch.arange(R) < n[:, None]
    v = (
        F.normalize(torch.randn(B, R, D, generator=g, dtype=torch.float64), dim=-1)
        * mask[..., None]
    )
    graph = torch.rand(B, R, R, K, generator=g, dtype=torch.float64) * (
        torch.rand(B, R, R, K, generator=g) < 0.25
    )
    graph = graph * (mask[:, :, None] & mask[:, None] & ~torch.eye(R, dtype=torch.bool))[..., None]
    graph[:, 1], graph[:, :, 1] = 0, 0
    return v, graph, mask


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


def attend_by_loops(layer, x, y, bias):
    "x (L, D) over y (K, D), bias (heads, L, K)."
    d = D // layer.heads
    out = []
    for i in range(len(x)):
        parts = []
        for h in range(layer.heads):
            part = slice(h * d, h * d + d)
            q = layer.query.weight[part] @ x[i]
            logits = [
                float(q @ (layer.key.weight[part] @ z)) / math.sqrt(d) + float(bias[h, i, j])
                for j, z in enumerate(y)
            ]
            weights = [math.exp(logit) for logit in logits]
            parts.append(
                sum(w / sum(weights) * (layer.value.weight[part] @ z) for w, z in zip(weights, y))
            )
        out.append(layer.out.weight @ torch.cat(parts))
    return torch.stack(out)


def implicit_by_loops(layer, v, graph, i):
    x = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * layer.norm.weight + layer.norm.bias
    heads = layer.attend.heads
    scalars = torch.zeros(graph.shape[-1], heads) if layer.bias is None else layer.bias
    bias = torch.tensor(
        [
            [
                [
                    float(sum(g * s for g, s in zip(graph[a, b], scalars[:, h])))
                    for b in range(len(v))
                ]
                for a in range(len(v))
            ]
            for h in range(heads)
        ],
        dtype=torch.float64,
    )
    update = attend_by_loops(layer.attend, x, x, bias)
    new = v[i] + update[i]
    if layer.centred:
        new = new - sum(update) / len(v)
    return new / new.norm()


@ALL
@pytest.mark.parametrize('seed', range(3))
def test_equal_to_loops(kind, seed):
    layer, (v, graph, mask) = make(kind), ragged(seed)
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
    layer, (v, graph, _) = make(kind), ragged()
    with torch.no_grad():
        want = torch.stack(
            [
                torch.stack([message_by_loops(layer, v[b], graph[b], i) for i in range(R)])
                for b in range(B)
            ]
        )
        torch.testing.assert_close(layer.messages(v, graph), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize('bases', [1, 3])
def test_messages_equal_torch_geometric(bases):
    RGCNConv = pytest.importorskip('torch_geometric.nn').RGCNConv
    layer, (v, graph, _) = RelationalConvolution(D, K, bases=bases).double(), ragged()
    theirs = RGCNConv(D, D, K, num_bases=bases, aggr='sum', root_weight=False, bias=False).double()
    with torch.no_grad():
        layer.edge.zero_()  # theirs has none
        # theirs multiplies from the right
        theirs.weight.copy_(layer.send.weight.view(bases, D, D).mT)
        theirs.comp.copy_(layer.mix)
        graph = (graph > 0).double()  # nor has it weights
        # a full picture, flow from j to i
        to, of, relation = graph[0].nonzero().T
        assert len(to) > 10
        torch.testing.assert_close(
            layer.messages(v, graph)[0],
            theirs(v[0], torch.stack([of, to]), relation),
            atol=1e-12,
            rtol=0,
        )


@ALL
def test_order_of_regions_does_not_matter(kind):
    layer, (v, graph, mask) = make(kind), ragged()
    order = torch.randperm(R)
    mixed = layer(v[:, order], graph[:, order][:, :, order], mask[:, order])
    torch.testing.assert_close(mixed, layer(v, graph, mask)[:, order], atol=1e-12, rtol=0)


@ALL
def test_padding_is_zero_and_changes_nothing(kind):
    layer, (v, graph, mask) = make(kind), ragged()
    out = layer(v, graph, mask)
    assert not out[~mask].any() and out.norm(dim=-1)[mask].sub(1).abs().max() < 1e-12
    # alone and without its padding
    for b in (0, 1, 3, 4):
        n = int(mask[b].sum())
        torch.testing.assert_close(
            layer(v[b : b + 1, :n], graph[b : b + 1, :n, :n], mask[b : b + 1, :n])[0],
            out[b, :n],
            atol=1e-12,
            rtol=0,
        )


@EXPLICIT
def test_a_region_without_an_edge_stays_as_it_is(kind):
    layer, (v, graph, mask) = make(kind), ragged()
    torch.testing.assert_close(layer(v, graph, mask)[:, 1], v[:, 1], atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(v, graph * 0, mask), v, atol=1e-12, rtol=0)


@EXPLICIT
def test_messages_come_from_neighbours_only(kind):
    layer, (v, graph, mask) = make(kind), ragged()
    v.requires_grad_()
    reach = torch.stack(
        [
            torch.autograd.grad(layer(v, graph, mask)[0, i].square() @ torch.rand(D).double(), v)[
                0
            ][0].norm(dim=-1)
            for i in range(R)
        ]
    )
    assert torch.equal(reach > 1e-12, (graph[0].sum(-1) > 0) | torch.eye(R, dtype=torch.bool))
    twice = torch.stack(
        [
            torch.autograd.grad(
                layer(layer(v, graph, mask), graph, mask)[0, i].square() @ torch.rand(D).double(), v
            )[0][0].norm(dim=-1)
            for i in range(R)
        ]
    )
    step = ((graph[0].sum(-1) > 0) | torch.eye(R, dtype=torch.bool)).float()
    assert torch.equal(twice > 1e-12, step @ step > 0)  # two layers: two steps


@EXPLICIT
def test_relation_and_direction_count(kind):
    layer, (v, _, mask) = LAYERS[kind]().double(), ragged()  # as it starts
    # the matrices alone must do
    with torch.no_grad():
        layer.edge.zero_()
    graphs = torch.zeros(3, R, R, K, dtype=torch.float64)
    graphs[0, 0, 1, 2] = graphs[1, 0, 1, 3] = graphs[2, 1, 0, 2] = 1  # the same two regions
    a, b, turned = (layer(v[:1], graph[None], mask[:1])[0] for graph in graphs)
    assert (a[0] - b[0]).abs().max() > 0.01 and torch.equal(a[1:], b[1:])
    assert (
        (a[0] - v[0, 0]).abs().max() > 0.01
        and torch.equal(turned[0], F.normalize(v[0, 0], dim=-1))
        and (turned[1] - v[0, 1]).abs().max() > 0.01
    )


@EXPLICIT
def test_weights_are_shares_unless_they_are_few(kind):
    layer, (v, graph, mask) = make(kind), ragged()
    # all sums above 1: only the ratios count
    strong = graph * 50
    torch.testing.assert_close(
        layer(v, strong * 3, mask), layer(v, strong, mask), atol=1e-12, rtol=0
    )
    # sums below 1: a faint edge says little
    weak = layer(v, graph * 1e-3, mask) - v
    assert 0 < weak.abs().max() < 1e-2


def test_bias_of_implicit_reasoning():
    v, graph, mask = ragged()
    plain = make('uncentred')
    biased = ImplicitReasoning(D, K, centred=False).double()
    assert biased.load_state_dict(plain.state_dict(), strict=False).missing_keys == ['bias']
    # no relations: the graph is not looked at
    assert torch.equal(plain(v, None, mask), plain(v, graph, mask))
    # the bias starts at zero
    torch.testing.assert_close(biased(v, graph, mask), plain(v, None, mask), atol=1e-12, rtol=0)
    with torch.no_grad():
        biased.bias.fill_(1000.0)  # now edges decide
    v.requires_grad_()
    for i in range(R):
        g = torch.autograd.grad(biased(v, graph, mask)[0, i] @ torch.rand(D).double(), v)[0][
            0
        ].norm(dim=-1)
        heard = {j for j in range(R) if j != i and g[j] > 1e-12}
        heaviest = graph[0, i].sum(-1)
        assert heard == ({int(heaviest.argmax())} if heaviest.any() else set(range(R)) - {i})


def test_what_all_regions_receive_alike_changes_nothing():
    layer, (v, _, mask) = make('implicit'), ragged()
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
    layer = MaskedAttention(D, heads=3).double()
    x = torch.randn(3, 5, D).double()
    y = torch.randn(3, 8, D).double()
    mask = torch.rand(shape) < 0.5
    bias = torch.randn(3, 3, 5, 8).double()
    mask[..., 0, :] = torch.arange(8) == 3  # one choice: its value
    if shape[-2] > 1:
        mask[..., 1, :] = False
    with torch.no_grad():
        got = layer(x, y, mask, bias)
        full = mask.expand(3, 5, 8)
        for n in range(3):
            for i in range(5):
                may = full[n, i]
                want = (
                    attend_by_loops(layer, x[n, i : i + 1], y[n, may], bias[n, :, i : i + 1, may])[
                        0
                    ]
                    if may.any()
                    else torch.zeros(D).double()
                )
                torch.testing.assert_close(got[n, i], want, atol=1e-12, rtol=0)
        torch.testing.assert_close(
            layer(x, y, mask), layer(x, y, mask, bias * 0), atol=1e-12, rtol=0
        )


@pytest.mark.parametrize('biased', [False, True])
def test_attention_to_nothing_is_zero_with_finite_gradients(biased):
    layer = MaskedAttention(D)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[0], mask[1, 2] = False, False
    x, y, bias = (torch.randn(*s, requires_grad=True) for s in ((2, 5, D), (2, 6, D), (2, 4, 5, 6)))
    out = layer(x, y, mask, bias if biased else None)
    assert not out[0].any() and not out[1, 2].any() and out[1, 1].any()
    out.square().sum().backward()
    leaves = [x, y, *layer.parameters()] + [bias] * biased
    assert all(t.grad.isfinite().all() and t.grad.any() for t in leaves) and not y.grad[0].any()


@pytest.mark.parametrize('biased', [False, True])
def test_any_kernel_will_do(biased, monkeypatch):
    "Zeros for a row without a choice do not hang on the implementation that PyTorch picks: here is one that makes NaN of it."

    def bare(q, k, v, attn_mask):
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        logits = (
            logits.masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else logits + attn_mask
        )
        return logits.softmax(-1) @ v

    layer = MaskedAttention(D).double()
    mask = torch.rand(3, 5, 6) < 0.5
    mask[0], mask[1, 2] = False, False
    x, y, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((3, 5, D), (3, 6, D), (3, 4, 5, 6))
    )
    want = layer(x, y, mask, bias if biased else None)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', bare)
    got = layer(x, y, mask, bias if biased else None)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    for leaf in [x, y] + [bias] * biased:
        a, b = (
            torch.autograd.grad(out.square().sum(), leaf, retain_graph=True)[0]
            for out in (got, want)
        )
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


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
    layer, (v, graph, mask) = make(kind), ragged()
    v.requires_grad_()
    graph.requires_grad_()
    (layer(v, graph, mask) @ torch.rand(D).double()).sum().backward()
    leaves = [v, *layer.parameters()] + [graph] * (kind not in ('implicit', 'uncentred'))
    assert all(t.grad.isfinite().all() and t.grad.any() for t in leaves)
    assert not v.grad[~mask].any()


@ALL
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_smaller_types(kind, dtype):
    layer, (v, graph, mask) = make(kind), ragged()
    want = layer(v, graph, mask)
    got = layer.to(dtype)(v.to(dtype), graph.to(dtype), mask)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), want, atol=0.1 if dtype != torch.float32 else 1e-5, rtol=0
    )


@ALL
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_a_graph_of_another_type(kind, dtype):
    layer, (v, graph, mask) = make(kind).to(dtype), ragged()
    for other in (torch.float16, torch.float64):
        assert torch.equal(
            layer(v.to(dtype), graph.to(other), mask),
            layer(v.to(dtype), graph.to(other).to(dtype), mask),
        )


@ALL
@pytest.mark.parametrize('B, R', [(0, 7), (3, 0)])
def test_nothing_to_do(kind, B, R):
    layer = make(kind)
    assert layer(
        torch.zeros(B, R, D).double(),
        torch.zeros(B, R, R, K).double(),
        torch.ones(B, R, dtype=torch.bool),
    ).shape == (B, R, D)


@ALL
def test_nothing_is_made_on_another_device(kind):
    v, graph, mask = (t.to('meta') for t in ragged())
    assert make(kind).to('meta')(v, graph, mask).shape == (B, R, D)


def test_bases_share_matrices():
    count = lambda layer: sum(p.numel() for p in layer.parameters())
    assert count(RelationalConvolution(64, 140)) == 4 * 64 * 64 + 140 * 4 + 140 * 64 + 64 * 64
    assert (
        count(GatedReasoning(64, 140)) == count(RelationalConvolution(64, 140)) + 2 * 64 * 64 + 64
    )
    assert set(REASONING) == {'convolution', 'gated'} and all(
        build(D, K, bases=2).mix.shape == (K, 2) for build in REASONING.values()
    )


def test_faults_are_one_line():
    v, graph, mask = ragged()
    for call, what in [
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
        with pytest.raises(ValueError, match=what) as fault:
            call()
        assert '\n' not in str(fault.value)
