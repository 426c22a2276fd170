"""Power-function averages: their widths and weights in closed form, along a history and for parameters on a line."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from diffjax.training.averages import Exponential, Power, as_average, exponent_of, relative_width
from diffjax.training.state import update_ema

WIDTHS = (0.01, 0.05, 0.1, 0.2, 0.28)


@pytest.mark.parametrize('sigma_rel', WIDTHS)
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel):
    """Of (g + 1) t^g on [0, 1], by numerical integration."""
    g = exponent_of(sigma_rel)
    moments = [quad(lambda t, k=k: (g + 1) * t ** (g + k), 0, 1)[0] for k in (0, 1, 2)]
    assert moments[0] == pytest.approx(1)
    assert np.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(sigma_rel, rel=1e-6)
    assert relative_width(g) == pytest.approx(sigma_rel, rel=1e-9)


def test_published_exponents():
    """Karras et al. 2024, section 3.1: widths of 0.05 and 0.10 are gamma = 16.97 and 6.94."""
    assert exponent_of(0.05) == pytest.approx(16.97, abs=5e-3) and exponent_of(0.10) == pytest.approx(6.94, abs=5e-3)
    assert exponent_of(12**-0.5) == pytest.approx(0, abs=1e-6)  # the plain mean


@pytest.mark.parametrize('sigma_rel', [0.0, -0.1, 0.3, 1.0, float('nan')])
def test_impossible_widths_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=rf'sigma_rel lies in \(0, 0.2887\], .* got {sigma_rel}'):
        Power(sigma_rel=sigma_rel)


@pytest.mark.parametrize('sigma_rel', WIDTHS)
def test_a_history_is_weighed_by_the_integral_of_the_profile(sigma_rel):
    """w_i is the integral of (g + 1) t^g / n^(g+1) from i - 1 to i; nothing is left of what was there before."""
    rng, g = np.random.default_rng(0), exponent_of(sigma_rel)
    history, ema = rng.standard_normal((30, 5)), {'w': jnp.full(5, 5.0)}
    for n, params in enumerate(history, 1):
        ema = update_ema(ema, {'w': jnp.asarray(params, jnp.float32)}, Power(sigma_rel=sigma_rel), jnp.int32(n))
        weights = np.diff((np.arange(n + 1) / n) ** (g + 1))
        np.testing.assert_allclose(ema['w'], weights @ history[:n], atol=3e-6)


def test_a_line_is_averaged_at_its_centre_of_mass():
    """params_t = t in small steps: the average tends to (g + 1) / (g + 2) n."""
    average, n = Power(sigma_rel=0.1), 2000
    g, ema = average.exponent, jnp.zeros(())
    shares = np.asarray(average.share(jnp.arange(1, n + 1)))
    for t, share in enumerate(shares, 1):
        ema += share * (t / n - ema)
    assert float(ema) == pytest.approx((g + 1) / (g + 2), abs=1e-3)


@pytest.mark.parametrize('n', [1, 2, 1000, 10**6, 2 * 10**9])
def test_shares_are_right_however_long_the_run(n):
    """1 - (1 - 1/n)^(g + 1), in float64."""
    average = Power(sigma_rel=0.05)
    exact = -np.expm1((average.exponent + 1) * np.log1p(-1 / n)) if n > 1 else 1.0
    np.testing.assert_allclose(average.share(jnp.int32(n)), exact, rtol=2e-6)


def test_a_number_is_an_exponential_average():
    assert as_average(0.9) == Exponential(decay=0.9) and as_average(Power(sigma_rel=0.1)) == Power(sigma_rel=0.1)
    with pytest.raises(ValueError, match='a decay lies between 0 and 1, got 1.5'):
        Exponential(decay=1.5)
