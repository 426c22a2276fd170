"""The denoising task: label drop, examples that do not know of each other, and what guidance does to samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from diffjax.core import parameterizations, schedules, solvers, times, weights
from diffjax.core.guidance import Guidance
from diffjax.core.likelihood import Rademacher
from diffjax.core.losses import Loss
from diffjax.core.sampling import sample_keys
from diffjax.core.transforms import Transforms
from diffjax.core.types import Model
from diffjax.tasks import Denoising

pytestmark = pytest.mark.usefixtures('fast_compilation')

CLASSES = 7


def linear_model():
    """A 'network' on [B, 3] that looks at everything: output = x W + t + label's row."""

    def init(key, x, t, cond):
        a, b = jax.random.split(key)
        return {'w': jax.random.normal(a, (x.shape[-1], x.shape[-1])), 'rows': jax.random.normal(b, (CLASSES + 1, 3))}

    def apply(params, x, t, cond, key=None):
        rows = 0.0 if cond is None else params['rows'][cond]
        return x @ params['w'] + 1e-3 * t[:, None] + rows

    return Model(init, apply)


def make_task(**changes):
    objective = Loss(
        schedule=schedules.Flow(),
        parameterization=parameterizations.Velocity(),
        times=times.Uniform(),
        weight=weights.target,
    )
    return Denoising(**{'model': linear_model(), 'objective': objective, 'num_classes': CLASSES, **changes})


def make_batch(num):
    rng = np.random.default_rng(0)
    return {
        'x0': rng.standard_normal((num, 3)).astype(np.float32),
        'label': (np.arange(num) % CLASSES).astype(np.int32),
    }


def keys_of(num, seed=0):
    return sample_keys(jax.random.key(seed), num)


class Echo:
    """In the objective's place: the 'loss' of an example is the condition that its network call received."""

    def __call__(self, predict, x0, keys, log_variance):
        return predict(x0, jnp.zeros(len(x0)))[:, 0], {}


def echo_task(**changes):
    model = Model(lambda key, x, t, cond: {}, lambda params, x, t, cond, key=None: jnp.zeros_like(x) + cond[:, None])
    return make_task(model=model, objective=Echo(), **changes)


@pytest.mark.parametrize('probability', [0.0, 0.1, 0.5])
def test_labels_are_dropped_as_often_as_asked(probability):
    """A dropped label becomes the null label; the others stay. Within 5 standard deviations of the binomial."""
    num, batch = 4000, make_batch(4000)
    seen = np.asarray(jax.jit(echo_task(label_drop=probability).losses)({}, batch, keys_of(num))[0])
    dropped = seen == CLASSES
    np.testing.assert_array_equal(seen[~dropped], batch['label'][~dropped])
    assert abs(dropped.mean() - probability) <= 5 * np.sqrt(probability * (1 - probability) / num)
    by_class = [dropped[batch['label'] == c].mean() for c in range(CLASSES)]
    assert np.ptp(by_class) <= 10 * np.sqrt(probability * (1 - probability) / (num / CLASSES))


def test_label_drop_is_a_probability():
    for wrong in (-0.1, 1.0, 2.0):
        with pytest.raises(ValueError, match=f'label_drop is a probability below 1, got {wrong}'):
            make_task(label_drop=wrong)


def test_without_classes_the_network_sees_no_condition():
    def apply(params, x, t, cond, key=None):
        assert cond is None
        return jnp.zeros_like(x)

    task = make_task(model=Model(lambda key, x, t, cond: {'cond': cond}, apply), num_classes=0)
    batch = make_batch(4)
    assert task.init(jax.random.key(0), batch) == ({'cond': None}, ())
    assert jax.eval_shape(task.losses, {}, batch, keys_of(4))[0].shape == (4,)


def test_examples_do_not_know_of_each_other():
    """Example i of a batch has the loss that it has alone; equal examples with other keys have other losses."""
    task, batch, keys = make_task(label_drop=0.5), make_batch(8), keys_of(8)
    params, state = task.init(jax.random.key(1), batch)
    assert state == ()
    losses, loss_of = jax.jit(task.losses), jax.jit(lambda params: task.loss(params, (), (), batch, 0, keys))
    whole, extra = losses(params, batch, keys)
    part, _ = losses(params, jax.tree.map(lambda a: a[3:6], batch), keys[3:6])
    np.testing.assert_allclose(part, whole[3:6], rtol=1e-5)
    same = jax.tree.map(lambda a: np.repeat(a[:1], 8, 0), batch)
    assert len(np.unique(losses(params, same, keys)[0])) == 8

    loss, (_, metrics) = loss_of(params)
    np.testing.assert_allclose(loss, whole.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics['mse'], extra['mse'].mean(), rtol=1e-6)
    gradients, (_, logged) = jax.jit(task.gradients)(params, (), (), batch, 0, keys)
    np.testing.assert_allclose(logged['loss'], loss, rtol=1e-6)
    step = 1e-2
    there, back = (jax.tree.map(lambda p, g: p + s * g, params, gradients) for s in (step, -step))  # noqa: B023
    slope = (loss_of(there)[0] - loss_of(back)[0]) / (2 * step)
    np.testing.assert_allclose(slope, sum((g**2).sum() for g in jax.tree.leaves(gradients)), rtol=1e-2)


