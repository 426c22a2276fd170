"""Which tensor of a published checkpoint is which of our parameters: the rows that a table consists of.

A row names one of our leaves, the tensors it is made of, and the layout that leads from theirs to ours and back. A
layout uses methods of arrays alone (`transpose`, `reshape`, slices), so that it works on NumPy arrays and on abstract
ones: shapes are checked without a single value.

    dense('blocks_0/attention/qkv', 'blocks.0.attn1.to_q', 'blocks.0.attn1.to_k', 'blocks.0.attn1.to_v')

is two rows, `kernel` and `bias`, whose last axes are those of the three tensors side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from diffjax.core.types import Array


class Layout(NamedTuple):
    """A change of axes and its inverse."""

    to_ours: Callable[[Array], Array]
    to_theirs: Callable[[Array], Array]


@dataclass(frozen=True)
class Leaf:
    """One parameter. ours: its path, with slashes; theirs: tensors, in ours side by side along the last axis."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout
    sizes: tuple[int, ...] = ()  # of the parts along our last axis; (): equal parts
    copies: tuple[tuple[str, ...], ...] = ()  # further sets of tensors that hold the same as `theirs`, bit for bit
    value: Callable[[], np.ndarray] | None = None  # of a parameter that no tensor holds, because it is always the same


SAME = Layout(lambda a: a, lambda a: a)
LINEAR = Layout(lambda a: a.transpose(1, 0), lambda a: a.transpose(1, 0))  # [out, in] <-> [in, out]
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
POINTWISE = Layout(lambda a: a[:, :, 0, 0].transpose(1, 0), lambda a: a.transpose(1, 0)[:, :, None, None])
"""A convolution of 1 x 1 as a dense layer."""
ROW = Layout(lambda a: a.reshape(a.shape[1:]), lambda a: a.reshape(1, *a.shape))  # [1, ...] <-> [...]


def patches(size: int) -> Layout:
    """A convolution of p x p with stride p as a dense layer on patches: [O, I, p, p] <-> [p p I, O]."""

    def to_theirs(a):
        return a.reshape(size, size, -1, a.shape[-1]).transpose(3, 2, 0, 1)

    return Layout(lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]), to_theirs)


def reordered(layout: Layout, groups: int, order: Sequence[int]) -> Layout:
    """`layout`, then the `groups` equal parts of the last axis in another order: ours[i] = theirs[order[i]]."""
    back = [list(order).index(i) for i in range(groups)]

    def pick(a, places):
        parts = a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups)
        return parts[..., places, :].reshape(a.shape)

    order = list(order)
    return Layout(lambda a: pick(layout.to_ours(a), order), lambda a: layout.to_theirs(pick(a, back)))


def dense(ours: str, *theirs: str, bias: bool = True, layout: Layout = LINEAR, sizes: Sequence[int] = ()) -> list[Leaf]:
    """A dense layer of `kernel [in, out]` and `bias [out]`, made of one or several of theirs with the same inputs."""
    leaves = [Leaf(f'{ours}/kernel', tuple(f'{name}.weight' for name in theirs), layout, tuple(sizes))]
    if bias:
        leaves.append(Leaf(f'{ours}/bias', tuple(f'{name}.bias' for name in theirs), SAME, tuple(sizes)))
    return leaves


def conv(ours: str, theirs: str, *, bias: bool = True) -> list[Leaf]:
    """A two-dimensional convolution."""
    return dense(ours, theirs, bias=bias, layout=CONV)


def norm(ours: str, theirs: str, *, bias: bool = True) -> list[Leaf]:
    """A normalisation with `scale`, and `bias` unless it has none."""
    leaves = [Leaf(f'{ours}/scale', (f'{theirs}.weight',), SAME)]
    return leaves + ([Leaf(f'{ours}/bias', (f'{theirs}.bias',), SAME)] if bias else [])


def embed(ours: str, theirs: str) -> list[Leaf]:
    """A table of embeddings."""
    return [Leaf(f'{ours}/embedding', (f'{theirs}.weight',), SAME)]


def array(ours: str, theirs: str, layout: Layout = SAME) -> list[Leaf]:
    """A tensor by its whole name."""
    return [Leaf(ours, (theirs,), layout)]


def fixed(ours: str, value: Callable[[], np.ndarray]) -> list[Leaf]:
    """A parameter of ours that follows from the configuration and is not in their file; export checks that it does."""
    return [Leaf(ours, (), SAME, value=value)]


def shared(rows: Sequence[Leaf], *renamings: tuple[str, str]) -> list[Leaf]:
    """Rows whose tensors their file holds several times: once as named, and once for each renaming (old, new prefix).

    Import demands that all copies agree, and export writes all of them.
    """
    for row in rows:
        for name in row.theirs:
            if strangers := [old for old, _ in renamings if not name.startswith(old)]:
                raise ValueError(f'{name} does not begin with {strangers[0]!r}')
    return [
        replace(row, copies=tuple(tuple(new + name[len(old) :] for name in row.theirs) for old, new in renamings))
        for row in rows
    ]
