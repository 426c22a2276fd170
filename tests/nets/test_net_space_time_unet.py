"""The space-time U-Net: equality with the image network, its modules in NumPy, which frames see which, its cost."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moving_patterns import learn

from diffjax import nets
from diffjax.components import component
from diffjax.core.types import Model
from diffjax.nets import SpaceTimeUNet, UNet, as_model, count_parameters, inflate, stylised
from diffjax.nets.space_time_unet import TemporalAttention, TemporalBlock, TemporalConv
from diffjax.nets.unet_blocks import Style
from diffjax.training.flops import count_flops

IMAGE = {'base_channels': 8, 'channel_multipliers': (1, 2), 'num_res_blocks': 1, 'attention_resolutions': (2,)}
IMAGE |= {'num_heads': 2, 'num_classes': 5, 'out_channels': 3}
TINY = IMAGE | {'temporal_downsampling': (1,), 'frame_rate_frequencies': 8}
STYLE = Style('float32', 'xla', 0.0, 0, 1e-5, 'scale_shift', 'linear')
SHAPE = (2, 4, 4, 4, 2)


@pytest.fixture
def batch(image_batch):
    return image_batch(SHAPE)


@functools.cache
def _model(**changes):
    return Model(*map(jax.jit, as_model(SpaceTimeUNet(**(TINY | changes)))))


@functools.cache
def _image_model(**changes):
    return Model(*map(jax.jit, as_model(UNet(**(IMAGE | changes)))))


def _shapes(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(len(x)), jnp.zeros(len(x), jnp.int32))


@pytest.fixture
def start(perturb):
    """shapes -> what a network starts as, without compiling: `random` random, norms around one, nothing at zero; else
    kernels that start at zero are zero, and the others random too.
    """

    def start(shapes, *, random):
        def value(path, leaf):
            name = jax.tree_util.keystr(path)
            return jnp.full(leaf.shape, float("'scale'" in name))

        params = perturb(jax.tree_util.tree_map_with_path(value, shapes))
        if random:
            return params

        def gated(path, leaf):
            name = jax.tree_util.keystr(path)
            ends = (
                "['conv']" in name,
                'temporal_attention' in name and "['out']" in name,
                "'frame_rate']['out']" in name,
            )
            return jnp.zeros_like(leaf) if any(ends) else leaf

        return jax.tree_util.tree_map_with_path(gated, params)

    return start


def _each_frame(image, params, x, t, labels):
    """The image network on every frame, as one batch of images."""
    frames = x.shape[1]
    out = image.apply(params, x.reshape(-1, *x.shape[2:]), jnp.repeat(t, frames), jnp.repeat(labels, frames))
    return out.reshape(*x.shape[:2], *out.shape[1:])


# Equality with the image network --------------------------------------------------------------------------------------


DEEP = {'channel_multipliers': (1, 1, 2), 'attention_resolutions': (), 'attention_levels': (1,), 'resampling': 'resnet'}


@pytest.mark.parametrize(
    ('image_changes', 'changes'),
    [
        ({}, {'phases': 'all'}),
        ({}, {'temporal_downsampling': ()}),
        (DEEP, DEEP | {'phases': 'all', 'temporal_downsampling': (1, 2), 'temporal_attention': 2}),
    ],
)
def test_inflated_it_is_the_image_network_frame_by_frame(image_changes, changes, batch, start):
    x, t, labels = batch
    image, clip = _image_model(**image_changes), _model(**changes)
    params = start(_shapes(image, x[:, 0]), random=True)
    inflated = inflate(params, start(_shapes(clip, x), random=False))
    expected = _each_frame(image, params, x, t, labels)
    got = clip.apply(inflated, x, t, labels)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_on_fewer_frames_it_is_the_image_network_at_those_and_in_groups_of_equal_frames(batch, start):
    """Two levels of half the frames: every fourth frame of any clip, and any frame where fours are equal."""
    x, t, labels = batch
    x = jnp.concatenate([x, x[::-1]], axis=1)
    image, clip = _image_model(**DEEP), _model(**DEEP, temporal_downsampling=(1, 2))
    params = start(_shapes(image, x[:, 0]), random=True)
    inflated = inflate(params, start(_shapes(clip, x), random=False))
    expected, got = _each_frame(image, params, x, t, labels), clip.apply(inflated, x, t, labels)
    np.testing.assert_allclose(got[:, ::4], expected[:, ::4], atol=1e-5)
    assert np.abs(got - expected)[:, [1, 2, 3]].max(axis=(0, 2, 3, 4)).min() > 0.1
    grouped = clip.apply(inflated, jnp.repeat(x[:, ::4], 4, axis=1), t, labels)
    np.testing.assert_allclose(grouped, jnp.repeat(expected[:, ::4], 4, axis=1), atol=1e-5)


def test_an_image_is_seen_by_the_image_network_alone(batch, start):
    """A clip of one frame, whatever the modules over time have learned; and parameters are those of clips anyway."""
    x, t, labels = batch
    image, clip = _image_model(), _model()
    params = start(_shapes(clip, x), random=True)
    chex.assert_trees_all_equal_shapes(params, _shapes(clip, x[:, :1]))
    spatial = {name: params[name] for name in _shapes(image, x[:, 0])}
    got = clip.apply(params, x[:, :1], t, labels)
    np.testing.assert_allclose(got[:, 0], image.apply(spatial, x[:, 0], t, labels), atol=1e-5)


def test_it_starts_as_zero_with_every_module_over_time_silent(batch):
    model, shapes = _model(), _shapes(_model(), batch[0])
    params = model.init(jax.random.key(0), *batch)
    chex.assert_trees_all_equal_shapes(params, shapes)
    ends = [name for name in params if name.endswith('_temporal')]
    assert len(ends) == 8 and {'down_1_time', 'up_1_time', 'middle_temporal_attention_0'} < params.keys()
    for name in ends:
        chex.assert_trees_all_equal(
            params[name]['time']['conv'], jax.tree.map(jnp.zeros_like, params[name]['time']['conv'])
        )
    assert not params['down_1_time']['conv']['kernel'].any() and not params['up_1_time']['conv']['kernel'].any()
    assert not params['middle_temporal_attention_0']['attention']['out']['kernel'].any()
    assert not params['frame_rate']['out']['kernel'].any()


# Modules over time, by hand -------------------------------------------------------------------------------------------


def _norm(h, layer, groups):
    """Of one frame [H, W, C]."""
    h = h.reshape(*h.shape[:2], groups, -1)
    h = (h - h.mean((0, 1, 3), keepdims=True)) / np.sqrt(h.var((0, 1, 3), keepdims=True) + 1e-5)
    return h.reshape(*h.shape[:2], -1) * layer['scale'] + layer['bias']


def _float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.mark.parametrize(('kernel_size', 'stride'), [(3, 1), (3, 2), (5, 2), (1, 1)])
def test_a_convolution_over_time_is_a_sum_over_frames(perturb, kernel_size, stride):
    x = np.random.default_rng(0).standard_normal((2, 6, 2, 3, 4))
    layer, folded = TemporalConv(kernel_size, 6, 'float32', stride), jnp.asarray(x.reshape(12, 2, 3, 4), jnp.float32)
    params = perturb(layer.init(jax.random.key(0), folded)['params'])
    kernel, bias = (np.asarray(params['conv'][name], np.float64) for name in ('kernel', 'bias'))
    expected = np.zeros((2, 6 // stride, 2, 3, 4)) + bias
    for k in range(6 // stride):
        for j in range(kernel_size):
            if 0 <= (frame := k * stride + j - kernel_size // 2) < 6:
                expected[:, k] += x[:, frame] @ kernel[j, 0]
    got = layer.apply({'params': params}, folded)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=1e-5)


def test_a_temporal_block_normalises_each_frame(perturb):
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 3, 8)) * np.array([1.0, 5.0, 0.1])[:, None, None, None]
    block, folded = TemporalBlock(3, 3, STYLE), jnp.asarray(x[0], jnp.float32)
    params = perturb(block.init(jax.random.key(0), folded)['params'])
    p = _float64(params)
    h = np.stack([_norm(frame, p['norm'], 2) for frame in x[0]])
    h = np.pad(h / (1 + np.exp(-h)), ((1, 1), (0, 0), (0, 0), (0, 0)))
    expected = (
        x[0] + sum(h[j : j + 3] @ p['time']['conv']['kernel'][j, 0] for j in range(3)) + p['time']['conv']['bias']
    )
    np.testing.assert_allclose(block.apply({'params': params}, folded), expected, atol=1e-4)


def test_temporal_attention_is_among_the_frames_of_a_pixel_with_rotary_positions(perturb):
    """In float64, heads as complex numbers turned by frame times frequency; two clips of three frames."""
    x = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 8))
    block, folded = TemporalAttention(2, 3, STYLE), jnp.asarray(x.reshape(6, 2, 2, 8), jnp.float32)
    params = perturb(block.init(jax.random.key(0), folded)['params'], 0.5)
    p, expected = _float64(params), x.copy()
    frequencies = 10_000.0 ** (-np.arange(2) / 2)
    turn = np.exp(1j * np.arange(3)[:, None] * frequencies)
    for b in range(2):
        h = np.stack([_norm(frame, p['norm'], 2) for frame in x[b]])
        qkv = h @ p['attention']['qkv']['kernel'] + p['attention']['qkv']['bias']
        for i, j in np.ndindex(2, 2):
            q, k, v = qkv[:, i, j].reshape(3, 3, 2, 4).swapaxes(0, 1)  # [frame, head, feature] each
            q, k = ((a[..., ::2] + 1j * a[..., 1::2]) * turn[:, None] for a in (q, k))
            logits = np.einsum('thc,shc->hts', q, k.conj()).real / 2
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            out = np.einsum('hts,shd->thd', weights, v).reshape(3, 8)
            expected[b, :, i, j] += out @ p['attention']['out']['kernel'] + p['attention']['out']['bias']
    np.testing.assert_allclose(block.apply({'params': params}, folded).reshape(x.shape), expected, atol=1e-4)


# The whole network ----------------------------------------------------------------------------------------------------


def test_frames_are_seen_as_far_as_the_kernels_reach(batch, start):
    """One level has five blocks from end to end, so with kernels of three a frame reaches five frames, and no more."""
    x, t, labels = batch
    x = jnp.concatenate([x, x[::-1]], axis=1)
    one_level = {'channel_multipliers': (1,), 'temporal_downsampling': (), 'temporal_attention': 0}
    model = _model(**one_level)
    params = start(_shapes(model, x), random=True)
    change = model.apply(params, x.at[:, 0].add(1), t, labels) - model.apply(params, x, t, labels)
    change = np.abs(change).max(axis=(0, 2, 3, 4))
    assert np.all(change[:6] > 1e-5) and np.all(change[6:] == 0)


def test_one_phase_is_the_first_of_all(batch, start):
    """With kernels of one frame, phases meet in no convolution: what 'one' makes of the first phase, 'all' makes too.

    Attention does look along the frames, of one phase in both.
    """
    x, t, labels = batch
    one, every = _model(temporal_kernel=1), _model(temporal_kernel=1, phases='all')
    params = start(_shapes(one, x), random=True)
    chex.assert_trees_all_equal_shapes(params, _shapes(every, x))
    a, b = one.apply(params, x, t, labels), every.apply(params, x, t, labels)
    np.testing.assert_allclose(a[:, ::2], b[:, ::2], atol=1e-4)
    assert np.abs(a - b)[:, 1::2].max() > 0.1
    # and the second phase is the first of the clip without its first frame, up to where the clip ends
    later = one.apply(params, jnp.concatenate([x[:, 1:], x[:, -1:]], axis=1), t, labels)
    np.testing.assert_allclose(later[:, ::2], b[:, 1::2], atol=1e-4)


def test_every_input_matters_and_clips_are_independent(batch, start):
    x, t, labels = batch
    model, rate = _model(), jnp.array([8.0, 24.0])
    params = start(_shapes(model, x), random=True)

    def run(x, t, labels, rate):
        return model.apply(params, x, t, {'label': labels, 'frame_rate': rate})

    out = run(x, t, labels, rate)
    chex.assert_trees_all_close(run(x[::-1], t[::-1], labels[::-1], rate[::-1]), out[::-1], atol=1e-4)
    for other in ((x[:, ::-1], t, labels, rate), (x, t[::-1], labels, rate), (x, t, labels[::-1], rate)):
        assert np.abs(run(*other) - out).max(axis=(1, 2, 3, 4)).min() > 1e-2
    assert np.abs(run(x, t, labels, rate[::-1]) - out).max(axis=(1, 2, 3, 4)).min() > 1e-2
    # without a rate it is a network that knows none
    plain = _model(frame_rate_frequencies=0)
    rest = {name: value for name, value in params.items() if name != 'frame_rate'}
    chex.assert_trees_all_close(model.apply(params, x, t, labels), plain.apply(rest, x, t, labels), atol=1e-5)


def test_gates_at_zero_hide_gradients_for_one_step_alone(batch, start):
    """Of an inflated network exactly what stands before a gate has none; after one step of descent all have one."""
    x, t, labels = batch
    model = _model()
    params, cond = start(_shapes(model, x), random=False), {'label': labels, 'frame_rate': jnp.array([8.0, 24.0])}
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(model.apply(params, x, t, cond) ** 2)))

    def sizes(params):
        leaves = jax.tree_util.tree_leaves_with_path(gradient(params))
        return {jax.tree_util.keystr(path): float(np.abs(leaf).max()) for path, leaf in leaves}

    def gated(name):
        before = "['norm']" in name and 'temporal' in name, 'temporal_attention' in name and "['qkv']" in name
        return any(before) or "['frame_rate']['in']" in name

    first = sizes(params)
    assert {name for name, size in first.items() if size == 0} == set(filter(gated, first))
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient(params))
    second = sizes(stepped)
    assert min(second.values()) > 1e-9, min(second, key=second.get)


def _macs_by_hand(base, multipliers, blocks, attention, frames, size, channels, out_channels, halved, phases):
    """Multiply-adds of a clip, layer by layer: pixels and frames of a level, times products at each.

    As `frames` falls, so does the cost of all that stands between the two resamplings.
    """
    d, kernel, widths = 4 * base, 3, [base * m for m in multipliers]

    def of(level):  # pixels and frames
        seen = sum(other <= level for other in halved) if phases == 'one' else 0
        return (size >> level) ** 2, frames >> seen

    def clip(level):  # frames of a clip there: in 'all' there are more clips
        return frames >> sum(other <= level for other in halved)

    def block(a, b, level):
        n, f = of(level)
        cost = f * (n * (9 * a * b + 9 * b * b + a * b * (a != b)) + d * 2 * b)
        if size >> level in attention:
            cost += f * (n * 4 * b * b + 2 * n * n * b)
        return cost + f * n * kernel * b * b

    def over_time(a, level):
        n, f = of(level)
        return f * (n * 4 * a * a + 2 * n * clip(level) * a)

    total = base * d + d * d + frames * size**2 * 9 * widths[0] * (channels + out_channels)
    kept, h = [widths[0]], widths[0]
    for level, width in enumerate(widths):
        if level:
            n, f = of(level)
            total += 9 * h * h * n * f + (kernel * h * h * 4 * n * f if level in halved else 0)
            kept.append(h)
        for _ in range(blocks):
            total += block(h, width, level)
            h = width
            kept.append(h)
    last = len(widths) - 1
    n, f = of(last)
    middle = f * (n * 18 * h * h + d * 2 * h + n * kernel * h * h)
    total += 2 * middle + f * (n * 4 * h * h + 2 * n * n * h) + over_time(h, last)
    for level in reversed(range(len(widths))):
        for _ in range(blocks + 1):
            total += block(h + kept.pop(), widths[level], level)
            h = widths[level]
        if level:
            (n, f), (_, finer) = of(level), of(level - 1)
            total += 9 * h * h * 4 * n * f + (kernel * h * h * 4 * n * finer if level in halved else 0)
    return total


@pytest.mark.parametrize(
    ('halved', 'phases', 'share'),
    [((), 'one', 1), ((1,), 'one', 0.655), ((1, 2), 'one', 0.560), ((1, 2), 'all', 1.052)],
)
def test_fewer_frames_cost_what_a_count_by_hand_says(halved, phases, share):
    """16 frames of 32x32, three levels: of the cost without fewer frames, two halvings leave 0.56."""
    fields = {'base_channels': 32, 'channel_multipliers': (1, 2, 4), 'num_res_blocks': 2, 'attention_resolutions': (8,)}
    fields |= {'num_classes': 0, 'out_channels': 3, 'temporal_downsampling': halved, 'phases': phases}
    inputs, model = (jnp.zeros((1, 16, 32, 32, 3)), jnp.zeros(1), None), as_model(SpaceTimeUNet(**fields))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    flops = count_flops(jax.make_jaxpr(model.apply)(shapes, *inputs))
    arguments = 32, (1, 2, 4), 2, (8,), 16, 32, 3, 3, halved, phases
    assert flops == 2 * _macs_by_hand(*arguments)
    assert flops / 2 / _macs_by_hand(*arguments[:-2], (), 'one') == pytest.approx(share, abs=1e-3)


def test_parameters_are_those_of_images_and_of_modules_over_time(batch):
    """8 blocks of norms and kernels, two resamplings, an attention, the frame rate: counted by hand."""
    x, widths = batch[0], (8, 16, 16, 16, 16, 16, 8, 8)  # down, middle, up
    over_time = sum(2 * w + 3 * w * w + w for w in widths) + 3 * 8 * 8 + 8 + 3 * 16 * 16 + 16
    over_time += 2 * 16 + 4 * (16 * 16 + 16) + (8 * 32 + 32) + (32 * 32 + 32)
    images = count_parameters(_shapes(_image_model(), x[:, 0]))
    assert count_parameters(_shapes(_model(), x)) == images + over_time
    none = _model(temporal_kernel=0, temporal_attention=0, temporal_downsampling=(), frame_rate_frequencies=0)
    assert count_parameters(_shapes(none, x)) == images


def test_remat_recomputes_modules_over_time_too(batch):
    def blocks(remat):
        model = as_model(SpaceTimeUNet(**TINY, remat=remat))
        equations = jax.make_jaxpr(model.apply)(_shapes(model, batch[0]), *batch).eqns
        return sum(equation.primitive.name in ('checkpoint', 'remat', 'remat2') for equation in equations)

    assert blocks('none') == 0 and blocks('full') == 8 + 4 + 8 + 1  # residual, attention, and both kinds over time


def test_it_learns_a_motion_that_no_image_network_can():
    changes = {'num_classes': 0, 'out_channels': 1, 'attention_resolutions': (), 'frame_rate_frequencies': 0}
    alone = {'temporal_downsampling': (), 'temporal_kernel': 0, 'temporal_attention': 0}
    with_time, without = (learn(_model(**changes, **more)) for more in ({}, alone))
    assert np.mean(with_time[-10:]) < 0.3 and np.mean(without[-10:]) > 0.9


# Styles, names, mistakes ----------------------------------------------------------------------------------------------


def test_a_style_is_mixed_into_image_weights_alone(batch, start):
    clip, image = _shapes(_model(), batch[0]), _shapes(_image_model(), batch[0][:, 0])
    params, style = start(clip, random=True), jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0), image)
    mixed = stylised(params, style, 0.25)
    for name, leaves in mixed.items():
        expected = params[name] if name not in image else jax.tree.map(lambda a: 0.75 * a + 0.25 * 7, params[name])
        chex.assert_trees_all_close(leaves, expected, atol=1e-6)
    chex.assert_trees_all_equal(stylised(params, style, 0.0), params)


def test_parameters_without_a_place_are_refused(batch):
    clip = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), _shapes(_model(), batch[0]))
    wider = _shapes(_image_model(base_channels=16), batch[0][:, 0])
    with pytest.raises(
        ValueError, match=r'condition.label.table.embedding has shape \(6, 64\) in the network of images'
    ):
        inflate({'condition': {'label': wider['condition']['label']}}, clip)
    with pytest.raises(ValueError, match="there is no parameter 'down_2_0' in the network of clips; it has"):
        inflate({'down_2_0': {}}, clip)
    with pytest.raises(ValueError, match="there is no parameter 'gate' under conv_in; it has"):
        inflate({'conv_in': {'gate': jnp.zeros(1)}}, clip)


def test_a_config_names_it():
    spec = {'name': 'SpaceTimeUNet', 'base_channels': 8, 'temporal_downsampling': [1], 'channel_multipliers': [1, 2]}
    network = component(nets, spec, 'network', num_classes=0, out_channels=1)()
    assert network == SpaceTimeUNet(
        base_channels=8, temporal_downsampling=(1,), channel_multipliers=(1, 2), num_classes=0, out_channels=1
    )


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'temporal_downsampling': [2]}, r'temporal_downsampling=\(2,\) must name different levels from 1 to 1'),
        ({'temporal_downsampling': [0]}, r'temporal_downsampling=\(0,\) must name'),
        ({'temporal_downsampling': [1, 1]}, r'temporal_downsampling=\(1, 1\) must name different'),
        ({'phases': 'both'}, "phases='both' is not known; choose one of 'one', 'all'"),
        ({'temporal_kernel': 2}, 'temporal_kernel=2 must be odd, or 0'),
        ({'temporal_kernel': -1}, 'temporal_kernel=-1 must be odd, or 0'),
        ({'temporal_attention': -1}, 'temporal_attention=-1 must be a number of blocks'),
        ({'num_heads': 16}, 'heads of the last level have 1'),
        ({'frame_rate_frequencies': 3}, 'frame_rate_frequencies=3 must be even'),
        ({'base_channels': 7}, 'base_channels=7 must be even'),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        SpaceTimeUNet(**(TINY | changes))


def test_wrong_inputs_are_refused(batch):
    x, t, labels = batch
    with pytest.raises(ValueError, match=r'1 or a multiple of 2 \(temporal_downsampling=\(1,\)\), got 3'):
        _shapes(_model(), x[:, :3])
    with pytest.raises(ValueError, match=r'SpaceTimeUNet takes x of shape \[B, T, H, W, C\], got \(2, 4, 4, 2\)'):
        _shapes(_model(), x[:, 0])
    shapes = _shapes(_model(), x)
    for cond, message in (
        ({'label': labels, 'frame_rate': jnp.zeros(3)}, r'takes a frame_rate of shape \(2,\), got \(3,\)'),
        ({'frame_rate': t}, 'a network with num_classes=5 takes cond'),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(_model().apply, shapes, x, t, cond)
    with pytest.raises(ValueError, match='was given a frame_rate, which it does not know; set frame_rate_frequencies'):
        plain = _model(frame_rate_frequencies=0)
        jax.eval_shape(plain.apply, _shapes(plain, x), x, t, {'label': labels, 'frame_rate': t})
