"""Predictor-corrector methods: UniPC and SA-Solver."""

import numpy as np

from diffjax.core.checks import check_choice, check_number, check_window
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.exponential import KNEE, POLYNOMIALS, REMEMBER, exact_weights
from diffjax.core.solvers.multistep import LOWEST, Method, Rule, multistep
from diffjax.core.solvers.plans import Plan, check_noise
from diffjax.core.types import OrNone


def unipc(
    schedule: Schedule,
    grid,
    *,
    order: int = 3,
    variant: str = 'bh2',
    predict: str = 'x0',
    polynomial: str = 'logsnr',
    knee: float | None = None,
    final: str = 'adams',
    start: str = 'multistep',
) -> Plan:
    """UniPC-p: predictor UniP and corrector UniC of order p (Zhao et al. 2023, Algorithm 5 to 8).

    Order at least p, 1 to 4; one evaluation a step.

    Args:
        variant: B(h) = h ('bh1') or expm1(h) ('bh2'). It is felt in the second order of the predictor and the first of
            the corrector, where the paper fixes the coefficient at 1/2; elsewhere B cancels and the interpolant is
            integrated exactly, as it is at every order in another coordinate than the paper's: there is no bh1 there.
        predict: the estimate that is interpolated, 'x0' or 'eps'.
        polynomial: the coordinate in which the interpolant is one: the paper's 'logsnr', 'sigma/alpha', 'angle', 't',
            or, for x0, 'softplus', log(1 + knee alpha / sigma), like logsnr at low noise but finite at alpha = 0, so
            that from pure noise on nothing falls back to first order; made for the grid of the same name.
        knee: of 'softplus', as for that grid; None for 3.
        final: 'lower' is the paper's; see `Method`, as for start.
    """
    _check_unipc(order, variant, predict, polynomial, knee)
    predictor, corrector = _interpolants(schedule, polynomial, predict=predict, knee=knee or KNEE)
    if polynomial == 'logsnr':
        predictor, corrector = _published(predictor, corrector, variant, predict)
    method = Method(
        order,
        predictor,
        corrector=corrector,
        corrector_nodes=order + 1,
        predict=predict,
        lowest=-np.inf if polynomial == 'softplus' else LOWEST,
        final=final,
        start=start,
    )
    return multistep(schedule, grid, method)


def _check_unipc(order: int, variant: str, predict: str, polynomial: str, knee: float | None) -> None:
    check_choice("unipc's order", order, range(1, 5))
    check_choice('variant', variant, ('bh1', 'bh2'))
    check_choice('predict', predict, REMEMBER)
    check_choice('polynomial', polynomial, POLYNOMIALS)
    if variant != 'bh2' and polynomial != 'logsnr':
        raise ValueError(f"unipc's variant={variant} is felt with polynomial=logsnr alone, got polynomial={polynomial}")
    if knee is not None:
        check_number("unipc's knee", knee, inside=True)
        if polynomial != 'softplus':
            raise ValueError(f"unipc's knee is that of polynomial=softplus, got polynomial={polynomial}")


def _interpolants(schedule: Schedule, polynomial: str, **options) -> tuple[Rule, Rule]:
    """Predictor and corrector that integrate the interpolant exactly; a corrector's second node is the step's start."""

    def at(place):
        return lambda lam_s, lam, tau: exact_weights(schedule, lam[place], lam_s, lam, polynomial=polynomial, **options)

    return at(0), at(1)


def _published(predictor: Rule, corrector: Rule, variant: str, predict: str) -> tuple[Rule, Rule]:
    """The two with the paper's coefficient of 1/2 where there are two nodes."""

    def line(lam_t, lam_s, other):
        """Weights of (the estimate at `other`, the one at t): B / 2 of the difference over the step."""
        h, whole = lam_s - lam_t, exact_weights(None, lam_t, lam_s, np.zeros(1), predict=predict)[0]
        b = whole if variant == 'bh2' else (h if predict == 'x0' else -h * np.exp(-lam_s))
        slope = 0.5 * b * h / (other - lam_t)
        return np.array([slope, whole - slope])

    def ahead(lam_s, lam, tau):
        return line(lam[0], lam_s, lam[1])[::-1] if len(lam) == 2 else predictor(lam_s, lam, tau)

    def behind(lam_s, lam, tau):
        return line(lam[1], lam_s, lam_s) if len(lam) == 2 else corrector(lam_s, lam, tau)

    return ahead, behind


def sa_solver(
    schedule: Schedule,
    grid,
    *,
    tau: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
    predictor: int = 3,
    corrector: OrNone = 4,
    adapted: bool = False,
    final: str = 'lower',
) -> Plan:
    """SA-Solver: stochastic Adams methods, predictor and corrector (Xue et al. 2023, Algorithm 1, Eq. 11 to 17).

    One evaluation a step. Order 1 in distribution; for tau = 0 and final = 'adams' the greater of `predictor` and of
    `corrector`, which adds one at most.

    Args:
        tau: the noise: 0 for the ODE, 1 for the reverse SDE, in steps from times between `low` and `high`; 0 elsewhere.
        predictor, corrector: how many estimates each interpolates, 1 to 4 and 2 to 4; a corrector of 0 leaves it out.
        adapted: the authors' code's second order, which puts h^2 / 2 in place of the slope's exact integral.
        final: see `Method`.
    """
    check_choice("sa_solver's predictor", predictor, range(1, 5))
    check_choice("sa_solver's corrector", corrector, (0, 2, 3, 4))
    check_choice("sa_solver's adapted", adapted, (False, True))
    check_window('sa_solver', low, high, 1.0)
    check_noise('sa_solver', grid, tau=tau)
    ahead, behind = (_adams(schedule, place, adapted=adapted) for place in (0, 1))
    method = Method(
        predictor,
        ahead,
        corrector=behind if corrector else None,
        corrector_nodes=corrector,
        tau=lambda t: tau if low <= t <= high else 0.0,
        final=final,
    )
    return multistep(schedule, grid, method)


def _adams(schedule: Schedule, place: int, *, adapted: bool) -> Rule:
    """The stochastic Adams rule of a step that starts at the node in this place: 0 predicts, 1 corrects."""

    def rule(lam_s, lam, level):
        lam_t = lam[place]
        if not adapted or len(lam) != 2:
            return exact_weights(schedule, lam_t, lam_s, lam, predict='x0', tau=level)
        h, rate = lam_s - lam_t, 1 + level**2
        slope, whole = 0.5 * rate * h**2 / (lam[1 - place] - lam_t), -np.expm1(-rate * h)
        return np.array([whole - slope, slope] if place == 0 else [slope, whole - slope])

    return rule
