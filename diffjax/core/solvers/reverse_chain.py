"""The reverse Markov chain and its deterministic limit: DDPM and DDIM."""

import numpy as np

from diffjax.core import chain
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import Plan, Row, levels, tabulate, units


def ddpm(schedule: Schedule, grid, *, variance: str = 'small') -> Plan:
    """Ancestral sampling: the posterior with the estimated x0 in x0's place (Ho et al. 2020, Algorithm 2).

    Order 1 in distribution, one evaluation a step.

    Args:
        variance: of the noise: 'small', the posterior's beta~; 'large', the kernel's beta; 'learned', between the two
            where the denoiser says (Nichol & Dhariwal 2021, Eq. 15). The step that ends at sigma = 0 adds none.
    """
    if variance not in ('small', 'large', 'learned'):
        raise ValueError(f"ddpm's variance is 'small', 'large' or 'learned', got {variance!r}")
    t, alpha, sigma, _ = levels(schedule, grid)
    if t[0] < t[-1]:
        raise ValueError('ddpm walks the reverse chain and needs a falling grid; for inversion use ddim, euler or heun')
    x, _, h, z = units(1, 1)
    rows = []
    for i in range(len(t) - 1):
        of_x, of_x0, small = chain.posterior(schedule, t[i + 1], t[i])
        span = 0.0 if sigma[i + 1] == 0 else chain.log_variance_range(schedule, t[i + 1], t[i])
        std = np.sqrt(small) * (np.exp(0.5 * span) if variance == 'large' else 1.0)
        row = of_x * x + of_x0 * h[0] + std * z[0]
        rows.append(Row(t[i], (1, 0), row, log_variance_range=span if variance == 'learned' else 0.0))
    return tabulate(schedule, rows, num_noises=1)


def ddim(schedule: Schedule, grid, *, eta: float = 0.0) -> Plan:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 v) eps + eta sqrt(v) z, v the posterior's variance.

    Song et al. 2021, Eq. 12 and 16. Order 1, one evaluation a step. eta = 0 is Euler's method in
    sigma / alpha, eta = 1 is DDPM with the small variance.
    """
    t, alpha, sigma, _ = levels(schedule, grid)
    if not 0 <= eta <= 1:
        raise ValueError(f'eta lies in [0, 1], got {eta}')
    if eta and t[0] < t[-1]:
        raise ValueError(f'on a rising grid ddim is deterministic: eta = 0, got {eta}')
    x, _, h, z = units(1, 1 if eta else 0)
    rows = []
    for i in range(len(t) - 1):
        v = eta**2 * chain.posterior(schedule, t[i + 1], t[i])[2] if eta else 0.0
        row = h[0] + np.sqrt(v) * z[0] if eta else h[0]
        rows.append(Row(t[i], (alpha[i + 1], np.sqrt(sigma[i + 1] ** 2 - v)), row))
    return tabulate(schedule, rows, num_noises=1 if eta else 0)
