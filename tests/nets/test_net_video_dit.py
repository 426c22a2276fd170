"""VideoDiT: equality with the image network, attention over time in NumPy, positions token by token, cost, settings."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from moving_patterns import learn

from diffjax import nets
from diffjax.components import component
from diffjax.core.types import Model
from diffjax.nets import DiT, VideoDiT, as_model, count_parameters, inflate
from diffjax.nets.layers import SelfAttention
from diffjax.nets.rotary import grid_positions, space_time_sizes, turned, turns
from diffjax.nets.stacking import unstack_layers
from diffjax.training.flops import count_flops

IMAGE = {'patch_size': 2, 'hidden_size': 16, 'depth': 2, 'num_heads': 2, 'num_classes': 5, 'out_channels': 3}
CLIP = {'frame_rate_frequencies': 8}
SHAPE = (2, 4, 4, 6, 2)


@pytest.fixture
def batch(image_batch):
    return image_batch(SHAPE)


@functools.cache
def _model(**changes):
    return Model(*map(jax.jit, as_model(VideoDiT(**(IMAGE | CLIP | changes)))))


@functools.cache
def _image_model(**changes):
    return Model(*map(jax.jit, as_model(DiT(**(IMAGE | changes)))))


def _init(model, x):
    return model.init(jax.random.key(0), x, jnp.zeros(len(x)), jnp.zeros(len(x), jnp.int32))


def _each_frame(image, params, x, t, labels):
    """The image network on every frame, as one batch of images."""
    frames = x.shape[1]
    out = image.apply(params, x.reshape(-1, *x.shape[2:]), jnp.repeat(t, frames), jnp.repeat(labels, frames))
    return out.reshape(*x.shape[:2], *out.shape[1:])


# Equality with the image network --------------------------------------------------------------------------------------


OPTIONS = {'positions': 'both', 'qk_norm': 'rms', 'norm': 'rms', 'conditioning': 'adaln_single', 'num_registers': 2}


@pytest.mark.parametrize(('changes', 'frames_of_a_patch'), [({}, 1), (OPTIONS, 2)])
def test_inflated_it_is_the_image_network_frame_by_frame(perturb, batch, changes, frames_of_a_patch):
    """Two frames to a patch: so are clips in which pairs of frames are equal."""
    x, t, labels = batch
    x = jnp.repeat(x[:, ::frames_of_a_patch], frames_of_a_patch, axis=1)
    image, clip = _image_model(**changes), _model(**changes, temporal_patch_size=frames_of_a_patch)
    params = perturb(_init(image, x[:, 0]))
    expected = _each_frame(image, params, x, t, labels)
    got = clip.apply(inflate(params, _init(clip, x)), x, t, labels)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize('changes', [{}, {'temporal_patch_size': 2}, {'space_time': 'full'}])
def test_an_image_is_seen_as_the_image_network_sees_it(perturb, batch, changes):
    """A clip of one frame, whatever attention over time has learned; and parameters are those of clips anyway."""
    x, t, labels = batch
    image, clip = _image_model(), _model(**changes)
    params, started = perturb(_init(image, x[:, 0])), _init(clip, x[:, :1])
    chex.assert_trees_all_equal_shapes(started, jax.eval_shape(functools.partial(_init, clip), x))
    got = clip.apply(inflate(params, perturb(started, seed=2)), x[:, :1], t, labels)
    np.testing.assert_allclose(got[:, 0], image.apply(params, x[:, 0], t, labels), atol=1e-5)


# Blocks and positions, by hand ----------------------------------------------------------------------------------------


def test_attention_over_time_is_among_the_tokens_of_a_place(perturb, batch):
    """Equation (1) in float64 on what DiT's block makes: heads as complex numbers, turned by frame times frequency."""
    seen = {}

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.name == 'blocks_1':
            seen['x' if 'x' in seen else 'frame'] = args[0]
            seen['out'] = out[0]
        if context.module.name == 'mlp_out' and context.module.path[0] == 'blocks_1':
            seen['mlp'] = out
        return out

    clip = _model(scan_layers=False)
    params = perturb(_init(clip, batch[0]))
    image = jax.tree.map(jnp.copy, params)
    for i in range(2):
        image[f'blocks_{i}']['time_attention']['out'] = jax.tree.map(
            jnp.zeros_like, image[f'blocks_{i}']['time_attention']['out']
        )

    def run(params):
        seen.clear()
        module = VideoDiT(**(IMAGE | CLIP | {'scan_layers': False}))
        with nn.intercept_methods(record):
            module.apply({'params': params}, *batch)
        return seen['out']

    silent = {**params, 'blocks_1': image['blocks_1']}  # the second block without (1), on the same input
    before, after = jax.jit(run)(silent), jax.jit(run)(params)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params['blocks_1']['time_attention'])
    x = np.asarray(before, np.float64).reshape(2, 4, 6, 16)
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    q, k, v = np.moveaxis((h @ p['qkv']['kernel'] + p['qkv']['bias']).reshape(2, 4, 6, 3, 2, 8), 3, 0)
    turn = np.exp(1j * np.arange(4)[:, None] * 10_000.0 ** (-np.arange(4) / 4))[:, None, None]
    q, k = ((a[..., ::2] + 1j * a[..., 1::2]) * turn for a in (q, k))
    weights = np.exp(np.einsum('btlhc,bslhc->blhts', q, k.conj()).real / np.sqrt(8))
    out = np.einsum('blhts,bslhd->btlhd', weights / weights.sum(-1, keepdims=True), v).reshape(x.shape)
    expected = x + out @ p['out']['kernel'] + p['out']['bias']
    assert np.abs(expected - x).max() > 0.3
    np.testing.assert_allclose(np.asarray(after).reshape(x.shape), expected, atol=1e-3)


