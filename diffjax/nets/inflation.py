"""From networks of images to networks of clips: parameters carried over, and styles mixed in.

The networks of clips are those of images with modules over time between the layers, and have the names of their
parameters, so that inflation is a matter of names (Bar-Tal et al. 2024, arXiv:2401.12945, section 3.1). Where a
`VideoDiT` puts r frames into a token, a patch is embedded as the mean over them and each frame is read out alike, as
in I3D (Carreira & Zisserman 2017, arXiv:1705.07750, section 2.4.2): equal frames are then seen as the image was.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, PyTree


def inflate(image: PyTree, clip: PyTree) -> PyTree:
    """Parameters of a network of clips, with those of the network of images in their places.

    image: of `UNet` or `DiT`; clip: of `SpaceTimeUNet` or `VideoDiT` with the same fields, as `init` made them or
    trained. ValueError names a parameter that has no place, or not the shape of its place.
    """
    return _placed(image, clip, ())


def stylised(params: PyTree, style: PyTree, strength: Array | float) -> PyTree:
    """A network of clips in the style of a fine-tuned network of images: its image weights are mixed, (1 - s) w + s w'.

    params: of the network of clips, w in it; style: w', of the fine-tuned network of images. Modules over time stay.
    Lumiere takes s from 0.5 to 1 (Bar-Tal et al. 2024, section 4: "Stylized Generation").
    """
    return jax.tree.map(lambda base, other: base + strength * (other - base), params, inflate(style, params))


def _placed(image: PyTree, clip: PyTree, path: tuple[str, ...]) -> PyTree:
    if isinstance(image, Mapping) and isinstance(clip, Mapping):
        if foreign := sorted(image.keys() - clip.keys()):
            where = f'under {".".join(path)}' if path else 'in the network of clips'
            raise ValueError(f'there is no parameter {foreign[0]!r} {where}; it has {sorted(clip)}')
        return {**clip, **{name: _placed(value, clip[name], (*path, name)) for name, value in image.items()}}
    shapes = [getattr(leaf, 'shape', None) for leaf in (image, clip)]
    if shapes[0] != shapes[1] and None not in shapes:
        image = _over_frames(image, clip.shape, path)
    if getattr(image, 'shape', None) != shapes[1]:
        raise ValueError(
            f'{".".join(path)} has shape {shapes[0]} in the network of images and {shapes[1]} in that of clips'
        )
    return image


def _over_frames(leaf: Array, shape: tuple[int, ...], path: tuple[str, ...]) -> Array:
    """A patch's embedding or the output layer for as many frames as `shape` has room for; any other as it is."""
    axis = {'patch_embed': 0, 'final': -1}.get(path[0])
    if axis is None or path == ('patch_embed', 'bias') or shape[axis] % leaf.shape[axis]:
        return leaf
    times = shape[axis] // leaf.shape[axis]
    repeated = jnp.concatenate([leaf] * times, axis)
    return repeated / times if axis == 0 else repeated
