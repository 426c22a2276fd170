"""The file of Inception-I3D: names, shapes and layouts of the published ones, and what is refused."""

import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.weights.architecture import WeightsError
from diffjax.weights.engine import expected_shapes, export_tensors
from diffjax.weights.i3d import ARCHITECTURE, open_weights


@pytest.fixture(scope='module')
def tensors():
    """By their names, random; a counter among them, as PyTorch keeps it."""
    rng = np.random.default_rng(0)
    shapes = expected_shapes(ARCHITECTURE, {})
    found = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return found | {'Conv3d_1a_7x7.bn.num_batches_tracked': np.array(7, np.int64)}


@pytest.fixture(scope='module')
def path(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'i3d.safetensors'
    save_file(tensors, path)
    return path


def test_names_shapes_and_layouts(path, tensors):
    """Some of the published file, by hand; and all of it there and back."""
    assert len(tensors) == 57 * 5 + 2 + 1
    assert tensors['Conv3d_1a_7x7.conv3d.weight'].shape == (64, 3, 7, 7, 7)
    assert tensors['Mixed_4e.b2b.conv3d.weight'].shape == (64, 32, 3, 3, 3)
    assert tensors['Mixed_5c.b1b.bn.running_var'].shape == (384,)
    assert tensors['logits.conv3d.weight'].shape == (400, 1024, 1, 1, 1)
    params = open_weights(path)()
    kernel = params['Conv3d_1a_7x7']['kernel']
    assert kernel.shape == (7, 7, 7, 3, 64)
    assert kernel[6, 5, 1, 2, 33] == tensors['Conv3d_1a_7x7.conv3d.weight'][33, 2, 6, 5, 1]
    assert params['logits_kernel'][17, 300] == tensors['logits.conv3d.weight'][300, 17, 0, 0, 0]
    np.testing.assert_array_equal(params['logits_bias'], tensors['logits.conv3d.bias'])
    for ours, theirs in (('scale', 'weight'), ('bias', 'bias'), ('mean', 'running_mean'), ('var', 'running_var')):
        np.testing.assert_array_equal(params['Mixed_3c']['b3b'][ours], tensors[f'Mixed_3c.b3b.bn.{theirs}'])
    back = export_tensors(ARCHITECTURE, {}, params)
    assert sorted(back) == sorted(name for name in tensors if 'tracked' not in name)
    assert all(np.array_equal(a, tensors[name]) for name, a in back.items())


def test_other_files_are_refused_in_one_line_before_a_value_is_read(tensors, tmp_path):
    small = {name: a for name, a in tensors.items() if a.size < 1000}
    (tmp_path / 'a.pt').write_bytes(b'PK\x03\x04 an archive of PyTorch')
    (tmp_path / 'b.pt').write_bytes(pickle.dumps({}, protocol=2))
    save_file(small, tmp_path / 'few')
    (tmp_path / 'cut').write_bytes((tmp_path / 'few').read_bytes()[:-9])
    save_file(tensors | {'logits.conv3d.bias': np.zeros(600, np.float32)}, tmp_path / 'other')  # of 600 classes
    for name, message in {
        'a.pt': 'is a pickle, which can run whatever it likes .* two lines in diffjax/weights/i3d.py',
        'b.pt': 'is a pickle',
        'cut': 'truncated or damaged',
        'none': 'none: ',
        'few': r'missing: .*conv3d.weight',
        'other': r'1 of another shape: logits.conv3d.bias is \[600\] and should be \[400\]',
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            open_weights(tmp_path / name)
        assert '\n' not in str(caught.value), name
