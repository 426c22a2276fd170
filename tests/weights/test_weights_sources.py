"""What a person may point at: folders, shards, variants, pipelines, lone files; and what is refused, and why."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_dit import CONFIG, draw

from diffjax.weights import WeightsError
from diffjax.weights.sources import open_source


def same(tensors, source):
    assert set(source.tensors) == set(source.specs) == set(tensors) and len(source.tensors) == len(tensors)
    for name, a in tensors.items():
        assert source.specs[name] == (a.shape, a.dtype)
        np.testing.assert_array_equal(source.tensors[name], a)


def split(tensors, count=3):
    """Names of the tensors of each of `count` shards."""
    return [list(tensors)[i::count] for i in range(count)]


def shard(write_folder, tensors, pattern, index, **extra):
    files = {pattern.format(i + 1): names for i, names in enumerate(split(tensors))}
    folder = write_folder(tensors, files=files, **extra)
    places = {tensor: file for file, names in files.items() for tensor in names}
    (folder / index).write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': places}))
    return folder, places


@pytest.mark.parametrize('file', ['diffusion_pytorch_model.safetensors', 'model.safetensors', 'other.safetensors'])
def test_one_file(write_folder, tensors, file):
    folder = write_folder(tensors, files={file: list(tensors)})
    source = open_source(folder)
    same(tensors, source)
    assert source.files == (file,) and source.path == folder and source.config == CONFIG
    assert source.architecture.class_name == 'DiTTransformer2DModel' and source.options['depth'] == 2


def test_the_name_that_was_published_first(write_folder, tensors):
    """facebook/DiT-XL-2-256 calls its class Transformer2DModel, and carries settings of it that say nothing."""
    older = CONFIG | {'_class_name': 'Transformer2DModel', 'num_vector_embeds': None, 'use_linear_projection': False}
    assert open_source(write_folder(tensors, config=older)).architecture.class_name == 'DiTTransformer2DModel'


@pytest.mark.parametrize('base', ['diffusion_pytorch_model', 'model'])
def test_shards(write_folder, tensors, base):
    folder, _ = shard(write_folder, tensors, f'{base}-{{:05}}-of-00003.safetensors', f'{base}.safetensors.index.json')
    same(tensors, open_source(folder))
    assert len(open_source(folder).files) == 3


def test_variants(write_folder, tensors):
    half = draw(np.float16, seed=1)
    folder = write_folder(tensors)
    base = folder / 'diffusion_pytorch_model'
    save_file(half, f'{base}.fp16.safetensors')
    same(tensors, open_source(folder))
    same(half, open_source(folder, variant='fp16'))
    with pytest.raises(WeightsError, match="the variant 'bf16' is not among its weights; there are .*fp16"):
        open_source(folder, variant='bf16')
    (folder / 'diffusion_pytorch_model.safetensors').rename(folder / 'another.safetensors')
    with pytest.raises(WeightsError, match='one without a variant is not among its weights'):
        open_source(folder)


def test_shards_of_a_variant(write_folder, tensors):
    pattern = 'diffusion_pytorch_model.fp16-{:05}-of-00003.safetensors'
    folder, _ = shard(write_folder, tensors, pattern, 'diffusion_pytorch_model.safetensors.index.fp16.json')
    same(tensors, open_source(folder, variant='fp16'))


@pytest.mark.parametrize('part', ['transformer', 'unet'])
def test_pipelines(write_folder, tensors, part, tmp_path):
    folder = write_folder(tensors, name=f'pipeline/{part}')
    write_folder(tensors, name='pipeline/vae')
    (tmp_path / 'pipeline' / 'model_index.json').write_text('{}')
    source = open_source(tmp_path / 'pipeline')
    assert source.path == folder
    same(tensors, source)


def test_a_pipeline_of_other_parts(write_folder, tensors, tmp_path):
    write_folder(tensors, name='pipeline/prior')
    (tmp_path / 'pipeline' / 'model_index.json').write_text('{}')
    with pytest.raises(WeightsError, match='one of transformer, unet would be taken; it has none'):
        open_source(tmp_path / 'pipeline')


def published(width=384, channels=3, patch=2, classes=5):
    """A DiT-S of facebookresearch, one block deep, all zeros."""
    layers = {
        't_embedder.mlp.0': (width, 256),
        't_embedder.mlp.2': (width, width),
        'blocks.0.attn.qkv': (3 * width, width),
        'blocks.0.attn.proj': (width, width),
        'blocks.0.mlp.fc1': (4 * width, width),
        'blocks.0.mlp.fc2': (width, 4 * width),
        'blocks.0.adaLN_modulation.1': (6 * width, width),
        'final_layer.linear': (patch**2 * 4, width),
        'final_layer.adaLN_modulation.1': (2 * width, width),
        'x_embedder.proj': (width, channels, patch, patch),
    }
    shapes = {f'{name}.weight': shape for name, shape in layers.items()}
    shapes |= {f'{name}.bias': shape[:1] for name, shape in layers.items()}
    shapes |= {'y_embedder.embedding_table.weight': (classes + 1, width), 'pos_embed': (1, 4, width)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_a_file_of_facebookresearch(tmp_path):
    tensors = published()
    save_file(tensors, tmp_path / 'DiT.safetensors')
    for path in (tmp_path / 'DiT.safetensors', tmp_path):
        source = open_source(path)
        assert source.architecture.class_name == 'facebookresearch/DiT'
        assert source.options['num_heads'] == 6 and source.options['depth'] == 1
        assert source.options['input'] == {'shape': [4, 4, 3]}
        same(tensors, source)


def test_a_file_of_something_else(tmp_path):
    save_file({'w': np.zeros(3, np.float32)}, tmp_path / 'a.safetensors')
    with pytest.raises(WeightsError, match='without its config.json is read only if it is the DiT of facebookresearch'):
        open_source(tmp_path / 'a.safetensors')
    wrong = published() | {'pos_embed': np.zeros((4, 3), np.float32)}
    save_file(wrong, tmp_path / 'b.safetensors')
    with pytest.raises(WeightsError, match='its tensors have the wrong axes'):
        open_source(tmp_path / 'b.safetensors')


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'DiT-XL-2-256x256.pth', 'v1-5.ckpt', 'model.pkl'])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / 'opened')))
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(WeightsError, match=f'{name}: a pickle runs whatever code .*save_file.torch.load.*{name}'):
            open_source(path)
    assert not (tmp_path / 'opened').exists()


def test_what_there_is_not(tmp_path, write_folder, tensors):
    cases = {
        tmp_path / 'nowhere': 'there is nothing of that name',
        tmp_path: 'there is no config.json in it',
        write_folder({}, name='empty', files={'notes.txt': []}): 'there are no .safetensors files in it',
    }
    for path, message in cases.items():
        with pytest.raises(WeightsError, match=message):
            open_source(path)
    (tmp_path / 'a.gguf').write_bytes(b'')
    with pytest.raises(WeightsError, match='neither a folder with a config.json nor a .safetensors file'):
        open_source(tmp_path / 'a.gguf')


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'_class_name': 'AudioLDM'}, "'AudioLDM' is not covered; covered: .*DiTTransformer2DModel"),
        ({'architectures': ['GPT2']}, "'GPT2' is not covered"),
        ({'architectures': []}, 'names no class'),
        ({'_class_name': 3}, 'names no class'),
        ({'_class_name': 'Transformer2DModel', 'norm_type': ['ada']}, "'Transformer2DModel' is not covered"),
    ],
)
def test_classes_that_are_not_covered(write_folder, tensors, config, message):
    with pytest.raises(WeightsError, match=message):
        open_source(write_folder(tensors, config=config))


@pytest.mark.parametrize(
    'name', ['../secret.safetensors', '/etc/x.safetensors', 'a/b.safetensors', '..', 'x.bin', 'a\\b.safetensors', '\0']
)
def test_an_index_leads_nowhere_else(write_folder, tensors, name, tmp_path):
    save_file(tensors, tmp_path / 'secret.safetensors')
    index = 'model.safetensors.index.json'
    folder, places = shard(write_folder, tensors, 'model-{}.safetensors', index)
    places[next(iter(places))] = name
    (folder / index).write_text(json.dumps({'weight_map': places}))
    with pytest.raises(WeightsError, match='is no name of a .safetensors file beside it'):
        open_source(folder)


def test_an_index_that_differs_from_its_files(write_folder, tensors):
    index = 'model.safetensors.index.json'
    folder, places = shard(write_folder, tensors, 'model-{}.safetensors', index)
    first = next(iter(places))
    wrong = {
        'of the 3 files it names are missing: model-4.safetensors': places | {first: 'model-4.safetensors'},
        "model-1.safetensors does not hold 'ghost'": places | {'ghost': 'model-1.safetensors'},
        f"model-1.safetensors holds, unknown to the index, '{first}'": {k: v for k, v in places.items() if k != first},
        'it has no weight_map': [],
    }
    for message, weight_map in wrong.items():
        (folder / index).write_text(json.dumps({'weight_map': weight_map}))
        with pytest.raises(WeightsError, match=message.replace('3 files', '. files')):
            open_source(folder)