@pytest.mark.parametrize('positions', ['sincos', 'rope'])
def test_in_full_every_token_is_turned_by_its_frame_row_and_column(batch, positions):
    """Cosines of angles that are written out token by token; registers stand in their frame and at no place."""
    seen = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, SelfAttention) and context.method_name == '__call__':
            seen.append((args[0].shape, args[1]))
        return call(*args, **kwargs)

    fields = {'space_time': 'full', 'num_registers': 1, 'positions': positions, 'scan_layers': False, 'hidden_size': 32}
    module = VideoDiT(**(IMAGE | fields))

    @jax.jit
    def angles_of_tokens():
        with nn.intercept_methods(record):
            as_model(module).init(jax.random.key(0), *batch)
        return seen[0][1]  # what does not follow from the parameters is all that is computed

    sizes = (4, 6, 6) if positions == 'rope' else (16, 0, 0)
    angles = []
    for frame in range(4):
        for place in [(0, 0), *np.ndindex(2, 3)]:
            angles.append(
                [
                    position * 10_000.0 ** (-2 * j / size)
                    for position, size in zip((frame, *place), sizes)
                    for j in range(size // 2)
                ]
            )
    cosines, sines = angles_of_tokens()
    assert seen[0][0] == (2, 4 * 7, 32)
    np.testing.assert_allclose(cosines, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sines, np.sin(angles), atol=1e-6)


def test_three_dimensional_rotations_see_differences_alone():
    """The product of a turned query and a turned key depends on how far apart they are, along each axis by itself."""
    assert [space_time_sizes(size) for size in (8, 16, 64, 72)] == [(4, 2, 2), (4, 6, 6), (16, 24, 24), (20, 26, 26)]
    rng, sizes = np.random.default_rng(0), space_time_sizes(16)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(at, to):
        a, b = (turned(x, turns(np.array([p]), sizes)) for x, p in ((q, at), (k, to)))
        return float(jnp.vdot(a, b))

    base = product((1, 2, 3), (4, 0, 1))
    assert product((6, 9, 4), (9, 7, 2)) == pytest.approx(base, abs=1e-4)
    for other in ((5, 0, 1), (4, 1, 1), (4, 0, 2)):
        assert abs(product((1, 2, 3), other) - base) > 1e-3
    np.testing.assert_array_equal(grid_positions(2, 1, 2), [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])


def test_patches_hold_frames_rows_and_columns(batch):
    """Hand-made weights, as for DiT: tokens (v, -v), of which layer norm makes v over its root mean square."""
    x, t, labels = batch
    model, eye = (
        as_model(VideoDiT(**(IMAGE | {'hidden_size': 32, 'out_channels': 2, 'temporal_patch_size': 2}))),
        np.eye(16),
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t, labels)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)  # so that blocks are the identity
    params['patch_embed'] = {'kernel': jnp.asarray(np.hstack([eye, -eye])), 'bias': jnp.zeros(32)}
    params['final'] = {'kernel': jnp.asarray(np.vstack([eye, 0 * eye])), 'bias': jnp.zeros(16)}
    expected = np.array(x)
    for b, f, i, j in np.ndindex(2, 2, 2, 3):
        patch = np.s_[b, 2 * f : 2 * f + 2, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        expected[patch] /= np.sqrt(np.mean(expected[patch] ** 2) + 1e-6)
    np.testing.assert_allclose(jax.jit(model.apply)(params, x, t, labels), expected, atol=1e-5)


# The whole network ----------------------------------------------------------------------------------------------------


def test_still_clips_stay_still(perturb, batch):
    """Attention over time among equal tokens gives what each would have alone, whatever its weights."""
    x, t, labels = batch
    model = _model()
    params = perturb(_init(model, x))
    out = model.apply(params, jnp.repeat(x[:, :1], 4, axis=1), t, labels)
    np.testing.assert_allclose(out, jnp.repeat(out[:, :1], 4, axis=1), atol=1e-5)
    moving = model.apply(params, x, t, labels)
    assert np.abs(moving[:, 0] - out[:, 0]).max() > 1e-2  # the first frames are equal: the others are seen


def test_a_loop_in_the_program_is_the_same_as_blocks_written_out(perturb, batch):
    x, t, labels = batch
    scanned, written = _model(scan_layers=True), _model(scan_layers=False)
    params = perturb(_init(scanned, x))
    out = written.apply(unstack_layers(params), x, t, labels)
    chex.assert_trees_all_close(scanned.apply(params, x, t, labels), out, atol=1e-5)


def test_every_input_matters_and_clips_are_independent(perturb, batch):
    x, t, labels = batch
    model, rate = _model(), jnp.array([8.0, 24.0])
    params = perturb(_init(model, x))

    def run(x, t, labels, rate):
        return model.apply(params, x, t, {'label': labels, 'frame_rate': rate})

    out = run(x, t, labels, rate)
    chex.assert_trees_all_close(run(x[::-1], t[::-1], labels[::-1], rate[::-1]), out[::-1], atol=1e-4)
    others = (
        (x[:, ::-1], t, labels, rate),
        (x, t[::-1], labels, rate),
        (x, t, labels[::-1], rate),
        (x, t, labels, 3 * rate),
    )
    for other in others:
        assert np.abs(run(*other) - out).max(axis=(1, 2, 3, 4)).min() > 1e-3
    plain = _model(frame_rate_frequencies=0)
    rest = {name: value for name, value in params.items() if name != 'frame_rate'}
    chex.assert_trees_all_close(model.apply(params, x, t, labels), plain.apply(rest, x, t, labels), atol=1e-5)


def test_gates_at_zero_hide_gradients_for_one_step_alone(perturb, batch):
    """Of an inflated network exactly what stands before a gate has none; after one step of descent all have one."""
    x, t, labels = batch
    image, model = _image_model(), _model()
    params = inflate(perturb(_init(image, x[:, 0])), _init(model, x))
    cond = {'label': labels, 'frame_rate': jnp.array([8.0, 24.0])}
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(model.apply(params, x, t, cond) ** 2)))

    def sizes(params):
        leaves = jax.tree_util.tree_leaves_with_path(gradient(params))
        found = {jax.tree_util.keystr(path): float(np.abs(leaf).max()) for path, leaf in leaves}
        return {name: size for name, size in found.items() if 'pos_embed' not in name}

    first = sizes(params)
    hidden = {f"['blocks']['time_attention']['qkv']['{name}']" for name in ('kernel', 'bias')}
    hidden |= {f"['frame_rate']['in']['{name}']" for name in ('kernel', 'bias')}
    assert {name for name, size in first.items() if size == 0} == hidden
    second = sizes(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient(params)))
    assert min(second.values()) > 1e-9, min(second, key=second.get)


