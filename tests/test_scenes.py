"The generated world: deterministic, true, balanced, and as noisy as its knobs say."

from collections import Counter

import numpy as np
import pytest

from imtm_lite.world.scenes import (
    ACTIONS,
    CATEGORIES,
    COLOURS,
    KINDS,
    NOUNS,
    OPPOSITE,
    PLURALS,
    POSES,
    PREDICATES,
    SPATIAL,
    Noise,
    Scene,
    Thing,
    blind_reader,
    chains,
    describe,
    detect,
    draw,
    holds,
    make_scene,
    probes,
    spatial_facts,
)

N = 400


@pytest.fixture(scope='module')
def scenes():
    return [make_scene(seed) for seed in range(N)]


@pytest.fixture(scope='module')
def sentences(scenes):
    return [describe(s, seed=k) for k, s in enumerate(scenes)]


@pytest.fixture(scope='module')
def pairs(scenes):
    return [(s, p) for k, s in enumerate(scenes) for p in probes(s, seed=k)]


def test_deterministic(scenes):
    for k in range(10):
        again = make_scene(k)
        assert again == scenes[k]
        assert np.array_equal(draw(again), draw(scenes[k]))
        assert describe(again, k) == describe(scenes[k], k) and probes(again, k) == probes(
            scenes[k], k
        )
        a = detect(again, k)
        b = detect(scenes[k], k)
        assert (
            np.array_equal(a.boxes, b.boxes)
            and np.array_equal(a.thing, b.thing)
            and a.triples == b.triples
        )
    assert len({str(s) for s in scenes}) == N


def test_scenes_are_well_formed(scenes):
    for s in scenes:
        assert 3 <= len(s.things) <= 7
        for t in s.things:
            x0, y0, x1, y1 = t.box
            assert 0 <= x0 < x1 <= s.side and 0 <= y0 < y1 <= s.side
            assert (
                t.category in CATEGORIES
                and t.colour in COLOURS
                and t.pose in POSES
                and t.facing in ('left', 'right')
            )
        for i, p, j in s.actions:
            assert p in ACTIONS and i != j and max(i, j) < len(s.things)
        for i, p, j in spatial_facts(s):
            assert p in SPATIAL and i != j
    assert {t.category for s in scenes for t in s.things} == set(CATEGORIES)
    assert {p for s in scenes for _, p, _ in s.actions} == set(ACTIONS)
    assert max(Counter(t.category for t in s.things).most_common(1)[0][1] for s in scenes) == 3


def test_pictures(scenes):
    for s in scenes[:20]:
        picture = draw(s)
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert not np.array_equal(picture, draw(Scene([], backdrop=s.backdrop)))


def test_every_thing_shows():
    for c in CATEGORIES:
        empty = draw(Scene([]))
        shown = {}
        for colour in COLOURS:
            inside = Thing(c, colour, 'medium', (40, 40, 90, 90))
            changed = (draw(Scene([inside])) != empty).any(-1)
            assert (
                changed[40:90, 40:90].sum() > 200
                and changed.sum() < 1.15 * changed[40:90, 40:90].sum() + 60
            )
            shown[colour] = draw(Scene([inside])).tobytes()
        assert len(set(shown.values())) == len(COLOURS)


def test_directions_are_opposite(scenes):
    for s in scenes:
        facts = set(spatial_facts(s))
        for i, p, j in facts:
            if p in OPPOSITE:
                assert (j, OPPOSITE[p], i) in facts
            if p == 'next to':
                assert (j, p, i) in facts


def test_facts_do_not_know_of_actions(scenes):
    for s in scenes:
        still = Scene([Thing(t.category, t.colour, t.size, t.box) for t in s.things])
        assert spatial_facts(still) == spatial_facts(s)
    picture = [
        draw(
            Scene(
                [
                    Thing('man', 'red', 'medium', (50, 50, 78, 96), pose),
                    Thing('ball', 'blue', 'medium', (76, 65, 91, 80)),
                ]
            )
        )
        for pose in ('standing', 'reaching', 'arms up', 'sitting', 'running', 'looking')
    ]
    assert len({p.tobytes() for p in picture}) == 6


def test_boxes_do_not_tell_the_action():
    "Who chases whom, ridden or stood on: independent of the boxes."
    left_chases = []
    ridden = []
    for seed in range(2000):
        s = make_scene(10**5 + seed)
        for i, p, j in s.actions:
            if p == 'chasing':
                left_chases.append(s.things[i].box[0] < s.things[j].box[0])
            if p == 'riding':
                ridden.append(1)
            if p == 'standing on':
                ridden.append(0)
    for v in (left_chases, ridden):
        assert abs(np.mean(v) - 0.5) < 4 * 0.5 / len(v) ** 0.5


