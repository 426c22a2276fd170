"""The spiral, trained for a moment: its samples must lie on the spiral rather than like noise."""

import numpy as np


def test_samples_are_much_nearer_to_the_spiral_than_noise(experiment, tmp_path):
    distances = experiment('spiral').main([f'--out={tmp_path}', '--steps=300', '--sampler_steps=10'])
    assert distances['samples'] < 0.4 * distances['noise']
    assert distances['another draw of data'] < 0.4 * distances['noise']
    assert (tmp_path / 'spiral.png').stat().st_size > 50_000


def test_the_distance_of_a_shift_is_its_length_over_root_two(experiment):
    x = np.random.default_rng(0).standard_normal((100, 2))
    distance = experiment('spiral').sliced_wasserstein
    assert distance(x, x) == 0
    assert np.isclose(distance(x, x + np.array([2.0, 0.0])), np.sqrt(2))


def test_points_follow_the_curve(experiment):
    points, place = experiment('spiral').spiral(np.random.default_rng(0), 2000)
    module = experiment('spiral')
    radius = np.linalg.norm(points, axis=1)
    assert np.abs(radius - module.RADIUS * place).max() < 6 * module.THICKNESS
