"""What the laws of this room are asked of: one entry for each name in a module's `__all__`.

A new schedule, target, weight, time distribution, grid or solver enters every law through these fixtures. Where a law
needs a statement of its own about each entry (its formula, its order), the test holds a table by name, and an entry
that is missing there fails with a KeyError that names it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import grids, oracles, parameterizations, schedules, solvers, times, weights
from diffjax.core.guidance import Guidance, classifier_free
from diffjax.core.sampling import pad, sample, sample_keys

SETTINGS = {  # the settings of a solver that are methods of their own
    'ddpm': ({'variance': 'small'}, {'variance': 'large'}, {'variance': 'learned'}),
    'ddim': ({'eta': 0.0}, {'eta': 0.5}, {'eta': 1.0}),
    'euler': tuple({'coordinate': c} for c in solvers.COORDINATES),
    'heun': tuple({'coordinate': c} for c in solvers.COORDINATES),
}
SCHEDULES = {  # one example of each schedule
    name: getattr(schedules, name)(**{'Shifted': {'base': schedules.Cosine(), 'logsnr_shift': -1.4}}.get(name, {}))
    for name in schedules.__all__
}
VARIANTS = {  # settings of schedules that are curves of their own
    'Shifted-Flow': schedules.Shifted(base=schedules.Flow(), shift=3.0),
    'Shifted-VE': schedules.Shifted(base=schedules.VE(), logsnr_shift=1.2),
    'Shifted-ScaledLinear': schedules.Shifted(base=schedules.ScaledLinear(), resolution=128),
    'ScaledLinear-zero': schedules.ScaledLinear(zero_terminal=True),
    'Shifted-SquaredCos-zero': schedules.Shifted(base=schedules.SquaredCos(zero_terminal=True), resolution=96),
    'Sigmoid-tau': schedules.Sigmoid(start=0.0, end=3.0, tau=0.7),
}
SOLVER_SCHEDULES = 'Flow', 'Cosine', 'ScaledLinear', 'EDM', 'VE'  # each kind once: a program is compiled for each
SOLVER_GRIDS = {  # each kind once: from t = 1 or short of it, to t = 0 or to the lowest level
    'uniform': grids.uniform,
    'logsnr': grids.logsnr,
    'karras': grids.karras,
    'karras-lowest': functools.partial(grids.karras, end='lowest'),
}
SOLVERS = [(name, options) for name in solvers.__all__ for options in SETTINGS.get(name, ({},))]


@pytest.fixture(scope='session', params=SCHEDULES)
def schedule(request):
    """Every schedule: for laws that cost little."""
    return SCHEDULES[request.param]


@pytest.fixture(scope='session', params=SCHEDULES | VARIANTS)
def any_schedule(request):
    """Every schedule in every kind of setting: for the laws of schedules themselves."""
    return (SCHEDULES | VARIANTS)[request.param]


@pytest.fixture(scope='session', params=SOLVER_SCHEDULES)
def solver_schedule(request):
    """A few: for what is asked of every solver."""
    return SCHEDULES[request.param]


@pytest.fixture(scope='session', params=parameterizations.__all__)
def parameterization(request):
    return getattr(parameterizations, request.param)()


@pytest.fixture(scope='session', params=times.__all__)
def distribution(request):
    return getattr(times, request.param)()


@pytest.fixture(scope='session', params=weights.__all__)
def weight(request):
    return getattr(weights, request.param)


@pytest.fixture(scope='session', params=grids.__all__)
def grid(request):
    if request.param == 'times':
        return lambda schedule, num_steps: grids.times(
            schedule, num_steps, values=[*np.cos(np.linspace(0, 1.5, num_steps)), 0.0]
        )
    return getattr(grids, request.param)


@pytest.fixture(scope='session', params=SOLVER_GRIDS)
def solver_grid(request):
    """A few: for what is asked of every solver."""
    return SOLVER_GRIDS[request.param]


@pytest.fixture(scope='session', params=SOLVERS, ids=lambda s: '-'.join([s[0], *map(str, s[1].values())]))
def solver(request):
    """(name, options, function)."""
    name, options = request.param
    return name, options, functools.partial(getattr(solvers, name), **options)


def true_target(name, schedule, x0, eps, t):
    """Every target written out, without rows, in float64. t: []."""
    alpha, sigma = float(schedule.alpha(np.float64(t))), float(schedule.sigma(np.float64(t)))
    x, h = alpha * x0 + sigma * eps, 1e-6 * min(t, 1 - t)

    def path(time):
        return schedule.alpha(np.float64(time)) * x0 + schedule.sigma(np.float64(time)) * eps

    def edm():
        y, noise, sigma_data = x / alpha, sigma / alpha, 0.5  # Karras et al. 2022, Table 1
        c_skip = sigma_data**2 / (noise**2 + sigma_data**2)
        c_out = noise * sigma_data / np.sqrt(noise**2 + sigma_data**2)
        return (x0 - c_skip * y) / c_out

    return {
        'Eps': lambda: eps,
        'X0': lambda: x0,
        'V': lambda: alpha * eps - sigma * x0,
        'Velocity': lambda: (path(t + h) - path(t - h)) / (2 * h),
        'Score': lambda: -(x - alpha * x0) / sigma**2,
        'EDM': edm,
    }[name]()


@pytest.fixture(scope='session')
def formula():
    return true_target


class Program:
    """One compiled float64 sampler of a guided 2-D mixture; it counts how often the denoiser is traced."""

    ROWS, REMEMBERED, NOISES, BATCH = 400, 2, 1, 24

    def __init__(self, schedule):
        self.schedule, self.mixture, self.traces = schedule, oracles.gmm2d(), 0
        exact = self.mixture.denoiser(schedule)

        def apply(state, x, t, cond):
            self.traces += 1
            return exact.apply(state, x, t, cond)

        def follow(plan, x, cond, keys, guidance):
            denoiser = classifier_free(exact._replace(apply=apply), guidance, jnp.asarray(-1))
            return sample(denoiser, plan, x, cond, keys)[0]

        self.compiled = jax.jit(follow)

    def pad(self, plan):
        return pad(plan, self.ROWS, self.REMEMBERED, self.NOISES)

    def start(self, t, seed=0):
        """A batch at time t, float64."""
        rng = np.random.default_rng(seed)
        which = rng.choice(8, self.BATCH, p=self.mixture.weights)
        x0 = self.mixture.means[which] + np.sqrt(self.mixture.variances[which]) * rng.standard_normal((self.BATCH, 2))
        t = np.float64(t)
        return self.schedule.alpha(t) * x0 + self.schedule.sigma(t) * rng.standard_normal(x0.shape)

    def __call__(self, plan, x, *, scale=1.0, cond=None, seed=0):
        with jax.enable_x64(True):
            cond = jnp.asarray(np.full(len(x), -1) if cond is None else cond)
            keys = sample_keys(jax.random.key(seed), len(x))
            guidance = Guidance(*(jnp.asarray(v, jnp.float64) for v in (scale, 0.0, 1.0)))
            return np.asarray(self.compiled(self.pad(plan), jnp.asarray(x, jnp.float64), cond, keys, guidance))


_programs = {}


@pytest.fixture(scope='session')
def program():
    """schedule -> its `Program`, compiled once for the whole folder."""
    return lambda schedule: _programs.setdefault(schedule, Program(schedule))


@pytest.fixture(scope='session')
def interior():
    """(schedule, num_steps, low, high) -> times with equal steps in logsnr between two levels, both ends included;
    from the lowest that the schedule reaches, where that is more than `low`.
    """

    def make(schedule, num_steps, low=-6.0, high=6.0):
        low = max(low, float(schedule.logsnr(np.float64(1))))
        return schedule.t_of_logsnr(np.linspace(low, high, num_steps + 1))

    return make
