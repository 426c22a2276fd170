"""A task whose loss and gradient are known in closed form, and all that is needed to train it in milliseconds."""

from dataclasses import dataclass

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from diffjax.tasks import Task
from diffjax.training import loop, optimizers
from diffjax.training.loop import Settings, Trainer

IN, OUT = 64, 32  # 2048 weights: enough to be split over fsdp


@dataclass(frozen=True)
class Regression(Task):
    """loss = mean over examples of |x W + b - y|^2 / 2 + noise . b,   noise ~ N(0, I) from the example's key.

    The task state counts the examples seen.
    """

    def init(self, key, batch):
        del batch
        kernel = 0.1 * jax.random.normal(key, (IN, OUT))
        return {'dense': {'kernel': kernel, 'bias': jnp.full(OUT, 0.5)}, 'pos_embed': jnp.ones((IN, OUT))}, jnp.int32(0)

    def loss(self, params, task_state, frozen, batch, step, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (OUT,)))(keys)
        kernel, bias = params['dense']['kernel'], params['dense']['bias']
        error = batch['x'] @ kernel + bias - batch['y']
        losses = 0.5 * (error**2).sum(-1) + noise @ bias + 0 * params['pos_embed'].sum()
        return losses.mean(), (task_state + len(losses), {'noise': noise.mean()})


def closed_form(params, batch, noise):
    """(loss, gradients of kernel and bias) in float64."""
    kernel, bias = (np.asarray(params['dense'][name], np.float64) for name in ('kernel', 'bias'))
    error = batch['x'] @ kernel + bias - batch['y']
    loss = (0.5 * (error**2).sum(-1) + noise @ bias).mean()
    return loss, batch['x'].T @ error / len(error), (error + noise).mean(0)


def draw(index, batch_size):
    """Batch number `index` of a fixed stream."""
    rng = np.random.default_rng([7, index])
    x = rng.standard_normal((batch_size, IN)).astype(np.float32)
    return {'x': x, 'y': (x[:, :OUT] + 0.1 * rng.standard_normal((batch_size, OUT))).astype(np.float32)}


@pytest.fixture(scope='module', autouse=True)
def fast(fast_compilation):
    return fast_compilation


@pytest.fixture
def task():
    return Regression()


@pytest.fixture
def exact():
    return closed_form


@pytest.fixture
def batch():
    return draw(0, 16)


@pytest.fixture
def batch_of():
    """index -> batch number `index` of the stream, counted from 0."""
    return lambda index: draw(index, 16)


@pytest.fixture
def make_mesh():
    """(data, fsdp) -> a mesh over the first devices."""

    def make(data, fsdp):
        return Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp), ('data', 'fsdp'))

    return make


@pytest.fixture
def stream():
    """(change=None) -> a Grain iterator of batches of 16; change(index, batch) may alter or spoil one."""

    def make(change=None):
        def one(index):
            made = draw(index, 16)
            return made if change is None else change(index, made)

        return iter(grain.MapDataset.range(1000).map(one).to_iter_dataset(grain.ReadOptions(1, 1)))

    return make


@pytest.fixture
def trainer(task, make_mesh):
    """(num_steps, mesh=(1, 1), task=..., optimizer=..., **settings) -> a Trainer of the regression."""

    def make(num_steps, *, mesh=(1, 1), task=task, optimizer=None, **settings):
        defaults = {'log_every_steps': 5, 'checkpoint_every_steps': 4, 'ema': {'slow': 0.99, 'fast': 0.5}}
        return Trainer(
            task=task,
            optimizer=optimizer or optimizers.adamw(num_steps=1000, learning_rate=1e-2, weight_decay=0.1),
            settings=Settings(num_steps=num_steps, batch_size=16, **{**defaults, **settings}),
            prepare=lambda raw, key: raw,
            mesh=make_mesh(*mesh),
            seed=3,
        )

    return make


@pytest.fixture
def before_step(monkeypatch):
    """(n, action): calls the action when the loop hands over the batch of its n-th step."""

    def install(n, action):
        calls, original = [], loop.to_global

        def to_global(batch, sharding):
            calls.append(None)
            if len(calls) == n + 1:  # the first call only asks for shapes
                action()
            return original(batch, sharding)

        monkeypatch.setattr(loop, 'to_global', to_global)

    return install


@pytest.fixture
def bits():
    """The bytes of every leaf, by its path."""

    def read(tree):
        def of(leaf):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            return np.asarray(leaf).tobytes()

        return {jax.tree_util.keystr(path): of(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    return read
