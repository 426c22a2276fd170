"""EDM2: the paper's equations in NumPy, published counts, magnitudes that are kept, weights that stay normalised."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.integrate import quad
from scipy.special import expit

from diffjax.core import parameterizations, schedules, times, weights
from diffjax.core.losses import Loss
from diffjax.core.types import Model
from diffjax.data import open_source
from diffjax.nets import EDM2, as_model, count_parameters
from diffjax.nets.edm2 import Block
from diffjax.nets.magnitude import FourierFeatures, Linear, concatenate, mix, normalize, silu
from diffjax.tasks import Denoising
from diffjax.training import optimizers
from diffjax.training.flops import count_flops
from diffjax.training.state import init_state
from diffjax.training.step import make_step

TINY = dict(base_channels=8, channel_multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), head_channels=8)  # noqa: C408
TINY |= {'num_classes': 5, 'out_channels': 3, 'uncertainty_channels': 6}


@functools.cache
def _model(**changes):
    return Model(*map(jax.jit, as_model(EDM2(**(TINY | changes)))))


@pytest.fixture(scope='module')
def batch():
    """Images of magnitude 1, log(sigma) / 4 over its range, two classes and the null label."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 8, 2)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray([-1.2, 0.1, 0.9], jnp.float32), jnp.array([0, 3, 5])