def test_the_loss_at_a_noise_level_drops_nothing():
    """Velocity on the flow path is eps - x0: the error of a network that says only its label's row is known."""
    task, batch, keys = make_task(label_drop=0.9), make_batch(6), keys_of(6)
    params, _ = task.init(jax.random.key(1), batch)
    params = {**params, 'w': 0 * params['w']}
    eps, losses_at = np.stack([jax.random.normal(key, (3,)) for key in keys]), jax.jit(task.losses_at)
    for t in (0.1, 0.9):
        output = np.asarray(params['rows'])[batch['label']] + 1e-3 * float(
            task.objective.parameterization.time_input(task.objective.schedule, jnp.float32(t))
        )
        error = ((output - (eps - batch['x0'])) ** 2).mean(-1)
        np.testing.assert_allclose(losses_at(params, batch, t, keys), error, rtol=1e-4)


def test_guidance_in_sampling():
    """Scale 1 is no guidance; scale 0 is the baseline: the null label, or the negative one."""
    task = make_task()
    params, _ = task.init(jax.random.key(1), make_batch(2))
    params = jax.tree.map(lambda p: 0.3 * p, params)
    plan = solvers.euler(task.objective.schedule, np.linspace(1, 0, 6), coordinate='t')
    labels, keys = jnp.arange(5), keys_of(5)

    @jax.jit
    def draw(guidance, labels=labels, baseline=None):
        return task.sample(params, (), plan, guidance, labels, keys, (3,), baseline)

    def constant(label):
        return jnp.full(5, label)

    free = draw(None)
    assert free.shape == (5, 3)
    np.testing.assert_allclose(draw(Guidance(1.0)), free, atol=1e-5)
    np.testing.assert_allclose(draw(Guidance(0.0)), draw(None, constant(CLASSES)), atol=1e-5)
    np.testing.assert_allclose(draw(Guidance(0.0), baseline=constant(2)), draw(None, constant(2)), atol=1e-5)
    assert np.abs(draw(Guidance(3.0)) - free).max() > 0.1
    np.testing.assert_allclose(draw(Guidance(3.0, 0.5, 0.4)), free, atol=1e-5)  # an empty interval
    held = task.sample(params, (), plan, Guidance(3.0), labels, keys, (3,), None, Transforms(threshold=0.25))
    assert np.abs(held).max() <= 0.25 + 1e-6 < np.abs(draw(Guidance(3.0))).max()  # of the guided estimate
    # This network is linear in the label's row, so that samples are, too, in the scale.
    np.testing.assert_allclose(draw(Guidance(3.0)), 3 * free - 2 * draw(Guidance(0.0)), atol=1e-4)


def test_likelihood_of_a_perfect_network():
    """Classes of N(label, v) under their exact velocity on Flow; with t_min the density of x_t / alpha there."""
    variance, labels, keys = 0.3, np.array([0, 2, 5]), keys_of(3)

    def velocity(params, x, timestep, label, key=None):
        t, mean = timestep[:, None] / 1000, 1.0 * label[:, None]
        eps = t * (x - (1 - t) * mean) / ((1 - t) ** 2 * variance + t**2)
        x0 = mean + (1 - t) * variance * (x - (1 - t) * mean) / ((1 - t) ** 2 * variance + t**2)
        return eps - x0

    task = make_task(model=Model(lambda key, x, t, cond: {}, velocity))
    x0 = labels[:, None] + np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    for t_min in (0.0, 0.2):
        options = {'trace': Rademacher(), 't_min': t_min, 'tolerance': 1e-6}  # no noise where the Jacobian is diagonal
        result = task.log_likelihood({}, {'x0': jnp.asarray(x0, jnp.float32), 'label': labels}, keys, **options)
        spread = np.sqrt(variance + (t_min / (1 - t_min)) ** 2)
        np.testing.assert_allclose(result.log_density, norm.logpdf(x0, labels[:, None], spread).sum(-1), atol=1e-4)