@pytest.mark.parametrize('space_time', ['factorised', 'full'])
@pytest.mark.parametrize('r', [1, 2])
def test_cost_and_parameters_are_those_counted_by_hand(space_time, r):
    """DiT-S/2 on 16 frames of 32x32x4: multiply-adds of every product, and parameters beside those of the image DiT."""
    d, depth, frames, length, patch = 384, 12, 16 // r, 256, r * 2 * 2 * 4
    fields = {'patch_size': 2, 'hidden_size': d, 'depth': depth, 'num_heads': 6, 'num_classes': 10, 'out_channels': 4}
    model = as_model(VideoDiT(**fields, space_time=space_time, temporal_patch_size=r))
    inputs = jnp.zeros((1, 16, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    factorised, tokens = space_time == 'factorised', frames * length
    attended = length + (frames if factorised else 0) if factorised else tokens
    dense = 12 * d * d + (4 * d * d if factorised else 0)
    block = tokens * (dense + 2 * attended * d) + 6 * d * d * (frames if factorised else 1)
    total = tokens * d * 2 * patch + 256 * d + d * d + 2 * d * d + depth * block
    assert count_flops(jax.make_jaxpr(model.apply)(shapes, *inputs)) == 2 * total
    image = as_model(DiT(**fields))
    of_image = count_parameters(jax.eval_shape(image.init, jax.random.key(0), inputs[0][:, 0], *inputs[1:]))
    more = depth * 4 * (d * d + d) * factorised + (r - 1) * (16 * d + 16 * d + 16)
    assert count_parameters(shapes) == of_image + more


def test_remat_recomputes(batch):
    def flops(remat):
        model = as_model(VideoDiT(**(IMAGE | CLIP), remat=remat))
        shapes = jax.eval_shape(functools.partial(_init, model), batch[0])
        return count_flops(jax.make_jaxpr(jax.grad(lambda params: model.apply(params, *batch).sum()))(shapes))

    assert flops('full') > 1.2 * flops('none')


@pytest.mark.parametrize(('space_time', 'num_steps', 'share'), [('factorised', 50, 0.5), ('full', 120, 0.8)])
def test_it_learns_a_motion_that_no_image_network_can(space_time, num_steps, share):
    """What a network frame by frame can reach at best is 1: of the frames that are to be made it sees noise alone."""
    fields = {'num_classes': 0, 'out_channels': 1, 'frame_rate_frequencies': 0, 'space_time': space_time}
    assert np.mean(learn(_model(**fields), num_steps)[-10:]) < share


# Names and mistakes ---------------------------------------------------------------------------------------------------


def test_a_config_names_it():
    spec = {'name': 'VideoDiT', 'patch_size': 2, 'hidden_size': 16, 'depth': 1, 'num_heads': 2, 'space_time': 'full'}
    network = component(nets, spec, 'network', num_classes=0, out_channels=1)()
    fields = {name: value for name, value in spec.items() if name != 'name'}
    assert network == VideoDiT(**fields, num_classes=0, out_channels=1)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'space_time': 'axial'}, "space_time='axial' is not known; choose one of 'factorised', 'full'"),
        ({'frame_rate_frequencies': -2}, 'frame_rate_frequencies=-2 must be even'),
        ({'hidden_size': 12, 'num_heads': 4}, 'a head needs an even number of features, at least 2'),
        ({'space_time': 'full', 'positions': 'rope', 'num_heads': 4}, 'at least 8, to be turned by positions'),
        ({'positions': 'learned'}, "positions='learned' is not known"),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        VideoDiT(**(IMAGE | changes))


def test_wrong_inputs_are_refused(batch):
    x, t, labels = batch

    def init(x, cond=labels, **changes):
        jax.eval_shape(as_model(VideoDiT(**(IMAGE | changes))).init, jax.random.key(0), x, t, cond)

    with pytest.raises(
        ValueError, match='the number of frames must be 1 or a multiple of temporal_patch_size=2, got 3'
    ):
        init(x[:, :3], temporal_patch_size=2)
    with pytest.raises(ValueError, match=r'VideoDiT takes x of shape \[B, T, H, W, C\], got \(2, 4, 6, 2\)'):
        init(x[:, 0])
    with pytest.raises(ValueError, match='height and width must be multiples of patch_size=2, got 3x6'):
        init(x[:, :, :3])
    with pytest.raises(ValueError, match='VideoDiT was given a frame_rate, which it does not know'):
        init(x, {'label': labels, 'frame_rate': t})
