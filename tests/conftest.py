"""What all tests share: eight fake devices, and for a whole session one folder of datasets and compiled programs.

This file runs before jax is imported. Workers of pytest-xdist, and processes that tests start, inherit the folder from
the process that began the session.
"""

import contextlib
import copy
import gc
import hashlib
import os
import resource
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

assert 'jax' not in sys.modules, 'the settings below are read when jax is imported'

OWNER = 'DIFFJAX_TESTS' not in os.environ
if OWNER:
    os.environ['DIFFJAX_TESTS'] = tempfile.mkdtemp(prefix='diffjax-tests-')
SESSION = Path(os.environ['DIFFJAX_TESTS'])
ROOT = Path(__file__).parents[1]
MAX_MAPS = 8_000

os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'TFDS_DATA_DIR': str(SESSION / 'datasets'),
    'JAX_COMPILATION_CACHE_DIR': str(SESSION / 'programs'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
}


def pytest_unconfigure(config):
    del config
    if OWNER:
        shutil.rmtree(SESSION, ignore_errors=True)


@pytest.fixture(scope='module', autouse=True)
def bounded_maps():
    """Compiled programs are mapped into memory, and Linux gives a process 65,530 maps: none left is a crash."""
    yield
    maps = Path('/proc/self/maps')
    if maps.exists() and len(maps.read_text().splitlines()) > MAX_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope='module')
def fast_compilation():
    """What tests run takes milliseconds and compiles for seconds: leave the compiler's optimiser out."""
    import jax

    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture
def compiles():
    """`with compiles() as names:` collects one entry for each program that the backend is asked for."""
    import jax

    @contextlib.contextmanager
    def count():
        names = []

        def listen(name, seconds, **kwargs):
            del seconds
            if name == '/jax/core/compile/backend_compile_duration':
                names.append(kwargs.get('fun_name', name))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield names
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return count


@pytest.fixture(scope='session')
def get_config():
    """(name, argument='') -> the config of configs/NAME.py."""

    def get(name, argument=''):
        return runpy.run_path(str(ROOT / 'configs' / f'{name}.py'))['get_config'](argument)

    return get


@pytest.fixture
def config(get_config):
    """The smallest config there is, as plain data."""
    return get_config('digits', 'smoke').to_dict()


@pytest.fixture(scope='session')
def changed():
    """(config, 'a.b', value) -> the config with config[a][b] = value; a value of None removes the key."""

    def change(config, key, value):
        config = copy.deepcopy(config)
        *sections, last = key.split('.')
        node = config
        for name in sections:
            node = node[name]
        if value is None:
            del node[last]
        else:
            node[last] = value
        return config

    return change


@pytest.fixture(scope='session')
def snapshot():
    """folder -> {file: its time and digest}."""

    def take(folder):
        return {
            str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in Path(folder).rglob('*')
            if path.is_file()
        }

    return take


@pytest.fixture
def command(monkeypatch, capsys):
    """(*words) -> (exit code, stdout, stderr) of the command, run inside this process on eight devices."""
    import jax

    from diffjax import main as program
    from diffjax.command import FLAGS, parse

    def run(*words):
        for name in [name for name in FLAGS if name.partition('.')[0] == 'config']:
            delattr(FLAGS, name)
        known = 'workdir', 'mode', 'labels', 'num_samples', 'seed', 'out', 'coordinator', 'heartbeat_timeout_seconds'
        for name in known:
            FLAGS[name].unparse()
        FLAGS.unparse_flags()
        monkeypatch.setattr(sys, 'argv', ['diffjax.main', *words])  # where ml_collections looks for overrides
        capsys.readouterr()
        try:
            program.main(parse(sys.argv))
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    monkeypatch.chdir(ROOT)
    filtering = jax.config.jax_traceback_filtering
    yield run
    jax.config.update('jax_traceback_filtering', filtering)


@pytest.fixture
def no_training(monkeypatch):
    from diffjax.training.loop import Trainer

    def train(*args, **kwargs):
        raise AssertionError('it began to train')

    monkeypatch.setattr('diffjax.training.loop.train', train)
    monkeypatch.setattr(Trainer, 'step', train)


@pytest.fixture
def dying():
    """`with dying():` whatever draws samples ends as soon as it has kept one batch."""
    from diffjax.kept_samples import Kept

    keep = Kept.keep

    def die(self, first, samples):
        keep(self, first, samples)
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def end():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Kept, 'keep', die)
            yield

    return end


@pytest.fixture
def refused(no_training, snapshot, tmp_path, compiles):
    """(run, *fragments): the command run() says no, in one line with these fragments, and changes nothing."""

    def check(run, *fragments):
        before = snapshot(tmp_path)
        with compiles() as programs:
            code, out, err = run()
        assert code == 2 and 'Traceback' not in out + err
        (line,) = err.strip().splitlines()
        assert line.startswith('error: ') and len(line) < 2000
        for fragment in fragments:
            assert fragment in line
        assert snapshot(tmp_path) == before
        assert not [name for name in programs if 'step' in name or 'draw' in name]

    return check


@pytest.fixture(scope='session')
def trained(tmp_path_factory, get_config):
    """A workdir of `configs/digits.py:smoke`, trained on one device and not yet sampled from. Copy it to change it."""
    from dataclasses import replace

    import jax
    import numpy as np

    from diffjax.build import build
    from diffjax.data import make_iterator
    from diffjax.training.loop import train
    from diffjax.workdir import write_config

    workdir, config = tmp_path_factory.mktemp('trained') / 'digits', get_config('digits', 'smoke').to_dict()
    experiment = build(config)
    workdir.mkdir()
    write_config(workdir, config)
    batches = make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=experiment.seed)
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', True)
    one_device = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    train(replace(experiment, mesh=one_device).trainer(), batches, workdir, announce=lambda text: None)
    jax.config.update('jax_disable_most_optimizations', before)
    return workdir


@pytest.fixture
def limit_files():
    """(num_bytes): files of this process grow no longer: the system refuses the write, as on a full disk. (): again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes=before[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))

    yield limit
    limit()
