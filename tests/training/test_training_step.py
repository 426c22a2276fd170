"""The step against closed forms: gradients, accumulation, averages, noise, donation, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core import parameterizations, schedules, times, weights
from diffjax.core.losses import Loss
from diffjax.nets import DiT, as_model
from diffjax.tasks import Denoising, Task
from diffjax.training import optimizers
from diffjax.training.sharding import batch_sharding
from diffjax.training.state import init_state, update_ema
from diffjax.training.step import make_step

DECAYS = {'long': 0.9999, 'middle': 0.9, 'short': 0.5}


def unchanged(raw, key):
    del key
    return raw


def example_noise(state, num_examples, width):
    """The noise that each example must draw: from the run's key, the step and its own index, nothing else."""
    _, task_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    return np.stack([jax.random.normal(jax.random.fold_in(task_key, i), (width,)) for i in range(num_examples)])


@pytest.mark.parametrize('num_microbatches', [1, 2, 4])
def test_one_step_is_the_closed_form_gradient(task, batch, exact, num_microbatches):
    optimizer = optimizers.sgd(num_steps=10, learning_rate=1.0, momentum=0.0)
    state = init_state(task, optimizer, DECAYS, batch, seed=1)._replace(step=jnp.int32(5))
    step = make_step(task, optimizer, prepare=unchanged, profiles=DECAYS, num_microbatches=num_microbatches)
    new, metrics = jax.jit(step)(state, (), batch)

    noise = example_noise(state, 16, 32)
    loss, kernel, bias = exact(state.params, batch, noise)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics['noise'], noise.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics['grad_norm'], np.sqrt((kernel**2).sum() + (bias**2).sum()), rtol=1e-5)
    old = jax.tree.map(np.asarray, state.params['dense'])
    np.testing.assert_allclose(new.params['dense']['kernel'], old['kernel'] - kernel, atol=1e-5)
    np.testing.assert_allclose(new.params['dense']['bias'], old['bias'] - bias, atol=1e-5)
    norm = np.sqrt(sum((np.asarray(p, np.float64) ** 2).sum() for p in jax.tree.leaves(new.params)))
    np.testing.assert_allclose(metrics['param_norm'], norm, rtol=1e-6)
    assert int(new.step) == 6 and int(new.task_state) == 16  # the task state passes through every microbatch
    assert (jax.random.key_data(new.key) == jax.random.key_data(state.key)).all()


def test_ema_is_the_weighted_mean_of_the_history(task, batch):
    optimizer = optimizers.sgd(num_steps=100, learning_rate=0.05)
    state = init_state(task, optimizer, DECAYS, batch, seed=1)
    step = jax.jit(make_step(task, optimizer, prepare=unchanged, profiles=DECAYS))
    history = []
    for n in range(1, 13):
        state, _ = step(state, (), batch)
        history.append(np.asarray(state.params['dense']['kernel'], np.float64))
        for name, decay in DECAYS.items():
            weight = decay ** np.arange(n - 1, -1, -1, dtype=np.float64)
            mean = np.tensordot(weight / weight.sum(), np.stack(history), 1)
            np.testing.assert_allclose(state.ema[name]['dense']['kernel'], mean, rtol=0, atol=2e-6)
    assert np.abs(history[0] - history[-1]).max() > 0.1  # the parameters did move


@pytest.mark.parametrize('decay', [0.5, 0.9, 0.999, 0.9999, 0.999999])
@pytest.mark.parametrize('n', [1, 2, 10, 1000, 10**6, 2 * 10**9])
def test_ema_weight_of_the_newest_parameters(decay, n):
    """(1 - d) / (1 - d^n) in float64, also where d is so close to 1 that float32 cannot tell it from its neighbours."""
    share = update_ema(jnp.zeros(()), jnp.ones(()), decay, jnp.int32(n))
    np.testing.assert_allclose(share, np.expm1(np.log(decay)) / np.expm1(n * np.log(decay)), rtol=1e-6)
    if n == 1:
        assert share == 1


