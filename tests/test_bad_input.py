"""Malformed configs, workdirs and checkpoints, through the commands.

Each is told in one line on stderr that names what was given, with an exit code, before anything is compiled; and no
file is touched (`refused` of conftest.py). The mistakes of `test_build_mistakes.py` and `test_main.py` are others, and
datasets, images and weights stand in `test_bad_files.py`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures('fast_compilation')
ROOT = Path(__file__).parents[1]
DIGITS = f'--config={ROOT}/configs/digits.py:smoke'
NAN, INF = float('nan'), float('inf')


# Values of a config: key, value, what is said -------------------------------------------------------------------------

VALUES = [
    ('seed', 'x', "seed is a whole number from 0 to 4294967295, got 'x'"),
    ('seed', -1, 'seed is a whole number from 0 to 4294967295, got -1'),
    ('seed', 1.5, 'got 1.5'),
    ('seed', 2**70, 'got 1180591620717411303424'),
    ('seed', True, 'got True'),
    ('seed', [0], 'got [0]'),
    ('network', [], 'network is a name'),
    ('network.depth', 0, "network 'DiT': depth is a whole number from 1 on, got 0"),
    ('network.depth', -1, 'depth is a whole number from 1 on, got -1'),
    ('network.depth', 1.5, 'depth is a whole number, got 1.5'),
    ('network.depth', '2', "depth is a whole number, got '2'"),
    ('network.hidden_size', 0, 'hidden_size must be above 0, got 0'),
    ('network.hidden_size', 2**40, 'hidden_size is a whole number of at most 2147483647, got 1099511627776'),
    ('network.hidden_size', '32', "hidden_size is a whole number, got '32'"),
    ('network.hidden_size', NAN, 'hidden_size must be above 0, got nan'),
    ('network.patch_size', 0, 'patch_size is a whole number from 1 on, got 0'),
    ('network.patch_size', -2, 'patch_size is a whole number from 1 on, got -2'),
    ('network.patch_size', 2.0, 'patch_size is a whole number, got 2.0'),
    ('network.num_heads', 0, 'num_heads must be above 0, got 0'),
    ('network.mlp_ratio', NAN, 'mlp_ratio must be above 0, got nan'),
    ('network.mlp_ratio', -1, 'mlp_ratio must be above 0, got -1'),
    ('network.frequency_shift', 'x', "frequency_shift is a whole number, got 'x'"),
    ('optimizer.learning_rate', NAN, 'learning_rate is a number from 0 on, got nan'),
    ('optimizer.learning_rate', -1.0, 'learning_rate is a number from 0 on, got -1.0'),
    ('optimizer.learning_rate', 'fast', "learning_rate is a finite number, got 'fast'"),
    ('optimizer.warmup_steps', -1, 'warmup_steps = -1 must be below num_steps = 4, and 0 or more'),
    ('optimizer.weight_decay', INF, 'weight_decay is a number from 0 on, got inf'),
    ('optimizer.clip_norm', -1, 'clip_norm is a number above 0, or None for no clipping, got -1'),
    ('optimizer.clip_norm', 'x', "clip_norm is a finite number or None, got 'x'"),
    ('optimizer.b1', 2, 'b1 is a number from 0 on and below 1, got 2'),
    ('label_drop', NAN, 'label_drop is a finite number, got nan'),
    ('label_drop', 'x', "label_drop is a finite number, got 'x'"),
    ('learned_variance', 'yes', "learned_variance is True or False, got 'yes'"),
    ('schedule', 'vp:beta_max=-1', "schedule 'vp': beta_max is a number from 0.1 on, got -1"),
    ('schedule', 'vp:beta_max=x', "beta_max is a number from 0.1 on, got 'x'"),
    ('schedule', 'shifted:base=flow,logsnr_shift=x', "logsnr_shift is a finite number or None, got 'x'"),
    ('times', 'logit_normal:std=-1', "logit-normal times' std is a number above 0, got -1"),
    ('times', 'uniform:low=x', "times 'uniform': low is a finite number, got 'x'"),
    ('weight', 'min_snr:gamma=-1', "min_snr's gamma is a number above 0, got -1"),
    ('weight', 'sigmoid:bias=x', "weight 'sigmoid': bias is a finite number, got 'x'"),
    ('sampler.guidance', NAN, 'sampler.guidance is a finite number, got nan'),
    ('sampler.guidance', INF, 'sampler.guidance is a finite number, got inf'),
    ('sampler.num_steps', 2.5, 'sampler.num_steps is a whole number, got 2.5'),
    ('sampler.num_steps', 10**9, 'sampler.num_steps is at most 100000, got 1000000000'),
    ('sampler.negative_label', 1.5, 'sampler.negative_label is a whole number, got 1.5'),
    ('sampler.cfg_zero_star', 'x', "sampler.cfg_zero_star is True or False, got 'x'"),
    ('sampler.params', 3, 'sampler.params is a text, got 3'),
    ('sampler.params', 'ema/../x', "got 'ema/../x'"),
    ('sampler.solver', 'none.json', 'the plan none.json cannot be read: No such file or directory'),
    ('sampler.grid', [1.0, 'x', 0.0], "values is a list of finite numbers, got [1.0, 'x', 0.0]"),
    ('evaluation.num_samples', 1.5, 'evaluation.num_samples is a whole number, got 1.5'),
    ('evaluation.reference', 3, 'evaluation.reference is a text, got 3'),
    ('training.num_steps', NAN, 'training.num_steps is a whole number, got nan'),
    ('training.batch_size', '16', "training.batch_size is a whole number, got '16'"),
    ('training.batch_size', 16.0, 'training.batch_size is a whole number, got 16.0'),
    ('training.batch_size', 2**62, 'training.batch_size is a whole number of at most 2147483647, got'),
    ('training.num_microbatches', 1.5, 'training.num_microbatches is a whole number, got 1.5'),
    ('training.log_every_steps', 0, 'training.log_every_steps must be at least 1, got 0'),
    ('training.keep_checkpoints', 0, 'training.keep_checkpoints must be at least 1, got 0'),
    ('training.ema', 0.99, 'training.ema is a section with keys, got 0.99'),
    ('training.ema.a/b', 0.9, "averages are called by a word that is not 'raw', got 'a/b'"),
    ('training.ema.raw', 0.9, "averages are called by a word that is not 'raw', got 'raw'"),
    ('training.init_from', '/nowhere', 'training.init_from: /nowhere: no network.json in it'),
    ('training.init_from', 3, 'training.init_from is a text, got 3'),
    ('dataset', [], 'dataset is a section with keys, got []'),
    ('dataset.name', 3, 'dataset.name is a text, got 3'),
    ('dataset.name', '', 'A dataset is called name[/config][:version]'),
    ('dataset.name', '../digits', "but not '../digits'"),
    ('dataset.name', 'цифры', "but not 'цифры'"),
    ('dataset.split', '', "dataset.split names what is learned, such as 'train'"),
    ('dataset.split', 'train[:0]', "the split 'train[:0]' of 'digits' has no examples"),
    ('dataset.split', 'train[90%', "no split 'train[90%'; its splits are ['test', 'train']"),
    ('dataset.split', 'train+test+x', "no split 'train+test+x'"),
    ('dataset.test_split', 'test[5:5]', "the split 'test[5:5]' of 'digits' has no examples"),
    ('dataset.resolution', -8, 'dataset.resolution must be at least 0, got -8'),
    ('dataset.data_dir', '/dev/null', "Cannot write the dataset 'digits' under /dev/null (Not a directory)"),
    ('dataset.flip', 'x', "dataset.flip is True or False, got 'x'"),
    ('mesh', [1], 'mesh is a section with keys, got [1]'),
    ('mesh.data', 'x', "mesh.data is a whole number, got 'x'"),
    ('mesh.data', -2, 'mesh.data = -2 times mesh.fsdp = 1 does not cover the 8 devices here'),
    ('first_stage', 3, 'first_stage is a section with keys, got 3'),
    ('first_stage', {'config': 3}, 'first_stage.config is a section with keys or None, got 3'),
    ('first_stage', {'config': {'a': 1}}, 'first_stage.config is the config of an autoencoder, and lacks training'),
    ('first_stage', {'workdir': '/nowhere'}, 'first_stage.workdir: /nowhere holds neither a run nor imported weights'),
    ('task', 'x', "task.name is one of autoencoding, recognition, variational, adversarial; got 'x'"),
    ('новый\n', 1, "unknown key 'новый\\n'"),
]


@pytest.mark.parametrize('key, value, fragment', VALUES, ids=[f'{key}={value}'[:40] for key, value, _ in VALUES])
def test_values_of_a_config(refused, command, config, changed, tmp_path, key, value, fragment):
    config = changed(config, key, value)
    (tmp_path / 'config.py').write_text(
        f'from ml_collections import ConfigDict\nnan, inf = float("nan"), float("inf")\n'
        f'def get_config():\n    return ConfigDict({config!r})\n'
    )
    refused(lambda: command(f'--config={tmp_path}/config.py', f'--workdir={tmp_path}/run'), fragment)


# Files that should be configs -----------------------------------------------------------------------------------------

MAKE = f'import runpy\ndef get_config():\n    c = runpy.run_path("{ROOT}/configs/digits.py")["get_config"]("smoke")\n'
FILES = {
    'raises': ('def get_config():\n    raise RuntimeError("no\\nluck")\n', ', line 2: RuntimeError: no luck'),
    'divides': ('1 / 0\n', ', line 1: ZeroDivisionError: division by zero'),
    'no_python': ('def get_config(:\n', 'is no Python: invalid syntax (line 1)'),
    'binary': (b'\0\xff\xfe', 'is no Python'),
    'imports': ('import nowhere_at_all\n', "line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    'ends': ('import sys\ndef get_config():\n    sys.exit(0)\n', 'line 3: SystemExit: 0'),
    'recursive': ('def get_config():\n    return get_config()\n', 'RecursionError'),
    'list': ('def get_config():\n    return [1]\n', 'get_config returns a ml_collections.ConfigDict, got [1]'),
    'none': ('def get_config():\n    return None\n', 'get_config returns a ml_collections.ConfigDict, got None'),
    'dict': ('def get_config():\n    return {"seed": 1}\n', "ConfigDict, got {'seed': 1}"),
    'arguments': ('def get_config(a, b):\n    return a\n', 'missing 2 required positional arguments'),
    'value': ('get_config = 3\n', "'int' object is not callable"),
    'function': (MAKE + '    c.seed = len\n    return c\n', 'built-in function len'),
    'number': (MAKE + '    c = c.copy_and_resolve_references()\n    c[3] = 1\n    return c\n', '3'),
    'nothing': (
        'from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n',
        'the config lacks seed, schedule',
    ),
}


@pytest.mark.parametrize('name', FILES)
def test_files_that_are_no_configs(refused, command, tmp_path, name):
    text, fragment = FILES[name]
    (tmp_path / f'{name}_config.py').write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: command(f'--config={tmp_path}/{name}_config.py', f'--workdir={tmp_path}/run'), fragment)


@pytest.mark.parametrize('text', ['', 'x = 1\n'])
def test_a_file_without_get_config(tmp_path, text):
    """In a process of its own: ml_collections keeps the functions of the files that it has loaded before."""
    (tmp_path / 'other.py').write_text(text)
    words = [sys.executable, '-m', 'diffjax.main', f'--config={tmp_path}/other.py', f'--workdir={tmp_path}/run']
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, '') and not (tmp_path / 'run').exists()
    assert done.stderr == f'error: --config={tmp_path}/other.py has no function get_config\n'


def test_a_folder_is_no_config(refused, command, tmp_path):
    (tmp_path / 'folder.py').mkdir()
    refused(lambda: command(f'--config={tmp_path}/folder.py', f'--workdir={tmp_path}/run'), 'there is no such file')


# Workdirs -------------------------------------------------------------------------------------------------------------


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def replace_by_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path)


def every_file(folder, change):
    for path in folder.rglob('*'):
        if path.is_file():
            path.write_bytes(change(path.read_bytes()))


CONFIGS = {  # what becomes of config.json -> what is said by every command
    'cut': (lambda path: path.write_text('{"seed": 1'), 'config.json is damaged: it is no JSON'),
    'empty': (lambda path: path.write_text(''), 'config.json is damaged: it is no JSON'),
    'list': (lambda path: path.write_text('[1]'), 'config.json is damaged: it holds no table'),
    'null': (lambda path: path.write_text('null'), 'config.json is damaged: it holds no table'),
    'binary': (lambda path: path.write_bytes(b'\xff\xfe\0'), 'config.json is damaged: it is no text'),
    'deep': (lambda path: path.write_text('[' * 100_000), 'config.json is damaged: its brackets have no end'),
    'folder': (replace_by_folder, 'config.json cannot be read: Is a directory'),
    'link': (link_to_itself, 'config.json cannot be read: Too many levels of symbolic links'),
}
OLD_CONFIGS = {  # those of another version: what is said without --config
    'no keys': (lambda config: config.clear(), 'the config lacks seed'),
    'new key': (lambda config: config.update(old={'a': 1}), "unknown key 'old'"),
    'section': (lambda config: config.update(network=3), 'got 3'),
    'word': (lambda config: config['sampler'].update(num_steps='x'), "sampler.num_steps is a whole number, got 'x'"),
    'task': (lambda config: config.update(task='dance'), "got 'dance'"),
}


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / 'run'))


@pytest.fixture
def previewed(command, monkeypatch):
    """The preview in this process, whose eight devices it cannot change."""
    from diffjax import preview

    for name in ('XLA_FLAGS', 'JAX_PLATFORMS', 'TF_CPP_MIN_LOG_LEVEL'):
        monkeypatch.setenv(name, os.environ.get(name, ''))  # put back afterwards
    monkeypatch.setattr('diffjax.main.main', preview.main)
    return command


@pytest.mark.parametrize('name', CONFIGS)
def test_a_damaged_config_of_a_workdir(refused, command, run, name):
    damage, fragment = CONFIGS[name]
    damage(run / 'config.json')
    for words in (['--mode=sample'], ['--mode=evaluate'], ['--mode=encode'], [DIGITS]):
        refused(lambda words=words: command(f'--workdir={run}', *words), f'{run}/{fragment}')


@pytest.mark.parametrize('name', CONFIGS)
def test_a_damaged_config_is_not_previewed(refused, previewed, run, name):
    damage, fragment = CONFIGS[name]
    damage(run / 'config.json')
    refused(lambda: previewed(f'--workdir={run}', '--mesh=data:8'), f'{run}/{fragment}')


@pytest.mark.parametrize('name', OLD_CONFIGS)
def test_a_workdir_of_another_version(refused, command, run, name):
    change, fragment = OLD_CONFIGS[name]
    edit(run / 'config.json', change)
    refused(lambda: command(f'--workdir={run}', '--mode=sample'), fragment)


def test_a_workdir_of_another_experiment(refused, command, run):
    edit(run / 'config.json', lambda config: config['network'].update(hidden_size=64))
    fragment = 'holds another run: network.hidden_size is 64 there and 32 here'
    refused(lambda: command(f'--workdir={run}', DIGITS), fragment)


def test_checkpoints_of_nobody_knows_what(refused, command, run):
    (run / 'config.json').unlink()
    refused(lambda: command(f'--workdir={run}', DIGITS), f'{run} holds checkpoints and no config.json')
    refused(lambda: command(f'--workdir={run}', '--mode=sample'), f'{run} holds no run: there is no config.json in it')


def test_a_file_in_the_place_of_a_workdir(refused, command, tmp_path):
    (tmp_path / 'file').write_text('mine')
    for place in ('file', 'file/run'):
        refused(lambda place=place: command(f'--workdir={tmp_path}/{place}', DIGITS), f'{tmp_path}/file is no folder')
    refused(lambda: command(f'--workdir={tmp_path}/file', '--mode=sample'), f'{tmp_path}/file/config.json cannot be')


def test_a_workdir_that_cannot_be_written(refused, command, tmp_path, monkeypatch):
    """Whoever is root may write anywhere: the system's own refusal is put in its place."""
    mkdir = Path.mkdir

    def refuse(path, *args, **kwargs):
        if path == tmp_path / 'run':
            raise PermissionError(13, 'Permission denied', str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, 'mkdir', refuse)
    refused(lambda: command(f'--workdir={tmp_path}/run', DIGITS), f'{tmp_path}/run: Permission denied')


