"""The rank of the differences at joins: against SciPy, against the closed form of its spread, and on built seams."""

import numpy as np
import pytest
from scipy import stats

from diffjax.evaluation.seams import frame_differences, seam_figures

RNG = np.random.default_rng(0)
JOINS = [7, 15, 23, 31, 39]


def walks(num_clips, num_frames=48, jumps=()):
    """Clips of one grey pixel that goes up or down by 1 to 20 in each step, and by 30 more at the jumps."""
    steps = RNG.integers(1, 21, (num_clips, num_frames - 1))
    steps[:, list(jumps)] += 30
    places = np.zeros((num_clips, num_frames), int)
    for k in range(num_frames - 1):
        sign = np.where(places[:, k] + steps[:, k] > 255, -1, 1)
        places[:, k + 1] = places[:, k] + sign * steps[:, k]
    return places.astype(np.uint8)[..., None, None, None], steps


def test_differences_are_the_mean_changes_in_bytes():
    clips, steps = walks(5)
    np.testing.assert_array_equal(frame_differences(clips), steps)
    wide = RNG.integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
    expected = [[np.mean(np.abs(clip[k + 1].astype(int) - clip[k])) for k in range(2)] for clip in wide]
    np.testing.assert_allclose(frame_differences(wide), expected, rtol=1e-6)


def test_the_rank_of_a_clip_is_that_of_mann_and_whitney():
    """U = R - m (m + 1) / 2, with R the sum of the joins' ranks, ties sharing theirs."""
    clips, steps = walks(1)
    there = np.isin(np.arange(47), JOINS)
    u = stats.mannwhitneyu(steps[0, there], steps[0, ~there]).statistic
    expected = ((u + 5 * 6 / 2) / 5 - 0.5) / 47
    figures = seam_figures(clips, JOINS)
    assert figures['seam_rank'] == pytest.approx(expected, rel=1e-12)
    assert figures['seam_ratio'] == pytest.approx(steps[0, there].mean() / steps[0, ~there].mean())
    assert 'seam_rank_error' not in figures


def test_no_seam_is_seen_where_none_is():
    """1/2 within the error, and the error is that of equation (2), for steps that are drawn independently."""
    figures = seam_figures(walks(2000)[0], JOINS)
    deviation = np.sqrt(48 * 42 / (12 * 5 * 47**2))
    assert abs(figures['seam_rank'] - 0.5) < 3 * deviation / np.sqrt(2000)
    assert figures['seam_rank_error'] == pytest.approx(deviation / np.sqrt(2000), rel=0.05)
    assert figures['seam_ratio'] == pytest.approx(1, abs=0.03)


def test_a_seam_is_seen():
    figures = seam_figures(walks(20, jumps=JOINS)[0], JOINS)
    assert figures['seam_rank'] == pytest.approx(1 - 5 / 94) and figures['seam_rank_error'] == pytest.approx(
        0, abs=1e-9
    )
    assert figures['seam_ratio'] > 3
    elsewhere = seam_figures(walks(20, jumps=[3, 20])[0], JOINS)
    assert elsewhere['seam_rank'] - 0.5 < 3 * elsewhere['seam_rank_error']
    still = seam_figures(np.zeros((3, 48, 2, 2, 1), np.uint8), JOINS)
    assert still['seam_rank'] == 0.5 and np.isnan(still['seam_ratio'])


def test_places_to_look_at():
    for joins in ([], list(range(47))):
        with pytest.raises(ValueError, match='seams are looked for at some of the 47 steps between frames'):
            seam_figures(walks(2)[0], joins)
