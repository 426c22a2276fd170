"""The sections of a config by themselves."""

from dataclasses import replace

import pytest

from diffjax.settings import ConfigError, SamplerSettings

PLAIN = SamplerSettings(solver='ddim')


def test_two_samplers_have_two_file_names():
    changes = [
        {},
        {'solver': 'heun:coordinate=sigma/alpha'},
        {'solver': 'runs/plan/plan.json'},
        {'grid': 'karras'},
        {'grid': 'karras:rho=3'},
        {'grid': [1.0, 0.5, 0.0]},
        {'num_steps': 7},
        {'guidance': 2.5},
        {'guidance': 2.5, 'guidance_high': 0.5},
        {'guidance': 2.5, 'guidance_rescale': 0.7},
        {'guidance': 2.5, 'negative_label': 3},
        {'guidance': 2.5, 'cfg_zero_star': True},
        {'zero_init': 1},
        {'threshold': 1.0},
        {'dynamic_threshold': 0.995},
        {'dynamic_threshold': 0.99},
        {'params': 'raw'},
        {'known': 'first_frames'},
        {'known': 'first_frames:num_known=2'},
        {'known': {'name': 'first_frames', 'num_known': 2}, 'known_from': 'a/clips.npz'},
        {'known': 'first_frames', 'known_from': 'b/clips.npz'},
        {'num_frames': 48},
        {'num_frames': 48, 'window_stride': 4},
        {'grid': [i / 100 for i in range(100, -1, -1)]},
        {'grid': [i / 101 for i in range(101, -1, -1)]},
    ]
    names = [replace(PLAIN, **change).file_name for change in changes]
    assert len(set(names)) == len(changes)
    assert all(len(name) < 180 and set('./ :[]\'",').isdisjoint(name) for name in names)
    assert names[0] == 'ddim-50steps-uniform-w1'
    assert names[8] == 'ddim-50steps-uniform-w2_5-guidance_high=0_5'
    assert replace(PLAIN, batch_size=8).file_name == names[0]  # says nothing about the samples
    path = {'solver': 'runs/plan/plan.json'}
    assert replace(PLAIN, **path, grid='karras', num_steps=3).file_name == replace(PLAIN, **path).file_name


@pytest.mark.parametrize(('low', 'high'), [(0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (float('nan'), 1.0)])
def test_an_interval_of_guidance_that_holds_nothing(low, high):
    with pytest.raises(ConfigError, match=f'times with 0 <= low <= high <= 1; got {low} and {high}'):
        replace(PLAIN, guidance=2.0, guidance_low=low, guidance_high=high)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'num_frames': -1}, 'sampler.num_frames is a whole number from 0 on, got -1'),
        ({'num_frames': 48.0}, 'sampler.num_frames is a whole number from 0 on, got 48.0'),
        ({'num_frames': 48, 'window_stride': 'half'}, "sampler.window_stride is a whole number from 0 on, got 'half'"),
        ({'window_stride': 8}, 'sampler.window_stride = 8 says nothing without a sampler.num_frames'),
        (
            {'known_from': 'x.npz'},
            "sampler.known_from = 'x.npz' says nothing without a sampler.known, such as first_fr",
        ),
        ({'known': 'first_frames', 'known_from': 3}, 'sampler.known_from is the path of a file, got 3'),
    ],
)
def test_keys_of_clips_that_say_nothing(values, message):
    with pytest.raises(ConfigError, match=message):
        replace(PLAIN, **values)
