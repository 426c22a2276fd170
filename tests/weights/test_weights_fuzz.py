"""Damaged sources, thousands of them: each is imported, or refused by a WeightsError in one line, and nothing else."""

import json
import random
import shutil

import numpy as np
import pytest
from tiny_dit import CONFIG, draw

from diffjax.weights import WeightsError
from diffjax.weights.engine import import_leaves
from diffjax.weights.sources import open_source

VALUES = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**200, 0.5, -0.0, 1e-5, 1e308, float('nan'), float('inf')),
    *('', 'a', '\ud800', '\0', '../x', 'gelu', 'Transformer2DModel', 'F16', 'BF16', 'x' * 5000),
    *([], [1], [-1, 2], [[2]], ['a'], {}, {'a': 1}, {'data_offsets': [0, 1]}),
)


def attempt(path):
    """Everything that an import does but writing."""
    source = open_source(path)
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    for leaf in import_leaves(source.architecture, source.options, source.tensors, shapes).values():
        leaf.read()


def survives(path):
    """Whether it was taken. A refusal has to be a WeightsError that prints in one line."""
    try:
        attempt(path)
    except WeightsError as error:
        text = str(error)
        assert text and '\n' not in text and len(text) < 3000
        text.encode()
        return False
    return True


def scramble(content, draw):
    """Bytes with some of them changed, removed, doubled or moved."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 50))):
        place, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 8, 100))
        part = content[place : place + length]
        kind = draw.randrange(5)
        if kind == 0:
            content[place : place + length] = bytes(draw.randrange(256) for _ in part)
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place:place] = part
        elif kind == 3:
            del content[place:]
        else:
            content[place : place + 1] = draw.choice(b'{}[]",:0123456789-e').to_bytes()
        if not content:
            break
    return bytes(content)


def change(tree, draw):
    """JSON with one value, key or entry changed, at any depth."""
    node, parents = tree, []
    while isinstance(node, dict | list) and node and draw.random() < 0.8:
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        parents.append((node, key))
        node = node[key]
    if not parents:
        return draw.choice(VALUES)
    node, key = parents[-1]
    kind = draw.randrange(4)
    if kind == 0:
        node[key] = draw.choice(VALUES)
    elif kind == 1:
        del node[key]
    elif kind == 2 and isinstance(node, dict):
        node[draw.choice(('a', '\n', '\ud800', 'shape', '__metadata__', 'x' * 2000))] = node[key]
    else:
        node[key] = draw.choice(({'a': node[key]}, [node[key], node[key]], str(node[key])))
    return tree


def header_of(content):
    length = int.from_bytes(content[:8], 'little')
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + data


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    """A folder of two shards with its index, and its files as bytes."""
    from safetensors.numpy import save_file

    folder, tensors = tmp_path_factory.mktemp('fuzz') / 'source', draw(np.float16)
    folder.mkdir()
    parts = {f'model-{i + 1}.safetensors': list(tensors)[i::2] for i in range(2)}
    for name, tensor_names in parts.items():
        save_file({tensor: tensors[tensor] for tensor in tensor_names}, folder / name)
    places = {tensor: name for name, tensor_names in parts.items() for tensor in tensor_names}
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
    (folder / 'config.json').write_text(json.dumps(CONFIG | {'num_layers': 2}))
    assert survives(folder)
    yield folder, {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)


@pytest.mark.parametrize('name', ['model-1.safetensors', 'model.safetensors.index.json', 'config.json'])
@pytest.mark.parametrize('kind', ['bytes', 'values'])
def test_damage_is_refused_in_words(sharded, name, kind):
    folder, whole = sharded
    draw, taken = random.Random(f'{name} {kind}'), 0
    is_json = name.endswith('.json')
    for _ in range(700):
        if kind == 'bytes':
            damaged = scramble(whole[name], draw)
        elif is_json:
            damaged = json.dumps(change(json.loads(whole[name]), draw)).encode()
        else:
            header, data = header_of(whole[name])
            damaged = with_header(change(header, draw), data)
        (folder / name).write_bytes(damaged)
        taken += survives(folder)
    (folder / name).write_bytes(whole[name])
    assert taken < 600 and survives(folder)
    if kind == 'bytes' and not is_json:
        assert taken > 0  # damage to values alone looks like other values


def test_names_that_are_folders_and_links(sharded, tmp_path):
    folder, whole = sharded
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy)
    (copy / 'model-1.safetensors').unlink()
    (copy / 'model-1.safetensors').symlink_to(copy / 'model-1.safetensors')  # to itself
    assert not survives(copy)
    (copy / 'model-1.safetensors').unlink()
    (copy / 'model-1.safetensors').mkdir()
    assert not survives(copy)
    (copy / 'model-1.safetensors').rmdir()
    (tmp_path / 'blob').write_bytes(whole['model-1.safetensors'])
    (copy / 'model-1.safetensors').symlink_to(tmp_path / 'blob')  # as the cache of Hugging Face keeps them
    assert survives(copy)
