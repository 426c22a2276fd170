"""Where activations live: a network says what their axes mean, and whoever knows the devices says where they go.

A network is written for one device. Split over several, the compiler chooses how activations are split, from how inputs
and parameters are; where that choice would be poor, a layer says by `placed` what its axes mean:

    'batch'    examples, or what is folded with them into the first axis
    'heads'    features of the heads of an attention, head by head
    'hidden'   features inside a block, which its first product makes and its last one uses up
    'whole'    features between blocks, of which every device needs all
    None       anything else, left to the compiler

It does nothing unless the network is applied within `placing`, as `as_model` does with a place that it is given.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

Place = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
_PLACE: ContextVar[Place | None] = ContextVar('place', default=None)


@contextmanager
def placing(place: Place | None) -> Iterator[None]:
    """Whatever is `placed` inside goes where `place(x, axes)` puts it."""
    before = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(before)


def is_placing() -> bool:
    return _PLACE.get() is not None


def placed(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, of which the first axes mean this, and the others nothing."""
    place = _PLACE.get()
    return x if place is None else place(x, axes)
