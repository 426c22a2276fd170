"""What the laws of this room are asked of: one entry for each name in a module's `__all__`.

A new schedule, target, weight, time distribution, grid or solver enters every law through these fixtures. Where a law
needs a statement of its own about each entry (its formula, its order), the test holds a table by name, and an entry
that is missing there fails with a KeyError that names it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import grids, oracles, parameterizations, schedules, solvers, times, weights
from diffjax.core.guidance import Guidance, classifier_free
from diffjax.core.sampling import pad, sample, sample_keys

SETTINGS = {  # the settings of a solver that are methods of their own
    'ddim': ({'eta': 0.0}, {'eta': 0.5}, {'eta': 1.0}),
    'ddpm': ({'variance': 'small'}, {'variance': 'large'}, {'variance': 'learned'}),
    'deis': (
        *({'order': p, 'polynomial': 'logsnr'} for p in (1, 2, 3, 4)),
        *({'order': p, 'polynomial': 't'} for p in (2, 3, 4)),
        {'order': 3, 'polynomial': 'angle'},
        {'order': 3, 'polynomial': 'sigma/alpha'},
        {'order': 3, 'polynomial': 'logsnr', 'final': 'lower'},
    ),
    'dpm2_ancestral': ({'eta': 1.0}, {'eta': 0.0}),
    'dpm_solver': (*({'order': p} for p in (1, 2, 3)), *({'order': p, 'stages': 'grid'} for p in (2, 3))),
    'dpm_solver_m': (*({'order': p} for p in (1, 2, 3)), {'order': 3, 'halved': True}),
    'dpmpp_2m': ({}, {'final': 'euler'}, {'final': 'lower'}, {'start': 'singlestep'}),
    'dpmpp_2m_sde': tuple({'kind': kind, 'eta': eta} for kind in ('midpoint', 'heun') for eta in (1.0, 0.0)),
    'dpmpp_2s': ({}, {'stages': 'grid'}),
    'dpmpp_2s_ancestral': ({'eta': 1.0}, {'eta': 0.0}),
    'dpmpp_3m': ({}, {'halved': True}, {'final': 'euler'}, {'final': 'lower'}, {'start': 'singlestep'}),
    'dpmpp_3m_sde': ({'eta': 1.0}, {'eta': 0.5, 'final': 'adams'}, {'halved': True}, {'eta': 0.0}),
    'dpmpp_3s': ({}, {'stages': 'grid'}),
    'dpmpp_sde': ({'eta': 1.0}, {'eta': 0.5, 'r': 0.3}, {'eta': 0.0}),
    'edm': ({}, {'churn': 0.0}),
    'euler': tuple({'coordinate': c} for c in solvers.COORDINATES),
    'euler_ancestral': ({'eta': 1.0}, {'eta': 0.0}),
    'euler_maruyama': (*({'diffusion': name} for name in ('sde', 'sigma', 'constant')), {'scale': 0.0}),
    'heun': tuple({'coordinate': c} for c in solvers.COORDINATES),
    'lms': (*({'order': p} for p in (1, 2, 3, 4)), *({'order': 3, 'coordinate': c} for c in ('t', 'angle'))),
    'pndm': ({'warmup': 'plms'}, {'warmup': 'prk'}),
    'repaint': ({'jump': 2, 'repeats': 3}, {'jump': 3, 'repeats': 2, 'variance': 'large'}),
    'restart': ({'low': 0.5}, {'low': 0.5, 'num_restarts': 2, 'num_steps': 3}, {'num_restarts': 0}),
    'rk4': tuple({'coordinate': c} for c in solvers.COORDINATES),
    'sa_solver': (
        {},
        {'predictor': 2, 'corrector': 2, 'adapted': True},
        {'tau': 0.6, 'low': 0.2, 'high': 0.8, 'corrector': 0, 'final': 'adams'},
        {'tau': 0.0},
        {'tau': 0.0, 'final': 'adams', 'predictor': 2, 'corrector': 0},
        {'tau': 0.0, 'final': 'adams', 'predictor': 2, 'corrector': 3},
    ),
    'tcd': ({'gamma': 0.3}, {'gamma': 1.0}, {'gamma': 0.0}),
    'unipc': (
        *({'order': p} for p in (1, 2, 3, 4)),
        *({'order': p, 'variant': 'bh1'} for p in (1, 2)),
        {'order': 3, 'predict': 'eps'},
        {'order': 3, 'final': 'lower'},
        {'order': 3, 'polynomial': 'softplus'},
        {'order': 4, 'polynomial': 'softplus', 'knee': 0.3},
        {'order': 4, 'start': 'singlestep'},
    ),
}
SILENCED_BY = {  # solvers that add noise: the option whose 0 makes them deterministic, None where there is none
    **dict.fromkeys(('consistency', 'ddpm', 'lcm', 'repaint')),
    **dict.fromkeys(('ddim', 'dpm2_ancestral', 'dpmpp_2m_sde', 'dpmpp_2s_ancestral', 'dpmpp_3m_sde'), 'eta'),
    **dict.fromkeys(('dpmpp_sde', 'euler_ancestral'), 'eta'),
    'edm': 'churn',
    'euler_maruyama': 'scale',
    'restart': 'num_restarts',
    'sa_solver': 'tau',
    'tcd': 'gamma',
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


class Setting(NamedTuple):
    """A solver with its options."""

    name: str
    options: dict
    make: Callable  # (schedule, grid) -> Plan
    stochastic: bool


def setting(name, options):
    function = getattr(solvers, name)
    silent = SILENCED_BY.get(name, '')
    level = options.get(silent, inspect.signature(function).parameters[silent].default) if silent else silent is None
    return Setting(name, options, functools.partial(function, **options), level > 0)


SOLVERS = [setting(name, options) for name in solvers.__all__ for options in SETTINGS.get(name, ({},))]


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


@pytest.fixture(scope='session')
def settings():
    """name -> the `Setting`s of a solver."""
    return {name: [setting for setting in SOLVERS if setting.name == name] for name in solvers.__all__}


@pytest.fixture(scope='session', params=SOLVERS, ids=lambda s: '-'.join([s.name, *map(str, s.options.values())]))
def solver(request):
    """A `Setting`."""
    return request.param


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


class Exact:
    """The exact denoiser of the 2-D mixture on a schedule, NumPy float64, and what formulas are written with."""

    def __init__(self, schedule):
        self.schedule, self.mixture = schedule, oracles.gmm2d()

    def __call__(self, x, t):
        """(x0, eps) at t."""
        t = np.float64(t)
        return self.mixture.posterior(x, self.schedule.alpha(t), self.schedule.sigma(t))

    def levels(self, t):
        """alpha, sigma, log(alpha / sigma)."""
        alpha, sigma = self.schedule.alpha(np.float64(t)), self.schedule.sigma(np.float64(t))
        with np.errstate(divide='ignore'):
            return alpha, sigma, np.log(alpha) - np.log(sigma)

    def time(self, lam):
        """t of log(alpha / sigma)."""
        return self.schedule.t_of_logsnr(np.float64(2 * lam))

    def draws(self, plan, seed=1, num=5):
        """Standard normal draws for every row, draw j the same whatever N: [M, N, num, 2]."""
        return np.random.default_rng(seed).standard_normal((len(plan.t), 2, num, 2))[:, : plan.num_noises]

    def start(self, t, num=5):
        alpha, sigma, _ = self.levels(t)
        rng = np.random.default_rng(0)
        return alpha * self.mixture.means[:num] + sigma * rng.standard_normal((num, 2))

    def follow(self, plan, x, draws=None):
        """The plan, row by row: all states. [M, B, 2]."""
        anchor, memory, states = x, np.zeros((plan.num_remembered, *x.shape)), []
        for m in range(len(plan.t)):
            x0, eps, *_ = self(x, plan.t[m])
            memory = np.stack([plan.remember[m, 0] * x0 + plan.remember[m, 1] * eps, *memory[:-1]])
            z = np.zeros((plan.num_noises, *x.shape)) if draws is None else draws[m]
            parts = np.concatenate([x[None], anchor[None], memory, z])
            x, anchor = (np.tensordot(row[m], parts, 1) for row in (plan.to_x, plan.to_anchor))
            states.append(x)
        return np.stack(states)


@pytest.fixture(scope='session')
def exact_denoiser():
    """schedule -> its `Exact`."""
    return Exact


class Program:
    """One compiled float64 sampler of a guided mixture; it counts how often the denoiser is traced."""

    ROWS, REMEMBERED, NOISES, GIVEN = 800, 13, 2, 3

    def __init__(self, schedule, mixture):
        self.schedule, self.mixture, self.traces = schedule, getattr(oracles, mixture)(), 0
        exact = self.mixture.denoiser(schedule)

        def apply(state, x, t, cond):
            self.traces += 1
            return exact.apply(state, x, t, cond)

        def follow(plan, x, cond, keys, guidance, given, num_given):
            denoiser = classifier_free(exact._replace(apply=apply), guidance, jnp.asarray(-1))

            def project(x, number):
                return jnp.where(number < num_given, given[jnp.minimum(number, self.GIVEN - 1)], x)

            return sample(denoiser, plan, x, cond, keys, project=project)[0]

        self.compiled = jax.jit(follow)

    def pad(self, plan):
        return pad(plan, self.ROWS, self.REMEMBERED, self.NOISES)

    def start(self, t, seed=0):
        """A batch at time t, float64."""
        rng = np.random.default_rng(seed)
        means, variances = self.mixture.means, self.mixture.variances
        batch = 24 if means.shape[1] == 2 else 8
        which = rng.choice(len(means), batch, p=self.mixture.weights)
        x0 = means[which] + np.sqrt(variances[which]) * rng.standard_normal((batch, means.shape[1]))
        t = np.float64(t)
        return self.schedule.alpha(t) * x0 + self.schedule.sigma(t) * rng.standard_normal(x0.shape)

    def __call__(self, plan, x, *, scale=1.0, cond=None, seed=0, given=()):
        """The last x. given: states that are put in x's place after the first rows."""
        with jax.enable_x64(True):
            imposed = jnp.zeros((self.GIVEN, *x.shape)).at[: len(given)].set(jnp.asarray([*given, x])[: len(given)])
            cond = jnp.asarray(np.full(len(x), -1) if cond is None else cond)
            keys = sample_keys(jax.random.key(seed), len(x))
            guidance = Guidance(*(jnp.asarray(v, jnp.float64) for v in (scale, 0.0, 1.0)))
            x = jnp.asarray(x, jnp.float64)
            return np.asarray(self.compiled(self.pad(plan), x, cond, keys, guidance, imposed, len(given)))


_programs = {}


@pytest.fixture(scope='session')
def program():
    """(schedule, mixture's name) -> its `Program`, compiled once for the whole folder."""

    def get(schedule, mixture='gmm2d'):
        if (schedule, mixture) not in _programs:
            _programs[schedule, mixture] = Program(schedule, mixture)
        return _programs[schedule, mixture]

    return get


@pytest.fixture(scope='session')
def interior():
    """(schedule, num_steps, low, high) -> times with equal steps in logsnr between two levels, both ends included;
    from the lowest that the schedule reaches, where that is more than `low`.
    """

    def make(schedule, num_steps, low=-6.0, high=6.0):
        low = max(low, float(schedule.logsnr(np.float64(1))))
        return schedule.t_of_logsnr(np.linspace(low, high, num_steps + 1))

    return make