@pytest.fixture(scope='module')
def random_params(batch):
    """Every parameter random, the gains too: nothing at zero, no weight of magnitude 1."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(as_model(EDM2(**TINY)).init, jax.random.key(0), *batch)
    return jax.tree.map(lambda s: jnp.asarray(0.2 + rng.standard_normal(s.shape), jnp.float32), shapes)


# The network again, for one image, in NumPy float64 and in the paper's words.


def unit(x, axes):
    return x / (1e-4 + np.sqrt(np.mean(x**2, axes, keepdims=True)))


def mp_silu(x):
    return x * expit(x) / 0.596


def mp_sum(a, b, t):
    return ((1 - t) * a + t * b) / np.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    scale = np.sqrt((a.shape[-1] + b.shape[-1]) / ((1 - t) ** 2 + t**2))
    return np.concatenate([a * scale * (1 - t) / np.sqrt(a.shape[-1]), b * scale * t / np.sqrt(b.shape[-1])], -1)


def linear(x, layer, gain=1.0):
    w = layer['weight']
    return x @ (gain * unit(w, 0) / np.sqrt(len(w)))


def conv(x, layer, gain=1.0):
    w = layer['weight']
    w = gain * unit(w, (0, 1, 2)) / np.sqrt(w[..., 0].size)
    height, width, _ = x.shape
    padded, out = np.pad(x, ((1, 1), (1, 1), (0, 0))), 0
    for i in range(3):
        for j in range(3):
            out = out + padded[i : i + height, j : j + width] @ w[i, j]
    return out


def fourier(t, layer):
    return np.sqrt(2) * np.cos(2 * np.pi * (layer['frequencies'] * t + layer['phases']))


def cosine_attention(x, p, head_channels=8):
    height, width, channels = x.shape
    qkv = linear(x.reshape(-1, channels), p['qkv']).reshape(height * width, 3, channels // head_channels, head_channels)
    q, k, v = (unit(qkv[:, i], -1) for i in range(3))
    out = np.zeros((height * width, channels // head_channels, head_channels))
    for head in range(out.shape[1]):
        for i in range(len(out)):
            score = np.exp(k[:, head] @ q[i, head] / np.sqrt(head_channels))
            out[i, head] = score @ v[:, head] / score.sum()
    return linear(out.reshape(height, width, channels), p['out'])


def block(x, e, p, side, resample='keep'):
    if resample == 'down':
        x = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
    if resample == 'up':
        x = x.repeat(2, 0).repeat(2, 1)
    if side == 'encoder':
        x = unit(linear(x, p['skip']) if 'skip' in p else x, -1)
    y = conv(mp_silu(x), p['conv_in'])
    y = conv(mp_silu(y * (linear(e, p['modulation'], p['gain']) + 1)), p['conv_out'])
    if side == 'decoder' and 'skip' in p:
        x = linear(x, p['skip'])
    x = mp_sum(x, y, 0.3)
    return mp_sum(x, cosine_attention(x, p), 0.3) if 'qkv' in p else x


def network(p, x, t, label):
    e = linear(fourier(t, p['time_features']), p['time'])
    one_hot = np.eye(5)[label] * np.sqrt(5) if label < 5 else np.zeros(5)
    e = mp_silu(mp_sum(e, linear(one_hot, p['label']), 0.5))
    x = conv(np.concatenate([x, np.ones((8, 8, 1))], -1), p['conv_in'])
    kept = [x]
    for name, resample in (('down_0_0', 'keep'), ('down_1', 'down'), ('down_1_0', 'keep')):
        x = block(x, e, p[name], 'encoder', resample)
        kept.append(x)
    x = block(block(x, e, p['middle_in'], 'decoder'), e, p['middle_out'], 'decoder')
    for name in ('up_1_0', 'up_1_1', 'up_0', 'up_0_0', 'up_0_1'):
        x = x if name == 'up_0' else mp_cat(x, kept.pop(), 0.5)
        x = block(x, e, p[name], 'decoder', 'up' if name == 'up_0' else 'keep')
    assert not kept
    return conv(x, p['conv_out'], p['gain'])


def test_it_equals_the_papers_equations(batch, random_params):
    x, t, labels = (np.asarray(a, np.float64) for a in batch)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), random_params)
    assert [name for name in p if 'qkv' in p[name]] == ['down_1_0', 'middle_in', 'up_1_0', 'up_1_1']
    expected = np.stack([network(p, x[i], t[i], int(labels[i])) for i in range(3)])
    got = _model().apply(random_params, *batch)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    u = [linear(fourier(time, p['uncertainty_features']), p['uncertainty'])[0] for time in t]
    np.testing.assert_allclose(_model().log_variance(random_params, batch[1]), u, atol=2e-5)


PUBLISHED = {'XS': (128, 125, 46), 'S': (192, 280, 102), 'M': (256, 498, 181)}
PUBLISHED |= {'L': (320, 778, 282), 'XL': (384, 1119, 406), 'XXL': (448, 1523, 552)}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes(name):
    """Karras et al. 2024, table 2, at 64x64x4. The paper's Gflops are multiply-adds, and 1 to 2 % more than those of
    the matrix products and convolutions.
    """
    channels, millions, gflops = PUBLISHED[name]
    model = as_model(EDM2(base_channels=channels, num_classes=1000, out_channels=4, compute_dtype='bfloat16'))
    shapes = ((1, 64, 64, 4), jnp.float32), ((1,), jnp.float32), ((1,), jnp.int32)
    inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert round(count_parameters(params) / 1e6) in (millions, millions - 1)  # the paper rounds 777.5 up
    multiply_adds = count_flops(jax.make_jaxpr(model.apply)(params, *inputs)) / 2e9
    assert 0.975 * gflops < multiply_adds < gflops


def test_magnitudes_are_kept_through_the_depth():
    """At the start, over a batch of noise: each of 15 blocks has outputs of magnitude 1, to a quarter, the last like
    the first; the network's are zero, as its gain is. Attention is left out: a mean of values is shorter than they are.
    So are convolutions that reach beyond the border, as many do at 16 x 16; one block without its 0.596 would be half.
    """
    wide = {'base_channels': 32, 'head_channels': 32, 'channel_multipliers': (1, 2, 2), 'attention_balance': 0.0}
    net, seen = EDM2(**TINY | wide), {}

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, Block) and context.method_name == '__call__':
            seen[context.module.name] = jnp.sqrt(jnp.mean(jnp.square(out)))
        return out

    def run(key):
        x, t, labels = jax.random.normal(key, (8, 16, 16, 2)), jnp.linspace(-1.2, 1.0, 8), jnp.arange(8) % 5
        variables = net.init({'params': key}, x, t, labels)
        with nn.intercept_methods(record):
            out = net.apply(variables, x, t, labels)
        return out, dict(seen)

    out, sizes = jax.jit(run)(jax.random.key(3))
    assert np.abs(out).max() == 0
    sizes = {name: round(float(size), 3) for name, size in sizes.items()}
    assert len(sizes) == 15 and all(0.75 < value < 1.1 for value in sizes.values()), sizes


def test_each_layer_keeps_magnitudes():
    a, b = np.random.default_rng(0).standard_normal((2, 4096, 24)).astype(np.float32)
    b = b[:, :8]

    def size(x):
        return np.sqrt(np.mean(np.square(x, dtype=np.float64)))

    for balance in (0.1, 0.3, 0.5):
        np.testing.assert_allclose(size(mix(a[:, :8], b, balance)), 1, atol=0.02)
        joined = np.asarray(concatenate(a, b, balance))
        np.testing.assert_allclose(size(joined), 1, atol=0.02)
        shares = [np.sqrt(np.sum(part**2, dtype=np.float64)) for part in (joined[:, :24], joined[:, 24:])]
        np.testing.assert_allclose(shares[1] / shares[0], balance / (1 - balance), rtol=0.02)
    normal = quad(lambda z: (z / (1 + np.exp(-z))) ** 2 * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), -20, 20)[0]
    np.testing.assert_allclose(math.sqrt(normal), 0.596, atol=5e-4)
    np.testing.assert_allclose(size(silu(jnp.asarray(a))), 1, atol=0.02)
    for size_of_kernel, x in ((1, a), (3, a[:1024].reshape(1, 32, 32, 24))):
        y, _ = Linear(32, kernel_size=size_of_kernel).init_with_output(jax.random.key(0), x)
        np.testing.assert_allclose(size(y), 1, atol=0.05)
    y, _ = FourierFeatures(64).init_with_output(jax.random.key(0), a[:, 0])
    assert y.shape == (4096, 64)
    np.testing.assert_allclose(size(y), 1, atol=0.02)


def test_zero_is_normalised_to_zero():
    """As x / epsilon, which is what the formula is near zero; the root in it has no derivative there."""
    value, slope = jax.value_and_grad(lambda x: jnp.sum(normalize(x, -1)))(jnp.zeros((2, 3)))
    assert value == 0
    np.testing.assert_allclose(slope, 1e4, rtol=1e-6)


def rows(tree):
    """{name: weights as [inputs, outputs]}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])
        for path, leaf in leaves
        if path[-1].key == 'weight'
    }


