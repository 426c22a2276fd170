"""Malformed datasets, images, references and weights, through the commands: one line, an exit code, nothing touched."""

import io
import json
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.usefixtures('fast_compilation')
ROOT = Path(__file__).parents[1]
DIGITS = f'--config={ROOT}/configs/digits.py:smoke'


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


# Datasets -------------------------------------------------------------------------------------------------------------

TRAIN = 'digits-train.array_record-00000-of-00001'


def swap(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def picture(*size):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new('L', size).save(buffer, 'PNG')
    return buffer.getvalue()


def records(image, label=3):
    """Twenty examples in the place of the training split, the last of them with this image and label."""

    def change(folder):
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordWriter

        kinds = {'image': tfds.features.Scalar(np.object_), 'label': tfds.features.Scalar(np.int64)}
        features = tfds.features.FeaturesDict(kinds)
        to_proto = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info()).get_tf_example
        (folder / TRAIN).unlink()
        writer = ArrayRecordWriter(str(folder / TRAIN), 'group_size:1')
        for example in [(picture(8, 8), 3)] * 19 + [(image, label)]:
            writer.write(to_proto(dict(zip(kinds, example))).SerializeToString())
        writer.close()
        swap('dataset_info.json', '"1437"', '"20"')(folder)

    return change


IMAGE = 'tensorflow_datasets.core.features.image_feature.Image'
TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
DATASETS = {
    'info gone': (lambda d: (d / 'dataset_info.json').unlink(), 'dataset_info.json'),
    'info cut': (lambda d: (d / 'dataset_info.json').write_text('{'), 'dataset_info.json is damaged: it is no JSON'),
    'info list': (lambda d: (d / 'dataset_info.json').write_text('[]'), 'dataset_info.json is damaged: it holds no'),
    'info empty': (lambda d: (d / 'dataset_info.json').write_text('{}'), 'digits is damaged: Invalid version'),
    'format': (swap('dataset_info.json', '"array_record"', '"strange"'), "'strange' is not a valid FileFormat"),
    'version': (swap('dataset_info.json', '"1.0.0"', '"x"'), "Invalid version 'x'"),
    'splits': (swap('dataset_info.json', '"1437"', '"-5"'), "shards have whole numbers as lengths, got ['-5']"),
    'too long': (swap('dataset_info.json', '"1437"', '"99999"'), 'index 1437 out of bound 1437'),
    'a second shard': (
        swap('dataset_info.json', '"1437"', '"1437", "10"'),
        'digits-train.array_record-00000-of-00002 is not there',
    ),
    'a path': (swap('dataset_info.json', TEMPLATE, f'../../{TEMPLATE}'), 'it would lead out of the folder'),
    'features gone': (lambda d: (d / 'features.json').unlink(), 'features.json is missing'),
    'features cut': (lambda d: (d / 'features.json').write_text('{'), 'features.json is damaged: it is no JSON'),
    'a module': (swap('features.json', IMAGE, 'antigravity.Image'), "'antigravity.Image' is no feature of"),
    'unknown': (swap('features.json', IMAGE, f'{IMAGE}X'), f'Unrecognized FeatureConnector type: {IMAGE}X'),
    'shape': (swap('features.json', '"8"', '"16"'), "The image of example 0 of 'digits', split 'train', cannot be dec"),
    'dtype': (swap('features.json', '"uint8"', '"uint16"'), "'digits' has images of type uint16, expected uint8"),
    'classes': (swap('features.json', '"10"', '"5"'), 'and its 5 classes are 0 to 4'),
    'shard gone': (lambda d: (d / TRAIN).unlink(), f'{TRAIN} is not there'),
    'shard empty': (lambda d: (d / TRAIN).write_bytes(b''), "Example 0 of 'digits', split 'train', cannot be read"),
    'shard garbage': (lambda d: (d / TRAIN).write_bytes(b'garbage' * 10_000), "Example 0 of 'digits'"),
    'shard cut': (lambda d: (d / TRAIN).write_bytes((d / TRAIN).read_bytes()[:100_000]), "Example 0 of 'digits'"),
    'image cut': (records(picture(8, 8)[:40]), "The image of example 19 of 'digits', split 'train', cannot be decoded"),
    'image empty': (records(b''), "The image of example 19 of 'digits', split 'train', cannot be decoded"),
    'image size': (records(picture(9, 9)), 'cannot reshape array of size 81 into shape (8,8,1)'),
    'label high': (records(picture(8, 8), 77), "The label of example 19 of 'digits', split 'train', is 77, and its 10"),
    'label low': (records(picture(8, 8), -1), 'is -1, and its 10 classes are 0 to 9'),
}


