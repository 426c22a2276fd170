"""Attention of the space-time U-Net over space and time together: in NumPy, as an inflated network, and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import SpaceTimeUNet, UNet, as_model, inflate
from diffjax.nets.space_time_unet import SpaceTimeAttention
from diffjax.nets.unet_blocks import Style

IMAGE = {'base_channels': 8, 'channel_multipliers': (1, 2), 'num_res_blocks': 1, 'attention_resolutions': ()}
IMAGE |= {'num_heads': 2, 'num_classes': 0, 'out_channels': 1, 'num_groups': 4}
CLIP = IMAGE | {'temporal_downsampling': (1,), 'temporal_attention': 2, 'attention_over': 'space_time'}
STYLE = Style('float32', 'xla', 0.0, 2, 1e-5, 'scale_shift', 'linear')
GROUPS = 2


def _norm(frame, layer):
    """Of [H, W, C], in groups of channels."""
    h = frame.reshape(*frame.shape[:2], GROUPS, -1)
    h = (h - h.mean((0, 1, 3), keepdims=True)) / np.sqrt(h.var((0, 1, 3), keepdims=True) + 1e-5)
    return h.reshape(frame.shape) * layer['scale'] + layer['bias']


def _affine(h, layer):
    return h @ layer['kernel'] + layer['bias']


def test_it_is_a_transformer_block_over_all_pixels_of_a_clip(perturb):
    """In float64; heads of 16 features, of which 4 are turned by time, 6 by the row, 6 by the column."""
    frames, height, width, heads, size = 3, 2, 2, 2, 16
    x = np.random.default_rng(0).standard_normal((2, frames, height, width, heads * size))
    block = SpaceTimeAttention(heads, frames, STYLE)
    folded = jnp.asarray(x.reshape(-1, height, width, heads * size), jnp.float32)
    params = perturb(block.init(jax.random.key(0), folded)['params'], 0.3)
    p, expected = jax.tree.map(lambda a: np.asarray(a, np.float64), params), x.copy()
    places = list(np.ndindex(frames, height, width))
    angles = [[place[axis] * 10_000.0 ** (-2 * j / n) for axis, n in enumerate((4, 6, 6)) for j in range(n // 2)]
              for place in places]  # fmt: skip
    turn = np.exp(1j * np.array(angles))[:, None]
    for clip in expected:
        h = np.stack([_norm(frame, p['norm']) for frame in clip]).reshape(len(places), -1)
        q, k, v = _affine(h, p['attention']['qkv']).reshape(-1, 3, heads, size).swapaxes(0, 1)
        q, k = ((a[..., ::2] + 1j * a[..., 1::2]) * turn for a in (q, k))
        weights = np.exp(np.einsum('thc,shc->hts', q, k.conj()).real / 4)
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum('hts,shd->thd', weights, v).reshape(len(places), -1)
        clip += _affine(out, p['attention']['out']).reshape(clip.shape)
        h = np.stack([_norm(frame, p['mlp_norm']) for frame in clip]).reshape(len(places), -1)
        h = _affine(h, p['mlp_in'])
        clip += _affine(h / (1 + np.exp(-h)), p['mlp_out']).reshape(clip.shape)
    np.testing.assert_allclose(block.apply({'params': params}, folded).reshape(x.shape), expected, atol=1e-4)


@pytest.fixture(scope='module')
def clips():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((2, 4, 8, 8, 1)), jnp.float32), jnp.array([0.3, 0.8])


def _random(params, *, but=()):
    """Parameters like these, random; `but`: whole leaves stay."""

    def value(path, leaf):
        name = jax.tree_util.keystr(path)
        key = jax.random.key(sum(map(ord, name)))
        return leaf if any(word in name for word in but) else leaf + 0.2 * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(value, params)


def test_an_inflated_network_is_the_image_network_at_every_second_frame(clips):
    x, t = clips
    image, clip = as_model(UNet(**IMAGE)), as_model(SpaceTimeUNet(**CLIP))
    params = _random(image.init(jax.random.key(0), x[:, 0], t))
    fresh = clip.init(jax.random.key(1), x, t)
    got = jax.jit(clip.apply)(inflate(params, fresh), x, t)
    expected = jnp.stack([image.apply(params, x[:, k], t) for k in (0, 2)], axis=1)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(got[:, ::2], expected, atol=1e-5)


def test_every_pixel_hears_of_every_other_and_every_parameter_learns(clips):
    x, t = clips
    clip = as_model(SpaceTimeUNet(**CLIP))
    params = _random(clip.init(jax.random.key(0), x, t))
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(clip.apply(params, x, t) ** 2)))(params)
    sizes = {jax.tree_util.keystr(path): float(np.abs(leaf).max()) for path, leaf in
             jax.tree_util.tree_leaves_with_path(gradient)}  # fmt: skip
    assert sum('middle_temporal_attention_1' in name for name in sizes) == 12
    assert min(sizes.values()) > 1e-9, min(sizes, key=sizes.get)

    block, h = SpaceTimeAttention(2, 4, STYLE), jnp.ones((4, 3, 3, 32)) * jnp.linspace(0, 1, 32)
    params = _random(block.init(jax.random.key(0), h)['params'])
    moved = h.at[0, 0, 0, 3].add(1.0)
    change = block.apply({'params': params}, moved) - block.apply({'params': params}, h)
    assert np.abs(change).max(axis=-1).min() > 1e-6  # of a pixel of the first frame, at all pixels of all frames


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attention_over': 'everything'}, "='everything' is not known; choose one of 'time', 'space_time'"),
        ({'num_heads': 4}, "='space_time' needs heads of a multiple of 4 .* those of the last level have 4"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SpaceTimeUNet(**(CLIP | changes))
