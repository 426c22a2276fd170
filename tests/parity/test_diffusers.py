"""Every scheduler of diffusers beside ours, in float64: from the same x, at the same times, with the same noise."""

import numpy as np
import pytest

pytest.importorskip('diffusers', reason="pip install -e '.[parity]'")
pytest.importorskip('torchsde', reason="pip install -e '.[parity]'")

from cases import (  # noqa: E402
    FINAL,
    LINE,
    SIGMAS,
    STATES,
    Case,
    after_runge_kutta,
    brownian,
    gap,
    once,
    two_stages,
)
from diffusers_reference import run  # noqa: E402
from diffusers_schedulers import REFERENCES  # noqa: E402

EULER, LOWER = {'final': 'euler'}, {'final': 'lower'}  # 15 steps and more, and fewer
HALVED, HEUN = {'halved': True}, {'kind': 'heun', 'eta': 0.0}

CASES = [
    Case('ddim', 'ddim', grid='leading'),
    Case('ddim-eta1', 'ddim', {'eta': 1.0}, 'leading'),
    Case('ddpm-small', 'ddpm', grid='leading'),
    Case('ddpm-small', 'ddpm'),
    Case('ddpm-large', 'ddpm', {'variance': 'large'}, 'leading'),
    Case('pndm', 'pndm', {'warmup': 'prk'}, 'leading', 20, grid_of=after_runge_kutta),
    Case('plms', 'pndm', grid='leading', grid_of=once),
    Case('plms-to-data', 'pndm', grid='leading', grid_of=once),
    Case('euler', 'euler'),
    Case('euler', 'ddim', grid='karras'),
    Case('euler-ancestral', 'euler_ancestral'),
    Case('euler-ancestral', 'ddpm', grid='trailing'),
    Case('heun', 'heun', grid_of=two_stages),
    Case('heun', 'heun', {}, 'karras', 17, SIGMAS, two_stages),
    Case('kdpm2', 'dpm2', grid_of=two_stages),
    Case('kdpm2', 'dpm2', grid='karras', grid_of=two_stages),
    Case('kdpm2-ancestral', 'dpm2_ancestral', grid_of=two_stages),
    Case('dpmpp-sde', 'dpmpp_sde', grid_of=two_stages, noise=brownian),
    Case('dpmpp-sde', 'dpmpp_sde', grid='karras', grid_of=two_stages, noise=brownian),
    *(Case(f'lms-{order}', 'lms', {'order': order}) for order in (1, 2, 3, 4)),
    Case('lms-4', 'lms', grid='karras'),
    Case('deis-1', 'deis', {'order': 1, 'polynomial': 'logsnr'} | EULER),
    Case('deis-2', 'deis', {'order': 2, 'polynomial': 'logsnr'} | EULER),
    Case('deis-3', 'deis', {'order': 3, 'polynomial': 'logsnr'} | EULER),
    Case('deis-3', 'deis', {'order': 3, 'polynomial': 'logsnr'} | LOWER, 'leading', 12),
    Case('dpmpp-1m', 'ddim'),
    Case('dpmpp-2m-midpoint', 'dpmpp_2m', EULER),
    Case('dpmpp-2m-midpoint', 'dpmpp_2m', LOWER, 'trailing', 12),
    Case('dpmpp-2m-midpoint', 'dpmpp_2m', EULER, 'karras'),
    Case('dpmpp-2m-midpoint', 'dpmpp_2m', EULER, 'lu'),
    Case('dpmpp-2m-midpoint', 'dpmpp_2m', EULER, 'shift=3', 17, LINE),
    Case('dpmpp-2m-heun', 'dpmpp_2m_sde', HEUN),
    Case('dpmpp-2m-heun', 'dpmpp_2m_sde', HEUN, 'beta'),
    Case('dpmpp-3m-heun', 'dpmpp_3m', HALVED | EULER),
    Case('dpmpp-3m-heun', 'dpmpp_3m', HALVED | LOWER, 'trailing', 12),
    Case('dpmpp-3m-heun', 'dpmpp_3m', HALVED | EULER, 'karras'),
    Case('dpm-1m', 'ddim'),
    Case('dpm-2m-midpoint', 'dpm_solver_m', {'order': 2} | EULER),
    Case('dpm-2m-heun', 'deis', {'order': 2, 'polynomial': 'logsnr'} | EULER),
    Case('dpm-3m-midpoint', 'dpm_solver_m', {'order': 3} | HALVED | EULER),
    Case('dpm-3m-midpoint', 'dpm_solver_m', {'order': 3} | HALVED | LOWER, 'leading', 12),
    Case('sde-dpmpp-1m', 'ddpm'),
    Case('sde-dpmpp-2m-midpoint', 'dpmpp_2m_sde'),
    Case('sde-dpmpp-2m-heun', 'dpmpp_2m_sde', {'kind': 'heun'}, 'karras'),
    Case('dpmpp-1s', 'ddim', grid='own'),
    Case('dpmpp-2s-midpoint', 'dpmpp_2s', {'stages': 'grid'}, 'own', 17),
    Case('dpmpp-2s-midpoint', 'dpmpp_2s', {'stages': 'grid'}, 'karras', 16),
    Case('dpmpp-3s-midpoint', 'dpmpp_3s', {'stages': 'grid'}, 'own', 15),
    Case('dpmpp-3s-midpoint', 'dpmpp_3s', {'stages': 'grid'}, 'own', 16),
    Case('dpmpp-3s-midpoint', 'dpmpp_3s', {'stages': 'grid'}, 'karras', 17),
    Case('dpm-1s', 'ddim', grid='own'),
    Case('dpm-2s-midpoint', 'dpm_solver', {'order': 2, 'stages': 'grid'}, 'own', 17),
    Case('dpm-3s-midpoint', 'dpm_solver', {'order': 3, 'stages': 'grid'}, 'own', 16),
    Case('sde-dpmpp-1s', 'ddpm', grid='own'),
    *(Case(f'unipc-{order}-bh2', 'unipc', {'order': order} | LOWER) for order in (1, 2, 3, 4)),
    Case('unipc-2-bh2', 'unipc', {'order': 2} | LOWER, 'karras'),
    Case('unipc-3-bh2', 'unipc', {'order': 3} | LOWER, 'shift=3', 17, LINE),
    *(
        Case(f'unipc-{order}-{kind}-to-first', 'unipc', {'order': order, 'variant': kind} | LOWER)
        for order in (1, 2, 3, 4)
        for kind in ('bh1', 'bh2')
    ),
    *(
        Case(f'unipc-noise-{order}-{kind}', 'unipc', {'order': order, 'variant': kind, 'predict': 'eps'} | LOWER)
        for order in (1, 2, 3, 4)
        for kind in ('bh1', 'bh2')
    ),
    *(
        Case(
            f'sa-{predictor}-{corrector}-tau{tau}',
            'sa_solver',
            {'tau': float(tau), 'predictor': predictor, 'corrector': corrector, 'adapted': True},
        )
        for tau, predictor, corrector in ((0, 1, 2), (0, 2, 2), (0, 3, 3), (0, 3, 4), (1, 2, 2), (1, 3, 4))
    ),
    Case(
        'sa-2-2', 'sa_solver', {'predictor': 2, 'corrector': 2, 'adapted': True, 'low': 0.201, 'high': 0.801}, 'leading'
    ),
    Case('edm-euler', 'ddim', {}, 'karras', 17, SIGMAS),
    Case('edm-euler', 'euler', {}, 'exponential', 17, SIGMAS),
    Case('edm-dpmpp-1m', 'ddim', {}, 'karras', 17, SIGMAS),
    Case('edm-dpmpp-2m-midpoint', 'dpmpp_2m', EULER, 'karras', 17, SIGMAS),
    Case('edm-dpmpp-2m-heun', 'dpmpp_2m_sde', HEUN, 'karras', 17, SIGMAS),
    Case('edm-dpmpp-3m-heun', 'dpmpp_3m', HALVED | EULER, 'karras', 17, SIGMAS),
    Case('edm-dpmpp-3m-heun', 'dpmpp_3m', HALVED | LOWER, 'exponential', 12, SIGMAS),
    Case('edm-sde-dpmpp-2m', 'dpmpp_2m_sde', {}, 'karras', 17, SIGMAS),
    Case('flow-euler', 'euler', {'coordinate': 't'}, 'shift=1', 17, LINE),
    Case('flow-euler', 'ddim', {}, 'shift=3', 17, LINE),
    Case('flow-euler', 'euler', {'coordinate': 't'}, 'uniform', 17, LINE),
    Case('flow-heun', 'heun', {'coordinate': 't'}, 'shift=1', 17, LINE, two_stages),
    Case('flow-heun', 'heun', {'coordinate': 't'}, 'shift=3', 17, LINE, two_stages),
    Case('flow-euler-stochastic', 'consistency', {}, 'shift=3', 17, LINE),
    Case('flow-lcm', 'consistency', {}, 'shift=1', 17, LINE),
    Case('lcm', 'lcm', grid='own', num_steps=4),
    Case('lcm', 'lcm', grid='own', num_steps=17),
    Case('tcd', 'tcd', {}, 'own', 4),
    Case('tcd', 'tcd', {}, 'own', 10),
    Case('tcd-eta0', 'tcd', {'gamma': 0.0}, 'own', 4),
]