def outputs_and_gradients(model, params, batch):
    """(output, u) and the gradient of half the sum of their squares."""

    def run(params):
        both, pull = jax.vjp(lambda p: (model.apply(p, *batch), model.log_variance(p, batch[1])), params)
        return both, pull(both)[0]

    return jax.jit(run)(params)


@pytest.fixture(scope='module')
def plain(batch, random_params):
    return outputs_and_gradients(as_model(EDM2(**TINY)), random_params, batch)


def test_gradients_are_orthogonal_to_weights_and_reach_every_parameter(random_params, plain):
    """The output does not know a row's length: a step along the gradient turns it. Frequencies and phases are fixed."""
    slope = plain[1]
    for name, w in rows(random_params).items():
        g = rows(slope)[name]
        cosine = (w * g).sum(0) / np.linalg.norm(w, axis=0) / np.maximum(np.linalg.norm(g, axis=0), 1e-12)
        assert np.abs(cosine).max() < 2e-3, name  # epsilon leaves that much
        assert np.abs(g).max() > 1e-7, name
    for path, g in jax.tree_util.tree_leaves_with_path(slope):
        fixed = path[-1].key in ('frequencies', 'phases')
        assert (np.abs(g).max() == 0) == fixed, path


def test_the_projection_puts_weights_back_and_nothing_else(batch, random_params):
    model = _model()
    projected = model.project(random_params)
    for name, w in rows(projected).items():
        np.testing.assert_allclose(np.sqrt((w**2).mean(0)), 1, rtol=1e-3, err_msg=name)
    kept = [(path, a) for path, a in jax.tree_util.tree_leaves_with_path(projected) if path[-1].key != 'weight']
    before = dict(jax.tree_util.tree_leaves_with_path(random_params))
    assert len(kept) == 10 + 1 + 4 and all((a == before[path]).all() for path, a in kept)
    out = model.apply(random_params, *batch)
    chex.assert_trees_all_close(model.apply(projected, *batch), out, atol=1e-3 * float(jnp.abs(out).max()))


def test_remat_changes_nothing(batch, random_params, plain):
    again = outputs_and_gradients(as_model(EDM2(**TINY, remat='full')), random_params, batch)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again)):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(float(jnp.abs(a).max()), 1e-3))


def test_bfloat16_is_close_to_float32(batch):
    """At the start, with gains of the size that training gives them; parameters are float32 in both."""
    params = _model().init(jax.random.key(2), *batch)
    params = jax.tree_util.tree_map_with_path(lambda path, a: 0.5 + 0 * a if path[-1].key == 'gain' else a, params)
    whole, half = (model.apply(params, *batch) for model in (_model(), _model(compute_dtype='bfloat16')))
    assert half.dtype == jnp.float32
    error = np.linalg.norm(half - whole) / np.linalg.norm(whole)
    assert 1e-4 < error < 2e-2


