"""The schedulers of diffusers as a table: their classes, their settings, and how schedulers of a kind are spoken to.

`diffusers_reference.run` follows them. A method that comes in several orders or forms has an entry for each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

SIGMA_DATA = 0.5  # of EDM's preconditioning (Karras et al. 2022, Table 1)
CHURN = {'s_churn': 8.0, 's_tmin': 0.05, 's_tmax': 10.0, 's_noise': 1.003}  # its levels stay below every schedule's top


class Family(NamedTuple):
    """What schedulers of one kind share. Their own (alpha, sigma) are those of their own scale."""

    level: Callable[[Any, int], tuple[float, float]]  # (scheduler, number of the call) -> (alpha, sigma) asked about
    end: Callable[[Any], tuple[float, float]]  # the same for the result
    output: str  # what the network is to predict, one of OUTPUTS


class Reference(NamedTuple):
    """A scheduler of diffusers with its settings."""

    scheduler: str
    family: Family
    options: dict[str, Any] = {}
    step: dict[str, Any] = {}  # further arguments of `step`
    stochastic: bool = False
    cost: tuple[int, int] = (1, 0)  # N steps cost cost[0] N + cost[1] evaluations
    fewest: int = 2

    def num_steps(self, num_evaluations: int) -> int:
        """The most steps that cost no more than this."""
        return (num_evaluations - self.cost[1]) // self.cost[0]


def _precondition(e, x, alpha, sigma):
    """EDM's F, for which c_skip x + c_out F is x0."""
    del alpha
    spread = np.hypot(sigma, SIGMA_DATA)
    return (e.x0 - (SIGMA_DATA / spread) ** 2 * x) * spread / (sigma * SIGMA_DATA)


OUTPUTS = {  # (estimate, x, alpha, sigma) -> the network's output
    'epsilon': lambda e, x, alpha, sigma: e.eps,
    'sample': lambda e, x, alpha, sigma: e.x0,
    'v_prediction': lambda e, x, alpha, sigma: alpha * e.eps - sigma * e.x0,
    'flow_prediction': lambda e, x, alpha, sigma: e.eps - e.x0,
    'preconditioned': _precondition,
}


def _of_abar(value) -> tuple[float, float]:
    return float(value) ** 0.5, (1 - float(value)) ** 0.5


def _at_timestep(scheduler, i: int) -> tuple[float, float]:
    return _of_abar(scheduler.alphas_cumprod[int(scheduler.timesteps[i])])


def _before_the_last(scheduler) -> tuple[float, float]:
    """Where DDIM and PNDM land: a fixed number of timesteps below the last one."""
    config = scheduler.config
    index = int(scheduler.timesteps[-1]) - config.num_train_timesteps // scheduler.num_inference_steps
    return _of_abar(scheduler.alphas_cumprod[index] if index >= 0 else scheduler.final_alpha_cumprod)


def _at_lambda(scheduler, i: int) -> tuple[float, float]:
    return tuple(float(level) for level in scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i]))


def _at_sigma(scheduler, i: int) -> tuple[float, float]:
    """The two-stage methods keep the level of their second stage each in their own place."""
    if getattr(scheduler, 'state_in_first_order', True):
        return 1.0, float(scheduler.sigmas[i])
    if hasattr(scheduler, 'sigmas_up'):  # KDPM2Ancestral
        return 1.0, float(scheduler.sigmas_interpol[i - 1])
    if hasattr(scheduler, 'sigmas_interpol'):  # KDPM2
        return 1.0, float(scheduler.sigmas_interpol[i])
    return 1.0, float(getattr(scheduler, 'mid_point_sigma', scheduler.sigmas[i]))  # DPMSolverSDE, Heun


def _at_flow(scheduler, i: int) -> tuple[float, float]:
    return 1.0 - float(scheduler.sigmas[i]), float(scheduler.sigmas[i])


def _at_pair(scheduler, i: int) -> tuple[float, float]:
    return float(scheduler.alphas[i]), float(scheduler.betas[i])