@pytest.fixture(scope='module')
def whole_digits(tmp_path_factory):
    from diffjax.data import open_source

    folder = tmp_path_factory.mktemp('whole')
    open_source('digits', 'train', data_dir=folder)
    return folder / 'digits'


@pytest.mark.parametrize('name', DATASETS)
def test_a_damaged_dataset(refused, command, whole_digits, tmp_path, name):
    damage, fragment = DATASETS[name]
    shutil.copytree(whole_digits, tmp_path / 'data' / 'digits')
    damage(tmp_path / 'data' / 'digits' / '1.0.0')
    words = DIGITS, f'--workdir={tmp_path}/run', f'--config.dataset.data_dir={tmp_path}/data'
    refused(lambda: command(*words), fragment)


# Images and references ------------------------------------------------------------------------------------------------


def claim(shape, dtype='|u1'):
    """An NPZ archive whose array says that it has this shape, and holds ten bytes."""
    import zipfile

    def change(path):
        header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b'\n'
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('arr_0.npy', b'\x93NUMPY\x01\0' + struct.pack('<H', len(header)) + header + b'0123456789')

    return change


def bomb(path):
    """A PNG that claims two thousand million pixels."""
    head = struct.pack('>IIBBBBB', 50_000, 50_000, 8, 0, 0, 0, 0)
    chunks = ((b'IHDR', head), (b'IDAT', zlib.compress(b'')), (b'IEND', b''))
    body = b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data)) for name, data in chunks
    )
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + body)


def pictures(change):
    """In the place of the archive a folder, the second picture of which is changed."""

    def make(path):
        path.unlink()
        path.mkdir()
        for i in range(3):
            (path / f'{i}.png').write_bytes(picture(4, 4))
        change(path / '1.png')

    return make


def moments(mu, sigma):
    return lambda path: np.savez(path, mu=mu, sigma=sigma)


IMAGES = {
    'gone': (lambda p: p.unlink(), 'there is nothing'),
    'garbage': (lambda p: p.write_bytes(b'garbage'), 'is no NPZ archive (np.savez writes one), or it is cut off'),
    'cut': (lambda p: p.write_bytes(p.read_bytes()[:200]), 'is no NPZ archive (np.savez writes one), or it is cut off'),
    'other array': (lambda p: np.savez(p, x=np.zeros(3)), 'none called arr_0'),
    'floats': (lambda p: np.savez(p, np.zeros((3, 4, 4, 1))), 'images are uint8 [N, H, W, 1 or 3], got float64'),
    'a pickle': (lambda p: np.savez(p, np.array([{}, {}], object)), 'got object [2]'),
    'one axis': (lambda p: np.savez(p, np.zeros(3, np.uint8)), 'images are uint8 [N, H, W, 1 or 3], got uint8 [3]'),
    'none': (lambda p: np.savez(p, np.zeros((0, 4, 4, 1), np.uint8)), 'got uint8 [0, 4, 4, 1]'),
    'a claim': (claim((2**40, 4, 4, 1)), 'bytes of images are missing'),
    'a wide claim': (claim((2, 2**30, 2**29, 1)), 'have 576,460,752,303,423,488 dimensions, too many'),
    'empty folder': (lambda p: (p.unlink(), p.mkdir()), 'holds no pictures'),
    'picture garbage': (pictures(lambda p: p.write_bytes(b'garbage')), '1.png cannot be read as a picture'),
    'picture cut': (pictures(lambda p: p.write_bytes(p.read_bytes()[:45])), '1.png cannot be read as a picture'),
    'picture size': (pictures(lambda p: p.write_bytes(picture(5, 5))), '1.png 5x5'),
    'picture bomb': (pictures(bomb), '1.png cannot be read as a picture: Image size (2500000000 pixels) exceeds'),
}
REFERENCES = {
    'half': (lambda p: np.savez(p, mu=np.zeros(16)), 'holds mu alone; mu and sigma belong together'),
    'NaN': (moments(np.full(16, np.nan), np.eye(16)), 'mu or sigma holds NaN or infinity'),
    'shapes': (moments(np.zeros(16), np.eye(5)), 'mu [D] and sigma [D, D] are needed, got [16], [5, 5]'),
    'words': (moments(np.array(['a'] * 16), np.eye(16)), 'could not convert string to float'),
    'a pickle': (moments(np.array([{}] * 16, object), np.eye(16)), 'Object arrays cannot be loaded'),
    'another space': (moments(np.zeros(2048), np.eye(2048)), 'holds moments of 2048 features, and pixels have 16'),
}


