"""Datasets of encodings: what is written, that it is the same however it came to be, and what cannot be encoded."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from diffjax.data import CorruptExample, EncodingSettings, make_iterator, open_source, prepare, write_encoded
from diffjax.data.sources import Source

SETTINGS = EncodingSettings(batch_size=8, examples_per_shard=20)
ENCODER = {'sha256': 'abc'}


def encode(images):
    """Something whose moments can be worked out by hand: the mean of 2 x 2 pixels, and a tenth of it."""
    x = images.astype(np.float64).reshape(len(images), 4, 2, 4, 2, 1).mean((2, 4)) / 255
    return {'mean': x.astype(np.float16), 'std': (x / 10).astype(np.float16)}


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope='module')
def few(digits_dir):
    return {
        split: open_source('digits', f'{split}[:{n}]', data_dir=digits_dir) for split, n in (('train', 50), ('test', 5))
    }


@pytest.fixture(scope='module')
def written(few, tmp_path_factory):
    return write_encoded(tmp_path_factory.mktemp('out'), 'digits_latents', few, encode, SETTINGS, encoder=ENCODER)


def test_every_example_is_there_in_its_place(few, written):
    for split, source in few.items():
        latents = open_source('digits_latents', split, data_dir=written.parents[1])
        images = source.read(range(len(source)))
        assert (latents.kind, latents.image_shape, latents.num_classes) == ('latent', (4, 4, 1), 10)
        found, expected = latents.read(range(len(latents))), encode(images['image'])
        for name in ('mean', 'std'):
            np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(found['label'], images['label'])


def test_moments_standardise_what_training_draws(few, written):
    latents = open_source('digits_latents', 'train', data_dir=written.parents[1])
    values = latents.arrays['mean'].astype(np.float64)
    np.testing.assert_allclose(latents.moments['mean'], [values.mean()], rtol=1e-6)
    np.testing.assert_allclose(latents.moments['std'], [np.sqrt(values.var() + (values**2).mean() / 100)], rtol=1e-3)
    import jax

    shift, scale = np.float32(latents.moments['mean']), 1 / np.float32(latents.moments['std'])
    drawn = [prepare(latents.arrays, jax.random.key(i), flip=False, scale=scale, shift=shift)['x0'] for i in range(20)]
    np.testing.assert_allclose(np.mean(drawn), 0, atol=2e-3)
    np.testing.assert_allclose(np.std(drawn), 1, atol=2e-3)
    batch = next(make_iterator(latents, batch_size=4, seed=0))
    assert sorted(batch) == ['label', 'mean', 'std']


@pytest.mark.parametrize('stop_after', [1, 3, 5, 7, 9])
def test_killed_and_started_again_it_is_the_same_byte_for_byte(few, written, tmp_path, stop_after):
    calls = 0

    def dies(images):
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        write_encoded(tmp_path, 'digits_latents', few, dies, SETTINGS, encoder=ENCODER)
    assert not (tmp_path / 'digits_latents' / '1.0.0').exists()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'digits_latents').rglob('*.array_record-*-of-0000?')}
    folder = write_encoded(tmp_path, 'digits_latents', few, encode, SETTINGS, encoder=ENCODER)
    assert contents(folder) == contents(written)
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before  # whole shards were not made again
    assert len(before) == {1: 0, 3: 0, 5: 1, 7: 2, 9: 3}[stop_after]
    write_encoded(tmp_path, 'digits_latents', few, dies, SETTINGS, encoder=ENCODER)  # it is there: nothing is encoded


def test_processes_share_the_shards(few, written, tmp_path):
    """Two processes one after the other, the second of which finds what the first has left, and the first finishes."""
    seen = []

    def by(process):
        def recorded(images):
            seen.append(process)
            return encode(images)

        return write_encoded(tmp_path, 'digits_latents', few, recorded, SETTINGS, encoder=ENCODER, process=(process, 2))

    by(1), by(0)
    assert contents(tmp_path / 'digits_latents' / '1.0.0') == contents(written)
    assert (seen.count(0), seen.count(1)) == (2 + 6, 1 + 3)  # blank ones tell the shapes; 3 shards of train, 1 of test


def test_another_encoding_is_not_mixed_in(few, written, tmp_path):
    for change in ({'encoder': {'sha256': 'def'}}, {'settings': dataclasses.replace(SETTINGS, batch_size=4)}):
        given = {'encoder': ENCODER, 'settings': SETTINGS} | change
        before = contents(written)
        with pytest.raises(ValueError, match='holds latents of another kind'):
            write_encoded(
                written.parents[1], 'digits_latents', few, encode, given['settings'], encoder=given['encoder']
            )
        assert contents(written) == before


def test_mirrored_images_follow_their_originals(few, tmp_path):
    settings = dataclasses.replace(SETTINGS, mirrored=True)
    write_encoded(tmp_path, 'digits_latents', few, encode, settings, encoder=ENCODER)
    latents = open_source('digits_latents', 'train', data_dir=tmp_path)
    images = few['train'].read(range(50))['image']
    assert len(latents) == 100
    found = latents.read(range(100))['mean']
    np.testing.assert_array_equal(found[::2], encode(images)['mean'])
    np.testing.assert_array_equal(found[1::2], encode(images[:, :, ::-1])['mean'])


def test_clips_become_latents_of_clips(tmp_path):
    """Of the frames that are read, at their rate; mirrored in width alone."""
    import tensorflow_datasets as tfds

    class Records(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    clips = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6, 1), dtype=np.uint8)
    source = Source(
        name='films',
        split='train',
        kind='video',
        image_shape=(3, 4, 6, 1),
        num_classes=2,
        num_bytes=clips.nbytes,
        records=Records({'video': clip, 'label': i % 2, 'place': np.float32([i])} for i, clip in enumerate(clips)),
        features={
            'video': tfds.features.Tensor(shape=(3, 4, 6, 1), dtype=np.uint8),
            'label': tfds.features.ClassLabel(num_classes=2),
            'place': tfds.features.Tensor(shape=(1,), dtype=np.float32),
        },
        frame_rate=12.0,
    )

    def halved(x):
        return {'mean': (x / 256).astype(np.float16), 'std': np.zeros(x.shape, np.float16)}

    expected = halved(clips[:, ::2])['mean']
    for mirrored in (False, True):
        settings = EncodingSettings(batch_size=4, examples_per_shard=3, mirrored=mirrored)
        folder, sources = tmp_path / str(mirrored), {'train': source.clipped(2, 2)}
        write_encoded(folder, 'films_latents', sources, halved, settings, encoder=ENCODER)
        latents = open_source('films_latents', 'train', data_dir=folder)
        assert (latents.kind, latents.image_shape, latents.frame_rate) == ('latent', (2, 4, 6, 1), 6.0)
        assert set(latents.features) == {'mean', 'std', 'label', 'mirrored' if mirrored else 'place'}
        found = latents.read(range(len(latents)))
        np.testing.assert_array_equal(found['mean'][:: 1 + mirrored], expected)
        np.testing.assert_array_equal(found['label'][:: 1 + mirrored], np.arange(5) % 2)
        if mirrored:
            np.testing.assert_array_equal(found['mean'][1::2], expected[:, :, :, ::-1])
    with pytest.raises(ValueError, match='holds latents of another kind .frame_rate: 6.0 there and 12.0 here'):
        write_encoded(folder, 'films_latents', {'train': source.clipped(2)}, halved, settings, encoder=ENCODER)


@pytest.fixture
def corrupt(few):
    """Example 7 is cut in the middle, example 9 is no image."""
    source = few['train']
    records = [dict(source.records[i]) for i in range(12)]
    records[7]['image'] = records[7]['image'][:40]
    records[9]['image'] = b'what is this'

    class Records(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(Source)}
    return {'train': Source(**fields | {'records': Records(records)})}


def test_a_corrupt_image_is_named(corrupt, tmp_path):
    with pytest.raises(
        CorruptExample, match=r"image of example 7 of 'digits', split 'train\[:50\]', cannot be decoded"
    ):
        write_encoded(tmp_path, 'digits_latents', corrupt, encode, SETTINGS, encoder=ENCODER)
    with pytest.raises(CorruptExample, match='example 9'):
        corrupt['train'].read([1, 9])


def test_corrupt_images_are_skipped_and_counted_where_that_is_asked_for(corrupt, tmp_path):
    settings = dataclasses.replace(SETTINGS, on_corrupt='skip')
    folder = write_encoded(tmp_path, 'digits_latents', corrupt, encode, settings, encoder=ENCODER)
    latents = open_source('digits_latents', 'train', data_dir=tmp_path)
    assert len(latents) == 10
    assert json.loads((folder / 'encoding.json').read_text())['skipped'] == {'train': 2}
    good = [i for i in range(12) if i not in (7, 9)]
    images = np.stack([corrupt['train'][i]['image'] for i in good])
    np.testing.assert_array_equal(latents.read(range(10))['mean'], encode(images)['mean'])


def test_settings_refuse():
    with pytest.raises(ValueError, match="on_corrupt is 'error' or 'skip', got 'ignore'"):
        EncodingSettings(on_corrupt='ignore')
    with pytest.raises(ValueError, match='at least 1, got 0 and 2048'):
        EncodingSettings(batch_size=0)
    with pytest.raises(ValueError, match='batch_size of at least 2'):
        EncodingSettings(batch_size=1, mirrored=True)


def test_images_are_cropped_to_their_middle_and_resized():
    from PIL import Image

    from diffjax.data.images import decode

    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = [255, 0, 0]  # the middle square
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, 'PNG')
    found = decode(buffer.getvalue(), (10, 10, 3), cropped=True)
    np.testing.assert_array_equal(found[:, 1:], np.broadcast_to([255, 0, 0], (10, 9, 3)))
    np.testing.assert_array_equal(found[:, 0, 0], 128)  # a box of four pixels, two of them red
    with pytest.raises(ValueError):
        decode(buffer.getvalue(), (10, 10, 3))


def test_latents_that_are_not_finite_are_told(few, tmp_path):
    with pytest.raises(ValueError, match='std of an example of digits_latents-train.* is not finite as float16'):
        write_encoded(
            tmp_path,
            'digits_latents',
            few,
            lambda images: encode(images) | {'std': np.full((len(images), 4, 4, 1), np.inf, np.float16)},
            SETTINGS,
            encoder=ENCODER,
        )
    assert not (tmp_path / 'digits_latents' / '1.0.0').exists()


def test_two_runs_do_not_write_at_once(few, tmp_path):
    def writes(images):
        with pytest.raises(ValueError, match='is being written by another run'):
            write_encoded(tmp_path, 'digits_latents', few, encode, SETTINGS, encoder=ENCODER)
        return encode(images)

    folder = write_encoded(tmp_path, 'digits_latents', few, writes, SETTINGS, encoder=ENCODER)
    assert not [path.name for path in folder.iterdir() if 'lock' in path.name or path.suffix == '.part']


def test_images_of_another_size_are_another_encoding(few, written, tmp_path):
    larger = {
        split: dataclasses.replace(source, image_shape=(16, 16, 1), cropped=True) for split, source in few.items()
    }
    with pytest.raises(ValueError, match='holds latents of another kind .image_shape'):
        write_encoded(written.parents[1], 'digits_latents', larger, encode, SETTINGS, encoder=ENCODER)


def test_a_size_that_no_image_has_is_a_corrupt_image():
    from PIL import Image

    from diffjax.data.images import decode

    buffer = io.BytesIO()
    Image.new('L', (8, 8)).save(buffer, 'PNG')
    damaged = bytearray(buffer.getvalue())
    damaged[16:24] = (60_000).to_bytes(4, 'big') * 2  # width and height
    damaged[29:33] = zlib.crc32(damaged[12:29]).to_bytes(4, 'big')
    with pytest.raises(ValueError, match='decompression bomb'):
        decode(bytes(damaged), (8, 8, 1))


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from diffjax.data import EncodingSettings, open_source, write_encoded
data, out = sys.argv[1:]
few = {'train': open_source('digits', 'train[:30]', data_dir=data)}
def encode(images):
    x = images[:, ::2, ::2].astype(np.float16)
    return {'mean': x, 'std': x, 'tokens': x[..., 0].astype(np.int32)}
settings = EncodingSettings(batch_size=8, examples_per_shard=20)
print(write_encoded(Path(out), 'digits_latents', few, encode, settings, encoder={}))
"""


def test_the_bytes_are_the_same_in_every_process(digits_dir, tmp_path):
    """Python's hashes, and what is ordered by them, are each process's own."""
    folders = []
    for seed in (1, 2):
        command = [sys.executable, '-c', PROGRAM, str(digits_dir), str(tmp_path / str(seed))]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'PYTHONHASHSEED': str(seed)})
        assert done.returncode == 0, done.stderr
        folders.append(Path(done.stdout.strip().splitlines()[-1]))
    assert contents(folders[0]) == contents(folders[1])
