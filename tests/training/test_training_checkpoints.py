"""Checkpoints: whole or refused, on whatever mesh, and a run that goes on as if nothing had happened."""

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from diffjax.training.checkpoints import Checkpoints, abstract, checksums
from diffjax.training.loop import train

# Where Orbax fails to read it leaves tasks behind, whose errors asyncio reports once more when they are collected.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
logging.getLogger('asyncio').setLevel(logging.CRITICAL)


@pytest.fixture(scope='module')
def tree():
    rng = np.random.default_rng(0)
    return {
        'kernel': jnp.asarray(rng.standard_normal((64, 32)), jnp.float32),
        'half': jnp.asarray(rng.standard_normal((7, 3)), jnp.bfloat16),
        'step': jnp.int32(17),
        'bytes': jnp.asarray(rng.integers(0, 255, 33), jnp.uint8),
        'mask': jnp.asarray([True, False, True]),
        'key': jax.random.key(5),
        'zeros': jnp.zeros((4, 5, 6)),
    }


def with_flipped_bit(leaf, rng):
    """The same array but for one bit, and its class of type kept."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(with_flipped_bit(jax.random.key_data(leaf), rng))
    data = np.array(leaf)
    flat = data.reshape(-1).view(np.uint8)
    bit = 0 if data.dtype == bool else rng.integers(8)
    flat[rng.integers(len(flat))] ^= np.uint8(1 << bit)
    return jnp.asarray(data)


@pytest.mark.parametrize('name', ['kernel', 'half', 'step', 'bytes', 'mask', 'key', 'zeros'])
def test_one_flipped_bit_shows_in_its_leaf_alone(tree, name):
    rng = np.random.default_rng(1)
    before, place = np.asarray(checksums(tree)), sorted(tree).index(name)
    for _ in range(12):
        after = np.asarray(checksums({**tree, name: with_flipped_bit(tree[name], rng)}))
        assert (after[place] != before[place]).all()
        np.testing.assert_array_equal(np.delete(after, place, 0), np.delete(before, place, 0))


def test_exchanged_values_show(tree):
    """Rows, columns and single values in each other's place: sums that ignore the position would not see them."""
    before = np.asarray(checksums(tree))[sorted(tree).index('kernel')]
    kernel = np.asarray(tree['kernel'])
    single = kernel.copy()
    single[0, 0], single[1, 5] = kernel[1, 5], kernel[0, 0]
    for other in (kernel[::-1], kernel[:, ::-1], np.roll(kernel, 1), single):
        after = np.asarray(checksums({**tree, 'kernel': jnp.asarray(other)}))[sorted(tree).index('kernel')]
        assert (after != before).all()


def test_checksums_do_not_depend_on_the_mesh(trainer, batch):
    found = []
    for shape in ((1, 1), (8, 1), (4, 2), (1, 8)):
        make, _, _ = trainer(9, mesh=shape).init(batch)
        found.append(np.asarray(checksums(make())))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    assert len(np.unique(found[0][:, 0])) > 3  # kernel, bias, positions and key are all different


def rows(workdir):
    """metrics.csv without the column that depends on the clock."""
    lines = [line.split(',') for line in (Path(workdir) / 'metrics.csv').read_text().splitlines()]
    clock = lines[0].index('steps_per_second')
    return [line[:clock] + line[clock + 1 :] for line in lines]


MESH = (4, 2)


@pytest.fixture
def uninterrupted(trainer, stream, tmp_path, bits):
    """(bytes of the state after 20 steps without a stop, its metrics.csv)."""
    result = train(trainer(20, mesh=MESH), stream(), tmp_path / 'whole', announce=lambda text: None)
    return bits(result.state), rows(tmp_path / 'whole')


