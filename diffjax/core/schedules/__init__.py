"""Noise schedules: two functions of time, alpha(t) and sigma(t).

    x_t = alpha(t) x0 + sigma(t) eps,   t = 0 data, t = 1 noise,   logsnr(t) = log(alpha^2 / sigma^2)           (1)

A schedule is written against the array module of its argument: plans call it with NumPy in float64, training and
sampling with `jax.numpy` in float32. Every function takes and returns arrays of one shape, `t: [...]`.
"""

from diffjax.core.schedules.continuous import EDM, VE, VP, Cosine, Flow, InverseCosine, LinearAbar, Sigmoid
from diffjax.core.schedules.schedule import TINY as TINY
from diffjax.core.schedules.schedule import Schedule as Schedule
from diffjax.core.schedules.schedule import floor_log as floor_log
from diffjax.core.schedules.schedule import log as log
from diffjax.core.schedules.schedule import namespace as namespace
from diffjax.core.schedules.schedule import sigmoid as sigmoid
from diffjax.core.schedules.shifted import Shifted
from diffjax.core.schedules.tables import Discrete as Discrete
from diffjax.core.schedules.tables import Linear, ScaledLinear, SigmoidBetas, SquaredCos

__all__ = [
    'Cosine',
    'EDM',
    'Flow',
    'InverseCosine',
    'Linear',
    'LinearAbar',
    'ScaledLinear',
    'Shifted',
    'Sigmoid',
    'SigmoidBetas',
    'SquaredCos',
    'VE',
    'VP',
]