DIFFERENCES = [  # ours follows the paper; it is checked that they differ, so that no line outlives its reason
    Case('ddim', 'ddim', differs='off leading it steps by a fixed number of timesteps, whatever the grid'),
    Case('plms', 'pndm', grid='trailing', grid_of=once, differs='as ddim'),
    Case('dpmpp-3m-midpoint', 'dpmpp_3m', HALVED | EULER, differs='its second step is a midpoint one'),
    Case('dpm-3m-heun', 'dpm_solver_m', {'order': 3} | HALVED | EULER, differs='its second step is a heun one'),
    Case('dpmpp-3m-heun', 'dpmpp_3m', EULER, differs='half of the second difference: order 2 where ours is 3'),
    Case('sde-dpmpp-3m-heun', 'dpmpp_3m_sde', HALVED, differs='a wrong sign: worse with more steps'),
    Case('sde-dpmpp-3m-midpoint', 'dpmpp_3m_sde', HALVED, differs='a wrong sign: worse with more steps'),
    Case('dpmpp-2s-heun', 'dpmpp_2s', {'stages': 'grid'}, 'own', differs='the other factor of the difference'),
    Case('dpm-2s-heun', 'dpm_solver', {'order': 2, 'stages': 'grid'}, 'own', differs='as dpmpp-2s-heun'),
    Case('dpmpp-3s-heun', 'dpmpp_3s', {'stages': 'grid'}, 'own', differs='a second difference in the third stage'),
    Case('dpm-3s-heun', 'dpm_solver', {'order': 3, 'stages': 'grid'}, 'own', 16, differs='as dpmpp-3s-heun'),
    Case('edm-dpmpp-3m-midpoint', 'dpmpp_3m', HALVED | EULER, 'karras', 17, SIGMAS, differs='as dpmpp-3m-midpoint'),
    Case('unipc-2-bh1', 'unipc', {'order': 2, 'variant': 'bh1'} | LOWER, differs='infinity times zero at the end'),
    Case('ddpm-large', 'ddpm', {'variance': 'large'}, 'trailing', differs='noise in the step to data'),
]

