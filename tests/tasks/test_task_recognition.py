"""Recognition: answers of scenes written by hand, and the loss as a likelihood."""

import itertools

import jax
import numpy as np
import pytest

from diffjax.nets.recognizer import Recognizer
from diffjax.tasks import Recognition
from diffjax.tasks.questions import Answers, Classes, Flights, Plays, Scenes

pytestmark = pytest.mark.usefixtures('fast_compilation')

SHAPES, COLORS, SIZES = ('cube', 'ball'), ('red', 'green', 'blue'), ('small', 'large')
ASPECTS = ('anywhere', 'left', 'right', 'top', 'bottom', *SIZES)
SCENES = Scenes(num_shapes=2, num_colors=3, num_sizes=2, max_objects=3)

HAND_WRITTEN = {
    # (shape, colour, size, y, x) of each object; what is so of it
    'a small red cube in the upper left': (
        [('cube', 'red', 'small', 0.2, 0.3)],
        {'red cube': 'anywhere left top small'},
    ),
    'a large blue ball in the lower right, a small one in the upper right': (
        [('ball', 'blue', 'large', 0.7, 0.8), ('ball', 'blue', 'small', 0.1, 0.6)],
        {'blue ball': 'anywhere right top bottom small large'},
    ),
    'three different ones': (
        [
            ('cube', 'green', 'large', 0.9, 0.1),
            ('ball', 'green', 'small', 0.1, 0.1),
            ('cube', 'red', 'small', 0.6, 0.9),
        ],
        {
            'green cube': 'anywhere left bottom large',
            'green ball': 'anywhere left top small',
            'red cube': 'anywhere right bottom small',
        },
    ),
    'nothing': ([], {}),
}


def annotations(objects):
    """As the dataset delivers them: -1 where there is no object."""
    rows = [(SHAPES.index(s), COLORS.index(c), SIZES.index(k), y, x) for s, c, k, y, x in objects]
    table = np.full((3, 5), -1.0)
    table[: len(rows)] = np.reshape(rows, (len(rows), 5))
    shape, color, size = (table[:, i].astype(np.int8) for i in range(3))
    return {'shape': shape, 'color': color, 'size': size, 'centre': table[:, 3:].astype(np.float32)}


BATCH = jax.tree.map(lambda *a: np.stack(a), *(annotations(objects) for objects, _ in HAND_WRITTEN.values()))


def test_answers_of_scenes_written_by_hand():
    answers = SCENES(BATCH)
    assert answers.yes.shape == (4, SCENES.num_questions) == (4, 7 * 6) and SCENES.num_choices == 4
    names = [f'{color} {shape}' for shape in SHAPES for color in COLORS]
    for yes, choice, (objects, truth) in zip(answers.yes, answers.choice, HAND_WRITTEN.values()):
        said = {pair for pair, value in zip(itertools.product(ASPECTS, names), np.asarray(yes)) if value}
        assert said == {(aspect, name) for name, aspects in truth.items() for aspect in aspects.split()}
        assert choice == len(objects)
    assert set(np.unique(answers.yes)) == {0, 1}


def test_the_order_of_objects_does_not_matter():
    turned = {name: a[:, ::-1] for name, a in BATCH.items()}
    jax.tree.map(np.testing.assert_array_equal, SCENES(BATCH), SCENES(turned))


FRAME_ASPECTS = ('there', 'left', 'right', 'top', 'bottom')
CLIP_ASPECTS = (
    *(f'{way} {when}' for when in ('first', 'last') for way in ('leftwards', 'rightwards', 'upwards', 'downwards')),
    'fast',
)


