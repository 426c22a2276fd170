"""The README's promises that a machine can check: its code runs, its files and names exist."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import oracles, schedules, solvers, weights

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def block(name: str) -> str:
    """The python block behind a `<!-- test: NAME -->` line."""
    return README.split(f'<!-- test: {name} -->\n```python\n')[1].split('```')[0]


def test_the_library_example_learns_the_mixture():
    """As it stands in the README but for fewer steps: samples far likelier under the true density than noise is."""
    code = block('library')
    assert len([line for line in code.splitlines() if line.strip()]) <= 17
    names = {}
    exec(code.replace('1500', '400'), names)
    data = oracles.gmm2d()
    samples = np.asarray(names['samples'], np.float64)
    noise = np.random.default_rng(0).normal(0, 1.2, samples.shape)
    exact = np.asarray(data.sample(jax.random.key(1), len(samples))[0], np.float64)
    likelihood = [data.log_density(x).mean() for x in (noise, samples, exact)]
    assert likelihood[1] > likelihood[2] - 0.25 * (likelihood[2] - likelihood[0])
    np.testing.assert_allclose(samples.mean(0), data.mean, atol=0.3)


def test_the_likelihood_example_knows_the_density():
    """In float32, against the mixture's closed form in float64."""
    names = {}
    exec(block('likelihood'), names)
    exact = names['data'].log_density(np.asarray(names['points'], np.float64))
    np.testing.assert_allclose(names['log_density'], exact, atol=1e-3)


def test_the_solver_example_is_euler():
    """The solver that the README writes down is Euler's method in sigma / alpha, row for row."""
    code = README.split('```python\ndef my_euler')[1].split('```')[0]
    names = {name: getattr(solvers, name) for name in ('levels', 'units', 'Row', 'tabulate')}
    exec('def my_euler' + code, names)
    grid = np.linspace(0.9, 0.1, 7)
    for mine, theirs in zip(names['my_euler'](schedules.VP(), grid), solvers.euler(schedules.VP(), grid)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


def test_the_weight_example_is_its_paper():
    code = README.split('```python\ndef p2')[1].split('```')[0]
    names = {'jnp': jnp}
    exec('def p2' + code, names)
    logsnr = jnp.linspace(-6.0, 6.0, 5)
    level = weights.Level(logsnr, jnp.zeros(5), jnp.zeros(5))
    np.testing.assert_allclose(jnp.exp(names['p2'](level, gamma=0.5)), (1 + np.exp(logsnr)) ** -0.5, rtol=1e-5)


@pytest.mark.parametrize('path', sorted(set(re.findall(r'\]\(((?!https?:)[^)#]+)\)', README))))
def test_linked_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize('path', sorted(set(re.findall(r'(?:configs|experiments)/\w+\.py', README))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


def test_no_placeholder_is_left():
    assert '@@' not in README
