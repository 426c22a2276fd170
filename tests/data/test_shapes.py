"""The captioned shapes: captions hold, pictures show what the labels say, a scene depends on nothing but its index."""

import re

import numpy as np
import pytest

from diffjax.data import open_source
from diffjax.data.shapes import shapes_dataset_builder
from diffjax.data.shapes.rendering import draw, edge_map, solid
from diffjax.data.shapes.scenes import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    HELD_OUT,
    NUMBERS,
    SHAPES,
    SIZES,
    Background,
    Object,
    Scene,
    scene,
)

NOUN = rf'({"|".join(filter(None, NUMBERS))}|an) (?:({"|".join(SIZES)}) )?({"|".join(COLORS)}) ({"|".join(SHAPES)})s?'
RELATIONS = {
    'left of': lambda a, b: a.x < b.x,
    'right of': lambda a, b: a.x > b.x,
    'above': lambda a, b: a.y < b.y,
    'below': lambda a, b: a.y > b.y,
    'beside': lambda a, b: True,
}
SCENES = {split: [scene(split, i) for i in range(1500)] for split in ('train', 'test')}


def named(match, objects):
    """The objects that a noun of a caption speaks of."""
    number, size, color, shape = match
    kind = SHAPES.index(shape), list(COLORS).index(color)
    found = [thing for thing in objects if thing[:2] == kind]
    assert len(found) == max(NUMBERS.index(number) if number in NUMBERS else 1, 1)
    assert not size or all(list(SIZES)[thing.size] == size for thing in found)
    return found


@pytest.mark.parametrize('split', SCENES)
def test_captions_are_true_and_complete(split):
    seen = set()
    for what in SCENES[split]:
        sentence, _, ground = what.caption.partition(', on a ')
        groups = [named(match, what.objects) for match in re.findall(NOUN, sentence)]
        assert sum(map(len, groups)) == len(what.objects), what.caption
        relations = re.findall('|'.join(RELATIONS), sentence)
        assert len(relations) == len(groups) - 1
        for relation, group in zip(relations, groups[1:]):
            assert all(RELATIONS[relation](a, b) for a in groups[0] for b in group), what.caption
        assert groups[0][0][:2] == what.subject
        assert CLASSES[what.label] == f'{list(COLORS)[what.subject[1]]} {SHAPES[what.subject[0]]}'
        if ground:
            assert re.findall('|'.join(BACKGROUNDS), ground) == list(dict.fromkeys(what.background[:2]))
        assert sentence.startswith('an o') == (sentence.split()[0] == 'an')
        seen |= {*relations, f'{len(what.objects)} objects', bool(ground)}
    assert seen >= {*RELATIONS, *(f'{n} objects' for n in range(1, 5)), True, False}


def test_some_combinations_wait_for_the_test_split():
    def combinations(split):
        return {(SHAPES[t.shape], list(COLORS)[t.color]) for what in SCENES[split] for t in what.objects}

    everything = {(shape, color) for shape in SHAPES for color in COLORS}
    assert combinations('test') == everything
    assert combinations('train') == everything - set(HELD_OUT)


def test_a_scene_depends_on_its_split_and_index_alone():
    assert scene('train', 7) == SCENES['train'][7] != scene('test', 7)
    assert len({what.objects for what in SCENES['train'] + SCENES['test']}) == 3000
    with pytest.raises(ValueError, match='train, test .*validation'):
        scene('validation', 0)


def test_solids_stand_whole_in_the_picture_and_hide_little():
    for what in SCENES['train'][:300]:
        picture = draw(what)
        for i, thing in enumerate(what.objects):
            top, left, bottom, right = picture.boxes[i]
            assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
            whole = solid_mask(thing)
            rows, columns = np.nonzero(whole)
            box = [rows.min() / 64, columns.min() / 64, (rows.max() + 1) / 64, (columns.max() + 1) / 64]
            np.testing.assert_allclose(picture.boxes[i], box, atol=1.01 / 64)
            assert (picture.segmentation == i + 1).sum() > 0.5 * whole.sum()


