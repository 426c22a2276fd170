"""Safetensors files against the library of that name, and files that lie about themselves."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffjax.weights import WeightsError
from diffjax.weights.tensors import CODES, DTYPES, Spec, TensorFile, TensorWriter, read_json

KINDS = ['float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint64', 'uint8', 'bool']
FLOAT8 = ('float8_e4m3fn', 'float8_e5m2')


def some(kind, shape=(2, 3), seed=0):
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    return np.random.default_rng(seed).integers(0, 2 if kind == 'bool' else 100, shape).astype(dtype)


@pytest.fixture
def mixed():
    tensors = {kind: some(kind, seed=i) for i, kind in enumerate(KINDS)}
    return tensors | {'odd': some('float16', (3, 1, 1)), 'none': np.zeros((0, 4), np.float32), 'one': np.float32(2.5)}


def test_reads_what_the_library_writes(mixed, tmp_path):
    save_file({name: np.asarray(a) for name, a in mixed.items()}, tmp_path / 'a.safetensors', metadata={'format': 'pt'})
    file = TensorFile(tmp_path / 'a.safetensors')
    assert set(file) == set(mixed) and len(file) == len(mixed)
    for name, a in mixed.items():
        assert file.specs[name] == (np.shape(a), a.dtype)
        assert file[name].dtype == a.dtype and file[name].shape == np.shape(a)
        np.testing.assert_array_equal(file[name], a)


def test_the_library_reads_what_is_written(mixed, tmp_path):
    path = tmp_path / 'a.safetensors'
    with TensorWriter(path, {name: Spec(np.shape(a), a.dtype) for name, a in mixed.items()}) as writer:
        for name in reversed(mixed):  # not the order in which they lie
            writer.write(name, mixed[name])
    read = load_file(path)
    assert read.keys() == mixed.keys()
    for name, a in mixed.items():
        assert read[name].dtype == a.dtype and read[name].shape == np.shape(a)
        np.testing.assert_array_equal(read[name], a)
    with safe_open(path, 'np') as file:
        assert file.metadata() == {'format': 'pt'}  # which transformers asks for
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], 'little')])
    header.pop('__metadata__')
    assert all(entry['data_offsets'][0] % DTYPES[entry['dtype']].itemsize == 0 for entry in header.values())


@pytest.mark.parametrize('kind', FLOAT8)
def test_eight_bit_floats(kind, tmp_path):
    """Which the library's NumPy side does not read: the bytes are laid out by hand."""
    a = some(kind)
    header = json.dumps({'a': {'dtype': CODES[a.dtype], 'shape': [2, 3], 'data_offsets': [0, 6]}}).encode()
    (tmp_path / 'a.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + a.tobytes())
    assert TensorFile(tmp_path / 'a.safetensors')['a'].tobytes() == a.tobytes()
    assert TensorFile(tmp_path / 'a.safetensors')['a'].dtype == getattr(ml_dtypes, kind)


def test_a_writer_keeps_to_what_was_announced(tmp_path):
    specs = {'a': Spec((2,), np.dtype(np.float32)), 'b': Spec((2,), np.dtype(np.float32))}
    with (
        pytest.raises(ValueError, match=r"1 tensors were announced and not written: \['b'\]"),
        TensorWriter(tmp_path / 'a', specs) as w,
    ):
        w.write('a', np.zeros(2))
    with (
        pytest.raises(ValueError, match='a was announced as'),
        TensorWriter(tmp_path / 'b', specs) as w,
    ):
        w.write('a', np.zeros(3))
    with pytest.raises(FileExistsError):
        TensorWriter(tmp_path / 'a', specs)


def entry(**changes):
    return {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]} | changes


LIES = {
    'not a table': ([1], 8, 'no table of tensors'),
    'an entry that is none': ({'a': 3}, 8, 'a has dtype, shape and data_offsets that are not understood'),
    'no dtype': ({'a': {'shape': [2], 'data_offsets': [0, 8]}}, 8, 'not understood'),
    'another dtype': ({'a': entry(dtype='F4')}, 8, r"not understood \(dtype 'F4'\)"),
    'a dtype that is none': ({'a': entry(dtype=[])}, 8, 'not understood'),
    'a negative size': ({'a': entry(shape=[-2])}, 8, 'shape or place that is none'),
    'a size that is none': ({'a': entry(shape=['2'])}, 8, 'shape or place that is none'),
    'a truth value': ({'a': entry(shape=[True, 2])}, 8, 'shape or place that is none'),
    'too many axes': ({'a': entry(shape=[1] * 8 + [2])}, 8, 'shape or place that is none'),
    'a size beyond all': ({'a': entry(shape=[2**63])}, 8, 'shape or place that is none'),
    'another size': ({'a': entry(shape=[3])}, 8, r'F32 \[3\], takes 12 bytes and has 8'),
    'an overlap': ({'a': entry(), 'b': entry(data_offsets=[4, 12])}, 12, 'puts b at byte 4, where 8 would be right'),
    'a gap': ({'a': entry(), 'b': entry(data_offsets=[12, 20])}, 20, 'puts b at byte 12, where 8'),
    'twice the same place': ({'a': entry(), 'b': entry()}, 8, 'puts b at byte 0, where 8'),
    'too little data': ({'a': entry()}, 7, 'holds 7 bytes of data and its header speaks of 8'),
    'too much data': ({'a': entry()}, 9, 'holds 9 bytes of data and its header speaks of 8'),
    'a name that is none': ({'a\nb': entry()}, 8, "a name that is none: 'a.*b'"),
    'half a letter': ({'\ud800': entry()}, 8, 'a name that is none'),
    'three places': ({'a': entry(data_offsets=[0, 8, 8])}, 8, 'not understood'),
    'backwards': ({'a': entry(data_offsets=[8, 0])}, 8, 'takes 8 bytes and has -8'),
}


@pytest.mark.parametrize('lie', LIES)
def test_lying_headers(lie, tmp_path):
    header, size, message = LIES[lie]
    text = json.dumps(header).encode()
    path = tmp_path / 'a.safetensors'
    path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(size))
    with pytest.raises(WeightsError, match=message) as caught:
        TensorFile(path)
    assert str(caught.value).startswith(str(path)) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'content',
    [b'', b'1234567', bytes(8), b'\xff' * 8, (100).to_bytes(8, 'little') + b'{}', (2).to_bytes(8, 'little') + b'{x'],
)
def test_foreign_and_truncated_files(content, tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(content)
    with pytest.raises(WeightsError, match='truncated, or no safetensors|no JSON'):
        TensorFile(tmp_path / 'a.safetensors')


def test_endless_nesting_and_digits(tmp_path):
    for text in (b'[' * 200_000, b'{"a": ' + b'9' * 10_000 + b'}', b'{"a": "\xff"}'):
        (tmp_path / 'a.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text)
        with pytest.raises(WeightsError, match='no JSON'):
            TensorFile(tmp_path / 'a.safetensors')
        (tmp_path / 'a.json').write_bytes(text)
        with pytest.raises(WeightsError, match='no JSON'):
            read_json(tmp_path / 'a.json')


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / 'a.safetensors'
    save_file({'a': np.zeros(100, np.float32)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match='it ends before the end of a'):
        file['a']
    path.unlink()
    with pytest.raises(WeightsError, match='No such file'):
        file['a']


def test_what_is_no_file_of_settings(tmp_path):
    (tmp_path / 'a.json').write_text('[1]')
    with pytest.raises(WeightsError, match='no table of settings'):
        read_json(tmp_path / 'a.json')
    with pytest.raises(WeightsError, match='No such file'):
        read_json(tmp_path / 'b.json')
