"""Learning to denoise clips: single frames among them, and a network that is told the frame rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import grids, schedules, solvers, times, weights
from diffjax.core.guidance import Guidance
from diffjax.core.losses import Loss
from diffjax.core.parameterizations import X0
from diffjax.core.types import Model
from diffjax.tasks import Denoising
from diffjax.tasks.denoising import one_frame, spread

CLASSES, SHAPE = 3, (8, 6, 2, 2, 1)
LOSS = Loss(schedule=schedules.Flow(), parameterization=X0(), times=times.Uniform(), weight=weights.target)
SEEN = []


def _apply(params, x, t, cond=None, key=None):
    """A network with one parameter for space and one for time, of which images know nothing."""
    SEEN.append((x.shape, cond))
    over_time = params['time'] * x.mean(1, keepdims=True) if x.shape[1] > 1 else 0.0
    return params['space'] * x + over_time


MODEL = Model(lambda key, x, t, cond: {'space': jnp.ones(()), 'time': jnp.ones(())}, _apply)
PARAMS = {'space': jnp.float32(0.7), 'time': jnp.float32(0.3)}


def _task(**changes):
    return Denoising(model=MODEL, objective=LOSS, num_classes=CLASSES, **changes)


def _batch(number=8):
    rng = np.random.default_rng(0)
    x0 = rng.standard_normal((number, *SHAPE[1:])).astype(np.float32)
    rate = rng.uniform(4, 8, number).astype(np.float32)
    return {'x0': x0, 'label': rng.integers(0, CLASSES, number), 'frame_rate': rate}


def _keys(number=8):
    return jax.random.split(jax.random.key(1), number)


@pytest.mark.parametrize(
    'number, fraction, count', [(8, 0.25, 2), (16, 0.125, 2), (8, 0.0, 0), (12, 0.75, 9), (7, 0, 0)]
)
def test_images_are_spread_evenly(number, fraction, count):
    where = np.flatnonzero(spread(number, fraction))
    assert len(where) == count
    if count > 1:
        assert np.diff(where).max() - np.diff(where).min() <= 1
        half = [(where < number // 2).sum(), (where >= number // 2).sum()]
        assert abs(half[0] - half[1]) <= 1


def test_a_share_of_a_batch_is_single_frames():
    """Each clip's loss is what it is alone, and each image's that of one of its frames alone, as an image."""
    batch, keys = _batch(), _keys()
    SEEN.clear()
    losses, extra = _task(image_fraction=0.25).losses(PARAMS, batch, keys)
    assert [shape for shape, _ in SEEN] == [(6, 6, 2, 2, 1), (2, 1, 2, 2, 1)]
    images = np.flatnonzero(spread(8, 0.25))
    clips = np.setdiff1d(np.arange(8), images)
    alone, _ = _task().losses(PARAMS, batch, keys)
    np.testing.assert_allclose(losses[clips], alone[clips], rtol=1e-6)
    for i in images:
        frames = [{'x0': batch['x0'][i : i + 1, f : f + 1], 'label': batch['label'][i : i + 1]} for f in range(6)]
        each = np.array([_task().losses(PARAMS, frame, keys[i : i + 1])[0][0] for frame in frames])
        assert (np.abs(each - losses[i]) < 1e-6).sum() == 1
    assert all(value.shape == (8,) for value in extra.values())


def test_any_frame_becomes_an_image():
    """Clips that show the number of each frame: over many examples all of them are seen, alike often."""
    numbers = np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None, None], (400, *SHAPE[1:]))
    images = one_frame({'x0': numbers, 'label': np.zeros(400, int), 'frame_rate': np.ones(400)}, _keys(400))
    assert set(images) == {'x0', 'label'} and images['x0'].shape == (400, 1, 2, 2, 1)
    counts = np.bincount(np.asarray(images['x0'])[:, 0, 0, 0, 0].astype(int), minlength=6)
    assert counts.min() > 400 / 6 - 4 * np.sqrt(400 / 6) and counts.sum() == 400


def test_images_teach_no_module_over_time():
    """As many images as there are clips: the gradient of `space` gets both, that of `time` the clips' alone."""
    batch, keys = _batch(), _keys()
    task = _task(image_fraction=0.5)
    images = spread(8, 0.5)

    def gradient(task, batch, keys):
        return jax.grad(lambda p: task.losses(p, batch, keys)[0].sum())(PARAMS)

    both = gradient(task, batch, keys)
    clips = gradient(_task(), jax.tree.map(lambda a: a[~images], batch), keys[~images])
    np.testing.assert_allclose(both['time'], clips['time'], rtol=1e-5)
    assert abs(both['space'] - clips['space']) > 1e-2


def test_clips_are_told_their_rate_and_images_are_not():
    batch, keys = _batch(), _keys()
    SEEN.clear()
    task = _task(image_fraction=0.25, knows_frame_rate=True)
    task.losses(PARAMS, batch, keys)
    (_, told), (_, image) = SEEN
    clips = ~spread(8, 0.25)
    assert set(told) == {'label', 'frame_rate'} and isinstance(image, jax.Array)
    np.testing.assert_array_equal(told['frame_rate'], batch['frame_rate'][clips])
    np.testing.assert_array_equal(told['label'], batch['label'][clips])
    np.testing.assert_array_equal(image, batch['label'][~clips])
    SEEN.clear()
    task.losses_at(PARAMS, batch, jnp.float32(0.5), keys)
    np.testing.assert_array_equal(SEEN[0][1]['frame_rate'], batch['frame_rate'])
    SEEN.clear()
    _task().losses(PARAMS, batch, keys)
    np.testing.assert_array_equal(SEEN[0][1], batch['label'])  # whoever does not know it is not told


def test_samples_are_of_the_rate_that_was_asked_for():
    """A network that believes in one value, its label and the rate: guidance moves the label's part alone."""

    def believe(params, x, t, cond=None, key=None):
        value = cond['label'] + 100 * cond['frame_rate']
        return jnp.broadcast_to(value.reshape(-1, 1, 1, 1, 1), x.shape).astype(jnp.float32)

    task = Denoising(model=MODEL._replace(apply=believe), objective=LOSS, num_classes=CLASSES, knows_frame_rate=True)
    plan = solvers.euler(schedules.Flow(), grids.uniform(schedules.Flow(), 4))
    labels, keys = jnp.array([0, 2]), _keys(2)
    for guidance, expected in ((None, [400, 402]), (Guidance(np.float32(2)), [400 - 3, 400 + 1])):
        x = task.sample(PARAMS, (), plan, guidance, labels, keys, SHAPE[1:], frame_rate=np.float32(4))
        np.testing.assert_allclose(x.mean((1, 2, 3, 4)), expected, rtol=1e-5)
        assert np.ptp(np.asarray(x), axis=(1, 2, 3, 4)).max() < 1e-2
