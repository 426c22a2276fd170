"""A recogniser's file: written, read, and refused where it is not what it says."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffjax.nets.recognizer import ClipRecognizer, Recognizer
from diffjax.weights import WeightsError
from diffjax.weights.engine import flat
from diffjax.weights.recognizer import KEY, SHAPES, open_recognizer, write_recognizer

pytestmark = pytest.mark.usefixtures('fast_compilation')
KEY = KEY.format('Recognizer')
NETWORK = Recognizer(num_outputs=3, channels=(4, 8), num_groups=2, first_stride=2, coordinates=True)
OF_CLIPS = ClipRecognizer(
    num_outputs=4 * 5 + 6,
    num_frames=4,
    num_frame_outputs=5,
    num_kinds=2,
    num_choices=3,
    channels=(4,),
    temporal_channels=(4, 2),
    num_groups=2,
)


@pytest.fixture(scope='module')
def params():
    return jax.jit(NETWORK.init)(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))['params']


@pytest.fixture
def file(params, tmp_path):
    write_recognizer(tmp_path / 'r.safetensors', NETWORK, params)
    return tmp_path / 'r.safetensors'


def rewritten(file, change, metadata=None):
    """The file with its tensors changed, and perhaps the text under KEY, by the library."""
    with safe_open(file, 'np') as opened:
        text = opened.metadata()[KEY] if metadata is None else metadata
    save_file(change(load_file(file)), file, metadata={KEY: text})


def test_a_network_comes_back_in_half_precision(file, params):
    found = open_recognizer(file)
    assert found.network == NETWORK and found.in_channels == 1
    for name, a in flat(found.load()).items():
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, np.float32(np.float16(flat(params)[name])))
    assert {a.dtype for a in load_file(file).values()} == {np.dtype(np.float16)}
    write_recognizer(file, NETWORK, jax.tree.map(lambda a: a + 1, params))  # in its place
    np.testing.assert_array_equal(open_recognizer(file).load()['head']['bias'], 1)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_other_files_are_refused_in_one_line(file, tmp_path):
    good = json.loads(safe_open(file, 'np').metadata()[KEY])
    for change, metadata, message in (
        (lambda t: {k: v for k, v in t.items() if k != 'head/bias'}, None, '1 missing: head/bias'),
        (lambda t: t | {'head/bias': np.zeros(5, np.float16)}, None, r'head/bias is \[5\] and should be \[3\]'),
        (lambda t: t, 'nothing', 'metadata describes no recogniser'),
        (lambda t: t, json.dumps(good | {'channels': 'many'}), 'metadata describes no recogniser'),
        (lambda t: t, json.dumps(good | {'channels': [10**9]}), 'metadata describes no recogniser'),
        (lambda t: t, json.dumps(good | {'num_groups': 3}), 'metadata describes no recogniser'),
        (lambda t: t, json.dumps(good | {'more': 1}), 'metadata describes no recogniser'),
    ):
        kept = file.read_bytes()
        rewritten(file, change, metadata)
        with pytest.raises(WeightsError, match=message) as caught:
            open_recognizer(file)
        assert '\n' not in str(caught.value)
        file.write_bytes(kept)
    save_file({'a': np.zeros(3)}, tmp_path / 'none.safetensors')
    for name, message in (('none.safetensors', 'describes no recogniser'), ('nowhere', 'No such file')):
        with pytest.raises(WeightsError, match=message):
            open_recognizer(tmp_path / name)


def test_numbers_that_are_none_are_refused(file, params):
    rewritten(file, lambda tensors: tensors | {'head/bias': np.full(3, np.nan, np.float16)})
    with pytest.raises(WeightsError, match='head/bias holds NaN or infinity'):
        open_recognizer(file).load()
    big = params | {'head': params['head'] | {'bias': np.full(3, 1e6)}}
    with pytest.raises(WeightsError, match='head/bias has values that float16 does not hold'):
        write_recognizer(file.with_name('big'), NETWORK, big)
    assert not file.with_name('big').exists()


def test_a_network_of_clips_comes_back(tmp_path):
    params = jax.jit(OF_CLIPS.init)(jax.random.key(0), np.zeros((1, 4, 8, 8, 1), np.float32))['params']
    write_recognizer(tmp_path / 'r', OF_CLIPS, params)
    found = open_recognizer(tmp_path / 'r')
    assert found.network == OF_CLIPS and found.in_channels == 1
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float16(a), np.float16(b)), found.load(), params)
    with safe_open(tmp_path / 'r', 'np') as opened:
        key, tensors = 'diffjax.ClipRecognizer', load_file(tmp_path / 'r')
        text = opened.metadata()[key]
    for changes in ({'num_outputs': 20}, {'temporal_channels': 4}, {'num_frames': 10**9}, {'coordinates': True}):
        save_file(tensors, tmp_path / 'r', metadata={key: json.dumps(json.loads(text) | changes)})
        with pytest.raises(WeightsError, match='metadata describes no recogniser'):
            open_recognizer(tmp_path / 'r')


def test_the_one_of_the_package_is_small():
    assert SHAPES.stat().st_size < 1_000_000
    assert open_recognizer().in_channels == 3
