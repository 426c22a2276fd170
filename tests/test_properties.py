"""What holds for any shape and any setting: it works and keeps its laws, or it is refused in one line.

Settings are drawn from the annotations of whatever a config can name, right ones and wrong ones; nothing is compiled.
"""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from diffjax import nets
from diffjax.build import build, make_plan
from diffjax.components import component
from diffjax.core import grids, parameterizations, schedules, solvers, times, weights
from diffjax.nets.dit import patchify, unpatchify
from diffjax.training.sharding import MIN_SHARDED_SIZE, state_shardings

LAWS = {'deadline': None, 'derandomize': True, 'database': None}
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
WRONG = st.sampled_from([-1, -0.5, 0, 1.5, math.nan, math.inf, 'x', None, True, [1]])
RIGHT = {
    int: st.integers(1, 12),
    float: st.floats(0.05, 5.0),
    bool: st.booleans(),
}


def refusal(call):
    """(what it gives, None), or (None, the ValueError): which is one line that says something."""
    try:
        return call(), None
    except ValueError as error:
        text = str(error)
        assert text and '\n' not in text and len(text) < 2000
        return None, error


@st.composite
def components(draw, module, *given_ones, wrong=0.15):
    """An entry of a module with some of its options: right by their type, and now and then wrong."""
    name = draw(st.sampled_from(module.__all__))
    spec = {'name': name}
    for key, parameter in inspect.signature(getattr(module, name)).parameters.items():
        required = parameter.default is parameter.empty
        if key in (*given_ones, 'parent', 'name') or (not required and draw(st.booleans())):
            continue
        kind = parameter.annotation
        if key == 'base':  # of a shifted schedule
            spec[key] = draw(st.sampled_from(['flow', 'cosine', 'vp']))
        elif draw(st.floats(0, 1)) < wrong:
            spec[key] = draw(WRONG)
        elif kind in RIGHT:
            spec[key] = draw(RIGHT[kind])
    return spec


# Schedules, grids, plans ----------------------------------------------------------------------------------------------


@settings(max_examples=150, **LAWS)
@given(components(schedules), st.lists(st.floats(0.001, 0.999), min_size=2, max_size=6, unique=True))
def test_any_schedule_keeps_its_identities(spec, t):
    schedule, error = refusal(lambda: component(schedules, spec, 'schedule')())
    assume(error is None)
    t = np.sort(np.array(t))
    assume(np.diff(t).min() > 1e-3)
    alpha, sigma, logsnr = schedule.alpha(t), schedule.sigma(t), schedule.logsnr(t)
    assert np.isfinite([alpha, sigma]).all() and (np.diff(sigma / np.maximum(alpha, 1e-12)) >= 0).all()
    if schedule.power:
        np.testing.assert_allclose(alpha**schedule.power + sigma**schedule.power, 1, rtol=1e-9)
    else:
        np.testing.assert_allclose(alpha, 1)
    inside = np.abs(logsnr) < 15
    np.testing.assert_allclose(logsnr[inside], 2 * np.log(alpha[inside] / sigma[inside]), rtol=1e-6, atol=1e-6)
    back = schedule.logsnr(schedule.t_of_logsnr(logsnr[inside]))
    np.testing.assert_allclose(back, logsnr[inside], rtol=1e-5, atol=1e-5)


@settings(max_examples=120, **LAWS)
@given(components(schedules, wrong=0.0), components(grids, 'schedule', 'num_steps'), st.integers(1, 12))
def test_any_grid_falls(schedule, spec, num_steps):
    schedule, error = refusal(lambda: component(schedules, schedule, 'schedule')())
    assume(error is None)
    make = component(grids, spec, 'grid', 'schedule', 'num_steps') if spec['name'] != 'times' else None
    assume(make is not None)  # which are given, not made
    t, error = refusal(lambda: make(schedule, num_steps))
    assume(error is None)
    assert t.shape == (num_steps + 1,) and t.dtype == np.float64
    assert (np.diff(t) < 0).all() and 0 <= t[-1] < t[0] <= 1


