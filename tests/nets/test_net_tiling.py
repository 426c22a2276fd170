"""Decoding in tiles against decoding whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import Autoencoder
from diffjax.nets.tiling import decode_tiles, starts


def pointwise(z):
    """Pixels that depend on one position of the latents alone: twice the size, no other neighbour."""
    y = jnp.stack([z.sum(-1), (z**2).mean(-1)], -1)
    return jnp.repeat(jnp.repeat(y, 2, 1), 2, 2)


@pytest.mark.parametrize('tile, overlap', [(4, 1), (5, 0), (6, 3), (16, 4)])
@pytest.mark.parametrize('height, width', [(13, 9), (4, 20), (3, 3)])
def test_pointwise_decoders_are_exact(tile, overlap, height, width):
    z = jax.random.normal(jax.random.key(0), (2, height, width, 3))
    whole = pointwise(z)
    tiled = jax.jit(lambda z: decode_tiles(pointwise, z, tile=tile, overlap=overlap, factor=2))(z)
    np.testing.assert_allclose(tiled, whole, rtol=1e-5, atol=1e-6)


def test_tiles_cover_and_overlap():
    for length in range(1, 40):
        for tile in range(1, 9):
            for overlap in range(tile):
                at = starts(length, tile, overlap)
                covered = np.zeros(length, bool)
                for start in at:
                    assert 0 <= start <= max(length - tile, 0)
                    covered[start : start + tile] = True
                assert covered.all()
                assert all(b - a <= tile - overlap for a, b in zip(at, at[1:]))


def test_blending_is_a_line_over_the_overlap():
    """A decoder that answers with its tile's number: between two tiles the picture rises in even steps."""

    def numbered(z):
        return jnp.broadcast_to(z[:, :1, :1, :1], z.shape)

    z = jnp.broadcast_to(jnp.arange(8.0)[None, None, :, None], (1, 5, 8, 1))
    x = decode_tiles(numbered, z, tile=5, overlap=2, factor=1)[0, 0, :, 0]
    np.testing.assert_allclose(x, [0, 0, 0, 1, 2, 3, 3, 3], atol=1e-6)  # tiles begin at 0 and 3


def test_an_autoencoder_in_tiles_is_near_and_needs_less_memory():
    network = Autoencoder(base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2)
    z = jax.random.normal(jax.random.key(1), (1, 64, 64, 4))
    params = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))

    def decode(z):
        return network.apply(params, z, method='decode')

    whole = jax.jit(decode).lower(z).compile()
    errors = []
    for tile, overlap in ((16, 2), (32, 8)):
        tiled = jax.jit(lambda z: decode_tiles(decode, z, tile=tile, overlap=overlap, factor=2)).lower(z).compile()  # noqa: B023
        errors.append(float(np.abs(tiled(z) - whole(z)).mean()))
        if tile == 16:
            assert tiled.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes / 2
    assert errors[1] < errors[0] < 0.5 * float(np.abs(whole(z)).mean())


def test_refuses():
    for tile, overlap in ((4, 4), (4, -1), (0, 0)):
        with pytest.raises(ValueError, match=f'below tile = {tile}, got {overlap}'):
            decode_tiles(pointwise, jnp.zeros((1, 8, 8, 3)), tile=tile, overlap=overlap, factor=2)


def test_clips_are_tiled_in_space_alone():
    """A decoder that doubles everything but the first frame: every tile has all of them."""

    def doubled(z):
        return jnp.repeat(jax.vmap(pointwise, 1, 1)(z), 2, 1)[:, 1:]

    z = jax.random.normal(jax.random.key(0), (2, 3, 7, 9, 3))
    tiled = jax.jit(lambda z: decode_tiles(doubled, z, tile=4, overlap=1, factor=2))(z)
    assert tiled.shape == (2, 5, 14, 18, 2)
    np.testing.assert_allclose(tiled, doubled(z), rtol=1e-5, atol=1e-6)
