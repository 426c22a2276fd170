"""The samplers of k-diffusion beside ours, in float64: from the same x, at the same times, with the same noise."""

import numpy as np
import pytest

pytest.importorskip('torchsde', reason="pip install -e '.[parity]'")
pytest.importorskip('torchdiffeq', reason="pip install -e '.[parity]'")

from cases import FINAL, SIGMAS, STATES, TABLE, Case, brownian, fast, gap, two_stages  # noqa: E402
from kdiffusion_reference import CHURN, SAMPLERS, available, named_sigmas, run, sampling  # noqa: E402

pytestmark = pytest.mark.skipif(not available(), reason='pip install --no-deps k-diffusion')

EULER, HALVED, KARRAS = {'final': 'euler'}, {'halved': True}, ('karras', 17, SIGMAS)
KARRAS_CHURN = {'churn': CHURN['s_churn'], 'low': CHURN['s_tmin'], 'high': CHURN['s_tmax'], 'noise': CHURN['s_noise']}

CASES = [
    Case('k-euler', 'euler', grid='timesteps'),
    Case('k-heun', 'heun', {}, *KARRAS, two_stages),
    Case('k-heun', 'edm', {'churn': 0.0}, *KARRAS, two_stages),
    Case('k-dpm2', 'dpm2', {}, *KARRAS, two_stages),
    Case('k-dpmpp-2m', 'dpmpp_2m', EULER, grid='timesteps'),
    Case('k-dpmpp-2m', 'dpmpp_2m', EULER, *KARRAS),
    Case('k-dpmpp-2m-heun', 'dpmpp_2m_sde', {'kind': 'heun', 'eta': 0.0}, *KARRAS),
    Case('k-dpmpp-3m', 'dpmpp_3m', HALVED | EULER, *KARRAS),
    Case('k-dpmpp-3m', 'dpmpp_3m', HALVED | EULER, 'exponential', 12),
    Case('k-dpmpp-2s', 'dpmpp_2s', {}, *KARRAS, two_stages),
    Case('k-dpmpp-sde-eta0', 'dpmpp_sde', {'eta': 0.0}, *KARRAS, two_stages),
    Case('k-dpm-fast', 'dpm_solver', {}, 'exponential', 21, SIGMAS, fast, first=18),
    Case('k-dpm-fast', 'dpm_solver', {}, 'exponential', 20, SIGMAS, fast, first=18),
    Case('k-euler-ancestral', 'euler_ancestral', {}, *KARRAS),
    Case('k-euler-ancestral-half', 'euler_ancestral', {'eta': 0.5}, *KARRAS),
    Case('k-dpm2-ancestral', 'dpm2_ancestral', {}, *KARRAS, two_stages),
    Case('k-dpmpp-2s-ancestral', 'dpmpp_2s_ancestral', {}, *KARRAS, two_stages),
    Case('k-dpmpp-sde', 'dpmpp_sde', {}, *KARRAS, two_stages, brownian),
    Case('k-dpmpp-2m-sde', 'dpmpp_2m_sde', {}, *KARRAS),
    Case('k-dpmpp-2m-sde-heun', 'dpmpp_2m_sde', {'kind': 'heun'}, 'polyexponential'),
    Case('k-dpmpp-2m-sde-half', 'dpmpp_2m_sde', {'eta': 0.5}, *KARRAS),
    Case('k-dpmpp-3m-sde', 'dpmpp_3m_sde', HALVED, *KARRAS),
    Case('k-heun-churn', 'edm', KARRAS_CHURN, *KARRAS, like='k-euler'),
    *(Case(f'k-lms-{order}', 'lms', {'order': order}, *KARRAS) for order in (1, 2, 3, 4)),
]

DIFFERENCES = [
    Case('k-dpmpp-3m', 'dpmpp_3m', EULER, *KARRAS, differs='half of the second difference: order 2 where ours is 3'),
    Case('k-dpmpp-3m-sde', 'dpmpp_3m_sde', {}, *KARRAS, differs='half of the second difference'),
]

NO_COUNTERPART = {
    'k-euler-churn': 'Karras et al. churn with Heun',
    'k-dpm2-churn': 'as k-euler-churn',
    'k-dpm-fast-ancestral': 'dpm-fast has no ancestral form in its paper',
}


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_every_state_is_theirs(case, ours):
    program = ours(case.schedule)
    assert gap(case, run, program).max() < STATES
    assert gap(case, run, program, np.float32)[-1] < FINAL


@pytest.mark.parametrize('case', DIFFERENCES, ids=lambda case: case.name)
def test_known_differences_are_there(case, ours):
    assert case.differs
    assert not gap(case, run, ours(case.schedule)).max() < 1e-6


def test_named_grids_are_theirs():
    theirs, ends = sampling(), (10, 0.002, 80.0)
    for name, function in (('karras', theirs.get_sigmas_karras), ('exponential', theirs.get_sigmas_exponential)):
        np.testing.assert_allclose(named_sigmas(SIGMAS, 10, name), function(*ends).numpy()[:-1], rtol=1e-5)
    squared = theirs.get_sigmas_polyexponential(*ends, rho=2.0).numpy()[:-1]
    np.testing.assert_allclose(named_sigmas(SIGMAS, 10, 'polyexponential'), squared, rtol=1e-5)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    log_sigmas = 0.5 * np.log(1 / np.cumprod(1 - betas) - 1)
    wanted = np.exp(np.interp(np.linspace(999, 0, 7), np.arange(1000), log_sigmas))
    np.testing.assert_allclose(named_sigmas(TABLE, 7, 'timesteps'), wanted, rtol=1e-9)
    np.testing.assert_allclose(named_sigmas(TABLE, 7, 'karras')[[0, -1]], wanted[[0, -1]], rtol=1e-9)
    with pytest.raises(ValueError, match="on EDM k-diffusion has no grid 'timesteps'"):
        named_sigmas(SIGMAS, 7, 'timesteps')


def test_no_sampler_is_left_out():
    covered = {case.theirs for case in (*CASES, *DIFFERENCES)}
    assert covered | set(NO_COUNTERPART) == set(SAMPLERS) and not covered & set(NO_COUNTERPART)
