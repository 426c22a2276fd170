"""Averages after the run: their dot products by integration, their parameters against the whole history, and damage."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from diffjax.training.averages import Power, exponent_of
from diffjax.training.checkpoints import abstract
from diffjax.training.loop import NonFiniteError, Settings, train
from diffjax.training.posthoc_ema import (
    SNAPSHOTS,
    TREE,
    Profile,
    combination,
    dot_products,
    folder_of,
    is_reconstructed,
    read_reconstructed,
    reconstruct,
)
from diffjax.training.snapshots import DamagedSnapshot, Snapshots

pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
logging.getLogger('asyncio').setLevel(logging.CRITICAL)

TRACKED = {'narrow': Power(sigma_rel=0.05), 'wide': Power(sigma_rel=0.1)}
EXPONENTS = [exponent_of(0.05), exponent_of(0.1)]


def density(t, step, exponent):
    return np.where(t <= step, (exponent + 1) * (t / step) ** exponent / step, 0.0)


def test_dot_products_are_integrals():
    steps, exponents = np.array([30, 100, 100, 70]), np.array([17.0, 7.0, 0.3, 2.0])
    found = dot_products(Profile(steps, exponents), Profile(steps[1:], exponents[1:]))
    for i in range(4):
        for j in range(3):
            a, b = (steps[i], exponents[i]), (steps[j + 1], exponents[j + 1])
            exact = quad(lambda t: density(t, *a) * density(t, *b), 0, min(a[0], b[0]))[0]  # noqa: B023
            assert found[i, j] == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize(
    'width, most', [(0.03, 0.3), (0.05, 1e-6), (0.07, 2e-3), (0.1, 1e-6), (0.15, 5e-3), (0.25, 0.1)]
)
def test_the_combination_is_nearest_to_the_profile(width, most):
    """32 snapshots of two: the density is as near as is said, no small change brings it nearer, and it sums to 1."""
    steps = np.repeat(np.arange(1, 33) * 32, 2)
    known = Profile(steps, np.tile(EXPONENTS, 32))
    wanted = Profile(np.array([1024]), np.array([exponent_of(width)]))
    weights, errors = combination(known, wanted)
    t = (np.arange(2**14) + 0.5) / 2**14 * 1024
    table = np.stack([density(t, *pair) for pair in zip(known.steps, known.exponents)])
    target = density(t, 1024, exponent_of(width))
    distance = np.linalg.norm(weights[:, 0] @ table - target) / np.linalg.norm(target)
    assert errors[0] < most and distance == pytest.approx(errors[0], rel=0.05, abs=2e-4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = weights[:, 0] + 1e-2 * rng.standard_normal(64)
        assert np.linalg.norm(other @ table - target) / np.linalg.norm(target) > errors[0] - 1e-6
    assert weights.sum() == pytest.approx(1, abs=3 * most)


def test_what_was_tracked_is_taken_as_it_is_and_nothing_from_the_future():
    known = Profile(np.repeat([10, 20, 30], 2), np.tile(EXPONENTS, 3))
    weights, errors = combination(known, Profile(np.array([20, 5]), np.array([EXPONENTS[1], EXPONENTS[0]])))
    np.testing.assert_allclose(weights[:, 0], [0, 0, 0, 1, 0, 0], atol=1e-8)
    assert errors[0] < 1e-6
    assert (weights[:, 1] == 0).all() and errors[1] == 1  # there is nothing yet


@pytest.fixture(scope='module')
def make_run():
    """The trainer's settings of this file: a snapshot after each 8 steps."""
    return {'ema': {'plain': 0.9, **TRACKED}, 'ema_snapshot_every_steps': 8, 'checkpoint_every_steps': 20}


def history_of(run, stream, batch):
    """The kernel after each step, by the step function alone."""
    make, shapes, shardings = run.init(batch)
    step, state, iterator, kernels = run.step(shardings), make(), stream(), []
    for _ in range(run.settings.num_steps):
        state, _ = step(state, (), next(iterator))
        kernels.append(np.asarray(state.params['dense']['kernel'], np.float64))
    return np.stack(kernels), abstract(shapes.params, shardings.params)


def test_any_width_is_reconstructed(trainer, stream, batch, tmp_path, make_run):
    """Against the weighted mean of the whole history, at the last step and at one in the middle of the run."""
    run = trainer(96, **make_run)
    train(run, stream(), tmp_path, announce=lambda text: None)
    kernels, shapes = history_of(run, stream, batch)
    snapshots = Snapshots(tmp_path / SNAPSHOTS)
    assert snapshots.steps == list(range(8, 97, 8))
    for step in (96, 48):
        widths = (0.05, 0.08, 0.15)
        for width, made in zip(widths, reconstruct(snapshots, TRACKED, widths, step, shapes)):
            weights = np.diff((np.arange(step + 1) / step) ** (exponent_of(width) + 1))
            exact = np.tensordot(weights, kernels[:step], 1)
            spread = np.abs(exact - kernels[step - 1]).max()  # what averaging changes
            tolerance = {0.05: 1e-5, 0.08: 0.02, 0.15: 0.05}[width] * (96 / step) ** 2
            assert np.abs(made.params['dense']['kernel'] - exact).max() < tolerance * spread, (step, width)
            assert made.num_snapshots == step // 8 and made.error < tolerance
    with pytest.raises(ValueError, match='no whole snapshot up to step 7 in .*ema_snapshots: .8, 16, '):
        reconstruct(snapshots, TRACKED, [0.08], 7, shapes)
    snapshots.close()


