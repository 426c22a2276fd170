"""Exact steps of the diffusion equations for an estimate that is a polynomial: what exponential integrators share.

With lam = log(alpha / sigma), h = lam_s - lam_t and the estimate known as a function of lam, a step from t to s is

    x_s = sigma_s / sigma_t e^(-tau^2 h) x_t + alpha_s W[x0] + sigma_s sqrt(1 - e^(-2 tau^2 h)) z,             (1)
          W[f] = (1 + tau^2) integral from lam_t to lam_s of e^(-(1 + tau^2) (lam_s - lam)) f(lam) dlam
    x_s = alpha_s (x_t / alpha_t + V[eps]),   V[f] = - integral from lam_t to lam_s of e^(-lam) f(lam) dlam    (2)

tau = 0 is the probability-flow ODE, in which both say the same (Lu et al. 2022a, Eq. 3.4; 2022b, Eq. 9); tau = 1 the
reverse SDE, anything else lies between or beyond (Xue et al. 2023, Eq. 11). Solvers differ in which estimate they
interpolate, at which nodes, and in which coordinate the interpolant is a polynomial.
"""

from typing import NamedTuple

import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import FAR, Point

GAUSS, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(40)

KNEE = 3.0  # the sigma / alpha at which `softplus` turns: some times the data's scale

POLYNOMIALS = {  # the coordinate in which the interpolant is a polynomial, from lam
    'logsnr': lambda schedule, lam, knee: lam,
    'softplus': lambda schedule, lam, knee: np.logaddexp(0.0, lam + np.log(knee)),  # finite where alpha = 0
    'sigma/alpha': lambda schedule, lam, knee: np.exp(-lam),
    'angle': lambda schedule, lam, knee: np.arctan(np.exp(-lam)),
    't': lambda schedule, lam, knee: schedule.t_of_logsnr(2 * lam),
}

REMEMBER = {'x0': (1.0, 0.0), 'eps': (0.0, 1.0)}


class Node(NamedTuple):
    """An estimate in the history: its place there, newest 0, and where it was made."""

    place: int
    lam: float


def lagrange(nodes: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The polynomials that are 1 at one node and 0 at the others, at v. nodes: [n], v: [m] -> [n, m]."""
    others = ~np.eye(len(nodes), dtype=bool)
    gaps = np.where(others, nodes[:, None] - nodes[None], 1.0)
    factors = np.where(others[..., None], (v[None, None] - nodes[None, :, None]) / gaps[..., None], 1.0)
    return factors.prod(1)


def integrate(kernel, low: float, high: float, nodes: np.ndarray, coordinate=lambda v: v) -> np.ndarray:
    """The integrals from low to high of kernel(v) times each of Lagrange's polynomials in coordinate(v). -> [n].

    By Gauss's rule with 40 points, which is exact to rounding for what stands here.
    """
    v = 0.5 * (high - low) * GAUSS + 0.5 * (high + low)
    return lagrange(coordinate(nodes), coordinate(v)) @ (0.5 * (high - low) * GAUSS_WEIGHTS * kernel(v))


def exact_weights(
    schedule: Schedule,
    lam_t: float,
    lam_s: float,
    lam: np.ndarray,
    *,
    predict: str,
    tau: float = 0.0,
    polynomial: str = 'logsnr',
    knee: float = KNEE,
) -> np.ndarray:
    """W or V of Eq. 1 and 2 as weights of the estimates at the nodes lam: [n] -> [n]."""
    rate = 1 + tau**2
    if len(lam) == 1:
        whole = -np.expm1(-rate * (lam_s - lam_t)) if predict == 'x0' else np.exp(-lam_s) - np.exp(-lam_t)
        return np.array([whole])
    if polynomial == 'softplus' and predict == 'x0':
        return _soft_weights(lam_t, lam_s, lam, rate, knee)

    def kernel(v):
        return rate * np.exp(-rate * (lam_s - v)) if predict == 'x0' else -np.exp(-v)

    return integrate(kernel, lam_t, lam_s, lam, lambda v: POLYNOMIALS[polynomial](schedule, v, knee))


def _soft_weights(lam_t: float, lam_s: float, lam: np.ndarray, rate: float, knee: float) -> np.ndarray:
    """W for a polynomial in v = log(1 + knee e^lam), over which it is integrated too: lam may be -infinite."""

    def kernel(v):
        return rate * np.exp(rate * (np.log(np.expm1(v) / knee) - lam_s)) / -np.expm1(-v)

    low, high, *nodes = POLYNOMIALS['softplus'](None, np.array([lam_t, lam_s, *lam]), knee)
    return integrate(kernel, low, high, np.array(nodes))


def last_weights(lam: np.ndarray, *, predict: str) -> np.ndarray:
    """W or V of a step from lam[0] to sigma = 0: the interpolant is a polynomial in u = sigma / alpha. lam: [n] -> [n].

    eps: Adams-Bashforth in u, V[f] = - integral from 0 to u_t. x0: the polynomial's value at u = 0, without a linear
    term, for on the exact path dx0/du = -u deps/du. At most three nodes: it is an extrapolation.
    """
    u = np.exp(-lam[:3])
    if predict == 'eps':
        weights = -integrate(np.ones_like, 0.0, u[0], u)
    else:
        powers = np.r_[0, np.arange(2, len(u) + 1)]
        weights = np.linalg.solve((u / u.max())[None] ** powers[:, None], np.eye(len(u))[0])
    return np.append(weights, np.zeros(len(lam) - len(u)))


def factors(here: Point, there: Point, *, predict: str, tau: float = 0.0) -> tuple[float, float, float]:
    """(factor of x, factor of the weighted estimates, standard deviation of the noise) of Eq. 1 or 2."""
    if predict == 'eps':
        return there.alpha / here.alpha, there.alpha, 0.0
    if there.sigma == 0 or (tau and np.isinf(here.lam)):
        return 0.0, there.alpha, there.sigma
    fade = tau**2 * (there.lam - here.lam) if tau else 0.0
    return (
        there.sigma / here.sigma * np.exp(-fade),
        there.alpha,
        there.sigma * np.sqrt(-np.expm1(-2 * fade)),
    )


def is_landing(here: Point, there: Point, *, predict: str) -> bool:
    """Whether only x_s = alpha_s x0 + sigma_s eps, DDIM's step, is finite between the two points."""
    return there.alpha == 0 or (here.sigma == 0 if predict == 'x0' else here.ratio > FAR)
