"""The recogniser as the perceptual distance of an autoencoder."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.data import make_iterator
from diffjax.data.shapes.rendering import draw
from diffjax.data.shapes.scenes import scene
from diffjax.first_stage import build_first_stage, measure
from diffjax.nets.recognizer import Recognizer, perceptual_distance
from diffjax.training.loop import train
from diffjax.weights.recognizer import open_recognizer, write_recognizer

pytestmark = pytest.mark.usefixtures('fast_compilation')


def built(get_config, perceptual):
    config = get_config('autoencoder_shapes', 'smoke').to_dict()
    config['task'] |= {'perceptual': perceptual, 'discriminator': 'none'}
    run = build_first_stage(config)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    return replace(run, mesh=mesh)


@pytest.fixture(scope='module')
def scenes():
    return np.float32(np.stack([draw(scene('test', i)).image for i in range(4)]) / 127.5 - 1)


def test_it_is_the_distance_of_the_features_in_the_file(get_config, scenes):
    run, opened = built(get_config, 'recognizer'), open_recognizer()
    x, y = scenes, scenes[::-1]
    maps = [opened.network.apply({'params': opened.load()}, a, method='features') for a in (x, y)]
    distance = jax.jit(run.task.perceptual)
    np.testing.assert_allclose(distance(run.frozen, x, y), perceptual_distance(*maps), rtol=1e-4)
    np.testing.assert_array_equal(distance(run.frozen, x, x), 0)
    grey = scenes[..., :1]
    np.testing.assert_allclose(
        distance(run.frozen, grey, grey[::-1]),
        distance(run.frozen, *(a.repeat(3, -1) for a in (grey, grey[::-1]))),
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match='pictures have 2 channels, and this network sees 3'):
        run.task.perceptual(run.frozen, scenes[..., :2], scenes[..., :2])


def test_its_gradient_leads_back_to_the_picture(get_config, scenes):
    """Along it a noisy picture comes nearer; and it is that of differences."""
    run = built(get_config, 'recognizer')
    y = scenes + 0.2 * np.random.default_rng(0).standard_normal(scenes.shape).astype(np.float32)
    distance = jax.jit(lambda y: run.task.perceptual(run.frozen, scenes, y).mean())
    slope = jax.jit(jax.grad(distance))(y)
    way = np.asarray(slope) / np.linalg.norm(slope)
    step = 0.02
    difference = (distance(y + step * way) - distance(y - step * way)) / (2 * step)
    np.testing.assert_allclose(difference, np.linalg.norm(slope), rtol=0.02)
    nearer = y
    for _ in range(5):
        nearer = nearer - 2.0 * way
        slope = jax.jit(jax.grad(distance))(nearer)
        way = np.asarray(slope) / np.linalg.norm(slope)
    assert distance(nearer) < 0.8 * distance(y)


def test_an_autoencoder_trains_on_it_and_the_report_says_so(get_config, tmp_path):
    run = built(get_config, 'recognizer')
    batches = make_iterator(run.source, batch_size=run.training.batch_size, seed=0)
    result = train(run.trainer(), batches, tmp_path, announce=lambda text: None)
    assert 'perceptual' in (tmp_path / 'metrics.csv').read_text().splitlines()[0]
    measure(run, result.state.params, tmp_path, result.step)
    assert 'with the feature distance of shapes_recognizer and no discriminator' in (tmp_path / 'report.md').read_text()


def test_another_file_is_another_distance(get_config, tmp_path):
    network = Recognizer(num_outputs=2, channels=(8,))
    write_recognizer(
        tmp_path / 'mine.safetensors', network, network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']
    )
    run = built(get_config, f'recognizer:weights={tmp_path}/mine.safetensors')
    assert run.task.perceptual.name == 'the feature distance of mine'
    assert (
        jax.tree.leaves(run.frozen)[0].shape
        == jax.tree.leaves(network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))[0].shape
    )