def test_a_damaged_snapshot_is_left_out(trainer, stream, batch, tmp_path, make_run, caplog):
    """A flipped bit, and a step of which half is missing: the rest still tells, less exactly."""
    run = trainer(40, **make_run)
    train(run, stream(), tmp_path, announce=lambda text: None)
    kernels, shapes = history_of(run, stream, batch)
    snapshots = Snapshots(tmp_path / SNAPSHOTS)
    whole = reconstruct(snapshots, TRACKED, [0.08], 40, shapes)[0]
    data = max((tmp_path / SNAPSHOTS / '24' / 'tree_wide').rglob('*'), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    shutil.rmtree(tmp_path / SNAPSHOTS / '16' / 'tree_narrow')
    with caplog.at_level(logging.WARNING, 'diffjax'):
        part = reconstruct(snapshots, TRACKED, [0.08], 40, shapes)[0]
    told = [record.getMessage() for record in caplog.records if 'left out' in record.getMessage()]
    assert len(told) == 2 and '16' in told[0] and '24' in told[1]
    assert (whole.num_snapshots, part.num_snapshots) == (5, 3) and part.error > whole.error
    weights = np.diff((np.arange(41) / 40) ** (exponent_of(0.08) + 1))
    exact = np.tensordot(weights, kernels, 1)
    assert np.abs(part.params['dense']['kernel'] - exact).max() < 0.2 * np.abs(exact - kernels[-1]).max()
    with pytest.raises(DamagedSnapshot, match='24'):
        snapshots.restore(24, 'wide', shapes)
    snapshots.close()


def test_a_run_in_parts_leaves_the_same_snapshots(trainer, stream, batch, tmp_path, make_run, bits):
    """Stopped by NaN after snapshots that no checkpoint covers: they are written again, bit for bit."""
    train(trainer(44, **make_run), stream(), tmp_path / 'whole', announce=lambda text: None)

    def spoil(index, batch):
        return {**batch, 'x': np.full_like(batch['x'], np.nan)} if index == 35 else batch

    with pytest.raises(NonFiniteError):
        train(trainer(44, **make_run), stream(spoil), tmp_path / 'parts', announce=lambda text: None)
    store = Snapshots(tmp_path / 'parts' / SNAPSHOTS)
    assert store.steps == [8, 16, 24, 32]  # the newest checkpoint is 20
    store.close()
    stamp = (tmp_path / 'parts' / SNAPSHOTS / '24').stat().st_mtime_ns
    train(trainer(44, **make_run), stream(), tmp_path / 'parts', announce=lambda text: None)
    assert (tmp_path / 'parts' / SNAPSHOTS / '24').stat().st_mtime_ns != stamp

    _, shapes, shardings = trainer(44, **make_run).init(batch)
    shapes = abstract(shapes.params, shardings.params)
    stores = [Snapshots(tmp_path / name / SNAPSHOTS) for name in ('whole', 'parts')]
    assert stores[0].steps == stores[1].steps == [8, 16, 24, 32, 40, 44]
    for step in stores[0].steps:
        for name in TRACKED:
            one, other = (bits(store.restore(step, name, shapes)) for store in stores)
            assert one == other
    for store in stores:
        store.close()


def test_snapshots_are_split_over_a_mesh_and_come_back_on_another(trainer, stream, batch, tmp_path, make_run):
    train(trainer(8, mesh=(2, 4), **make_run), stream(), tmp_path, announce=lambda text: None)
    store, kernels = Snapshots(tmp_path / SNAPSHOTS), []
    for mesh in ((2, 4), (1, 1)):
        _, shapes, shardings = trainer(8, mesh=mesh, **make_run).init(batch)
        made = reconstruct(store, TRACKED, [0.05], 8, abstract(shapes.params, shardings.params))[0]
        kernels.append(made.params['dense']['kernel'])
        assert len(kernels[-1].sharding.device_set) == mesh[0] * mesh[1]
    assert kernels[0].sharding.spec != kernels[1].sharding.spec or jax.device_count() == 1
    np.testing.assert_allclose(kernels[0], kernels[1], rtol=1e-6)
    store.close()


def test_what_was_made_is_found_by_name(tmp_path):
    """ema/WIDTH/STEP, or the newest step of ema/WIDTH; anything else says what is there and how to make it."""
    shape = {'w': jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    with pytest.raises(
        FileNotFoundError, match=r'no ema/0.08: it has none; make it with --mode=ema .*--sigma_rel=0.08$'
    ):
        read_reconstructed(tmp_path, 'ema/0.08', shape)
    for step in (90, 100):
        store = Snapshots(folder_of(tmp_path, 0.08, step))
        store.save(step, {TREE: {'w': jnp.full(3, float(step))}})
        store.close()
    folder_of(tmp_path, 0.08, 200).mkdir()  # made, and nothing in it yet
    for name, step in (('ema/0.08', 100), ('ema/0.08/90', 90), ('ema/0.080', 100), ('ema/8e-2/90', 90)):
        params, found = read_reconstructed(tmp_path, name, shape)
        assert found == step and (np.asarray(params['w']) == step).all()
    with pytest.raises(FileNotFoundError, match=r'it has ema/0.08/100, ema/0.08/90; .* --sigma_rel=0.08 --step=7'):
        read_reconstructed(tmp_path, 'ema/0.08/7', shape)
    names = dict.fromkeys(('ema/0.08', 'ema/0.08/7', 'ema/8e-2'), True)
    names |= dict.fromkeys(('ema', 'ema/', 'ema/x', 'ema/1-2', 'ema/.', 'raw'), False)
    assert {name: is_reconstructed(name) for name in names} == names


def test_snapshots_need_power_averages():
    for ema, every in (({'ema': 0.99}, 10), (TRACKED, -1)):
        with pytest.raises(
            ValueError, match='ema_snapshot_every_steps is a number of steps, 0 for never, and keeps power'
        ):
            Settings(num_steps=1, batch_size=1, ema=ema, ema_snapshot_every_steps=every)
