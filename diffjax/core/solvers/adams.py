"""Adams-Bashforth methods: LMS in a coordinate, and PNDM, which takes DDIM for its step."""

import numpy as np

from diffjax.core.checks import check_choice
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.coordinates import integrand
from diffjax.core.solvers.exponential import integrate
from diffjax.core.solvers.plans import FAR, Plan, Point, Row, points, tabulate, units

EQUAL_STEPS = {  # Adams-Bashforth's coefficients where all steps are alike
    1: np.array([1.0]),
    2: np.array([3.0, -1.0]) / 2,
    3: np.array([23.0, -16.0, 5.0]) / 12,
    4: np.array([55.0, -59.0, 37.0, -9.0]) / 24,
}


def lms(schedule: Schedule, grid, *, order: int = 4, coordinate: str = 'sigma/alpha') -> Plan:
    """Adams-Bashforth on the grid as it is: the slope interpolated by a polynomial in the coordinate (k-diffusion's
    linear multistep). Order 1 to 4, one evaluation a step.

    The orders of the first steps rise from 1. To sigma = 0 in sigma / alpha the order is kept; a step that touches an
    infinite coordinate is ddim's.

    Args:
        coordinate: as for `euler`; 't' on a flow schedule is Adams-Bashforth on the velocity.
    """
    check_choice("lms's order", order, EQUAL_STEPS)
    t, n, u, slope = integrand(schedule, grid, coordinate)
    x, _, h, _ = units(order)
    rows, nodes = [], []
    for i in range(len(t) - 1):
        if not np.isfinite(u[i] + u[i + 1]):
            rows.append(Row(t[i], (schedule.alpha(t[i + 1]), schedule.sigma(t[i + 1])), h[0]))
            nodes = []
            continue
        nodes = [u[i], *nodes][:order]
        weights = integrate(np.ones_like, u[i], u[i + 1], np.array(nodes))
        rows.append(Row(t[i], slope[i], n[i + 1] * (x / n[i] + weights @ h[: len(nodes)])))
    return tabulate(schedule, rows)


def transfer(x: np.ndarray, eps: np.ndarray, here: Point, there: Point) -> np.ndarray:
    """DDIM's step with any eps: alpha_s / alpha_t x + (sigma_s - alpha_s sigma_t / alpha_t) eps."""
    ratio = there.alpha / here.alpha
    return ratio * x + (there.sigma - ratio * here.sigma) * eps


def pndm(schedule: Schedule, grid, *, warmup: str = 'plms') -> Plan:
    """PNDM: DDIM's step with Adams-Bashforth's mean of four eps, its coefficients those of equal steps in t (Liu et al.
    2022, Eq. 11 to 13 and Algorithm 2).

    Order 2, one evaluation a step and those of the warm-up.

    Args:
        warmup: 'plms', the first step twice (one evaluation more; Stable Diffusion's PLMS), and orders rising to 4;
            'prk', three steps of the pseudo Runge-Kutta method (nine evaluations more). A step from alpha = 0 is
            ddim's and comes before either.
    """
    check_choice('warmup', warmup, ('plms', 'prk'))
    every = points(schedule, grid)
    x, anchor, h, _ = units(5 if warmup == 'plms' else 13)
    rows, places = [], None  # places in the history of the eps that count, newest first; None before the warm-up
    for here, there in zip(every, every[1:]):
        if here.ratio > FAR or there.alpha == 0:
            rows.append(Row(here.t, (there.alpha, there.sigma), h[0]))
            places = None
        elif warmup == 'prk' and there.sigma > 0 and (places is None or len(places) < 3):
            rows += _pseudo_runge_kutta(schedule, here, there, x, anchor, h)
            places = [3] + [place + 4 for place in places or []]
        elif places is None:
            rows.append(Row(here.t, (0, 1), transfer(x, h[0], here, there), to_anchor=x))
            places = [0]
            if there.sigma > 0:
                rows.append(Row(there.t, (0, 1), transfer(anchor, (h[0] + h[1]) / 2, here, there)))
                places = [1]
        else:
            places = [0, *(place + 1 for place in places)][:4]
            mean = EQUAL_STEPS[len(places)] @ h[places]
            rows.append(Row(here.t, (0, 1), transfer(x, mean, here, there)))
    return tabulate(schedule, rows)


def _pseudo_runge_kutta(schedule: Schedule, here: Point, there: Point, x, anchor, h) -> list[Row]:
    """The classical Runge-Kutta method with DDIM's step (Liu et al. 2022, Eq. 13)."""
    (middle,) = points(schedule, [here.t, 0.5 * (here.t + there.t)])[1:]
    return [
        Row(here.t, (0, 1), transfer(x, h[0], here, middle), to_anchor=x),
        Row(middle.t, (0, 1), transfer(anchor, h[0], here, middle)),
        Row(middle.t, (0, 1), transfer(anchor, h[0], here, there)),
        Row(there.t, (0, 1), transfer(anchor, (h[3] + 2 * h[2] + 2 * h[1] + h[0]) / 6, here, there)),
    ]