def test_answers_of_flights_written_by_hand():
    """A 3 that flies down to the right and bounces off the right wall with a 7 that flies up fast; and a 0 alone."""
    flights = Flights(num_frames=2, max_actors=2)
    nothing = [(-1.0, -1.0)] * 2
    batch = {
        'digit': np.array([[3, 7], [0, -1]], np.int8),
        'position': np.array(
            [[[(0.2, 0.3), (0.8, 0.1)], [(0.6, 0.7), (0.4, 0.1)]], [[(0.5, 0.5), nothing[0]], [(0.5, 0.4), nothing[0]]]]
        ),
        'velocity': np.array(
            [
                [[(0.03, 0.01), (-0.05, 0)], [(0.03, -0.01), (-0.05, 0)]],
                [[(0, -0.01), nothing[0]], [(0, -0.01), nothing[0]]],
            ]
        ),
    }
    answers = flights(batch)
    assert answers.yes.shape == (2, flights.num_questions) == (2, 2 * 50 + 90)
    assert answers.choice.tolist() == [2, 1] and flights.num_choices == 3
    names = [(frame, aspect, k) for frame in (0, 1) for aspect in FRAME_ASPECTS for k in range(10)]
    names += [(aspect, k) for aspect in CLIP_ASPECTS for k in range(10)]
    said = [{name for name, yes in zip(names, row) if yes} for row in np.asarray(answers.yes)]
    assert said[0] == {
        *((0, aspect, 3) for aspect in ('there', 'left', 'top')),
        *((1, aspect, 3) for aspect in ('there', 'right', 'bottom')),
        *((0, aspect, 7) for aspect in ('there', 'left', 'bottom')),
        *((1, aspect, 7) for aspect in ('there', 'left', 'top')),
        *((aspect, 3) for aspect in ('rightwards first', 'downwards first', 'leftwards last', 'downwards last')),
        *((aspect, 7) for aspect in ('upwards first', 'upwards last', 'fast')),
    }
    assert said[1] == {
        *((0, aspect, 0) for aspect in ('there', 'right', 'bottom')),
        *((1, aspect, 0) for aspect in ('there', 'left', 'bottom')),
        ('leftwards first', 0),
        ('leftwards last', 0),
    }


def test_kinds_of_plays_are_classes():
    plays = Plays(num_frames=1, max_actors=2)
    batch = {'shape': np.array([[2, -1]], np.int8), 'color': np.array([[5, -1]], np.int8)}
    batch |= {'position': np.zeros((1, 1, 2, 2)), 'velocity': np.zeros((1, 1, 2, 2))}
    answers = plays(batch)
    assert np.flatnonzero(answers.yes[0]).tolist() == [17, 24 + 17, 72 + 17] and answers.choice.tolist() == [1]
    assert plays.annotations == ('shape', 'color', 'position', 'velocity')


def test_classes_are_labels():
    answers = Classes(num_classes=10)({'label': np.array([3, 9])})
    assert answers.yes.shape == (2, 0) and answers.choice.tolist() == [3, 9]


def recognition(questions=SCENES, **fields):
    number = questions.num_questions + questions.num_choices
    return Recognition(
        network=Recognizer(num_outputs=number, channels=(4,), num_groups=2), questions=questions, **fields
    )


@pytest.mark.parametrize('weight', [1.0, 2.5])
def test_the_loss_is_the_likelihood_of_all_answers(weight):
    """As a product of probabilities, answer by answer, in float64."""
    task = recognition(choice_weight=weight)
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    params, state = task.init(jax.random.key(0), {'x0': x})
    loss, (_, metrics) = jax.jit(task.loss)(params, state, (), {'x0': x, **BATCH}, 0, None)
    logits = np.asarray(task.network.apply({'params': params}, x), np.float64)
    p = 1 / (1 + np.exp(-logits[:, :42]))
    answers = SCENES(BATCH)
    yes = np.where(np.asarray(answers.yes) == 1, p, 1 - p).prod(-1)
    odds = np.exp(logits[:, 42:])
    choice = (odds / odds.sum(-1, keepdims=True))[np.arange(4), answers.choice]
    np.testing.assert_allclose(loss, (-np.log(yes) - weight * np.log(choice)).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        [metrics['yes_or_no'], metrics['choice']], [-np.log(yes).mean(), -np.log(choice).mean()], rtol=1e-5
    )


def test_what_is_said_is_what_is_likelier():
    task = recognition()
    x = np.random.default_rng(1).standard_normal((3, 8, 8, 3)).astype(np.float32)
    params, _ = task.init(jax.random.key(0), {'x0': x})
    said, logits = task.answer(params, x), np.asarray(task.network.apply({'params': params}, x))
    assert isinstance(said, Answers)
    np.testing.assert_array_equal(said.yes, np.heaviside(logits[:, :42], 0))
    np.testing.assert_array_equal(said.choice, [list(row).index(max(row)) for row in logits[:, 42:]])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='take 46 outputs of the network, which has 7'):
        Recognition(network=Recognizer(num_outputs=7), questions=SCENES)
    with pytest.raises(ValueError, match='choice_weight must be at least 0, got -1'):
        recognition(choice_weight=-1)
