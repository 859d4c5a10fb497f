"The generated world: deterministic, true, balanced, and as noisy as its knobs say."

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from imtm_lite.world.scenes import (
    ACTIONS,
    CATEGORIES,
    COLOURS,
    NOUNS,
    OPPOSITE,
    PLURALS,
    POSES,
    PREDICATES,
    PROBE_KINDS,
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
    return [describe(scene, seed=k) for k, scene in enumerate(scenes)]


@pytest.fixture(scope='module')
def pairs(scenes):
    "Every scene with each of its probes."
    made = []
    for k, scene in enumerate(scenes):
        made += [(scene, probe) for probe in probes(scene, seed=k)]
    return made


def test_deterministic(scenes):
    for k, scene in enumerate(scenes[:10]):
        again = make_scene(k)
        assert again == scene
        assert np.array_equal(draw(again), draw(scene))
        assert describe(again, k) == describe(scene, k)
        assert probes(again, k) == probes(scene, k)
        second = detect(again, k)
        first = detect(scene, k)
        assert np.array_equal(second.boxes, first.boxes)
        assert np.array_equal(second.thing, first.thing)
        assert second.triples == first.triples
    assert len({str(scene) for scene in scenes}) == N


def test_scenes_are_well_formed(scenes):
    for scene in scenes:
        assert 3 <= len(scene.things) <= 7
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= scene.side and 0 <= y0 < y1 <= scene.side
            assert thing.category in CATEGORIES and thing.colour in COLOURS
            assert thing.pose in POSES and thing.facing in ('left', 'right')
        for i, action, j in scene.actions:
            assert action in ACTIONS and i != j and max(i, j) < len(scene.things)
        for i, predicate, j in spatial_facts(scene):
            assert predicate in SPATIAL and i != j


def test_every_category_and_action_occurs(scenes):
    categories = [[thing.category for thing in scene.things] for scene in scenes]
    assert set().union(*categories) == set(CATEGORIES)
    actions = [{action for _, action, _ in scene.actions} for scene in scenes]
    assert set().union(*actions) == set(ACTIONS)
    assert max(max(Counter(names).values()) for names in categories) == 3


def test_pictures(scenes):
    for scene in scenes[:20]:
        picture = draw(scene)
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert not np.array_equal(picture, draw(Scene([], backdrop=scene.backdrop)))


@pytest.mark.parametrize('category', CATEGORIES)
def test_every_thing_shows(category):
    empty = draw(Scene([]))
    shown = set()
    for colour in COLOURS:
        picture = draw(Scene([Thing(category, colour, 'medium', (40, 40, 90, 90))]))
        changed = (picture != empty).any(-1)
        inside = changed[40:90, 40:90].sum()
        assert inside > 200
        assert changed.sum() < 1.15 * inside + 60
        shown.add(picture.tobytes())
    assert len(shown) == len(COLOURS)


def test_directions_are_opposite(scenes):
    for scene in scenes:
        facts = set(spatial_facts(scene))
        for i, predicate, j in facts:
            if predicate in OPPOSITE:
                assert (j, OPPOSITE[predicate], i) in facts
            if predicate == 'next to':
                assert (j, predicate, i) in facts


def test_facts_do_not_know_of_actions(scenes):
    for scene in scenes:
        things = [Thing(t.category, t.colour, t.size, t.box) for t in scene.things]
        assert spatial_facts(Scene(things)) == spatial_facts(scene)


def test_poses_are_drawn():
    ball = Thing('ball', 'blue', 'medium', (76, 65, 91, 80))
    pictures = set()
    for pose in POSES:
        man = Thing('man', 'red', 'medium', (50, 50, 78, 96), pose)
        pictures.add(draw(Scene([man, ball])).tobytes())
    assert len(pictures) == len(POSES) == 6


def test_boxes_do_not_tell_the_action():
    "Who chases whom, ridden or stood on: independent of the boxes."
    left_chases = []
    ridden = []
    for seed in range(2000):
        scene = make_scene(10**5 + seed)
        for i, action, j in scene.actions:
            if action == 'chasing':
                left_chases.append(scene.things[i].box[0] < scene.things[j].box[0])
            if action in ('riding', 'standing on'):
                ridden.append(action == 'riding')
    for tosses in (left_chases, ridden):
        assert abs(np.mean(tosses) - 0.5) < 4 * 0.5 / len(tosses) ** 0.5


def test_sentences_hold(scenes, sentences):
    for scene, five in zip(scenes, sentences):
        assert len({sentence.text for sentence in five}) == 5
        for sentence in five:
            assert holds(sentence, scene), sentence.text


def test_sentences_are_not_true_of_everything(scenes, sentences):
    true = []
    for five, other in zip(sentences, scenes[1:] + scenes[:1]):
        true += [holds(sentence, other) for sentence in five]
    assert np.mean(true) < 0.05
    early = itertools.chain(*sentences[:100])
    assert any(holds(*both) for both in itertools.product(early, scenes[100:200]))


def test_words(sentences):
    for sentence in itertools.chain(*sentences):
        tokens = sentence.text.split()
        assert 6 <= len(tokens) <= 16 and sentence.text == ' '.join(tokens)
        assert sentence.text.isascii() and ''.join(tokens).isalpha()


def test_spans(sentences):
    for sentence in itertools.chain(*sentences):
        assert len(sentence.phrases) == len(sentence.mentions)
        spans = sorted((start, end) for start, end, _, _ in sentence.phrases)
        for (_, end), (start, _) in zip(spans, spans[1:]):
            assert end <= start
        for one, predicate, other in sentence.triples:
            assert predicate in PREDICATES and one != other


def names_of(category):
    "Its nouns, and their plurals."
    nouns = NOUNS[category]
    return {*nouns, *(PLURALS.get(noun, noun + 's') for noun in nouns)}


def test_phrases_say_what_their_chains_are(scenes, sentences):
    for scene, five in zip(scenes, sentences):
        groups = chains(scene)
        for sentence in five:
            tokens = sentence.text.split()
            for (start, end, _, chain), mention in zip(sentence.phrases, sentence.mentions):
                words = tokens[start:end]
                things = [scene.things[i] for i in groups[chain]]
                assert names_of(mention.category) & set(words)
                assert {thing.category for thing in things} == {mention.category}
                assert len(things) == mention.count
                if mention.colour:
                    assert mention.colour in words
                    assert {thing.colour for thing in things} == {mention.colour}


def test_articles(sentences):
    for sentence in itertools.chain(*sentences):
        tokens = sentence.text.split()
        for start, _, _, _ in sentence.phrases:
            assert tokens[start] in ('a', 'an', 'two', 'three')
            if tokens[start] in ('a', 'an'):
                assert (tokens[start] == 'an') == (tokens[start + 1][0] in 'aeiou')


def balls_and_a_tree(n):
    things = [Thing('tree', 'red', 'medium', (60, 60, 90, 110))]
    for x in range(10, 10 + 30 * n, 30):
        things.append(Thing('ball', 'red', 'medium', (x, 10, x + 15, 25)))
    return Scene(things)


def test_counting_is_exact():
    scenes = {n: balls_and_a_tree(n) for n in (2, 3)}
    counted = {}
    for scene in scenes.values():
        for seed in range(20):
            for sentence in describe(scene, seed):
                most = max(mention.count for mention in sentence.mentions)
                counted[most] = sentence
    for n, other in ((2, 3), (3, 2)):
        assert holds(counted[n], scenes[n])
        assert not holds(counted[n], scenes[other])


def test_probes(pairs):
    assert {probe.kind for _, probe in pairs} == set(PROBE_KINDS)
    for scene, probe in pairs:
        texts = (probe.kind, probe.true.text, probe.false.text)
        assert holds(probe.true, scene) and not holds(probe.false, scene), texts
        for sentence in (probe.true, probe.false):
            assert 6 <= len(sentence.text.split()) <= 16


def words_without_an(sentence):
    return ['a' if word == 'an' else word for word in sentence.text.split()]


def differences(probe):
    "Pairs of words that differ, place by place."
    words = zip(words_without_an(probe.true), words_without_an(probe.false))
    return [(true, false) for true, false in words if true != false]


def of_kind(pairs, kind):
    return [probe for _, probe in pairs if probe.kind == kind]


def test_object_probes_differ_in_one_noun(pairs):
    for probe in of_kind(pairs, 'object'):
        assert len(words_without_an(probe.true)) == len(words_without_an(probe.false))
        assert len(differences(probe)) == 1
        mentions = zip(probe.true.mentions, probe.false.mentions)
        assert sum(true != false for true, false in mentions) == 1


def test_attribute_probes_exchange_two_colours(pairs):
    for probe in of_kind(pairs, 'attribute'):
        assert sorted(words_without_an(probe.true)) == sorted(words_without_an(probe.false))
        first, second = differences(probe)
        assert first == second[::-1] and set(first) <= set(COLOURS)


@pytest.mark.parametrize(
    'kind, exchanged',
    [
        ('count', [{'two', 'three'}]),
        ('left-right', [{'left', 'right'}]),
        ('above-below', [{'above', 'below'}, {'over', 'under'}, {'higher', 'lower'}]),
    ],
)
def test_other_probes_exchange_one_word(pairs, kind, exchanged):
    for probe in of_kind(pairs, kind):
        if kind != 'left-right':
            assert len(words_without_an(probe.true)) == len(words_without_an(probe.false))
        (words,) = differences(probe)
        assert set(words) in exchanged


def test_role_probes_exchange_who_is_named(pairs):
    for probe in of_kind(pairs, 'who-does-what'):
        assert probe.true.pieces == probe.false.pieces
        assert probe.true.triples == probe.false.triples
        mentions = zip(probe.true.mentions, probe.false.mentions)
        changed = [(true, false) for true, false in mentions if true != false]
        assert len(changed) == 1 or changed[0] == changed[1][::-1]


def test_blind_reader_is_at_chance(sentences):
    blind = blind_reader([sentence.text for sentence in itertools.chain(*sentences)])
    passed = {kind: [] for kind in PROBE_KINDS}
    for seed in range(1000):
        for probe in probes(make_scene(10**6 + seed), seed):
            true = blind(probe.true.text)
            false = blind(probe.false.text)
            passed[probe.kind].append((true > false) + 0.5 * (true == false))
    for kind, right in passed.items():
        share = np.mean(right)
        assert abs(share - 0.5) < 0.03 + 3 * 0.5 / len(right) ** 0.5, (kind, share, len(right))


def test_blind_reader_notices_a_leak():
    "The check has teeth: when only yellow suns are true, it says so."
    blind = blind_reader(
        ['a yellow sun is above a blue car', 'a yellow sun is left of a red dog'] * 20
    )
    assert blind('a yellow sun is above a blue dog') > blind('a blue sun is above a yellow dog')


@pytest.mark.parametrize('regions', [1, 5, 12, 36])
def test_detection_has_fixed_rows(scenes, regions):
    for k, scene in enumerate(scenes[:50]):
        look = detect(scene, k, regions)
        assert look.boxes.shape == (regions, 4) and look.boxes.dtype == np.float32
        assert look.thing.shape == (regions,) and look.thing.dtype == np.int64
        corner = look.boxes[:, :2]
        opposite = look.boxes[:, 2:]
        assert (corner >= 0).all() and (opposite <= scene.side).all()
        assert (opposite - corner >= 1.99).all()
        assert (np.diff(look.scores) <= 0).all() and look.thing.max() < len(scene.things)
        for one, predicate, other, confidence in look.triples:
            assert look.thing[one] >= 0 and look.thing[other] >= 0 and one != other
            assert 0 <= predicate < len(PREDICATES) and 0 <= confidence <= 1


def triples_of(look):
    "(thing, predicate, thing) of the triples of a detection."
    return [
        (look.thing[one], PREDICATES[predicate], look.thing[other])
        for one, predicate, other, _ in look.triples
    ]


QUIET = Noise(jitter=0, missed=0, duplicate=0, background=1, wrong_relation=0, missing_relation=0)


def test_detection_without_noise(scenes):
    for k, scene in enumerate(scenes[:50]):
        look = detect(scene, k, noise=QUIET)
        assert sorted(look.thing[look.thing >= 0]) == list(range(len(scene.things)))
        for box, i in zip(look.boxes, look.thing):
            if i >= 0:
                assert np.allclose(box, scene.things[i].box)
        seen = set(triples_of(look))
        assert seen <= set(spatial_facts(scene) + scene.actions) and set(scene.actions) <= seen


def is_close(share, rate, n):
    "Whether a share of n is within four standard errors of a rate."
    return abs(share - rate) <= 4 * (rate * (1 - rate) / n) ** 0.5 + 1e-9


@pytest.mark.parametrize('rate', [0.0, 0.3, 1.0])
def test_detection_rates(scenes, rate):
    def look(**changed):
        noise = replace(QUIET, **changed)
        return [detect(scene, k, 16, noise) for k, scene in enumerate(scenes)]

    things = sum(len(scene.things) for scene in scenes)
    spare = 16 * N - things
    seen = sum(len(set(d.thing.tolist()) - {-1}) for d in look(missed=rate))
    assert is_close(1 - seen / things, rate, things)
    rows = sum((d.thing >= 0).sum() for d in look(duplicate=rate))
    assert is_close(rows / things - 1, rate, things)
    background = sum((d.thing < 0).sum() for d in look(background=rate))
    assert is_close(background / spare, rate, spare)
    relations = sum(len(d.triples) for d in look())
    kept = sum(len(d.triples) for d in look(missing_relation=rate))
    assert is_close(1 - kept / relations, rate, relations)
    wrong = 0
    for scene, d in zip(scenes, look(wrong_relation=rate)):
        facts = set(spatial_facts(scene) + scene.actions)
        wrong += sum(triple not in facts for triple in triples_of(d))
    assert is_close(wrong / relations, rate, relations)


@pytest.mark.parametrize('jitter', [0.02, 0.1])
def test_jitter_moves_boxes(scenes, jitter):
    moved = []
    for k, scene in enumerate(scenes[:100]):
        look = detect(scene, k, noise=Noise(jitter=jitter))
        for box, i in zip(look.boxes, look.thing):
            if i >= 0:
                true = np.array(scene.things[i].box)
                extent = true[2:] - true[:2]
                moved.append((box - true) / np.tile(extent, 2))
    assert abs(np.std(moved) / jitter - 1) < 0.12
