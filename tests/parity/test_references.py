"""The harness itself: double precision comes and goes, levels are the scheduler's own, mistakes are one line."""

import sys

import numpy as np
import pytest

pytest.importorskip('diffusers', reason="pip install -e '.[parity]'")
pytest.importorskip('torchsde', reason="pip install -e '.[parity]'")

import diffusers  # noqa: E402
import diffusers_reference  # noqa: E402
import references  # noqa: E402
import torch  # noqa: E402
from cases import LINE, SIGMAS, TABLE  # noqa: E402
from diffusers_schedulers import REFERENCES  # noqa: E402

from diffjax.core import oracles  # noqa: E402
from diffjax.core.schedules import ScaledLinear  # noqa: E402

MIXTURE = oracles.gmm2d()


def run(name, schedule, grid, num_steps=10, **options):
    x = np.random.default_rng(0).standard_normal((3, 2)) * schedule.sigma(np.float64(1.0))
    return diffusers_reference.run(name, schedule, MIXTURE.posterior, x, num_steps, grid, **options)


def test_double_precision_is_put_back():
    module = sys.modules[diffusers.HeunDiscreteScheduler.__module__]
    before = dict(vars(module))
    run('heun', TABLE, 'linspace')
    with pytest.raises(ValueError, match="got 'linspce'"):
        run('heun', TABLE, 'linspce')
    assert {name: vars(module)[name] for name in before} == before
    assert torch.get_default_dtype() == torch.float32
    assert diffusers.HeunDiscreteScheduler().sigmas.dtype == torch.float32


def test_levels_are_the_tables_in_double_precision():
    """SD's betas in long double: sigma / alpha at the integer timesteps of the leading grid."""
    betas = np.linspace(np.longdouble(0.00085) ** 0.5, np.longdouble(0.012) ** 0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[np.arange(900, -1, -100)]
    path = run('dpmpp-2m-midpoint', TABLE, 'leading', 9)
    found = np.exp(-0.5 * TABLE.logsnr(path.t[:-1]))
    np.testing.assert_allclose(found, np.sqrt((1 - abar) / abar)[:-1].astype(float), rtol=1e-12)
    assert path.t[-1] == 0 and path.num_evaluations == 9


def test_given_times_are_the_steps():
    times = TABLE.t_of_logsnr(np.linspace(-4, 6, 8))
    for name in ('dpmpp-2m-midpoint', 'euler', 'unipc-3-bh2', 'sa-2-2-tau0', 'dpmpp-2s-midpoint', 'lms-4'):
        np.testing.assert_allclose(run(name, TABLE, times).t[:8], times, rtol=1e-12)
    np.testing.assert_allclose(run('heun', TABLE, times).t[:-1:2], times, rtol=1e-12)
    np.testing.assert_allclose(run('flow-euler', LINE, [1.0, 0.7, 0.2]).t, [1.0, 0.7, 0.2, 0.0], atol=1e-12)
    np.testing.assert_allclose(run('edm-dpmpp-2m-heun', SIGMAS, [1.0, 0.1]).t, [1.0, 0.1, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    ('name', 'schedule', 'grid', 'message'),
    [
        ('heun', LINE, 'shift=1', 'HeunDiscreteScheduler does not run on Flow'),
        ('flow-euler', SIGMAS, 'karras', 'FlowMatchEulerDiscreteScheduler does not run on EDM'),
        ('edm-euler', TABLE, 'karras', 'EDMEulerScheduler does not run on ScaledLinear'),
        ('ddim', TABLE, 'karras', 'with the grid karras: it has no use_karras_sigmas'),
        ('ddim', TABLE, [0.9, 0.5], 'with the grid of given times: it has no timesteps'),
        ('euler', SIGMAS, 'linspace', 'on EDM a grid of the references is karras, exponential or a list'),
        ('euler', TABLE, 'karass', "grid of the references is one of linspace, .* got 'karass'"),
        ('euler', ScaledLinear(zero_terminal=True), 'karras', 'without zero_terminal'),
    ],
)
def test_mistakes_are_one_line(name, schedule, grid, message):
    with pytest.raises(ValueError, match=message):
        run(name, schedule, grid)


def test_a_missing_package_says_how_to_get_it():
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[parity\]'"):
        diffusers_reference.load('torch_that_nobody_has')


@pytest.mark.parametrize('name', ['karras', 'exponential'])
def test_the_grids_of_edm_are_its_schedulers(name):
    scheduler = diffusers.EDMEulerScheduler(sigma_max=SIGMAS.sigma_max, sigma_schedule=name)
    scheduler.set_timesteps(9)
    t = run('heun', SIGMAS, name, 9).t
    np.testing.assert_allclose(SIGMAS.sigma(np.append(t[:-1:2], t[-1])), scheduler.sigmas.numpy(), rtol=1e-5)


def test_each_runs_on_the_grids_that_it_has():
    spacings, sigmas = ['linspace', 'leading', 'trailing'], ['karras', 'exponential', 'beta']
    assert references.grids('ddim', TABLE) == spacings
    assert references.grids('unipc-3-bh2', TABLE) == [*spacings, *sigmas]
    assert references.grids('dpmpp-3m-heun', TABLE) == [*spacings, *sigmas, 'lu']
    assert references.grids('dpmpp-3s-heun', TABLE) == [*sigmas, 'own']
    assert references.grids('lcm', TABLE) == ['own']
    assert references.grids('k-lms-4', TABLE) == ['karras', 'exponential', 'polyexponential', 'timesteps']
    assert references.grids('edm-euler', SIGMAS) == references.grids('heun', SIGMAS) == ['karras', 'exponential']
    assert references.grids('flow-heun', LINE) == references.grids('deis-3', LINE) == ['shift=1', 'shift=3']
    assert not any(references.grids(name, LINE) for name in ('heun', 'ddim', 'k-heun', 'edm-euler', 'ipndm'))


@pytest.mark.parametrize('schedule', [SIGMAS, LINE], ids=lambda schedule: type(schedule).__name__)
def test_endings_keep_the_budget_and_come_near_the_flow(schedule):
    x = np.random.default_rng(1).standard_normal((4, 2)) * schedule.sigma(np.float64(1.0))
    end = MIXTURE.flow(schedule, x, 1.0, 0.0)
    found = list(references.endings(schedule, MIXTURE.posterior, x, 20))
    for ending in found:
        assert 17 <= ending.num_evaluations <= 20, ending[:4]
        assert not ending.stochastic
    errors = {ending[:2]: np.sqrt(np.mean(np.sum((ending.x - end) ** 2, 1))) for ending in found}
    finite = [error for error in errors.values() if np.isfinite(error)]
    assert len(finite) > 0.8 * len(found) and min(finite) < 0.02 < np.median(finite) < 1.5
    assert {name for name, _ in errors} <= set(REFERENCES) | set(references.SAMPLERS)
    assert any(name.startswith('k-') for name, _ in errors) != (schedule == LINE)


def test_a_refusal_goes_into_the_table(monkeypatch):
    monkeypatch.setattr(references, 'REFERENCES', {'tcd-eta0': REFERENCES['tcd-eta0']})
    monkeypatch.setattr(references, 'SAMPLERS', {})
    x = np.zeros((2, 2))
    (few,), (many,) = (list(references.endings(TABLE, MIXTURE.posterior, x, budget)) for budget in (4, 60))
    assert few.failure == '' and np.isfinite(few.x).all()
    assert '50' in many.failure and '\n' not in many.failure and np.isnan(many.x).all()
