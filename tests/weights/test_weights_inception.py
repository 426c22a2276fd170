"""The file of Inception's weights: what is in it, what is refused, and images through the network that it makes."""

import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.evaluation.collection import collect
from diffjax.evaluation.image_sets import image_array
from diffjax.evaluation.spaces import inception
from diffjax.nets import Inception
from diffjax.weights.architecture import WeightsError
from diffjax.weights.engine import expected_shapes, export_tensors
from diffjax.weights.inception import ARCHITECTURE, open_weights

pytestmark = pytest.mark.usefixtures('fast_compilation')


def write(path, tensors):
    save_file(tensors, path)
    return path


@pytest.fixture(scope='module')
def tensors():
    """By their names, random; counters among them, as PyTorch keeps them."""
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in expected_shapes(ARCHITECTURE, {}).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.2
        found[name] = np.float32(scale) * noise + name.endswith(('bn.weight', 'var'))
    return found | {'Conv2d_1a_3x3.bn.num_batches_tracked': np.array(7, np.int64)}


@pytest.fixture(scope='module')
def path(tensors, tmp_path_factory):
    return write(tmp_path_factory.mktemp('weights') / 'inception.safetensors', tensors)


def test_names_shapes_and_layouts(path, tensors):
    """Some of the published file, by hand; and all of it there and back."""
    assert len(tensors) == 94 * 5 + 2 + 1
    assert tensors['Mixed_6b.branch7x7_2.conv.weight'].shape == (128, 128, 1, 7)
    assert tensors['Mixed_7c.branch3x3dbl_3b.conv.weight'].shape == (384, 384, 3, 1)
    assert tensors['fc.weight'].shape == (1008, 2048)
    params = open_weights(path)()
    kernel = params['Mixed_6b']['branch7x7_2']['kernel']
    assert kernel.shape == (1, 7, 128, 128)
    assert kernel[0, 5, 3, 99] == tensors['Mixed_6b.branch7x7_2.conv.weight'][99, 3, 0, 5]
    assert params['fc_kernel'][17, 900] == tensors['fc.weight'][900, 17]
    for ours, theirs in (('scale', 'weight'), ('bias', 'bias'), ('mean', 'running_mean'), ('var', 'running_var')):
        unit = params['Mixed_5d']['branch_pool']
        np.testing.assert_array_equal(unit[ours], tensors[f'Mixed_5d.branch_pool.bn.{theirs}'])
    back = export_tensors(ARCHITECTURE, {}, params)
    assert sorted(back) == sorted(name for name in tensors if 'tracked' not in name)
    assert all(np.array_equal(a, tensors[name]) for name, a in back.items())


def test_other_files_are_refused_in_one_line_before_a_value_is_read(tensors, tmp_path):
    small = {name: a for name, a in tensors.items() if a.size < 1000}
    (tmp_path / 'a.pth').write_bytes(b'PK\x03\x04 an archive of PyTorch')
    (tmp_path / 'b.pth').write_bytes(pickle.dumps({}, protocol=2))
    (tmp_path / 'cut').write_bytes(write(tmp_path / 'whole', small).read_bytes()[:-9])
    few = dict(list(tensors.items())[:400]) | {'AuxLogits.fc.bias': np.zeros(3, np.float32)}
    write(tmp_path / 'few', few)
    other = write(tmp_path / 'other', tensors | {'fc.bias': np.zeros(1000, np.float32)})
    for name, message in {
        'a.pth': 'is a pickle, which can run whatever it likes .* two lines in diffjax/weights/inception.py',
        'b.pth': 'is a pickle',
        'cut': 'truncated or damaged',
        'none': 'none: ',
        'few': r'missing: .*unexpected: AuxLogits.fc.bias',
        'other': r'1 of another shape: fc.bias is \[1000\] and should be \[1008\]',
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            inception(weights=tmp_path / name)
        assert '\n' not in str(caught.value), name
    assert other.stat().st_size > 9e7


def test_grey_digits_pass_as_colour(path, monkeypatch):
    """Three images, padded to four, through the file and the whole network, against the network alone."""
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, 'local_devices', lambda: first)
    space = inception(weights=path, resize='pytorch', batch_size=4)
    assert space.dimensions((8, 8, 1)) == (2048, 2023) and space.batch_size == 4
    assert space.name == 'Inception-v3 (2015), images resized as by pytorch'
    found = collect(image_array('x', images), space)
    network, params = Inception(resize='pytorch'), open_weights(path)()
    expected = jax.jit(network.apply)({'params': params}, np.repeat(images, 3, -1))
    np.testing.assert_allclose(found.points, expected.pool, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.spatial.mean, np.mean(expected.spatial, 0), rtol=1e-3, atol=1e-3)
    assert np.std(expected.pool[0] - expected.pool[1]) > 0.01
    logits = np.asarray(space.extract(images).logits)[:3]
    np.testing.assert_allclose(logits, expected.logits - params['fc_bias'], rtol=1e-3, atol=1e-3)
    assert np.std(params['fc_bias']) > 0.1
