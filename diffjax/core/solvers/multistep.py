"""The exponential multistep engine: one evaluation a step, which also uses the estimates of the steps before it.

With a corrector, an evaluation also corrects the step that led to it before the next step sets out. The anchor carries
what that needs: the corrected x before, taken over its step by everything but the estimates, noise included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffjax.core.checks import check_choice
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.exponential import (
    REMEMBER,
    Node,
    exact_weights,
    factors,
    is_landing,
    last_weights,
)
from diffjax.core.solvers.plans import Plan, Point, Row, is_inner, points, tabulate, units
from diffjax.core.solvers.singlestep import start_rows

FINALS = ('adams', 'euler', 'lower')
LOWEST = -1e300  # of a finite lam
NEAR = 1e-4  # of a step; in lam where the step is infinite
STARTS = ('multistep', 'singlestep')

Rule = Callable[[float, np.ndarray, float], np.ndarray]  # (lam_s, lam of the nodes, newest first, tau) -> weights


@dataclass(frozen=True)
class Method:
    """A multistep method: its rules, and how it begins and ends.

    order, predictor: so many nodes go into a step, and the rule that weighs them.
    corrector: a rule whose first node is the step's end and whose second is its start; of `corrector_nodes` nodes.
    predict: the estimate that is interpolated, 'x0' or 'eps'.
    tau: the noise of the step from t: Eq. 1 in exponential.py.
    lowest: the lam from which on the rules take a node; minus infinity where they can do with alpha = 0.
    final: the step to sigma = 0, where lam is infinite: 'adams' interpolates in sigma / alpha there, over the nodes
        since the last noise, and keeps the order; 'euler' takes the estimate of x0 as it is, which is of first order;
        'lower' does that and lets the orders of the steps before it fall towards 1, which caps the order of the whole
        at 2.
    start: 'multistep', orders rise from 1, which caps the order of the whole at 2, with a corrector at 3;
        'singlestep', the first step is of third order, by two evaluations more.
    """

    order: int
    predictor: Rule
    corrector: Rule | None = None
    corrector_nodes: int = 0
    predict: str = 'x0'
    tau: Callable[[float], float] = lambda t: 0.0
    lowest: float = LOWEST
    final: str = 'adams'
    start: str = 'multistep'

    def __post_init__(self):
        check_choice('final', self.final, FINALS)
        check_choice('start', self.start, STARTS)

    def order_at(self, i: int, num_steps: int, order: int, there: Point) -> int:
        """Of step i: 0 for the jump to sigma = 0, and with final='lower' falling to 1 before it."""
        if self.final != 'adams' and there.sigma == 0:
            return 0
        return min(order, num_steps - i) if self.final == 'lower' else order


def usable(nodes: list[Node], order: int, lowest: float, step: float) -> tuple[list[int], np.ndarray]:
    """(places in the history, lam) of the newest `order` nodes from `lowest` on for a step in lam.

    Left out are nodes at an infinite lam, and those that nearly coincide with a newer one: what they differ by is
    rounding, and the weights would multiply it.
    """
    chosen, apart = [], NEAR * (abs(step) if np.isfinite(step) else 1.0)
    for node in nodes:
        if lowest <= node.lam < np.inf and all(abs(node.lam - newer.lam) > apart for newer in chosen):
            chosen.append(node)
    return [node.place for node in chosen[:order]], np.array([node.lam for node in chosen[:order]])


def remembered(nodes: list[Node], lam: float, capacity: int) -> list[Node]:
    """The history after one more estimate, made at lam."""
    return [Node(0, lam), *(Node(n.place + 1, n.lam) for n in nodes if n.place + 1 < capacity)]


def advance(method: Method, here: Point, there: Point, nodes: list[Node], order: int):
    """A step as (factor of x, {place in the history: coefficient}, standard deviation of the noise).

    order: 0 for a step to sigma = 0 that interpolates in lam, which is of first order there.
    """
    options = {'predict': method.predict, 'tau': method.tau(here.t)}
    of_x, of_sum, std = factors(here, there, **options)
    lowest = max(method.lowest, LOWEST) if np.isinf(there.lam) else method.lowest
    places, lam = usable(nodes, order, lowest, there.lam - here.lam)
    if not (method.lowest <= here.lam < np.inf) or not order or not len(lam):
        places, weights = [0], exact_weights(None, here.lam, there.lam, np.zeros(1), **options)
    elif np.isinf(there.lam):
        weights = last_weights(lam, predict=method.predict)
    else:
        weights = method.predictor(there.lam, lam, method.tau(here.t))
    return of_x, dict(zip(places, of_sum * weights)), std


def correct(method: Method, before: Point, here: Point, nodes: list[Node], order: int):
    """{place in the history: coefficient} that takes the anchor to `here`, the estimate made there included."""
    places, lam = usable(nodes, order + 1, method.lowest, here.lam - before.lam)
    weights = method.corrector(here.lam, lam, method.tau(before.t))
    return dict(zip(places, factors(before, here, predict=method.predict)[1] * weights))


def multistep(schedule: Schedule, grid, method: Method) -> Plan:
    """The plan of a method whose steps are its rules. Steps that start where the history is short have lower order."""
    every, stages, predict = points(schedule, grid), method.start == 'singlestep' and method.order > 1, method.predict
    num_steps, noisy = len(every) - 1, any(method.tau(p.t) for p in every[:-1])
    capacity = max(method.order, method.corrector_nodes) + stages
    x, anchor, h, z = units(max(capacity, 3) if stages else capacity, int(noisy))
    rows, nodes, before, calm = [], [], None, 0
    for i, (here, there) in enumerate(zip(every, every[1:])):
        if is_landing(here, there, predict=predict):
            rows.append(Row(here.t, (there.alpha, there.sigma), h[0]))
            nodes, before = [], None
            continue
        nodes, corrected = remembered(nodes, here.lam, len(h)), x
        if method.corrector and before:
            at = method.order_at(i - 1, num_steps, method.corrector_nodes - 1, here)
            corrected = anchor + sum(c * h[place] for place, c in correct(method, before, here, nodes, at).items())
        if stages and is_inner(here, there):
            first, nodes = start_rows(schedule, here, there, len(h), predict=predict)
            rows, stages, before = rows + first, False, None
            continue
        at = method.order_at(i, num_steps, method.order, there)
        at = min(at, calm + 1) if there.sigma == 0 else at  # extrapolation would multiply what noise did to the nodes
        of_x, of_h, std = advance(method, here, there, nodes, at)
        carried = of_x * corrected + (std * z[0] if noisy else 0.0)
        row = carried + sum(c * h[place] for place, c in of_h.items())
        rows.append(Row(here.t, REMEMBER[predict], row, to_anchor=carried if method.corrector else None))
        before, calm = here if method.lowest <= here.lam < np.inf else None, 0 if std else calm + 1
    return tabulate(schedule, rows, num_noises=int(noisy))
