"""What text-conditional networks are told, and labels in the place of text.

A condition is a dict of arrays, each with a leading batch axis; a network documents which it takes:

    text          [B, S, D]   embeddings of the tokens
    text_mask     [B, S]      True where there is a token; without it all are
    pooled        [B, P]      one embedding of the whole text
    label         int32 [B]   a class
    size          [B, 6]      SDXL's: original height and width, top and left of the crop, height and width wanted
    resolution    [B, 2]      PixArt's height and width, and `aspect_ratio` [B, 1]
    guidance      [B]         the guidance scale that a distilled network embeds
    frame_rate    [B]         frames per second of a clip

A network with `num_classes > 0` takes int32 labels [B] as well, in the place of such a dict: `LabelTokens` learns what
they would say. So every text-conditional network also trains on a dataset of classes.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array, PyTree
from diffjax.nets.layers import sinusoidal_embedding


class LabelTokens(nn.Module):
    """labels int32 [B] in 0..num_classes -> {'text': [B, num_tokens, text_size], 'pooled': [B, pooled_size]}.

    Two learned tables of `num_classes + 1` rows, the last one for the null label; `pooled_size = 0`: no `pooled`.
    """

    num_classes: int
    num_tokens: int
    text_size: int
    pooled_size: int = 0

    @nn.compact
    def __call__(self, labels: Array) -> dict[str, jax.Array]:
        init = nn.initializers.normal(1.0)  # the scale of a text encoder's normalised output
        rows = self.num_classes + 1
        text = nn.Embed(rows, self.num_tokens * self.text_size, embedding_init=init, name='text')(labels)
        condition = {'text': text.reshape(-1, self.num_tokens, self.text_size)}
        if self.pooled_size:
            condition['pooled'] = nn.Embed(rows, self.pooled_size, embedding_init=init, name='pooled')(labels)
        return condition


class FrameRateEmbedding(nn.Module):
    """Frames per second [B] -> [B, hidden_size], as times are embedded; it starts at zero, in float32."""

    hidden_size: int
    frequencies: int

    @nn.compact
    def __call__(self, frame_rate: Array) -> jax.Array:
        h = sinusoidal_embedding(frame_rate, self.frequencies)
        h = nn.silu(nn.Dense(self.hidden_size, kernel_init=nn.initializers.xavier_uniform(), name='in')(h))
        return nn.Dense(self.hidden_size, kernel_init=nn.initializers.zeros, name='out')(h)


def split_frame_rate(network: str, cond: PyTree, t: Array, frequencies: int) -> tuple[PyTree, Array | None]:
    """(cond as a network of images takes it, frames per second [B] or None) of a clip's condition.

    Beside what a network of images takes, a clip may have a dict: with 'frame_rate' [B], and with 'label' int32 [B] in
    the place of labels. ValueError where a rate is misshapen, or was given to a network without `frequencies` for it.
    """
    if not isinstance(cond, dict):
        return cond, None
    rest = {name: value for name, value in cond.items() if name != 'frame_rate'}
    frame_rate = cond.get('frame_rate')
    if frame_rate is not None and not frequencies:
        raise ValueError(f'{network} was given a frame_rate, which it does not know; set frame_rate_frequencies=64')
    if frame_rate is not None and jnp.shape(frame_rate) != jnp.shape(t):
        raise ValueError(f'{network} takes a frame_rate of shape {jnp.shape(t)}, got {jnp.shape(frame_rate)}')
    return (rest['label'] if rest.keys() == {'label'} else rest or None), frame_rate


def check_frequencies(frequencies: int) -> None:
    """Raises ValueError where a frame rate cannot have so many features."""
    if frequencies < 0 or frequencies % 2:
        right = 'must be even (it holds pairs of cosine and sine), or 0 for a network that knows no frame rate'
        raise ValueError(f'frame_rate_frequencies={frequencies} {right}')


def check_condition(network: str, cond: PyTree, required: dict[str, str], optional: dict[str, str] = {}) -> None:  # noqa: B006
    """Raises ValueError where a dict of conditions lacks one, holds a foreign one, or one of another rank.

    required, optional: name -> shape, as in {'text': '[B, S, D]'}.
    """
    known = {**required, **optional}
    if not isinstance(cond, dict):
        raise ValueError(f'{network} takes cond as a dict of {known}, got {type(cond).__name__}')
    if missing := [name for name in required if name not in cond]:
        raise ValueError(f'{network} lacks the condition {", ".join(missing)}; it takes {known}, got {sorted(cond)}')
    if foreign := [name for name in cond if name not in known]:
        raise ValueError(f'{network} does not know the condition {", ".join(foreign)}; it takes {known}')
    for name, value in cond.items():
        if jnp.ndim(value) != known[name].count(',') + 1:
            raise ValueError(f'{network} takes cond[{name!r}] of shape {known[name]}, got {jnp.shape(value)}')