@settings(max_examples=120, **LAWS)
@given(
    components(schedules, wrong=0.0),
    components(solvers, 'schedule', 'grid'),
    st.sampled_from(['uniform', 'karras:end=lowest', 'trailing', 'logsnr', 'beta']),
    st.integers(1, 8),
)
def test_any_solver_writes_a_finite_plan(schedule, solver, grid, num_steps):
    schedule, error = refusal(lambda: component(schedules, schedule, 'schedule')())
    assume(error is None)
    plan, error = refusal(lambda: make_plan(schedule, solver, grid, num_steps))
    assume(error is None)
    rows = len(plan.t)
    assert plan.remember.shape == (rows, 2) and plan.to_x.shape == plan.to_anchor.shape and len(plan.to_x) == rows
    assert all(np.isfinite(np.asarray(table, np.float64)).all() for table in plan)
    assert ((plan.t >= 0) & (plan.t <= 1)).all() and plan.live.any()


@settings(max_examples=40, **LAWS)
@given(components(times), components(weights, 'level'), components(parameterizations), st.floats(0.0, 0.999))
def test_any_objective_is_built_or_refused(distribution, weight, target, u):
    drawn, error = refusal(lambda: component(times, distribution, 'times')())
    refusal(lambda: component(parameterizations, target, 'target')())
    level = weights.Level(*(jnp.zeros(2) for _ in range(3)))
    value, _ = refusal(lambda: component(weights, weight, 'weight', 'level')(level))
    assert value is None or (value.shape == (2,) and bool(jnp.isfinite(value).all()))
    if error is None:
        t = drawn.sample(schedules.Cosine(), jnp.float32(u))
        assert 0 <= t <= 1


# Networks -------------------------------------------------------------------------------------------------------------

NETWORKS = ('DiT', 'UViT', 'EDM2', 'UNet')  # of images and labels
SMALL = {  # most of what is drawn is a network, and a small one
    'patch_size': st.sampled_from([1, 2, 4]),
    'hidden_size': st.sampled_from([8, 12, 16]),
    'num_heads': st.sampled_from([1, 2, 3]),
    'depth': st.sampled_from([1, 2, 3]),
    'base_channels': st.sampled_from([4, 8]),
    'num_blocks': st.sampled_from([1, 2]),
    'channel_multipliers': st.sampled_from([(1,), (1, 2)]),
    'attention_resolutions': st.sampled_from([(), (4,), (8, 4)]),
    'mlp_ratio': st.sampled_from([1.0, 4.0]),
    'num_registers': st.sampled_from([0, 3]),
    'positions': st.sampled_from(['sincos', 'rope', 'both', 'x']),
    'qk_norm': st.sampled_from(['none', 'rms']),
    'norm': st.sampled_from(['layer', 'rms']),
    'scan_layers': st.sampled_from([True, False, 'auto']),
}


@st.composite
def networks(draw):
    name = draw(st.sampled_from(NETWORKS))
    spec = {'name': name}
    for key, parameter in inspect.signature(getattr(nets, name)).parameters.items():
        if key in SMALL and (parameter.default is parameter.empty or draw(st.booleans())):
            spec[key] = draw(WRONG) if draw(st.floats(0, 1)) < 0.04 else draw(SMALL[key])
    return spec


@settings(max_examples=40, **LAWS)
@given(
    networks(),
    st.tuples(st.sampled_from([1, 3]), st.sampled_from([4, 6, 8]), st.sampled_from([4, 8]), st.sampled_from([1, 3])),
    st.sampled_from([0, 5]),
)
def test_any_network_gives_its_input_s_shape(spec, shape, num_classes):
    """Traced, never computed."""

    def trace():
        make = component(nets, spec, 'network', num_classes=num_classes, out_channels=2 * shape[-1])
        model = nets.as_model(make())
        x, t, cond = (
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape[:1], jnp.float32),
            jax.ShapeDtypeStruct(shape[:1], jnp.int32) if num_classes else None,
        )
        params = jax.eval_shape(model.init, jax.random.key(0), x, t, cond)
        return jax.eval_shape(model.apply, params, x, t, cond)

    out, error = refusal(trace)
    assert error is not None or (out.shape == (*shape[:-1], 2 * shape[-1]) and out.dtype == jnp.float32)