def solid_mask(thing, side=64):
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    return solid(thing, x, y)[0] < 0


@pytest.mark.parametrize('shape', range(4))
def test_solids_cover_the_area_of_their_outline(shape):
    """Closed forms: a disc, a hexagon, a rectangle with two halves of an ellipse, a triangle with one."""
    area = {
        'sphere': np.pi,
        'cube': 1.5 * np.sqrt(3),
        'cylinder': 1.4 * 1.4 + np.pi * 0.7 * 0.27,
        'cone': 0.85 * 1.7 + np.pi * 0.85 * 0.28 / 2,
    }[SHAPES[shape]]
    thing = Object(shape, 0, 2, 0.5, 0.5)
    measured = solid_mask(thing, 512).mean() / thing.radius**2
    assert measured == pytest.approx(area, rel=0.02)  # the base of a cone also swells a little beyond its sides


def test_soft_edges_are_those_of_a_picture_drawn_much_larger():
    """Coverage to first order against the mean over 8 x 8 finer pixels; hard edges are several times farther off."""
    for what in SCENES['test'][:12]:
        fine = draw(what, 512).image.astype(float).reshape(64, 8, 64, 8, 3).mean((1, 3))
        soft = np.abs(draw(what).image - fine).mean()
        hard = np.abs(draw(what, 512).image[4::8, 4::8] - fine).mean()
        assert soft < 0.8 and soft < 0.6 * hard


def test_nearer_solids_hide_farther_ones_and_the_map_says_so():
    back, front = Object(1, 0, 2, 0.5, 0.45), Object(1, 2, 1, 0.5, 0.6)
    picture = draw(Scene((back, front), Background('white', 'white', 0.0), '', (1, 0)))
    assert picture.segmentation[38, 32] == 2 and picture.segmentation[18, 32] == 1 and picture.segmentation[2, 2] == 0
    red, blue = picture.image[18, 32], picture.image[38, 32]
    assert red[0] > red[2] and blue[2] > blue[0]
    np.testing.assert_array_equal(picture.image[0, 0], BACKGROUNDS['white'])


def test_edges_stand_where_the_map_changes():
    segmentation = np.array([[0, 0, 1], [0, 2, 1], [0, 0, 0]], np.uint8)
    np.testing.assert_array_equal(edge_map(segmentation) > 0, [[0, 1, 0], [1, 1, 1], [0, 0, 0]])


def test_a_gradient_runs_from_corner_to_corner():
    image = draw(Scene((), Background('black', 'white', np.pi / 4), '', (0, 0))).image.astype(int)
    assert np.abs(image[0, 0] - BACKGROUNDS['black']).max() <= 4
    assert np.abs(image[-1, -1] - BACKGROUNDS['white']).max() <= 4
    assert (np.diff(np.diagonal(image[..., 0])) >= 0).all()


def test_the_dataset_holds_what_was_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_dataset_builder, 'NUM_EXAMPLES', {'train': 12, 'test': 5})
    source = open_source('shapes', 'train', data_dir=tmp_path)
    assert (source.kind, source.image_shape, source.num_classes, len(source)) == ('image', (64, 64, 3), 24, 12)
    for i in (0, 11):
        what, record = SCENES['train'][i], source.records[i]
        picture = draw(what)
        np.testing.assert_array_equal(source[i]['image'], picture.image)
        assert source[i]['label'] == what.label and record['caption'].decode() == what.caption
        number = len(what.objects)
        np.testing.assert_array_equal(record['shape'][:number], [thing.shape for thing in what.objects])
        assert (record['shape'][number:] == -1).all() and (record['box'][number:] == -1).all()
        np.testing.assert_allclose(record['centre'][:number], [(t.y, t.x) for t in what.objects], rtol=1e-6)
        np.testing.assert_array_equal(record['box'][:number], picture.boxes)
    assert len(open_source('shapes', 'test', data_dir=tmp_path)) == 5