def test_sentences_hold(scenes, sentences):
    for s, five in zip(scenes, sentences):
        assert len({x.text for x in five}) == 5
        for x in five:
            assert holds(x, s), x.text


def test_sentences_are_not_true_of_everything(scenes, sentences):
    other = np.mean(
        [holds(x, scenes[(k + 1) % N]) for k, five in enumerate(sentences) for x in five]
    )
    assert other < 0.05
    assert any(
        holds(x, t) for k, five in enumerate(sentences[:100]) for x in five for t in scenes[100:200]
    )


def test_words_and_spans(scenes, sentences):
    for s, five in zip(scenes, sentences):
        groups = chains(s)
        for x in five:
            tokens = x.text.split()
            assert (
                6 <= len(tokens) <= 16
                and x.text == ' '.join(tokens)
                and x.text.isascii()
                and x.text.replace(' ', '').isalpha()
            )
            assert len(x.phrases) == len(x.mentions)
            for (start, end, _, chain), m in zip(x.phrases, x.mentions):
                words = tokens[start:end]
                assert words[0] in ('a', 'an', 'two', 'three')
                assert any(
                    w in words for n in NOUNS[m.category] for w in (n, PLURALS.get(n, n + 's'))
                )
                assert {s.things[i].category for i in groups[chain]} == {m.category} and len(
                    groups[chain]
                ) == m.count
                if m.colour:
                    assert m.colour in words and {s.things[i].colour for i in groups[chain]} == {
                        m.colour
                    }
                if words[0] in ('a', 'an'):
                    assert (words[0] == 'an') == (words[1][0] in 'aeiou')
            spans = sorted((a, b) for a, b, _, _ in x.phrases)
            assert all(b <= c for (_, b), (c, _) in zip(spans, spans[1:]))
            for a, p, b in x.triples:
                assert p in PREDICATES and a != b


def test_counting_is_exact():
    ball = lambda x: Thing('ball', 'red', 'medium', (x, 10, x + 15, 25))
    two, three = (
        Scene(
            [ball(10 + 30 * k) for k in range(n)]
            + [Thing('tree', 'red', 'medium', (60, 60, 90, 110))]
        )
        for n in (2, 3)
    )
    says = {
        m.count: x
        for s in (two, three)
        for seed in range(20)
        for x in describe(s, seed)
        for m in x.mentions
        if m.count > 1
    }
    assert (
        holds(says[2], two)
        and holds(says[3], three)
        and not holds(says[2], three)
        and not holds(says[3], two)
    )


def test_probes(pairs):
    assert {p.kind for _, p in pairs} == set(KINDS)
    for s, p in pairs:
        assert holds(p.true, s) and not holds(p.false, s), (p.kind, p.true.text, p.false.text)
        for x in (p.true, p.false):
            assert 6 <= len(x.text.split()) <= 16


def test_probes_differ_in_one_thing(pairs):
    plain = lambda x: ['a' if w == 'an' else w for w in x.text.split()]
    for _, p in pairs:
        t = plain(p.true)
        f = plain(p.false)
        differ = [(a, b) for a, b in zip(t, f) if a != b]
        if p.kind != 'left-right' and p.kind != 'who-does-what':
            assert len(t) == len(f)
        if p.kind == 'object':
            assert (
                len(differ) == 1
                and sum(a != b for a, b in zip(p.true.mentions, p.false.mentions)) == 1
            )
        if p.kind == 'attribute':
            assert (
                len(differ) == 2
                and differ[0] == differ[1][::-1]
                and set(differ[0]) <= set(COLOURS)
                and sorted(t) == sorted(f)
            )
        if p.kind == 'count':
            assert [set(d) for d in differ] == [{'two', 'three'}]
        if p.kind == 'left-right':
            assert [set(d) for d in differ] == [{'left', 'right'}]
        if p.kind == 'above-below':
            assert [set(d) for d in differ] in (
                [{'above', 'below'}],
                [{'over', 'under'}],
                [{'higher', 'lower'}],
            )
        if p.kind == 'who-does-what':
            assert p.true.pieces == p.false.pieces and p.true.triples == p.false.triples
            changed = [(a, b) for a, b in zip(p.true.mentions, p.false.mentions) if a != b]
            assert len(changed) == 1 or changed[0] == changed[1][::-1]