@settings(max_examples=60, **LAWS)
@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2))
def test_patches_are_cut_and_laid_back(p, rows, columns, channels, batch):
    x = np.random.default_rng(0).standard_normal((batch, rows * p, columns * p, channels)).astype(np.float32)
    tokens = np.asarray(patchify(x, p))
    assert tokens.shape == (batch, rows * columns, p * p * channels)
    for row in range(rows):
        for column in range(columns):
            block = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            np.testing.assert_array_equal(tokens[:, row * columns + column], block.reshape(batch, -1))
    np.testing.assert_array_equal(unpatchify(tokens, p, rows * p, columns * p), x)


@settings(max_examples=80, **LAWS)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.lists(st.sampled_from([1, 2, 3, 5, 8, 12, 64, 100, 256]), min_size=0, max_size=4),
    st.sampled_from(['kernel', 'blocks', 'blocks_3']),
)
def test_shards_are_even_and_of_one_axis(size, shape, name):
    """The bytes of a device are those of the array over the axis, or all of them where nothing divides or is small."""
    mesh = Mesh(np.array(jax.devices()[:size]).reshape(1, size), ('data', 'fsdp'))
    leaf = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    sharding = state_shardings(mesh, {name: {'x': leaf}})[name]['x']
    part = sharding.shard_shape(tuple(shape))
    cut = [i for i in range(len(shape)) if part[i] != shape[i]]
    assert len(cut) <= 1 and all(part[i] * size == shape[i] for i in cut)
    assert not (cut == [0] and name == 'blocks')  # is scanned over
    free = [length for i, length in enumerate(shape) if length % size == 0 and (i or name != 'blocks')]
    if size > 1 and free and math.prod(shape) >= MIN_SHARDED_SIZE and max(free) > 1:
        assert [shape[i] for i in cut] == [max(free)]
    else:
        assert not cut


# Whole configs --------------------------------------------------------------------------------------------------------

KEYS = (
    *('seed', 'schedule', 'target', 'times', 'weight', 'label_drop', 'network.depth', 'network.hidden_size'),
    *('network.num_heads', 'network.patch_size', 'network.remat', 'optimizer.learning_rate', 'optimizer.warmup_steps'),
    *('training.num_steps', 'training.batch_size', 'training.num_microbatches', 'training.ema', 'mesh.data'),
    *('mesh.fsdp', 'sampler.solver', 'sampler.grid', 'sampler.num_steps', 'sampler.guidance', 'sampler.params'),
    *('evaluation.num_samples', 'evaluation.features', 'dataset.split', 'dataset.test_split', 'dataset.resolution'),
)
ANYTHING = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([0.5, math.nan, math.inf, 2**40, '', 'x', 'é\n', None, True, [], [1], {}, {'name': 'x'}, 'flow']),
    st.sampled_from(['cosine', 'vp', 'eps', 'v', 'x0', 'velocity', 'uniform', 'min_snr', 'ddim', 'heun', 'karras']),
    st.sampled_from(['train[:50%]', 'train[50:', 'test', 'raw', 'ema', 'pixels', 'full']),
)


@pytest.fixture(scope='module')
def smallest(get_config):
    return get_config('digits', 'smoke').to_dict()


@settings(max_examples=60, suppress_health_check=QUIET, **LAWS)
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, min_size=1, max_size=3))
def test_any_config_is_built_or_refused(smallest, changed, changes):
    config = smallest
    for key, value in changes.items():
        section, _, name = key.rpartition('.')
        node = config[section] if section else config
        config = {**config, section: {**node, name: value}} if section else {**config, name: value}
    experiment, error = refusal(lambda: build(config))
    assert error is not None or experiment.plan().t.size > 0