TIMESTEP = Family(_at_timestep, _before_the_last, 'epsilon')
TO_DATA = TIMESTEP._replace(end=lambda scheduler: (1.0, 0.0))
TO_FIRST = TIMESTEP._replace(end=lambda scheduler: _of_abar(scheduler.alphas_cumprod[0]))
DATA = Family(_at_lambda, lambda scheduler: _at_lambda(scheduler, -1), 'sample')
NOISE = DATA._replace(output='epsilon')
SIGMA = Family(_at_sigma, lambda scheduler: (1.0, float(scheduler.sigmas[-1])), 'epsilon')
PRECONDITIONED = SIGMA._replace(output='preconditioned')
VELOCITY = Family(_at_flow, lambda scheduler: _at_flow(scheduler, -1), 'flow_prediction')
PAIR = Family(_at_pair, lambda scheduler: _at_pair(scheduler, -1), 'v_prediction')
FORMS = {  # of DPM-Solver: (its name here, the family, settings)
    'dpmpp': (DATA, {'algorithm_type': 'dpmsolver++'}),
    'dpm': (NOISE, {'algorithm_type': 'dpmsolver', 'final_sigmas_type': 'sigma_min'}),  # it refuses to go to 0
    'sde-dpmpp': (DATA, {'algorithm_type': 'sde-dpmsolver++'}),
}


def _multistep(order: int) -> dict[str, Reference]:
    """The methods that come in orders: LMS, DEIS, UniPC, and DPM-Solver in all its forms."""
    table = {f'lms-{order}': Reference('LMSDiscreteScheduler', SIGMA, {}, {'order': order})}
    for kind in ('bh1', 'bh2'):
        options = {'solver_order': order, 'solver_type': kind}
        table[f'unipc-{order}-{kind}'] = Reference('UniPCMultistepScheduler', DATA, options)
        options = options | {'final_sigmas_type': 'sigma_min'}  # to 0 bh1 makes NaN
        table[f'unipc-{order}-{kind}-to-first'] = Reference('UniPCMultistepScheduler', DATA, options)
        options = options | {'predict_x0': False}
        table[f'unipc-noise-{order}-{kind}'] = Reference('UniPCMultistepScheduler', NOISE, options)
    if order == 4:
        return table
    table[f'deis-{order}'] = Reference('DEISMultistepScheduler', NOISE, {'solver_order': order})
    for kind in ('midpoint', 'heun') if order > 1 else ('midpoint',):
        tail = f'-{kind}' if order > 1 else ''
        setting = {'solver_order': order, 'solver_type': kind}
        table[f'edm-dpmpp-{order}m{tail}'] = Reference('EDMDPMSolverMultistepScheduler', PRECONDITIONED, setting)
        for form, (family, options) in FORMS.items():
            options, random = options | setting, form.startswith('sde')
            table[f'{form}-{order}m{tail}'] = Reference('DPMSolverMultistepScheduler', family, options, {}, random)
            options = options | {'lower_order_final': True}
            table[f'{form}-{order}s{tail}'] = Reference('DPMSolverSinglestepScheduler', family, options, {}, random)
    return table


def _constant(value: float, t: Any) -> float:
    del t
    return value


def _sa_solver(tau: float, predictor: int, corrector: int) -> Reference:
    options = {'predictor_order': predictor, 'corrector_order': corrector, 'tau_func': partial(_constant, tau)}
    return Reference('SASolverScheduler', DATA, options, stochastic=tau > 0)


