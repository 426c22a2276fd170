"""The preview: what a run will need, told before it; mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax import preview
from diffjax.build import build
from diffjax.command import FLAGS, parse
from diffjax.training.devices import DEVICES

ROOT = Path(__file__).parents[1]
DIGITS = f'--config={ROOT}/configs/digits.py:smoke'
MISTAKES = [
    ([], ['--config is needed']),
    ([DIGITS, '--mesh=rows:8'], ["unknown axis 'rows'", 'the axes are data, fsdp, sequence, tensor']),
    ([DIGITS, '--mesh=data:0'], ['--mesh=data:0', 'one size from 1 on, such as data:8,fsdp:4']),
    ([DIGITS, '--mesh=data:-1'], ['one size from 1 on']),
    ([DIGITS, '--mesh=data'], ['one size from 1 on']),
    ([DIGITS, '--mesh=data:2,data:4'], ['one size from 1 on']),
    ([DIGITS, '--mesh=data:4'], ['the mesh has 4 devices', 'runs here already, with 8']),
    ([DIGITS, '--mesh=data:64'], ['the mesh has 64 devices']),
    ([DIGITS, '--config.mesh.fsdp=0'], ['mesh: sizes are whole numbers from 1 on', "'fsdp': 0"]),
    ([DIGITS, '--mesh=data:8', '--config.training.batch_size=20'], ['batch_size = 20', '16 or 24 would']),
    ([DIGITS, '--mesh=data:8', '--device=v7'], ['--device=v7: unknown device; there are v4, v5e', 'H200, cpu']),
    ([DIGITS, '--mesh=data:8', '--measured_steps_per_second=3'], ['of the one device that --device names']),
    ([DIGITS, '--mesh=data:8', '--device=v4', '--measured_steps_per_second=0'], ['a rate above 0']),
    ([DIGITS, '--mesh=data:8', '--config.sead=1'], ["unknown key 'sead'", 'did you mean seed?']),
    (
        [f'--config={ROOT}/configs/autoencoder_kl.py', '--mesh=data:8', '--config.dataset.data_dir=EMPTY'],
        ["'imagenet2012' is not prepared"],
    ),
]


@pytest.fixture
def command(monkeypatch, capsys):
    """(*words) -> (exit code, stdout, stderr), inside this process and its eight devices."""
    assert jax.device_count() == 8  # JAX is up: the command cannot change that for the tests that follow
    for name in ('XLA_FLAGS', 'JAX_PLATFORMS', 'TF_CPP_MIN_LOG_LEVEL'):
        monkeypatch.setenv(name, os.environ.get(name, ''))  # put back afterwards

    def run(*words):
        for name in [name for name in FLAGS if name.partition('.')[0] == 'config']:
            delattr(FLAGS, name)
        for name in ('workdir', 'mesh', 'device', 'json', 'measured_steps_per_second'):
            FLAGS[name].unparse()
        FLAGS.unparse_flags()
        monkeypatch.setattr(sys, 'argv', ['diffjax.preview', *words])
        try:
            preview.main(parse(sys.argv))
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize('words, fragments', MISTAKES, ids=[' '.join(words[1:]) for words, _ in MISTAKES])
def test_a_mistake_is_one_line(command, monkeypatch, tmp_path, words, fragments):
    def never(*args):
        raise AssertionError('it began to compile')

    monkeypatch.setattr('diffjax.training.estimates.count_cost', never)
    code, out, err = command(*[word.replace('EMPTY', str(tmp_path)) for word in words])
    assert code == 2 and out == ''
    (line,) = err.strip().splitlines()
    assert line.startswith('error: ') and all(fragment in line for fragment in fragments)


def test_the_mesh_of_a_config():
    assert preview.read_mesh('fsdp:4') == {'data': 1, 'fsdp': 4, 'sequence': 1, 'tensor': 1}
    assert preview.fixed_mesh({'fsdp': 2}) == {'data': 1, 'fsdp': 2}
    assert preview.fixed_mesh({'data': -1, 'fsdp': 2}) == {'data': 1, 'fsdp': 2}
    assert preview.number_of({'data': 3, 'fsdp': 4, 'sequence': 2}) == 24


@pytest.mark.parametrize(
    'name, network, feature, shape',
    [
        ('dit_b', {'hidden_size': 16, 'depth': 1, 'num_heads': 2}, 'mean', (32, 32, 4)),
        ('cifar10_unet', {'base_channels': 8, 'num_res_blocks': 1}, 'image', (32, 32, 3)),
    ],
)
def test_a_dataset_need_not_be_there(get_config, tmp_path, name, network, feature, shape):
    config = get_config(name).to_dict()
    config['network'] |= network
    config['dataset']['data_dir'] = str(tmp_path)
    assert preview.build_for(config, None, looped=True).batch_spec[feature].shape == (1, *shape)


@pytest.mark.parametrize(
    'network, found',
    [
        ('DiT:depth=2', {'name': 'DiT', 'depth': 2, 'scan_layers': True}),
        ({'name': 'dit', 'scan_layers': 'auto'}, {'name': 'dit', 'scan_layers': True}),
        ({'name': 'DiT', 'scan_layers': False}, {'name': 'DiT', 'scan_layers': False}),
        ('UNet', 'UNet'),  # has no trunk
    ],
)
def test_the_loop_of_other_devices(network, found):
    assert preview.with_loop(network) == found


@pytest.mark.parametrize('looped, unroll', [(True, 1), (False, 3)])
def test_layers_run_in_a_loop_where_the_device_has_one(config, looped, unroll):
    """Where all devices are CPUs, a depth of three is written out."""
    config['network'] |= {'scan_layers': 'auto', 'depth': 3}
    experiment = preview.build_for(config | {'mesh': {'data': 8}}, None, looped=looped)
    params = experiment.trainer().init(experiment.batch_spec)[1].params
    image = jax.ShapeDtypeStruct((1, *experiment.sample_shape), 'float32')
    t, label = (jax.ShapeDtypeStruct((1,), dtype) for dtype in ('float32', 'int32'))
    program = str(jax.make_jaxpr(experiment.task.model.apply)(params, image, t, label))
    assert f'unroll={unroll}' in program and program.count('scan[') == 1


def test_the_rate_of_a_run(tmp_path):
    device = [DEVICES['v4']]
    assert preview.measured_rate(None, str(tmp_path), device) is None
    (tmp_path / 'metrics.csv').write_text('step,loss,steps_per_second\n1,1,0.1\n2,1,5\n3,1,7\n4,1,6\n')
    assert preview.measured_rate(None, str(tmp_path), device) == 6.0
    assert preview.measured_rate(2.5, str(tmp_path), device) == 2.5
    assert preview.measured_rate(None, str(tmp_path), device * 2) is None
    (tmp_path / 'metrics.csv').write_text('step,loss,steps_per_second\n')
    with pytest.raises(ValueError, match='metrics.csv has no rows'):
        preview.measured_rate(None, str(tmp_path), device)


REPORT = {
    'flops': {'per_device': 2e12},
    'traffic': {'least': 1e10},
    'collectives': {'all-gather': {'count': 3, 'size': 8e9, 'sent': 6e9}},
    'largest_collectives': [{'kind': 'all-gather', 'devices': 4, 'count': 3, 'sent': 3e9, 'where': 'a/b/c/d/dot'}],
}


def test_what_bounds_it_in_words():
    assert '2e+12 FLOPs of products, 200 for each byte' in preview.why(REPORT, 'compute')
    assert '10 GB read and written' in preview.why(REPORT, 'memory')
    assert 'sends 6 GB, 50% of it in 3 x all-gather over 4 devices: b/c/d/dot' in preview.why(REPORT, 'collectives')


def test_what_does_not_fit_says_so():
    times = {'compute': 2.0, 'memory': 1e-3, 'collectives': 4e-6, 'at_least': 2.0, 'at_most': 2.1, 'bound': 'compute'}
    devices = {
        'v5e': times | {'fits': False, 'share_of_memory': 1.2},
        'v4': times | {'fits': True, 'share_of_memory': 0.6},
    }
    lines = preview._device_lines(REPORT | {'devices': devices})
    assert 'ESTIMATE' in lines[0]
    assert ' '.join(lines[2].split()) == 'v5e NO, 120% 2 s 1 ms 4 us 2 s to 2.1 s compute'
    assert lines[3].split()[1:3] == ['yes,', '60%']


def test_the_command(tmp_path, config):
    """On four devices, in a process of its own; arguments against the shards that the rule of `fsdp` makes, by hand."""
    out = tmp_path / 'figures.json'
    words = [DIGITS, '--mesh=data:2,fsdp:2', '--device=v5e', '--measured_steps_per_second=100', f'--json={out}']
    run = subprocess.run(
        [sys.executable, '-m', 'diffjax.preview', *words], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-2000:]
    figures = json.loads(out.read_text())
    experiment = build(config | {'mesh': {'data': 8, 'fsdp': 1}})
    leaves = jax.tree.leaves(experiment.trainer().init(experiment.batch_spec)[1].params)

    def shard(a):
        return a.size * 4 // (2 if a.size >= 1024 and any(n % 2 == 0 for n in a.shape) else 1)

    arguments, memory = figures['memory']['arguments'], figures['memory']
    assert arguments['parameters'] == arguments['averages'] == sum(map(shard, leaves))
    assert sum(arguments.values()) == memory['argument']
    assert figures['num_parameters'] == sum(a.size for a in leaves)
    assert figures['mesh'] == {'data': 2, 'fsdp': 2} and figures['num_devices'] == 4
    assert figures['flops']['model'] == 4 * figures['flops']['per_device']
    assert figures['collectives']['all-gather']['count'] > 0  # parameters, where they are used
    roof, measured = figures['devices']['v5e'], figures['measured']
    assert roof['fits'] and roof['share_of_memory'] == memory['needed'] / 16e9
    np.testing.assert_allclose(roof['compute'], figures['flops']['per_device'] / 197e12)
    np.testing.assert_allclose(roof['memory'], figures['traffic']['least'] / 819e9)
    sent = sum(total['sent'] for total in figures['collectives'].values())
    np.testing.assert_allclose(roof['collectives'], sent / 200e9)
    np.testing.assert_allclose(measured['of_the_roofline'], 100 * roof['at_least'])
    for fragment in (
        '4 fake CPU devices (--xla_force_host',
        'AN ESTIMATE',
        'all-gather',
        'MEASURED on v5e: 100 steps/s',
    ):
        assert fragment in run.stdout
