"""Moving shapes: captions that are true of what is seen, motions as they are named, and paths as labels."""

import re

import numpy as np
import pytest

from diffjax.data import open_source
from diffjax.data.moving_shapes import moving_shapes_dataset_builder as builder
from diffjax.data.moving_shapes.plays import MOTIONS, Actor, Play, draw, path, play
from diffjax.data.shapes import rendering
from diffjax.data.shapes.scenes import CLASSES, COLORS, HELD_OUT, SHAPES, SIZES, Background, Object, Scene

PLAYS = {split: [play(split, i) for i in range(300)] for split in ('train', 'test')}
CLAUSE = rf'(an?) ({"|".join(COLORS)}) ({"|".join(SHAPES)}) ({"|".join(MOTIONS)})'


@pytest.mark.parametrize('split', PLAYS)
def test_captions_are_true_and_complete(split):
    """What a caption says of a motion is read off the path: which way, and whether it grows faster."""
    seen = set()
    for what in PLAYS[split]:
        clauses = what.caption.split(', ')
        assert len(clauses) == len(what.actors)
        for clause, actor in zip(clauses, what.actors):
            article, color, shape, motion = re.fullmatch(CLAUSE, clause).groups()
            assert (article == 'an') == (color == 'orange')
            assert (SHAPES.index(shape), list(COLORS).index(color)) == actor.thing[:2]
            down, right = path(actor)[0][-1] - path(actor)[0][0]
            steps = np.linalg.norm(np.diff(path(actor)[0], axis=0), axis=1)
            said = {
                'stands still': steps.max() == 0,
                'moves left': right < -0.25 and down == 0,
                'moves right': right > 0.25 and down == 0,
                'rises': down < -0.25 and right == 0,
                'falls': down > 0.25 and right == 0 and (np.diff(steps) > 0).all(),
            }
            assert [name for name, true in said.items() if true] == [motion]
            if motion != 'falls':
                np.testing.assert_allclose(steps, steps[0], atol=1e-12)
            seen.add(motion)
        assert CLASSES[what.label] == ' '.join(clauses[0].split()[1:3])
    assert seen == set(MOTIONS)


@pytest.mark.parametrize('split', PLAYS)
def test_solids_stay_whole_and_velocities_are_those_of_the_paths(split):
    for what in PLAYS[split]:
        for actor in what.actors:
            places, velocities = path(actor)
            assert places.min() >= actor.thing.radius - 1e-9 and places.max() <= 1 - actor.thing.radius + 1e-9
            middle = (velocities[1:] + velocities[:-1]) / 2  # exact for constant velocity and constant acceleration
            np.testing.assert_allclose(np.diff(places, axis=0), middle, atol=1e-12)
        if len(what.actors) == 2:
            a, b = (path(actor)[0] for actor in what.actors)
            least = 0.8 * sum(actor.thing.radius for actor in what.actors)
            assert np.linalg.norm(a - b, axis=1)[[0, -1]].min() > least
            assert what.actors[0].thing[:2] != what.actors[1].thing[:2]


def test_some_combinations_wait_for_the_test_split():
    def combinations(split):
        things = [actor.thing for what in PLAYS[split] for actor in what.actors]
        return {(SHAPES[thing.shape], list(COLORS)[thing.color]) for thing in things}

    assert not combinations('train') & set(HELD_OUT)
    assert combinations('test') >= set(HELD_OUT)


def test_frames_are_the_pictures_of_scenes():
    """Each frame, drawn by the other dataset's program from the places that the labels have."""
    for what in PLAYS['test'][:12]:
        frames, order = draw(what), [i for i in range(len(what.actors)) if i != what.front] + [what.front]
        for k in (0, 6, 15):
            things = []
            for i in order:
                y, x = path(what.actors[i])[0][k]
                things.append(what.actors[i].thing._replace(y=y, x=x))
            picture = rendering.draw(Scene(tuple(things), what.background, '', (0, 0)), 32)
            np.testing.assert_allclose(frames[k].astype(int), picture.image, atol=1)


def test_one_stands_in_front_of_the_other():
    ground = Background('white', 'white', 0.0)
    red, blue = (Actor(Object(1, color, 2, 0.5, 0.5), 0, 0.3) for color in (0, 2))
    for front, strong in ((0, 0), (1, 2)):
        assert draw(Play((red, blue), front, ground, ''))[0, 16, 16].argmax() == strong


def test_the_dataset_holds_what_was_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, 'NUM_EXAMPLES', {'train': 5, 'test': 2})
    names = ('number', 'shape', 'color', 'size', 'motion', 'front', 'position', 'velocity')
    source = open_source('moving_shapes', 'train', data_dir=tmp_path, annotations=names)
    assert (source.kind, source.image_shape, source.num_classes, len(source)) == ('video', (16, 32, 32, 3), 24, 5)
    for i in (4, 1):
        what, example = PLAYS['train'][i], source[i]
        np.testing.assert_array_equal(example['video'], draw(what))
        assert source.records[i]['caption'].decode() == what.caption and example['label'] == what.label
        number = example['number']
        assert number == len(what.actors) and example['front'] == what.front
        for j, actor in enumerate(what.actors):
            assert [example[name][j] for name in ('shape', 'color', 'size')] == list(actor.thing[:3])
            assert list(SIZES)[example['size'][j]] in ('medium', 'large')
            assert list(MOTIONS)[example['motion'][j]] in what.caption
            np.testing.assert_allclose(example['position'][:, j], path(actor)[0], rtol=1e-6)
            np.testing.assert_allclose(example['velocity'][:, j], path(actor)[1], rtol=1e-6)
        assert (example['position'][:, number:] == -1).all() and (example['shape'][number:] == -1).all()
