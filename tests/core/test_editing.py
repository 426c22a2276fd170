"""Editing: what is known stays to the last bit, a Gaussian's conditional distribution, and windows without seams.

The clips are Gaussian: frame i and frame j of a pixel have covariance RHO^|i - j|, so that the exact denoiser of any
number of frames, and the exact distribution given some of them, are matrices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import editing, grids, schedules, solvers
from diffjax.core.denoisers import stateless
from diffjax.core.editing import Known, Windows, adds_noise, keep_known, sample_known, windowed
from diffjax.core.sampling import pad, sample, sample_keys, starting_noise
from diffjax.core.types import Estimate

RHO, SCHEDULE = 0.9, schedules.Cosine()


def covariance(num_frames):
    return RHO ** np.abs(np.subtract.outer(np.arange(num_frames), np.arange(num_frames)))


def gaussian(schedule=SCHEDULE, mean=0.0):
    """The exact denoiser of clips [B, T, ...] of any T; `cond`, [B] or None, is added to the mean."""

    def denoise(x, t, cond):
        values, vectors = np.linalg.eigh(covariance(x.shape[1]))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        centre = mean if cond is None else mean + cond.reshape(-1, *[1] * (x.ndim - 1))
        modes = jnp.einsum('ts,bt...->bs...', vectors, x - alpha * centre)
        spread = (alpha**2 * values + sigma**2).reshape(-1, *[1] * (x.ndim - 2))
        gain = alpha * values.reshape(spread.shape) / spread
        x0 = centre + jnp.einsum('ts,bs...->bt...', vectors, gain * modes)
        return Estimate(x0, jnp.einsum('ts,bs...->bt...', vectors, sigma / spread * modes))

    return stateless(denoise)


@pytest.fixture
def clip():
    """x0 of 3 clips of 4 frames of 2x3 pixels."""
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2, 3, 1)), jnp.float32)


# Masks ----------------------------------------------------------------------------------------------------------------


def test_masks_are_what_they_are_called(clip):
    def frames(mask):
        assert mask.dtype == bool and mask.shape == (4, 1, 1, 1)
        return mask.ravel().tolist()

    assert frames(editing.first_frames(4)) == [True, False, False, False]
    assert frames(editing.first_frames(4, 3)) == [True, True, True, False]
    assert frames(editing.first_and_last(4)) == [True, False, False, True]
    moving = np.array([[True, False, False], [True, True, False]])
    mask = editing.cinemagraph(4, moving)
    assert mask.shape == (4, 2, 3, 1) and mask[0].all()
    for frame in mask[1:, :, :, 0]:
        np.testing.assert_array_equal(frame, ~moving)
    np.testing.assert_array_equal(editing.still(clip[:, 0], 4)[:, 3], clip[:, 0])


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: editing.first_frames(4, 4), 'num_known=4 leaves none of 4 frames to make'),
        (lambda: editing.first_frames(4, 0), 'num_known is a number from 1 on, got 0'),
        (lambda: editing.first_and_last(2), 'between the first and the last of 2 frames there is none'),
        (lambda: editing.cinemagraph(4, np.ones((2, 2))), r'moving must be booleans \[H, W\], got float64'),
        (lambda: _keep(mask=np.ones((4, 1, 1, 1))), 'a mask is booleans, True where x0 is known; got float64'),
        (lambda: _keep(mask=np.ones((3, 1, 1, 1), bool)), r'shape \(3, 1, 1, 1\) does not broadcast to x0 of shape'),
        (lambda: windowed(gaussian(), 4, 5), 'stride=5 leaves frames between windows of 4'),
        (lambda: windowed(gaussian(), 4, 0), 'stride is a number from 1 on, got 0'),
        (lambda: windowed(gaussian(), 4, 2, [1, 1, 0, 1]), 'weights must be 4 positive numbers'),
        (
            lambda: windowed(gaussian(), 4, 2).init(jnp.zeros((1, 3, 1)), None),
            '3 frames is shorter than the window of 4',
        ),
    ],
)
def test_mistakes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# What is known --------------------------------------------------------------------------------------------------------


def _keep(mask):
    plan = solvers.ddim(SCHEDULE, grids.uniform(SCHEDULE, 3))
    return keep_known(plan, SCHEDULE, Known(jnp.zeros((2, 4, 2, 3, 1)), mask), sample_keys(jax.random.key(0), 2))


@functools.cache
def _program(fresh):
    """One compiled program for every solver: the plan is its argument."""

    def run(plan, known, keys):
        return sample_known(gaussian(), plan, SCHEDULE, known, None, keys, fresh=fresh)

    return jax.jit(run)


SOLVERS = [
    ('ddpm', {}, True),
    ('repaint', {'jump': 2, 'repeats': 2}, True),
    ('ddim', {}, False),
    ('heun', {}, False),
    ('dpmpp_2m', {}, False),
    ('unipc', {}, False),
]
MASKS = {
    'image to video': editing.first_frames(4),
    'interpolation': editing.first_and_last(4),
    'continuation': editing.first_frames(4, 3),
    'cinemagraph': editing.cinemagraph(4, np.array([[True, False, False], [True, True, False]])),
    'inpainting': np.random.default_rng(1).random((4, 2, 3, 1)) < 0.5,
}


@pytest.mark.parametrize(
    ('solver', 'options', 'fresh'),
    [
        *SOLVERS,
        ('ddim', {'eta': 1}, True),
        ('restart', {'low': 0.2}, True),
        ('edm', {}, True),
        ('edm', {'churn': 0}, False),
    ],
)
def test_a_plan_says_whether_it_adds_noise(solver, options, fresh):
    plan = getattr(solvers, solver)(SCHEDULE, grids.uniform(SCHEDULE, 12), **options)
    for each in (plan, pad(plan, 64, 8, 4)):
        assert bool(adds_noise(each)) == bool(jax.jit(adds_noise)(each)) == fresh


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize(('solver', 'options', 'fresh'), SOLVERS)
def test_known_values_come_out_to_the_last_bit(clip, solver, options, fresh, mask):
    plan = getattr(solvers, solver)(SCHEDULE, grids.uniform(SCHEDULE, 5), **options)
    keys, mask = sample_keys(jax.random.key(0), 3), MASKS[mask]
    x = _program(fresh)(pad(plan, 16, 4, 2), Known(clip, jnp.asarray(mask)), keys)
    where = np.broadcast_to(mask, clip.shape)
    np.testing.assert_array_equal(x[where], clip[where])
    assert np.isfinite(x).all() and np.abs(x - clip)[~where].min() > 1e-5


def test_a_mask_may_differ_between_samples(clip):
    plan = pad(solvers.ddim(SCHEDULE, grids.uniform(SCHEDULE, 5)), 16, 4, 2)
    mask = np.random.default_rng(1).random((3, 4, 2, 3, 1)) < 0.5
    x = _program(True)(plan, Known(clip, jnp.asarray(mask)), sample_keys(jax.random.key(0), 3))
    np.testing.assert_array_equal(x[mask], clip[mask])


def test_grids_that_stop_short_of_the_data_end_with_it_all_the_same(clip):
    plan = solvers.dpmpp_2m(SCHEDULE, grids.uniform(SCHEDULE, 5)[:-1])
    x = _program(False)(pad(plan, 16, 4, 2), Known(clip, jnp.ones(1, bool)), sample_keys(jax.random.key(0), 3))
    np.testing.assert_array_equal(x, clip)


@pytest.mark.parametrize('fresh', [True, False])
def test_on_the_way_known_values_have_the_level_that_the_network_is_asked_at(fresh):
    """(x - alpha x0) / sigma is standard normal at the time of the next row; anew for each row, or one and the same."""
    plan = solvers.ddpm(SCHEDULE, grids.uniform(SCHEDULE, 4))
    keys, x0 = sample_keys(jax.random.key(0), 500), jnp.full((500, 4, 2), 3.0)
    project = keep_known(plan, SCHEDULE, Known(x0, jnp.asarray([[True], [False], [True], [False]])), keys, fresh=fresh)
    x = starting_noise(plan, keys, (4, 2))
    _, saved = sample(gaussian(), plan, x, None, keys, project=project, save=lambda x, t: x)
    eps = []
    for state, t in zip(saved, plan.t[1:]):
        eps.append((np.asarray(state)[:, ::2] - SCHEDULE.alpha(t) * 3) / SCHEDULE.sigma(t))
        assert abs(eps[-1].mean()) < 4 * 2000**-0.5 and abs(eps[-1].std() - 1) < 4 * 4000**-0.5
    between = np.corrcoef([e.ravel() for e in eps])[np.triu_indices(3, 1)]
    if fresh:
        assert np.abs(between).max() < 4 * 2000**-0.5
    else:
        assert between.min() > 1 - 1e-5
        np.testing.assert_allclose(eps[0], x[:, ::2], atol=1e-4)
    np.testing.assert_array_equal(saved[-1][:, ::2], x0[:, ::2])


def test_the_noise_of_what_is_known_is_not_that_of_the_plan():
    """Row by row, the draws of the two, for the same sample."""
    plan = solvers.ddpm(SCHEDULE, grids.uniform(SCHEDULE, 4))
    keys = sample_keys(jax.random.key(0), 1000)
    project = keep_known(plan, SCHEDULE, Known(jnp.zeros((1000, 2)), jnp.ones(2, bool)), keys)
    for row in range(2):
        drawn = jax.vmap(
            lambda key, row=row: jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, row + 1), 0), (2,))
        )(keys)
        known = project(jnp.zeros((1000, 2)), row)
        assert abs(np.corrcoef(np.ravel(drawn), np.ravel(known))[0, 1]) < 4 * 2000**-0.5


@pytest.mark.parametrize('fresh', [True, False])
def test_a_sample_does_not_know_its_batch(clip, fresh):
    plan = pad(solvers.repaint(SCHEDULE, grids.uniform(SCHEDULE, 5), jump=2, repeats=2), 16, 4, 2)
    keys, mask = sample_keys(jax.random.key(0), 3), jnp.asarray(editing.first_frames(4))
    together = _program(fresh)(plan, Known(clip, mask), keys)
    alone = _program(fresh)(plan, Known(clip[1:2], mask), keys[1:2])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5)


def test_unknown_values_begin_as_noise_and_known_ones_at_the_first_level():
    """On a schedule that does not end in pure noise the known part of the first state holds x0, the other part none."""
    schedule = schedules.ScaledLinear()
    plan = solvers.ddim(schedule, [1.0, 0.0])
    seen = []

    def denoise(x, t, cond):
        seen.append(x)
        return Estimate(x, jnp.zeros_like(x))

    keys = sample_keys(jax.random.key(0), 1)
    mask, x0 = jnp.asarray([True, False]), jnp.full((1, 2), 100.0)
    with jax.disable_jit():
        sample_known(stateless(denoise), plan, schedule, Known(x0, mask), None, keys)
    expected = starting_noise(plan, keys, (2,)) + jnp.asarray([plan.start[0] * 100, 0])
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5)


@functools.cache
def _conditional(solver, **options):
    """Mean and covariance of frames 1 and 2 of 2,000 clips whose frames 0 and 3 are 1.5 and -1; 60 steps of DDPM."""
    plan = getattr(solvers, solver)(SCHEDULE, grids.uniform(SCHEDULE, 60), variance='large', **options)
    x0 = jnp.tile(jnp.asarray([1.5, 0, 0, -1.0]), (2000, 1))
    known = Known(x0, jnp.asarray([True, False, False, True]))
    x = jax.jit(
        lambda plan: sample_known(gaussian(), plan, SCHEDULE, known, None, sample_keys(jax.random.key(0), 2000))
    )
    free = np.asarray(x(plan))[:, 1:3]
    return free.mean(0), np.cov(free.T)


def test_travel_in_time_comes_near_a_gaussians_exact_conditional():
    """RePaint's mean is within 0.04 of E[x | known] and its covariance within 0.02, where the deviation is 0.37.

    Without travel they are more than 0.1 and 0.05 off. What is left falls with the number of steps and of repeats.
    """
    of = covariance(4)
    gain = of[1:3][:, [0, 3]] @ np.linalg.inv(of[np.ix_([0, 3], [0, 3])])
    mean, spread = gain @ [1.5, -1.0], of[1:3, 1:3] - gain @ of[[0, 3]][:, 1:3]
    errors = {}
    for name, options in {'ddpm': {}, 'repaint': {'jump': 2, 'repeats': 10}}.items():
        got = _conditional(name, **options)
        errors[name] = [np.abs(a - b).max() for a, b in zip(got, (mean, spread))]
    print(errors)
    assert errors['repaint'][0] < 0.04 and errors['repaint'][1] < 0.02
    assert errors['ddpm'][0] > 0.1 and errors['ddpm'][1] > 0.05


# Long clips -----------------------------------------------------------------------------------------------------------


def _ask(denoiser, x, t, cond=None):
    return denoiser.apply(denoiser.init(x, cond), x, t, cond)[0]


@pytest.mark.parametrize(('window', 'stride'), [(4, 2), (4, 3), (5, 1), (8, 8), (11, 4)])
def test_a_denoiser_of_single_frames_is_itself_in_windows(window, stride):
    x = jax.random.normal(jax.random.key(0), (2, 11, 3))

    def denoise(x, t, cond):
        return Estimate(jnp.sin(x) + cond.reshape(-1, 1, 1), x * jnp.reshape(t, (-1, 1, 1)), jnp.cos(x))

    t, cond = jnp.array([0.3, 0.6]), jnp.array([1.0, 5.0])
    expected, got = denoise(x, t, cond), _ask(windowed(stateless(denoise), window, stride), x, t, cond)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, expected)


@pytest.mark.parametrize('weights', [None, np.ones(4), np.array([1.0, 3.0, 2.0, 0.5])])
def test_estimates_are_the_weighted_means_over_windows(weights):
    """Equation (2) in float64 loops over windows and frames, with the posterior of four frames by a linear solve."""
    x, t = np.random.default_rng(0).standard_normal((2, 9, 3)), 0.4
    alpha, sigma = SCHEDULE.alpha(np.float64(t)), SCHEDULE.sigma(np.float64(t))
    shares = np.array([1 - 0.5**0.5, 1 + 0.5**0.5, 1 + 0.5**0.5, 1 - 0.5**0.5]) if weights is None else weights
    total, norm = np.zeros_like(x), np.zeros(9)
    for start in (0, 3, 5):
        for frame in range(4):
            row = alpha * covariance(4)[frame] @ np.linalg.inv(alpha**2 * covariance(4) + sigma**2 * np.eye(4))
            total[:, start + frame] += shares[frame] * np.einsum('t,btc->bc', row, x[:, start : start + 4])
            norm[start + frame] += shares[frame]
    expected = total / norm[:, None]
    got = _ask(windowed(gaussian(), 4, 3, weights), jnp.asarray(x, jnp.float32), jnp.float32(t))
    np.testing.assert_allclose(got.x0, expected, atol=1e-5)
    np.testing.assert_allclose(alpha * got.x0 + sigma * got.eps, x, atol=1e-5)


@pytest.mark.parametrize(('num_frames', 'size', 'stride'), [(48, 16, 8), (11, 4, 3), (7, 4, 4), (5, 4, 1), (4, 4, 2)])
def test_joins_are_where_the_windows_of_a_frame_change(num_frames, size, stride):
    windows = Windows(num_frames, size, stride)
    starts = [*range(0, num_frames - size, stride)] + [num_frames - size]
    holders = [{s for s in starts if s <= k < s + size} for k in range(num_frames)]
    assert windows.joins == [k for k in range(num_frames - 1) if holders[k] != holders[k + 1]]


def test_all_windows_go_into_one_call_with_their_conditions_and_a_state_of_their_own():
    shapes = []

    def init(x, cond):
        return jnp.zeros(len(x))

    def apply(state, x, t, cond):
        shapes.append((x.shape, t.shape, cond['label'].tolist()))
        return Estimate(x, x), state + 1

    inner = gaussian()._replace(init=init, apply=apply)
    x, cond = jnp.zeros((2, 9, 3)), {'label': jnp.array([7, 8])}
    long = windowed(inner, 4, 3)
    _, state = long.apply(long.init(x, cond), x, jnp.array([0.1, 0.2]), cond)
    assert shapes == [((6, 4, 3), (6,), [7, 7, 7, 8, 8, 8])]
    np.testing.assert_array_equal(state, np.ones(6))


def test_long_clips_show_no_seam():
    """48 frames by windows of 16: sampling is linear in the noise, so its covariance is exact, from 48 unit vectors.

    The spread of x_{t+1} - x_t, relative to that of the 48-frame process, is the same at the joins as elsewhere. With
    plain means it is not; and side by side, without an overlap, windows know nothing of each other.
    """
    plan = solvers.dpmpp_2m(SCHEDULE, grids.logsnr(SCHEDULE, 20))
    exact = np.sqrt(2 * (1 - RHO))

    def spread(denoiser):
        x = plan.start[1] * jnp.eye(48)[:, :, None]
        ends = sample(denoiser, plan, x, None, sample_keys(jax.random.key(0), 48))[0][:, :, 0]
        return np.linalg.norm(np.diff(ends, axis=1), axis=0) / exact

    blended, mean = (spread(windowed(gaussian(), 16, 8, weights)) for weights in (None, np.ones(16)))
    apart = spread(windowed(gaussian(), 16, 16))
    assert np.ptp(blended) < 0.05 and np.abs(blended - 1).max() < 0.08
    assert np.ptp(mean) > 0.5 and apart[[15, 31]].min() > 2


def test_windows_keep_what_is_known(clip):
    keys, mask = sample_keys(jax.random.key(0), 3), jnp.asarray(editing.first_frames(4, 2))
    plan = solvers.dpmpp_2m(SCHEDULE, grids.uniform(SCHEDULE, 5))
    x = sample_known(windowed(gaussian(), 3, 1), plan, SCHEDULE, Known(clip, mask), None, keys, fresh=False)
    np.testing.assert_array_equal(x[:, :2], clip[:, :2])