LOGS = {
    'metrics.csv': [
        *(b'\xff\0\n1,2\n', b'loss,x\n1,2\n', b'step,loss\none,2\n', b'step,loss\n1,two\n', b'step\n1,2,3\n'),
        None,
    ],
    'figures.json': [b'{', b'[]', b'{}', b'{"step": "x"}', None],
}


@pytest.mark.parametrize('name', LOGS)
def test_a_damaged_log(refused, command, run, name):
    for content in LOGS[name]:
        if content is None:
            replace_by_folder(run / name)
        else:
            (run / name).write_bytes(content)
        refused(lambda: command(f'--workdir={run}', DIGITS), f'{run}/{name}')


def test_a_damaged_log_is_not_compared_with(refused, previewed, run):
    words = f'--workdir={run}', '--mesh=data:8', '--device=H100'
    (run / 'metrics.csv').write_text('step,loss,steps_per_second\n1,2,fast\n')
    refused(lambda: previewed(*words), 'its steps_per_second are no numbers')
    (run / 'metrics.csv').write_text('step,loss\n1,2\n')
    refused(lambda: previewed(*words), 'has no rows with steps_per_second')


# Checkpoints ----------------------------------------------------------------------------------------------------------

CHECKPOINTS = {
    'none': (lambda run: shutil.rmtree(run / 'checkpoints'), 'holds no checkpoint yet: train it first'),
    'an empty step': (
        lambda run: (shutil.rmtree(run / 'checkpoints'), (run / 'checkpoints' / '4').mkdir(parents=True)),
        'none of the checkpoints',
    ),
    'garbage': (lambda run: every_file(run / 'checkpoints', lambda b: b'garbage'), 'none of the checkpoints'),
    'cut': (lambda run: every_file(run / 'checkpoints', lambda b: b[:-20]), 'none of the checkpoints'),
    'wider': (
        lambda run: edit(run / 'config.json', lambda c: c['network'].update(hidden_size=64)),
        'params.blocks_0.attention.out.bias is (32,) there, (64,) by the config',
    ),
    'deeper': (
        lambda run: edit(run / 'config.json', lambda c: c['network'].update(depth=3)),
        "damaged, or of another network than the config's",
    ),
    'another network': (
        lambda run: edit(run / 'config.json', lambda c: c['network'].update(name='UViT', depth=3)),
        "damaged, or of another network than the config's",
    ),
    'other averages': (
        lambda run: edit(run / 'config.json', lambda c: c['training'].update(ema={'slow': 0.99})),
        "damaged, or of another network than the config's",
    ),
}


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoints_that_do_not_fit(refused, command, run, name):
    damage, fragment = CHECKPOINTS[name]
    damage(run)
    refused(lambda: command(f'--workdir={run}', '--mode=sample'), fragment, str(run))


def test_training_does_not_begin_anew_over_damage(command, run, snapshot, monkeypatch):
    def step(*args):
        raise AssertionError('it began to compile')

    monkeypatch.setattr('diffjax.training.loop.Trainer.step', step)
    every_file(run / 'checkpoints', lambda content: content[:-20])
    before = snapshot(run)
    code, _, err = command(f'--workdir={run}', DIGITS)
    (line,) = err.strip().splitlines()
    assert code == 2 and f'none of the checkpoints in {run}/checkpoints can be used' in line
    assert snapshot(run) == before
