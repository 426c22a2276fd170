"""Multistep methods with an interpolated estimate: DEIS, DPM-Solver and DPM-Solver++, and their SDE forms."""

import numpy as np

from diffjax.core.checks import check_choice
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.exponential import POLYNOMIALS, exact_weights
from diffjax.core.solvers.multistep import Method, Rule, multistep
from diffjax.core.solvers.plans import Plan, check_noise


def deis(
    schedule: Schedule, grid, *, order: int = 3, polynomial: str = 't', final: str = 'adams', start: str = 'multistep'
) -> Plan:
    """DEIS (tAB-DEIS): eps interpolated by a polynomial, integrated exactly (Zhang & Chen 2023, Eq. 14 and 15).

    Order 1 to 4, one evaluation a step.

    Args:
        polynomial: the coordinate in which it is one: 't' (the paper's tAB), 'sigma/alpha' (its rho-AB, which is lms),
            'logsnr' (diffusers' DEISMultistepScheduler), 'angle'.
        final, start: see `Method`.
    """
    check_choice("deis's order", order, range(1, 5))
    check_choice('polynomial', polynomial, POLYNOMIALS)

    def rule(lam_s, lam, tau):
        return exact_weights(schedule, lam[0], lam_s, lam, predict='eps', polynomial=polynomial)

    return multistep(schedule, grid, Method(order, rule, predict='eps', final=final, start=start))


def dpm_solver_m(
    schedule: Schedule,
    grid,
    *,
    order: int = 2,
    halved: bool = False,
    final: str = 'adams',
    start: str = 'multistep',
) -> Plan:
    """The multistep form of DPM-Solver: eps interpolated in lambda (Lu et al. 2022a, section 3; 2022b, Table 1).

    Order 1 to 3, one evaluation a step. In the second order the difference has half the whole's weight, as in the
    papers' second order; the third integrates exactly.

    Args:
        halved, final, start: as for `dpmpp_3m`.
    """
    check_choice("dpm_solver_m's order", order, range(1, 4))
    exactly = _three(schedule, halved, predict='eps')

    def rule(lam_s, lam, tau):
        if len(lam) != 2:
            return exactly(lam_s, lam, tau)
        whole = exact_weights(schedule, lam[0], lam_s, lam[:1], predict='eps')[0]
        slope = 0.5 * whole * (lam_s - lam[0]) / (lam[0] - lam[1])
        return np.array([whole + slope, -slope])

    return multistep(schedule, grid, Method(order, rule, predict='eps', final=final, start=start))


def _pair(rate: float, lam_s: float, lam: np.ndarray, kind: str) -> np.ndarray:
    """Weights of (x0_t, x0_before): 'midpoint', half the whole; 'heun', the integral of the straight line."""
    h = rate * (lam_s - lam[0])
    whole, slope = -np.expm1(-h), (lam_s - lam[0]) / (lam[0] - lam[1])
    slope *= 0.5 * whole if kind == 'midpoint' else 1 + np.expm1(-h) / h
    return np.array([whole + slope, -slope])


def dpmpp_2m(schedule: Schedule, grid, *, final: str = 'adams', start: str = 'multistep') -> Plan:
    """DPM-Solver++(2M): a two-step exponential integrator in lambda = logsnr / 2 (Lu et al. 2022b, Algorithm 2).

    x_s = sigma_s / sigma_t x - alpha_s expm1(-h) D,  D = (1 + 1 / 2r) x0_t - 1 / 2r x0_before,  r = h_before / h.
    Order 2, one evaluation a step.

    Args:
        final: 'euler' is the form in use, 'adams' keeps the order to sigma = 0; see `Method`, as for start.
    """

    def rule(lam_s, lam, tau):
        return _pair(1.0, lam_s, lam, 'midpoint') if len(lam) == 2 else -np.expm1(lam[:1] - lam_s)

    return multistep(schedule, grid, Method(2, rule, final=final, start=start))


def dpmpp_3m(schedule: Schedule, grid, *, halved: bool = False, final: str = 'adams', start: str = 'multistep') -> Plan:
    """DPM-Solver++(3M): x0 interpolated over three steps, integrated exactly in lambda (Lu et al. 2022b, section 4).

    Order 3, one evaluation a step; 2 with `halved`.

    Args:
        halved: take half of the second difference, as diffusers and k-diffusion do: of second order, and often better
            at few steps on Karras grids.
        final, start: see `Method`.
    """
    return multistep(schedule, grid, Method(3, _three(schedule, halved, predict='x0'), final=final, start=start))


def _three(schedule: Schedule, halved: bool, *, predict: str) -> Rule:
    """The exact rule, or the one that halves its second difference."""
    check_choice('halved', halved, (False, True))

    def rule(lam_s, lam, tau):
        weights = exact_weights(schedule, lam[0], lam_s, lam, predict=predict, tau=tau)
        if not halved or len(lam) < 3:
            return weights
        gaps = lam[:, None] - lam[None] + np.eye(3)
        return weights - 0.5 * (weights @ (lam - lam[0]) ** 2) / gaps.prod(1)

    return rule


def dpmpp_2m_sde(schedule: Schedule, grid, *, kind: str = 'midpoint', eta: float = 1.0, final: str = 'euler') -> Plan:
    """DPM-Solver++(2M) for the reverse SDE (Lu et al. 2022b, Eq. 18; k-diffusion's eta).

    Order 1 in distribution (2 for eta = 0), one evaluation a step.

    Args:
        kind: 'midpoint' or 'heun', of the difference's factor; they agree to second order.
        eta: of the noise: 0 is dpmpp_2m, 1 the reverse SDE; tau^2 in exponential.py.
        final: see `Method`.
    """
    check_choice('kind', kind, ('midpoint', 'heun'))
    check_noise('dpmpp_2m_sde', grid, eta=eta)

    def rule(lam_s, lam, tau):
        rate = 1 + tau**2
        return _pair(rate, lam_s, lam, kind) if len(lam) == 2 else -np.expm1(rate * (lam[:1] - lam_s))

    return multistep(schedule, grid, Method(2, rule, tau=lambda t: np.sqrt(eta), final=final))


def dpmpp_3m_sde(schedule: Schedule, grid, *, eta: float = 1.0, halved: bool = False, final: str = 'euler') -> Plan:
    """DPM-Solver++(3M) for the reverse SDE. Order 1 in distribution (3 for eta = 0), one evaluation a step.

    Args:
        eta, final: as for `dpmpp_2m_sde`.
        halved: as for `dpmpp_3m`; k-diffusion's form.
    """
    check_noise('dpmpp_3m_sde', grid, eta=eta)
    return multistep(
        schedule, grid, Method(3, _three(schedule, halved, predict='x0'), tau=lambda t: np.sqrt(eta), final=final)
    )
