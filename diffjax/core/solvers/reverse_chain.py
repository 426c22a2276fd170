"""The reverse Markov chain and its deterministic limit: DDPM and DDIM.

Song et al. 2021a is "Denoising Diffusion Implicit Models", Song et al. 2021b "Score-Based Generative Modeling through
Stochastic Differential Equations", here and in the other files.
"""

import numpy as np

from diffjax.core import chain
from diffjax.core.checks import check_choice, check_number
from diffjax.core.schedules import Schedule
from diffjax.core.solvers.plans import Plan, Point, Row, levels, points, tabulate, units


def ddpm(schedule: Schedule, grid, *, variance: str = 'small') -> Plan:
    """Ancestral sampling: the posterior with the estimated x0 in x0's place (Ho et al. 2020, Algorithm 2).

    Order 1 in distribution, one evaluation a step.

    Args:
        variance: of the noise: 'small', the posterior's beta~; 'large', the kernel's beta; 'learned', between the two
            where the denoiser says (Nichol & Dhariwal 2021, Eq. 15). The step that ends at sigma = 0 adds none.
    """
    check_choice("ddpm's variance", variance, ('small', 'large', 'learned'))
    t, alpha, sigma, _ = levels(schedule, grid)
    if t[0] < t[-1]:
        raise ValueError('ddpm walks the reverse chain and needs a falling grid; for inversion use ddim, euler or heun')
    x, _, h, z = units(1, 1)
    of_x, of_x0, small = chain.posterior(schedule, t[1:], t[:-1])
    span = np.where(sigma[1:] == 0, 0.0, chain.log_variance_range(schedule, t[1:], t[:-1]))
    std = np.sqrt(small) * (np.exp(0.5 * span) if variance == 'large' else 1.0)
    rows = []
    for i in range(len(t) - 1):
        row = of_x[i] * x + of_x0[i] * h[0] + std[i] * z[0]
        rows.append(Row(t[i], (1, 0), row, log_variance_range=span[i] if variance == 'learned' else 0.0))
    return tabulate(schedule, rows, num_noises=1)


def ddim(schedule: Schedule, grid, *, eta: float = 0.0) -> Plan:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 v) eps + eta sqrt(v) z, v the posterior's variance.

    Song et al. 2021a, Eq. 12 and 16. Order 1, one evaluation a step. eta = 0 is Euler's method in
    sigma / alpha, eta = 1 is DDPM with the small variance.
    """
    check_number("ddim's eta", eta, high=1.0)
    every = points(schedule, grid)
    if eta and every[0].t < every[-1].t:
        raise ValueError(f'on a rising grid ddim is deterministic: eta = 0, got {eta}')
    noises = 1 if eta else 0
    rows = [ddim_row(schedule, *pair, eta, noises=noises) for pair in zip(every, every[1:])]
    return tabulate(schedule, rows, num_noises=noises)


def ddim_row(schedule: Schedule, here: Point, there: Point, eta: float, capacity: int = 1, noises: int = 1) -> Row:
    """One step of `ddim`, which is finite everywhere, in a table of `capacity` estimates and `noises` draws.

    Without noise on the way up, whatever eta.
    """
    _, _, h, z = units(capacity, noises)
    v = eta**2 * chain.posterior(schedule, there.t, here.t)[2] if eta and here.sigma > there.sigma else 0.0
    row = h[0] + np.sqrt(v) * z[0] if v else h[0]
    return Row(here.t, (there.alpha, np.sqrt(there.sigma**2 - v)), row)