def _table() -> dict[str, Reference]:
    """Every scheduler in the settings that are methods of their own."""
    two, random, ddpm = {'cost': (2, -1)}, {'stochastic': True}, {'clip_sample': False}
    plms, to_data = {'skip_prk_steps': True, 'steps_offset': 1}, {'skip_prk_steps': True, 'set_alpha_to_one': True}
    table = {
        'ddim': Reference('DDIMScheduler', TIMESTEP, ddpm),
        'ddim-eta1': Reference('DDIMScheduler', TIMESTEP, ddpm, {'eta': 1.0}, **random),
        'ddpm-small': Reference('DDPMScheduler', TO_DATA, ddpm, **random),
        'ddpm-large': Reference('DDPMScheduler', TO_DATA, ddpm | {'variance_type': 'fixed_large'}, **random),
        'pndm': Reference('PNDMScheduler', TIMESTEP, {'steps_offset': 1}, cost=(1, 9), fewest=4),
        'plms': Reference('PNDMScheduler', TIMESTEP, plms, cost=(1, 1)),  # Stable Diffusion's setting
        'plms-to-data': Reference('PNDMScheduler', TIMESTEP, to_data, cost=(1, 1)),
        'euler': Reference('EulerDiscreteScheduler', SIGMA),
        'euler-churn': Reference('EulerDiscreteScheduler', SIGMA, {}, CHURN, **random),
        'euler-ancestral': Reference('EulerAncestralDiscreteScheduler', SIGMA, **random),
        'heun': Reference('HeunDiscreteScheduler', SIGMA, **two),
        'kdpm2': Reference('KDPM2DiscreteScheduler', SIGMA, **two),
        'kdpm2-ancestral': Reference('KDPM2AncestralDiscreteScheduler', SIGMA, **random, **two),
        'dpmpp-sde': Reference('DPMSolverSDEScheduler', SIGMA, **random, **two),
        'lcm': Reference('LCMScheduler', TO_DATA, **random),
        'tcd': Reference('TCDScheduler', TO_FIRST, {}, {'eta': 0.3}, **random),
        'tcd-eta0': Reference('TCDScheduler', TO_FIRST, {}, {'eta': 0.0}),
        'ipndm': Reference('IPNDMScheduler', PAIR),
        'edm-euler': Reference('EDMEulerScheduler', PRECONDITIONED),
        'edm-euler-churn': Reference('EDMEulerScheduler', PRECONDITIONED, {}, CHURN, **random),
        'edm-sde-dpmpp-2m': Reference(
            'CosineDPMSolverMultistepScheduler', PRECONDITIONED, {'sigma_data': SIGMA_DATA}, **random
        ),
        'flow-euler': Reference('FlowMatchEulerDiscreteScheduler', VELOCITY),
        'flow-heun': Reference('FlowMatchHeunDiscreteScheduler', VELOCITY, **two),
        'flow-euler-stochastic': Reference(
            'FlowMatchEulerDiscreteScheduler', VELOCITY, {'stochastic_sampling': True}, **random
        ),
        'flow-lcm': Reference('FlowMatchLCMScheduler', VELOCITY, **random),
    }
    for order in (1, 2, 3, 4):
        table |= _multistep(order)
    default = {'predictor_order': 2, 'corrector_order': 2}
    table['sa-2-2'] = Reference('SASolverScheduler', DATA, default, stochastic=True)  # tau = 1 in timesteps 200 to 800
    for tau, predictor, corrector in ((0, 1, 2), (0, 2, 2), (0, 3, 3), (0, 3, 4), (1, 1, 1), (1, 2, 2), (1, 3, 4)):
        table[f'sa-{predictor}-{corrector}-tau{tau}'] = _sa_solver(float(tau), predictor, corrector)
    return table


REFERENCES = _table()
GRIDS = {name: {'timestep_spacing': name} for name in ('linspace', 'leading', 'trailing')} | {
    'karras': {'use_karras_sigmas': True},
    'exponential': {'use_exponential_sigmas': True},
    'beta': {'use_beta_sigmas': True},
    'lu': {'use_lu_lambdas': True},
    'shift=1': {'shift': 1.0},  # some call it flow_shift
    'shift=3': {'shift': 3.0},
    'own': {},  # of those that offer no choice
}
DISTILLED = ('LCMScheduler', 'TCDScheduler')  # their timesteps are those of distillation, whatever spacing is asked for
