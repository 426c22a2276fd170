"""Solvers: `solver(schedule, grid, **options) -> Plan`, NumPy float64, run once before anything is traced.

`grid: [S + 1]` holds the times, falling for sampling and rising for inversion. Every row is finite at both ends: where
alpha = 0 or sigma = 0 the formulas' limits are taken by plain `if`s.
"""

from diffjax.core.solvers.coordinates import COORDINATES as COORDINATES
from diffjax.core.solvers.multistep import dpmpp_2m
from diffjax.core.solvers.plans import Plan as Plan
from diffjax.core.solvers.plans import Row as Row
from diffjax.core.solvers.plans import levels as levels
from diffjax.core.solvers.plans import tabulate as tabulate
from diffjax.core.solvers.plans import units as units
from diffjax.core.solvers.reverse_chain import ddim, ddpm
from diffjax.core.solvers.runge_kutta import euler, heun

__all__ = ['ddim', 'ddpm', 'dpmpp_2m', 'euler', 'heun']
