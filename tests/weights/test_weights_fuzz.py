"""Damaged sources, thousands of them: each is imported, or refused by a WeightsError in one line, and nothing else.

The damage is that of experiments/fuzz_weights.py, which does a hundred thousand.
"""

import importlib.util
import json
import random
import re
import resource
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location('fuzz_weights', ROOT / 'experiments' / 'fuzz_weights.py')
fuzz_weights = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz_weights)


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    """A folder of two shards with its index, and its files as bytes."""
    folder = tmp_path_factory.mktemp('fuzz') / 'source'
    folder.mkdir()
    whole = fuzz_weights.write_source(folder)
    assert fuzz_weights.outcome(folder) == ''
    yield folder, whole
    shutil.rmtree(folder)


@pytest.fixture
def little_memory():
    """Whoever asks for more than a gigabyte meets a MemoryError, which is no WeightsError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    fuzz_weights.limit_memory()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


COUNTS = dict(zip(fuzz_weights.FILES, (2400, 600, 800, 200)))


@pytest.mark.parametrize('name', COUNTS)
def test_damage_is_refused_in_words(sharded, little_memory, name):
    (folder, whole), draw, taken, said = sharded, random.Random(name), 0, set()
    for _ in range(COUNTS[name]):
        (folder / name).write_bytes(fuzz_weights.damage(name, whole[name], draw))
        text = fuzz_weights.outcome(folder)
        taken += not text
        said.add(fuzz_weights.kind_of(text))
    (folder / name).write_bytes(whole[name])
    assert taken < 0.5 * COUNTS[name] and len(said) >= 5 and fuzz_weights.outcome(folder) == ''
    if name == 'model-1.safetensors':
        assert taken > 0  # damage to values alone looks like other values


CLAIMS = {  # what a header says of one tensor -> what is said
    'elsewhere': ({'shape': [16], 'data_offsets': [2**60, 2**60 + 32]}, 'of data|at byte'),
    'a lot': ({'shape': [2**30, 2**29], 'data_offsets': [0, 2**60]}, 'at byte|of data and its header speaks of|takes'),
    'more': ({'shape': [2**31, 2**31], 'data_offsets': [0, 2**63]}, 'has a shape or place that is none'),
    'backwards': ({'data_offsets': [32, 0]}, 'takes 32 bytes and has -32'),
    'less than nothing': ({'data_offsets': [-32, 0]}, 'has a shape or place that is none'),
    'many axes': ({'shape': [1] * 9}, 'has a shape or place that is none'),
    'half': ({'shape': [8.0]}, 'has a shape or place that is none'),
    'no dtype': ({'dtype': 'F17'}, "dtype 'F17'"),
    'object': ({'dtype': 'O'}, "dtype 'O'"),
}


@pytest.mark.parametrize('claim', CLAIMS)
def test_no_claim_of_a_header_is_believed(sharded, little_memory, claim):
    (folder, whole), (changes, said) = sharded, CLAIMS[claim]
    header, data = fuzz_weights.header_of(whole['model-1.safetensors'])
    name = next(name for name, entry in header.items() if entry.get('data_offsets', [1])[0] == 0)
    length = header[name]['data_offsets'][1]
    if 'data_offsets' in changes:  # 32 stands for its length
        places = [place // 32 * length if abs(place) == 32 else place for place in changes['data_offsets']]
        changes = {**changes, 'data_offsets': places}
    header[name] |= changes
    (folder / 'model-1.safetensors').write_bytes(fuzz_weights.with_header(json.dumps(header).encode(), data))
    text = fuzz_weights.outcome(folder)
    (folder / 'model-1.safetensors').write_bytes(whole['model-1.safetensors'])
    assert re.search(said.replace('32', str(length)), text)


@pytest.mark.parametrize('length', [0, 1, 10**8 + 1, 2**31, 2**60, 2**64 - 1])
def test_no_length_of_a_header_is_believed(sharded, little_memory, length):
    folder, whole = sharded
    content = whole['model-1.safetensors']
    (folder / 'model-1.safetensors').write_bytes(length.to_bytes(8, 'little') + content[8:])
    text = fuzz_weights.outcome(folder)
    (folder / 'model-1.safetensors').write_bytes(content)
    assert 'model-1.safetensors: it' in text


def test_a_name_that_stands_twice(sharded):
    """Which of the two is meant, readers disagree."""
    folder, whole = sharded
    header, data = fuzz_weights.header_of(whole['model-1.safetensors'])
    text = json.dumps(header)
    name = next(name for name in header if name != '__metadata__')
    doubled = text[:-1] + ', ' + json.dumps({name: header[name]})[1:]
    (folder / 'model-1.safetensors').write_bytes(fuzz_weights.with_header(doubled.encode(), data))
    said = fuzz_weights.outcome(folder)
    (folder / 'model-1.safetensors').write_bytes(whole['model-1.safetensors'])
    assert 'has a name twice' in said


def test_names_that_are_folders_and_links(sharded, tmp_path):
    folder, whole = sharded
    cache = tmp_path / 'models--a--b'
    copy = Path(shutil.copytree(folder, cache / 'snapshots' / '0123'))
    (copy / 'model-1.safetensors').unlink()
    (copy / 'model-1.safetensors').symlink_to(copy / 'model-1.safetensors')  # to itself
    assert fuzz_weights.outcome(copy)
    (copy / 'model-1.safetensors').unlink()
    (copy / 'model-1.safetensors').mkdir()
    assert fuzz_weights.outcome(copy)
    (copy / 'model-1.safetensors').rmdir()
    (cache / 'blobs').mkdir()
    (cache / 'blobs' / 'abc').write_bytes(whole['model-1.safetensors'])
    (copy / 'model-1.safetensors').symlink_to(cache / 'blobs' / 'abc')  # as the cache of Hugging Face keeps them
    assert fuzz_weights.outcome(copy) == ''
