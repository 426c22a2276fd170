"""Any power-function average at any step, after the run, from snapshots of a few that were tracked.

An average of exponent g at step T weighs the parameters of step t by the density (g+1) t^g / T^(g+1) on [0, T]
(`training.averages.Power`). Snapshots of two widths, taken all along a run, are averages of many such densities; their
combination that is nearest to the density wanted is a problem of least squares (Karras et al. 2024, section 3.2 and
appendix C, algorithm 3):

    A x = b,    A_ij = <p_i, p_j>,    b_i = <p_i, p>                                                                (1)
    <p_a, p_b> = (g_a + 1) (g_b + 1) / (g_a + g_b + 1) (T_a / T_b)^(g_b) / T_b,    T_a <= T_b                       (2)

and the same x combines the snapshots themselves, because an average is linear in its density. What cannot be said is
small: a dozen snapshots or more reach widths from a little below the narrowest tracked to far beyond the widest.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import PyTree
from diffjax.training.averages import Average, Power, exponent_of
from diffjax.training.snapshots import DamagedSnapshot, Snapshots

log = logging.getLogger('diffjax')

SNAPSHOTS = 'ema_snapshots'  # folder of a workdir: the power profiles of training.ema, by step
RECONSTRUCTED = 'ema'  # folder of a workdir: one folder for each width, by step
TREE = 'params'  # the name of the one tree of a reconstructed step


class Profile(NamedTuple):
    """The densities of several averages: arrays of equal length."""

    steps: np.ndarray  # T
    exponents: np.ndarray  # g


class Reconstruction(NamedTuple):
    params: PyTree
    error: float  # of the density: |sum x_i p_i - p| / |p|
    num_snapshots: int


def power_profiles(ema: dict[str, float | Average]) -> dict[str, Power]:
    """The profiles of `training.ema` that snapshots keep."""
    return {name: profile for name, profile in ema.items() if isinstance(profile, Power)}


def dot_products(a: Profile, b: Profile) -> np.ndarray:
    """Equation (2): [len(a), len(b)]."""
    t_a, t_b = a.steps[:, None].astype(np.float64), b.steps[None, :].astype(np.float64)
    g_a, g_b = a.exponents[:, None], b.exponents[None, :]
    exponent = np.where(t_a <= t_b, g_b, g_a)  # that of the longer of the two
    shrink = (np.minimum(t_a, t_b) / np.maximum(t_a, t_b)) ** exponent
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * shrink / np.maximum(t_a, t_b)


def combination(snapshots: Profile, wanted: Profile) -> tuple[np.ndarray, np.ndarray]:
    """Equation (1) for each profile wanted: (weights [snapshots, wanted], relative errors [wanted]).

    Snapshots taken after the step that is wanted have weight 0.
    """
    weights = np.zeros((len(snapshots.steps), len(wanted.steps)))
    errors = np.ones(len(wanted.steps))
    for k in range(len(wanted.steps)):
        target = Profile(wanted.steps[k : k + 1], wanted.exponents[k : k + 1])
        past = snapshots.steps <= target.steps[0]
        if not past.any():
            continue
        known = Profile(snapshots.steps[past], snapshots.exponents[past])
        gram, right = dot_products(known, known), dot_products(known, target)[:, 0]
        size = 1 / np.sqrt(np.diag(gram))  # densities of length 1: the longest are the smallest
        x = size * np.linalg.lstsq(gram * size[:, None] * size, right * size, rcond=1e-13)[0]
        length = dot_products(target, target)[0, 0]
        errors[k] = np.sqrt(max(x @ gram @ x - 2 * x @ right + length, 0.0) / length)
        weights[past, k] = x
    return weights, errors


@jax.jit
def _add(totals: list[PyTree], params: PyTree, weights: jax.Array) -> list[PyTree]:
    """totals[k] + weights[k] params."""
    return [jax.tree.map(lambda t, p, w=weights[k]: t + w * p, total, params) for k, total in enumerate(totals)]


def reconstruct(
    snapshots: Snapshots, profiles: dict[str, Power], widths: Sequence[float], step: int, abstract_params: PyTree
) -> list[Reconstruction]:
    """The averages of relative widths `widths` at `step`, in one pass over the snapshots.

    profiles: what each snapshot holds. abstract_params: shapes, types and shardings of the parameters. In memory there
    is one snapshot of one profile at a time beside the results. A damaged snapshot is left out, with a warning.

    Raises ValueError where there is nothing to make them of.
    """
    wanted = Profile(np.full(len(widths), step), np.array([exponent_of(width) for width in widths]))
    steps = [taken for taken in snapshots.steps if taken <= step]
    while True:
        entries = [(taken, name) for taken in steps for name in profiles]
        if not entries:
            raise ValueError(f'there is no whole snapshot up to step {step} in {snapshots.folder}: {snapshots.steps}')
        exponents = np.array([profiles[name].exponent for _, name in entries])
        weights, errors = combination(Profile(np.array([taken for taken, _ in entries]), exponents), wanted)
        totals = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), abstract_params)] * len(widths)
        try:
            for (taken, name), row in zip(entries, weights):
                params = snapshots.restore(taken, name, abstract_params)
                totals = _add(totals, params, row.astype(np.float32))
        except DamagedSnapshot as error:
            log.warning('%s; it is left out', error)
            steps.remove(taken)
            continue
        return [Reconstruction(total, float(error), len(steps)) for total, error in zip(totals, errors)]


def folder_of(workdir: Path, sigma_rel: float, step: int) -> Path:
    """Where a reconstructed average is kept."""
    return Path(workdir) / RECONSTRUCTED / f'{sigma_rel:g}' / str(step)


def is_reconstructed(name: str) -> bool:
    """Whether a name of parameters means a reconstructed average: ema/WIDTH or ema/WIDTH/STEP."""
    return re.fullmatch(rf'{RECONSTRUCTED}/\d*\.?\d+(e-?\d+)?(/\d+)?', name) is not None


def read_reconstructed(workdir: Path, name: str, abstract_params: PyTree) -> tuple[PyTree, int]:
    """(parameters, step) of `ema/WIDTH/STEP`, or of the newest step of `ema/WIDTH`.

    Raises FileNotFoundError, saying what is there, and DamagedSnapshot.
    """
    _, width, *step = name.split('/')
    width = f'{float(width):g}'  # as folders are named
    steps = (Path(workdir) / RECONSTRUCTED).glob('*/*/*/')  # WIDTH/STEP/STEP: the inner one is there when it is whole
    there = {(path.parents[1].name, path.name) for path in steps if path.name == path.parent.name}
    found = [int(number) for other, number in there if other == width and (not step or number == step[0])]
    if not found:
        names = [f'{RECONSTRUCTED}/{a}/{b}' for a, b in sorted(there)]
        raise FileNotFoundError(
            f'{workdir} holds no {name}: it has {", ".join(names) or "none"}; make it with --mode=ema '
            f'--workdir={workdir} --sigma_rel={width}' + (f' --step={step[0]}' if step else '')
        )
    number = max(found)
    store = Snapshots(Path(workdir) / RECONSTRUCTED / width / str(number))
    params = store.restore(number, TREE, abstract_params)
    store.close()
    return params, number