def test_dropout_acts_with_a_key_alone(batch, random_params):
    apply = _model(dropout=0.5).apply
    still = apply(random_params, *batch)
    chex.assert_trees_all_close(still, _model().apply(random_params, *batch), atol=1e-5)
    one, again, other = (apply(random_params, *batch, jax.random.key(seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, again)
    assert min(np.abs(one - different).max() for different in (still, other)) > 1e-2


def test_the_uncertainty_is_left_out_on_request_and_time_is_scaled(batch, random_params):
    x, t, labels = batch
    shapes = jax.eval_shape(as_model(EDM2(**TINY | {'uncertainty_channels': 0})).init, jax.random.key(0), *batch)
    assert set(random_params) - set(shapes) == {'uncertainty', 'uncertainty_features'}
    assert _model(uncertainty_channels=0).log_variance({}, t) is None
    scaled = _model(time_scale=1e-3)
    for function, given in (('apply', (x, t * 1000, labels)), ('log_variance', (t * 1000,))):
        plain = (x, t, labels) if function == 'apply' else (t,)
        a, b = getattr(scaled, function)(random_params, *given), getattr(_model(), function)(random_params, *plain)
        np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.abs(b).max()))
    assert np.isnan(_model().apply(random_params, x, t, labels + 1)[2]).all()  # a label beyond the null one


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attention': 'flash'}, "attention='flash' is not known"),
        ({'compute_dtype': 'half'}, "compute_dtype='half' is not known"),
        ({'remat': 'some'}, "remat='some' is not known"),
        ({'channel_multipliers': ()}, 'channel_multipliers is empty'),
        ({'concat_balance': 1.5}, r'concat_balance is the share of the second .* in \[0, 1\]; got 1.5'),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        EDM2(**(TINY | changes))


def test_wrong_inputs_are_refused(batch):
    x, t, labels = batch

    def init(x=x, t=t, labels=labels, **changes):
        jax.eval_shape(as_model(EDM2(**(TINY | changes))).init, jax.random.key(0), x, t, labels)

    with pytest.raises(ValueError, match=r'multiples of 2 \(channel_multipliers has 2 levels, 1 halvings\), got 8x7'):
        init(x=x[:, :, :7])
    with pytest.raises(ValueError, match=r'EDM2 takes x of shape \[B, H, W, C\]'):
        init(x=x[0])
    with pytest.raises(ValueError, match='16 channels at 4 pixels, where there is attention, .* head_channels=12'):
        init(head_channels=12)
    with pytest.raises(ValueError, match=r't must be one time for each sample, shape \[B\]; got shape \(\)'):
        init(t=t[0])
    with pytest.raises(ValueError, match='num_classes=5 takes cond = int32 labels .* got None'):
        init(labels=None)
    with pytest.raises(ValueError, match=r'num_classes=0 takes cond = None; got shape \(3,\)'):
        init(num_classes=0)


def test_it_trains_on_the_digits_and_its_weights_stay_normalised():
    """50 steps with the uncertainty and the projection. At the start the network is zero, the zero predictor."""
    source = open_source('digits', 'train')
    images = source.arrays['image'].astype(np.float32) / 127.5 - 1
    small = {'base_channels': 16, 'channel_multipliers': (1,), 'head_channels': 16, 'attention_resolutions': ()}
    network = EDM2(**TINY | small | {'out_channels': 1, 'num_classes': 10})
    objective = Loss(
        schedule=schedules.EDM(),
        parameterization=parameterizations.EDM(),
        times=times.LogNormalSigma(mean=-0.4, std=1.0),
        weight=weights.edm,
    )
    task = Denoising(model=as_model(network), objective=objective, num_classes=10, label_drop=0.1)
    optimizer = optimizers.adam(num_steps=50, learning_rate=0.02, b2=0.99)
    step = jax.jit(make_step(task, optimizer, prepare=lambda raw, key: raw, profiles={'ema': 0.9}))
    batches = np.random.default_rng(0).integers(0, len(images), (50, 24))

    def batch(rows):
        return {'x0': images[rows], 'label': source.arrays['label'][rows]}

    state = init_state(task, optimizer, {'ema': 0.9}, batch(batches[0]), seed=0)
    errors = []
    for rows_of_batch in batches:
        state, metrics = step(state, (), batch(rows_of_batch))
        errors.append({name: float(value) for name, value in metrics.items()})
    zero = errors[0]['mse']
    late = np.mean([entry['mse'] for entry in errors[-10:]])
    assert late < 0.6 * zero, (zero, late)
    assert np.mean([entry['loss'] for entry in errors[-10:]]) < 1 + np.log(zero) - 0.2  # the least that zero can pay
    learned = np.mean([entry['log_variance'] for entry in errors[-10:]])
    misses = [abs(u - np.log(error)) for u, error in ((errors[0]['log_variance'], zero), (learned, late))]
    assert misses[1] < 0.5 < misses[0]  # u is on its way to log(error)
    for name, w in rows(state.params).items():
        np.testing.assert_allclose(np.sqrt((w**2).mean(0)), 1, rtol=1e-3, err_msg=name)
    moved = rows(state.params)["['down_0_0']['conv_in']['weight']"], rows(state.ema['ema'])
    assert np.sqrt((moved[1]["['down_0_0']['conv_in']['weight']"] ** 2).mean(0)).max() < 0.9999  # averages are shorter