def test_blind_reader_is_at_chance(sentences):
    blind = blind_reader([x.text for five in sentences for x in five])
    passed = {k: [] for k in KINDS}
    for seed in range(1000):
        for p in probes(make_scene(10**6 + seed), seed):
            t = blind(p.true.text)
            f = blind(p.false.text)
            passed[p.kind].append((t > f) + 0.5 * (t == f))
    for kind, v in passed.items():
        assert abs(np.mean(v) - 0.5) < 0.03 + 3 * 0.5 / len(v) ** 0.5, (kind, np.mean(v), len(v))


def test_blind_reader_notices_a_leak():
    "The check has teeth: when only yellow suns are true, it says so."
    blind = blind_reader(
        ['a yellow sun is above a blue car', 'a yellow sun is left of a red dog'] * 20
    )
    assert blind('a yellow sun is above a blue dog') > blind('a blue sun is above a yellow dog')


@pytest.mark.parametrize('regions', [1, 5, 12, 36])
def test_detection_has_fixed_rows(scenes, regions):
    for k, s in enumerate(scenes[:50]):
        d = detect(s, k, regions)
        assert (
            d.boxes.shape == (regions, 4)
            and d.boxes.dtype == np.float32
            and d.thing.shape == (regions,)
            and d.thing.dtype == np.int64
        )
        assert (
            (d.boxes[:, :2] >= 0).all()
            and (d.boxes[:, 2:] <= s.side).all()
            and (d.boxes[:, 2:] - d.boxes[:, :2] >= 1.99).all()
        )
        assert (np.diff(d.scores) <= 0).all() and d.thing.max() < len(s.things)
        for a, p, b, c in d.triples:
            assert (
                d.thing[a] >= 0
                and d.thing[b] >= 0
                and a != b
                and 0 <= p < len(PREDICATES)
                and 0 <= c <= 1
            )


def test_detection_without_noise(scenes):
    for k, s in enumerate(scenes[:50]):
        d = detect(s, k, noise=Noise(0, 0, 0, 1, 0, 0))
        assert sorted(t for t in d.thing if t >= 0) == list(range(len(s.things)))
        for box, t in zip(d.boxes, d.thing):
            if t >= 0:
                assert np.allclose(box, s.things[t].box)
        seen = {(d.thing[a], PREDICATES[p], d.thing[b]) for a, p, b, _ in d.triples}
        assert seen <= set(spatial_facts(s) + s.actions) and set(s.actions) <= seen


@pytest.mark.parametrize('rate', [0.0, 0.3, 1.0])
def test_detection_rates(scenes, rate):
    things = sum(len(s.things) for s in scenes)
    close = lambda x, n: abs(x - rate) <= 4 * (rate * (1 - rate) / n) ** 0.5 + 1e-9
    quiet = dict(
        jitter=0, duplicate=0, missed=0, background=1, wrong_relation=0, missing_relation=0
    )
    look = lambda **kw: [detect(s, k, 16, Noise(**{**quiet, **kw})) for k, s in enumerate(scenes)]
    assert close(
        1 - sum(len(set(d.thing.tolist()) - {-1}) for d in look(missed=rate)) / things, things
    )
    assert close(sum((d.thing >= 0).sum() for d in look(duplicate=rate)) / things - 1, things)
    assert close(
        sum((d.thing < 0).sum() for d in look(background=rate)) / (16 * N - things), 16 * N - things
    )
    full = sum(len(d.triples) for d in look())
    assert close(1 - sum(len(d.triples) for d in look(missing_relation=rate)) / full, full)
    false = [
        (d.thing[a], PREDICATES[p], d.thing[b]) not in facts
        for s, d in zip(scenes, look(wrong_relation=rate))
        for facts in [set(spatial_facts(s) + s.actions)]
        for a, p, b, _ in d.triples
    ]
    assert close(np.mean(false), full)


def test_jitter_moves_boxes(scenes):
    for jitter in (0.02, 0.1):
        moved = [
            (d.boxes[r] - s.things[t].box)
            / np.tile(np.subtract(s.things[t].box[2:], s.things[t].box[:2]), 2)
            for k, s in enumerate(scenes[:100])
            for d in [detect(s, k, noise=Noise(jitter=jitter))]
            for r, t in enumerate(d.thing)
            if t >= 0
        ]
        assert abs(np.std(moved) / jitter - 1) < 0.12