def test_clipping_scales_the_update_to_the_norm(task, batch):
    """sgd at rate 1 without momentum: the update is the clipped gradient. The norm is logged before clipping."""
    norms = {}
    for clip in (None, 0.25, 1e6):
        optimizer = optimizers.sgd(num_steps=10, learning_rate=1.0, momentum=0.0, clip_norm=clip)
        state = init_state(task, optimizer, {}, batch, seed=1)
        new, metrics = jax.jit(make_step(task, optimizer, prepare=unchanged, profiles={}))(state, (), batch)
        update = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), new.params, state.params)
        norms[clip] = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(update)))
        np.testing.assert_allclose(metrics['grad_norm'], norms[None], rtol=1e-4)
    assert norms[None] > 1
    np.testing.assert_allclose(norms[0.25], 0.25, rtol=1e-4)
    np.testing.assert_allclose(norms[1e6], norms[None], rtol=1e-4)


def test_the_old_state_is_donated(trainer, batch):
    run = trainer(9)
    make, _, shardings = run.init(batch)
    state = make()
    new, _ = run.step(shardings)(state, (), jax.device_put(batch, batch_sharding(run.mesh)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


class Recorder(Task):
    """Keeps the noise of the last batch as its task state."""

    def init(self, key, batch):
        return {'w': jnp.ones(())}, jnp.zeros((16, 4))

    def loss(self, params, task_state, frozen, batch, step, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        return params['w'] * noise.mean(), (noise + 0 * batch['x'][:, :4], {})


@pytest.mark.parametrize('shape', [(8, 1), (4, 2)])
def test_devices_draw_different_noise(trainer, batch, shape):
    run = trainer(9, mesh=shape, task=Recorder(), optimizer=optax.sgd(0.1))
    make, shapes, shardings = run.init(batch)
    split = shardings._replace(task_state=batch_sharding(run.mesh))  # each device keeps what it drew
    start, drawn = make(), []
    expected = example_noise(start, 16, 4)
    state, _ = run.step(split)(jax.device_put(start, split), (), batch)
    for shard in state.task_state.addressable_shards:
        assert shard.data.shape == (2, 4)
        drawn.append(np.asarray(shard.data))
        np.testing.assert_allclose(shard.data, expected[shard.index], rtol=1e-6)
    assert len(np.unique(np.concatenate(drawn).round(5), axis=0)) == 16
    later, _ = run.step(split)(state, (), batch)
    assert np.abs(np.asarray(later.task_state) - expected).min() > 0  # and other noise in the next step


def test_low_precision_keeps_float32_state():
    """Nothing is run: types alone. The large products are bfloat16; whatever a checkpoint holds is float32."""
    objective = Loss(
        schedule=schedules.Flow(),
        parameterization=parameterizations.Velocity(),
        times=times.Uniform(),
        weight=weights.target,
    )
    network = DiT(
        patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=3, out_channels=1, compute_dtype='bfloat16'
    )
    task = Denoising(model=as_model(network), objective=objective, num_classes=3, label_drop=0.1)
    batch = {'x0': jnp.zeros((8, 8, 8, 1)), 'label': jnp.zeros(8, jnp.int32)}
    optimizer = optimizers.adamw(num_steps=10)
    state = jax.eval_shape(lambda: init_state(task, optimizer, DECAYS, batch, seed=1))
    step = make_step(task, optimizer, prepare=unchanged, profiles=DECAYS, num_microbatches=2)
    jaxpr, (new, metrics) = jax.make_jaxpr(step, return_shape=True)(state, (), batch)
    for tree in (state, new, metrics):
        floats = [leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert floats and set(floats) == {jnp.dtype('float32')}
    assert jax.tree.structure(state) == jax.tree.structure(new)
    assert 'bf16[' in str(jaxpr)