@pytest.mark.parametrize('parts', [(10, 20), (3, 13, 20)])
def test_parts_equal_the_whole_bit_for_bit(uninterrupted, trainer, stream, tmp_path, bits, parts):
    """Parameters, averages, moments, keys; and every logged number."""
    for until in parts:
        result = train(trainer(until, mesh=MESH), stream(), tmp_path / 'parts', announce=lambda text: None)
        assert result.step == until and not result.stopped
    whole_state, whole_rows = uninterrupted
    assert bits(result.state) == whole_state
    uneven = {n for n in parts if n % 5}  # a run that ends between two rows writes one, and splits the next one's mean
    aside = {str(n) for n in uneven} | {str(-(-n // 5) * 5) for n in uneven}
    found, wanted = ([row for row in part if row[0] not in aside] for part in (rows(tmp_path / 'parts'), whole_rows))
    assert found == wanted and len(wanted) == (3 if uneven else 5)


def by_size(folder):
    """The files with the arrays, the largest first."""
    return sorted((p for p in (folder / 'state').rglob('*') if p.parent.name == 'd'), key=lambda p: -p.stat().st_size)


def flip(path, *places):
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 0x10
    path.write_bytes(data)


def flip_bytes(folder):
    path = by_size(folder)[0]
    flip(path, *range(0, path.stat().st_size, 97))


def truncate(folder):
    for path in by_size(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = {
    'whole': lambda folder: None,
    'flipped bytes': flip_bytes,
    'truncated': truncate,
    'empty': empty,
    'no state': lambda folder: shutil.rmtree(folder / 'state'),
    'no check': lambda folder: shutil.rmtree(folder / 'check'),
    'no manifest': lambda folder: (folder / 'state' / 'manifest.ocdbt').unlink(),
    'lost file': lambda folder: by_size(folder)[0].unlink(),
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A workdir with checkpoints 4, 8 and 10, made once."""
    return tmp_path_factory.mktemp('trained') / 'run'


@pytest.fixture
def damaged(trained, trainer, stream, tmp_path):
    """(kind) -> a copy of the trained workdir whose newest checkpoint is damaged."""
    if not trained.exists():
        train(trainer(10, mesh=MESH), stream(), trained, announce=lambda text: None)

    def make(kind, steps=(10,)):
        shutil.copytree(trained, tmp_path / 'run')
        for step in steps:
            DAMAGE[kind](tmp_path / 'run' / 'checkpoints' / str(step))
        return tmp_path / 'run'

    return make


@pytest.mark.parametrize('kind', [kind for kind in DAMAGE if kind != 'whole'])
def test_a_damaged_checkpoint_is_passed_over(uninterrupted, damaged, trainer, stream, bits, caplog, kind):
    """The run goes on from the one before, says so naming both, saves again, and ends where it should."""
    workdir = damaged(kind)
    every = 1 if kind == 'truncated' else 4  # the next one is then 9, before the damaged one
    run = trainer(20, mesh=MESH, checkpoint_every_steps=every)
    with caplog.at_level(logging.WARNING, 'diffjax'):
        result = train(run, stream(), workdir, announce=lambda text: None)
    (warning,) = [record.message for record in caplog.records if record.name == 'diffjax']
    assert 'checkpoint 10 is damaged' in warning and 'going on from checkpoint 8' in warning
    assert bits(result.state) == uninterrupted[0]
    assert rows(workdir) == uninterrupted[1]
    assert {int(p.name) for p in (workdir / 'checkpoints').iterdir()} == {20 - 2 * every, 20 - every, 20}


def test_one_flipped_bit_on_disk_never_comes_back(stream, tmp_path, bits, caplog):
    """Orbax returns damaged values of large arrays without a word (small ones lie within checked nodes)."""
    tree = {'large': jax.random.normal(jax.random.key(0), (1024, 1024))}
    like = abstract(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))

    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tree, stream(), {})
    checkpoints.close()

    def newest():
        checkpoints = Checkpoints(tmp_path)
        try:
            return checkpoints.restore_newest(like)
        finally:
            checkpoints.close()

    path = by_size(tmp_path / '2')[0]
    for place in map(int, np.random.default_rng(0).integers(path.stat().st_size, size=8)):
        flip(path, place)
        restored = newest()
        assert bits(restored.state) == bits(tree)
        assert restored.step == 1
        flip(path, place)
    assert "(ValueError: checksums differ for ['large']); going on from checkpoint 1" in caplog.text
    assert newest().step == 2


def test_no_whole_checkpoint_is_an_error(damaged, trainer, stream):
    """Training again from step 0 would overwrite what could perhaps be rescued."""
    workdir = damaged('truncated', steps=(4, 8, 10))
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}
    with pytest.raises(RuntimeError, match='none of the checkpoints in .*checkpoints can be used.*10: .*8: .*4: '):
        train(trainer(20, mesh=MESH), stream(), workdir, announce=lambda text: None)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}


def test_reading_deletes_nothing(damaged, trainer, batch):
    """Sampling from a run falls back too, but leaves the folder as it is."""
    workdir = damaged('flipped bytes')
    _, shapes, shardings = trainer(9, mesh=MESH).init(batch)
    checkpoints = Checkpoints(workdir / 'checkpoints')
    assert checkpoints.restore_newest(abstract(shapes, shardings)).step == 8
    checkpoints.close()
    assert (workdir / 'checkpoints' / '10').exists()


def test_what_a_killed_save_has_left_goes(damaged, trainer, stream, batch):
    """When training goes on, which needs the room; whoever only reads may be reading beside a run that saves."""
    workdir = damaged('whole')
    left = workdir / 'checkpoints' / '9.orbax-checkpoint-tmp'
    (left / 'state').mkdir(parents=True)
    run = trainer(12, mesh=MESH)
    _, shapes, shardings = run.init(batch)
    checkpoints = Checkpoints(workdir / 'checkpoints')
    assert checkpoints.restore_newest(abstract(shapes, shardings)).step == 10
    checkpoints.close()
    assert left.exists()
    train(run, stream(), workdir, announce=lambda text: None)
    assert not left.exists() and (workdir / 'checkpoints' / '12').exists()


def test_restores_on_another_mesh(damaged, trainer, batch, bits):
    workdir, found = damaged('whole'), []
    for shape in ((4, 2), (1, 1), (8, 1), (1, 8)):
        _, shapes, shardings = trainer(9, mesh=shape).init(batch)
        checkpoints = Checkpoints(workdir / 'checkpoints')
        state, step, *_ = checkpoints.restore_newest(abstract(shapes, shardings))
        checkpoints.close()
        assert step == 10 and state.params['dense']['kernel'].sharding.mesh.devices.shape == shape
        found.append(bits(state))
    assert all(other == found[0] for other in found[1:])
    assert len(set(found[0].values())) > 5


def test_another_shape_is_refused_and_nothing_deleted(damaged, trainer, stream):
    workdir = damaged('whole')
    run = trainer(20, mesh=MESH, ema={'another': 0.9})
    with pytest.raises(RuntimeError, match='none of the checkpoints'):
        train(run, stream(), workdir, announce=lambda text: None)
    assert {p.name for p in (workdir / 'checkpoints').iterdir()} == {'4', '8', '10'}


def test_an_array_of_another_shape_is_named_before_a_value_is_read(tree, stream, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {'params': tree}, stream(), {})
    checkpoints.wait()
    wanted = jax.eval_shape(lambda: {'params': tree})
    assert checkpoints.restore_newest(wanted).step == 3
    wanted['params']['half'] = jax.ShapeDtypeStruct((7, 4), jnp.bfloat16)
    monkeypatch.setattr(ocp.CheckpointManager, 'restore', lambda *args, **options: pytest.fail('values are read'))
    with pytest.raises(RuntimeError, match=r'params\.half is \(7, 3\) there, \(7, 4\) by the config'):
        checkpoints.restore_newest(wanted)
    checkpoints.close()


def test_a_step_is_never_saved_twice_in_silence(trainer, stream, tmp_path):
    run, iterator = trainer(9), stream()
    make, _, _ = run.init(next(iterator))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make(), iterator, {})
    with pytest.raises(RuntimeError, match='the checkpoint of step 2 was not written: step 3 is already there'):
        checkpoints.save(2, make(), iterator, {})
    checkpoints.close()


def test_what_is_saved_is_what_was_there_when_save_was_called(trainer, stream, tmp_path):
    """The save goes on in the background while the caller's notes and iterator move on."""
    run, iterator, notes = trainer(9), stream(), {'pending': {'loss': [1.5]}}
    make, shapes, shardings = run.init(next(iterator))
    position = dict(iterator.get_state())
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, make(), iterator, notes)
        notes['pending']['loss'].append(2.5)
        next(iterator)
    checkpoints.close()
    checkpoints, fresh = Checkpoints(tmp_path), stream()
    restored = checkpoints.restore_newest(abstract(shapes, shardings), fresh)
    assert restored.notes == {'pending': {'loss': [1.5, 2.5, 2.5]}}
    assert fresh.get_state() == {'next_index': position['next_index'] + 2}
    checkpoints.close()


def test_no_checkpoint_is_none(trainer, stream, tmp_path):
    _, shapes, shardings = trainer(9).init(next(stream()))
    checkpoints = Checkpoints(tmp_path / 'new')
    assert checkpoints.restore_newest(abstract(shapes, shardings)) is None
    checkpoints.close()
