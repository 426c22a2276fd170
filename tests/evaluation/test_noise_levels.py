"""The table of losses by noise level against an integral that is known."""

import pytest

from diffjax.evaluation import loss_by_noise_level


def test_levels_are_midpoints_and_their_mean_integrates():
    rows = loss_by_noise_level(lambda t: (3 * t**2, t / 10), 50)
    assert [row['t'] for row in rows[:2]] == pytest.approx([0.01, 0.03])
    assert rows[-1] == pytest.approx({'t': 0.99, 'loss': 3 * 0.99**2, 'standard_error': 0.099})
    assert sum(row['loss'] for row in rows) / 50 == pytest.approx(1, abs=1e-3)  # the midpoint rule for 3 t^2


def test_no_levels_are_refused():
    with pytest.raises(ValueError, match='num_levels=0'):
        loss_by_noise_level(lambda t: (0, 0), 0)