NO_COUNTERPART = {
    'euler-churn': 'adds the noise after the network has been asked; Karras et al. before',
    'edm-euler-churn': 'as euler-churn',
    'ipndm': 'a schedule of its own, whose first step loses x0; equal-step coefficients on unequal steps',
    'sa-1-1-tau1': 'a corrector of one estimate, which the paper does not have',
    'unipc-1-bh1': 'NaN: infinity times zero in the step to data',
    'unipc-3-bh1': 'as unipc-1-bh1',
    'unipc-4-bh1': 'as unipc-1-bh1',
    'sde-dpmpp-2s-midpoint': 'an independent draw for each stage; ours shares a path (dpmpp_sde)',
    'sde-dpmpp-2s-heun': 'as sde-dpmpp-2s-midpoint',
    'sde-dpmpp-3s-midpoint': 'as sde-dpmpp-2s-midpoint',
    'sde-dpmpp-3s-heun': 'as sde-dpmpp-2s-midpoint, and a wrong sign',
}


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_every_state_is_theirs(case, ours):
    program = ours(case.schedule)
    assert gap(case, run, program).max() < STATES
    assert gap(case, run, program, np.float32)[-1] < FINAL


@pytest.mark.parametrize('case', DIFFERENCES, ids=lambda case: case.name)
def test_known_differences_are_there(case, ours):
    assert case.differs
    assert not gap(case, run, ours(case.schedule)).max() < 1e-6  # or NaN


def test_no_scheduler_is_left_out():
    covered = {case.theirs for case in (*CASES, *DIFFERENCES)}
    assert covered | set(NO_COUNTERPART) == set(REFERENCES) and not covered & set(NO_COUNTERPART)
