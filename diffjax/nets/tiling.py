"""Decoding in pieces, for pictures and clips that do not fit in memory at once.

The latents are cut into squares that overlap, each is decoded by itself, one after the other, and where pictures meet
they are blended: picture i counts by a weight that rises in a line from its edge over the overlap,

    x(p) = sum_i w_i(p) x_i(p) / sum_i w_i(p)                                                                        (1)

Exact for a decoder whose pixels depend on one position of the latents. One that looks around, or normalises over the
whole picture, sees less in a tile: the seams fade as tiles and overlap grow.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `length` positions and overlap by at least `overlap`."""
    if not 0 <= overlap < tile:
        raise ValueError(f'overlap must be at least 0 and below tile = {tile}, got {overlap}')
    if length <= tile:
        return [0]
    number = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (number - 1)) for i in range(number)]


def decode_tiles(decode: Callable[[Array], Array], z: Array, *, tile: int, overlap: int, factor: int) -> jax.Array:
    """`decode` of tiles of `tile` positions a side: `[B, h, w, C] -> [B, h factor, w factor, C']`, by (1), in float32.

    decode: takes `[B, tile, tile, C]`, or less where the picture is smaller than a tile. Of clips `[B, t, h, w, C]`
    every tile has all frames, and `decode` says how many there will be.
    Raises ValueError unless 0 <= overlap < tile.
    """
    *lead, height, width, _ = z.shape
    rows, columns = (starts(length, tile, overlap) for length in (height, width))
    size = min(tile, height), min(tile, width)
    corners = np.array([(top, left) for top in rows for left in columns], np.int32)
    weight = _ramp(size[0] * factor, overlap * factor)[:, None] * _ramp(size[1] * factor, overlap * factor)
    weight = weight[:, :, None].astype(np.float32)
    made = jax.eval_shape(decode, jax.ShapeDtypeStruct((*lead, *size, z.shape[-1]), z.dtype)).shape
    first = (0,) * len(lead)

    def add(canvas, corner):
        part = jax.lax.dynamic_slice(z, (*first, *corner, 0), (*lead, *size, z.shape[-1]))
        values = jnp.concatenate([decode(part) * weight, jnp.broadcast_to(weight, (*made[:-1], 1))], -1)
        at = (*first, *(corner * factor), 0)
        there = jax.lax.dynamic_slice(canvas, at, values.shape)
        return jax.lax.dynamic_update_slice(canvas, there + values, at), None

    canvas = jnp.zeros((*made[:-3], height * factor, width * factor, made[-1] + 1), jnp.float32)
    canvas, _ = jax.lax.scan(add, canvas, corners)
    return canvas[..., :-1] / canvas[..., -1:]


def _ramp(length: int, rise: int) -> np.ndarray:
    """Up in a line over `rise` pixels, level, and down again: [length], all positive."""
    to_edge = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
    return np.minimum(to_edge / (rise + 1), 1.0)