@pytest.fixture
def measured(capsys):
    """(*words) -> (exit code, stdout, stderr) of python -m diffjax.evaluation, in this process."""
    from diffjax.evaluation.__main__ import main

    def run(*words):
        capsys.readouterr()
        return main(words), *capsys.readouterr()

    return run


@pytest.fixture
def archives(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    for name in ('samples.npz', 'reference.npz'):
        np.savez(tmp_path / name, images)
    return tmp_path


@pytest.mark.parametrize('name', IMAGES)
def test_damaged_images(refused, measured, archives, name):
    damage, fragment = IMAGES[name]
    damage(archives / 'samples.npz')
    other = 'samples' if (archives / 'samples.npz').is_dir() else 'reference'  # pictures are in colour
    words = 'fid', f'{archives}/samples.npz', f'{archives}/{other}.npz', '--features=pixels'
    refused(lambda: measured(*words, f'--out={archives}/figures.json'), fragment)


@pytest.mark.parametrize('name', REFERENCES)
def test_damaged_references(refused, measured, archives, name):
    damage, fragment = REFERENCES[name]
    damage(archives / 'reference.npz')
    refused(
        lambda: measured('fid', f'{archives}/samples.npz', f'{archives}/reference.npz', '--features=pixels'), fragment
    )


# Weights --------------------------------------------------------------------------------------------------------------

FILE, INDEX = 'diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.safetensors.index.json'


def header(change):
    """The header of the file changed, in place or as bytes."""

    def damage(folder):
        content = (folder / FILE).read_bytes()
        length = int.from_bytes(content[:8], 'little')
        table = json.loads(content[8 : 8 + length])
        text = change(table)
        text = text if isinstance(text, bytes) else json.dumps(table).encode()
        (folder / FILE).write_bytes(len(text).to_bytes(8, 'little') + text + content[8 + length :])

    return damage


def bias(**changes):
    return header(lambda table: table['pos_embed.proj.bias'].update(changes))


def indexed(place, change=lambda folder: None):
    """An index that says all tensors are in `place`; they are in a.safetensors."""

    def damage(folder):
        names = list(load_file(folder / FILE))
        (folder / FILE).rename(folder / 'a.safetensors')
        (folder / INDEX).write_text(json.dumps({'weight_map': dict.fromkeys(names, place)}))
        change(folder)

    return damage


def settings(**changes):
    return lambda folder: edit(folder / 'config.json', lambda config: config.update(changes))


def twice(table):
    text = json.dumps(table)
    return text[:-1].encode() + b', ' + json.dumps({'pos_embed.proj.bias': table['pos_embed.proj.bias']})[1:].encode()


WEIGHTS = {
    'no config': (lambda d: (d / 'config.json').unlink(), 'give the folder that config.json and the weights lie in'),
    'no weights': (lambda d: (d / FILE).unlink(), 'there are no .safetensors files in it'),
    'list': (lambda d: (d / 'config.json').write_text('[]'), 'config.json: it holds no table of settings'),
    'cut': (lambda d: (d / 'config.json').write_text('{'), 'config.json: it is no JSON'),
    'deep': (lambda d: (d / 'config.json').write_text('[' * 100_000), 'config.json: it is no JSON'),
    'class': (settings(_class_name='Strange'), "'Strange' is not covered; covered: AutoencoderKL"),
    'no class': (settings(_class_name=None), 'names no class'),
    'layers': (settings(num_layers=10**9), 'num_layers is 1000000000; covered: a whole number from 1 to 512'),
    'large': (settings(attention_head_dim=2**17, num_attention_heads=2**17), 'at most 268435456 tokens times channels'),
    'setting': (settings(new_thing=1), "settings that are not covered: 'new_thing'"),
    'another size': (settings(num_attention_heads=4), '43 of another shape: pos_embed.proj.weight is [16, 3, 2, 2]'),
    'deeper': (settings(num_layers=3), '19 missing: transformer_blocks'),
    'file cut': (lambda d: (d / FILE).write_bytes((d / FILE).read_bytes()[:-10]), 'truncated or damaged'),
    'file empty': (lambda d: (d / FILE).write_bytes(b''), 'it is truncated, or no safetensors file'),
    'file folder': (lambda d: ((d / FILE).unlink(), (d / FILE).mkdir()), f'{FILE}: Is a directory'),
    'header 2^60': (lambda d: (d / FILE).write_bytes((2**60).to_bytes(8, 'little') + b'{}'), 'it is truncated, or no'),
    'header list': (header(lambda table: b'[]'), 'its header is no table of tensors'),
    'header twice': (header(twice), 'has a name twice'),
    'tensor 2^60': (bias(shape=[2**30, 2**30], data_offsets=[0, 2**62]), 'has a shape or place that is none'),
    'dtype': (bias(dtype='X9'), "are not understood (dtype 'X9')"),
    'a pickle': (
        lambda d: ((d / FILE).unlink(), (d / 'diffusion_pytorch_model.bin').write_bytes(b'PK')),
        'a pickle runs whatever code it holds when it is opened, so it is not read',
    ),
    'index up': (indexed('../a.safetensors'), "'../a.safetensors' is no name of a .safetensors file beside it"),
    'index root': (indexed('/etc/passwd'), "'/etc/passwd' is no name of a .safetensors file beside it"),
    'index of nothing': (indexed('b.safetensors'), '1 of the 1 files it names are missing: b.safetensors'),
    'index list': (indexed('a.safetensors', lambda d: (d / INDEX).write_text('[]')), 'it holds no table of settings'),
    'index of more': (
        indexed(
            'a.safetensors', lambda d: edit(d / INDEX, lambda index: index['weight_map'].update(x='a.safetensors'))
        ),
        "a.safetensors does not hold 'x'",
    ),
}


@pytest.fixture
def published(tmp_path):
    """A tiny DiT as diffusers saves it."""
    sys.path.insert(0, str(ROOT / 'tests' / 'weights'))
    from tiny_dit import CONFIG, draw

    sys.path.pop(0)
    folder = tmp_path / 'source'
    folder.mkdir()
    save_file(draw(), folder / FILE)
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def weights(capsys):
    """(*words) -> (exit code, stdout, stderr) of python -m diffjax.weights; the signals it handles are put back."""
    from diffjax.weights.__main__ import main

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*words):
        capsys.readouterr()
        return main(words), *capsys.readouterr()

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('name', WEIGHTS)
def test_damaged_weights(refused, weights, published, name):
    damage, fragment = WEIGHTS[name]
    damage(published)
    refused(lambda: weights('import', str(published), f'--out={published.parent}/out'), fragment)
    refused(lambda: weights('inspect', str(published)), fragment)
