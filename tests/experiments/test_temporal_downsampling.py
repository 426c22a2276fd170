"""The comparison of what is halved, small: its rows, its costs, its refusals."""

import csv

import numpy as np
import pytest

from diffjax.data import open_source
from diffjax.data.moving_digits import moving_digits_dataset_builder

pytestmark = pytest.mark.usefixtures('fast_compilation', 'one_device')

SHORT = """
import runpy

def get_config(arg=''):
    config = runpy.run_path('configs/video_digits.py')['get_config']('smoke')
    config.dataset.num_frames = config.evaluation.num_samples = config.sampler.batch_size = 8
    config.evaluation.noise_levels = config.sampler.num_steps = 1
    return config
"""


@pytest.fixture(scope='module')
def study(experiment):
    return experiment('temporal_downsampling')


@pytest.fixture(scope='module')
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp('study')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_digits_dataset_builder, 'NUM_EXAMPLES', {'train': 64, 'test': 16})
        open_source('moving_digits', 'train', data_dir=folder)
    config = folder / 'short.py'
    config.write_text(SHORT)
    return [f'--config={config}', '--minutes=0.02', f'--data_dir={folder}', f'--out={folder}/out']


@pytest.fixture(scope='module')
def table(study, arguments):
    return study.main(arguments)


def test_rows_are_three_networks_of_one_size(table):
    both, space, frames = table
    assert [row['halved'] for row in table] == ['space and time', 'space alone', 'frame by frame']
    sizes = np.array([row['parameters'] for row in table])
    assert np.abs(sizes / sizes[0] - 1).max() < 0.2  # so small a network can only be twice as wide
    assert space['gflops_per_clip'] > 1.2 * both['gflops_per_clip']  # the coarse levels at all frames
    assert frames['base_channels'] >= both['base_channels']
    assert all(row['trained_s'] > 0 and row['steps'] >= 4 for row in table)


def test_a_network_is_made_wider_for_as_many_parameters(study, arguments, get_config, changed):
    """Twice the channels are four times the parameters of a convolution; between 8 and 16 nothing is divided by 8."""
    folder = arguments[2].partition('=')[2]
    config = changed(get_config('video_digits', 'smoke').to_dict(), 'dataset.data_dir', folder)
    number = study.parameters_of(config)
    assert study.as_large(config, number)['network']['base_channels'] == 8
    assert study.as_large(config, 4 * number)['network']['base_channels'] == 16


def test_all_of_it_is_measured(table):
    for row in table:
        assert np.isfinite([row[name] for name in ('frechet_video_distance', 'flicker_ratio', 'frechet_ratio')]).all()
        assert row['mb_of_a_step'] > 0


def test_tables_and_pictures(study, arguments, table, capsys):
    out = arguments[-1].partition('=')[2]
    again = study.main(arguments)
    assert 'compiled in' not in capsys.readouterr().out  # nothing was trained again
    assert [row['frechet_video_distance'] for row in again] == [row['frechet_video_distance'] for row in table]
    with open(f'{out}/rows.csv', newline='') as file:
        assert [float(row['flicker_ratio']) for row in csv.DictReader(file)] == [row['flicker_ratio'] for row in table]
    with open(f'{out}/report.md') as file:
        report = file.read()
    assert all(name in report for name in ('frame by frame', 'figures.png', 'samples.png'))


@pytest.mark.parametrize(
    'argument, message',
    [
        ('--config=configs/digits.py:smoke', 'has no SpaceTimeUNet'),
        ('--config=configs/video_shapes.py:smoke', 'has no SpaceTimeUNet'),
        ('--minutes=7', 'holds a study of another minutes'),
    ],
)
def test_refusals(study, arguments, table, argument, message):
    with pytest.raises(SystemExit, match=message):
        study.main([*arguments, argument])


def test_clips_that_are_not_measured(study, arguments, tmp_path):
    path = tmp_path / 'unmeasured.py'
    path.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config(arg=""):\n    return ConfigDict('
        '{"network": {"name": "SpaceTimeUNet"}, "evaluation": {"clip_features": ""}})\n'
    )
    with pytest.raises(SystemExit, match='measures no clips'):
        study.main([*arguments, f'--config={path}'])
