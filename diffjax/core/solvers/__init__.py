"""Solvers: `solver(schedule, grid, **options) -> Plan`, NumPy float64, run once before anything is traced.

`grid: [S + 1]` holds the times, falling for sampling and rising for inversion. Every row is finite at both ends: where
alpha = 0 or sigma = 0 the formulas' limits are taken by plain `if`s.
"""

from diffjax.core.solvers.adams import lms, pndm
from diffjax.core.solvers.ancestral import dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, euler_ancestral
from diffjax.core.solvers.coordinates import COORDINATES as COORDINATES
from diffjax.core.solvers.dpm_multistep import deis, dpm_solver_m, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde
from diffjax.core.solvers.few_steps import consistency, lcm, tcd
from diffjax.core.solvers.plans import Plan as Plan
from diffjax.core.solvers.plans import Row as Row
from diffjax.core.solvers.plans import levels as levels
from diffjax.core.solvers.plans import tabulate as tabulate
from diffjax.core.solvers.plans import units as units
from diffjax.core.solvers.predictor_corrector import sa_solver, unipc
from diffjax.core.solvers.reverse_chain import ddim, ddpm
from diffjax.core.solvers.runge_kutta import dpm2, euler, heun, rk4
from diffjax.core.solvers.singlestep import dpm_solver, dpmpp_2s, dpmpp_3s
from diffjax.core.solvers.stochastic import edm, euler_maruyama
from diffjax.core.solvers.travel import repaint, restart

__all__ = [
    'consistency',
    'ddim',
    'ddpm',
    'deis',
    'dpm2',
    'dpm2_ancestral',
    'dpm_solver',
    'dpm_solver_m',
    'dpmpp_2m',
    'dpmpp_2m_sde',
    'dpmpp_2s',
    'dpmpp_2s_ancestral',
    'dpmpp_3m',
    'dpmpp_3m_sde',
    'dpmpp_3s',
    'dpmpp_sde',
    'edm',
    'euler',
    'euler_ancestral',
    'euler_maruyama',
    'heun',
    'lcm',
    'lms',
    'pndm',
    'repaint',
    'restart',
    'rk4',
    'sa_solver',
    'tcd',
    'unipc',
]
