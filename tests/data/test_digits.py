"""The embedded digits against scikit-learn's own arrays, and their preparation under races and accidents."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from diffjax.data import open_source, preparation, read_all
from diffjax.data.digits.digits_dataset_builder import Builder


def test_split_sizes_and_facts(digits_dir):
    for split, size in (('train', 1437), ('test', 360)):
        source = open_source('digits', split, data_dir=digits_dir)
        assert len(source) == source.num_examples == size
        facts = (source.name, source.split, source.kind, source.image_shape, source.num_classes, source.num_bytes)
        assert facts == ('digits', split, 'image', (8, 8, 1), 10, size * 64)
        example = source[0]
        assert example['image'].dtype == np.uint8 and example['image'].shape == (8, 8, 1)
        assert example['label'].dtype == np.int32 and example['label'].shape == ()


def test_every_image_and_label_is_sklearns_under_its_id_and_splits_are_disjoint(digits_dir):
    real = load_digits()
    builder = tfds.builder_from_directory(digits_dir / 'digits' / '1.0.0')
    seen = []
    for split in ('train', 'test'):
        for record in builder.as_data_source(split=split):  # TFDS's own decoder here, not ours
            i = int(record['id'])
            ink = record['image'][..., 0].astype(float) * 16 / 255
            np.testing.assert_array_equal(np.rint(ink), real.images[i])
            assert record['label'] == real.target[i]
            seen.append(i)
    assert sorted(seen) == list(range(1797))
    assert seen != sorted(seen)


def test_images_match_by_value_with_class_counts_and_full_range(digits_dir):
    real = load_digits()
    splits = [read_all(open_source('digits', split, data_dir=digits_dir)) for split in ('train', 'test')]
    images = np.concatenate([split['image'] for split in splits])
    labels = np.concatenate([split['label'] for split in splits])
    assert images.min() == 0 and images.max() == 255
    ours = np.concatenate([np.rint(images.reshape(1797, 64) * (16 / 255)), labels[:, None]], 1)
    theirs = np.concatenate([real.data, real.target[:, None]], 1)
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    assert np.bincount(splits[1]['label'], minlength=10).min() >= 25  # every class is well represented in both


def test_writing_twice_gives_the_same_bytes(digits_dir, tmp_path):
    open_source('digits', 'train', data_dir=tmp_path)
    first, second = digits_dir / 'digits' / '1.0.0', tmp_path / 'digits' / '1.0.0'
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for split in ('train', 'test'):
        a, b = (read_all(open_source('digits', split, data_dir=d)) for d in (digits_dir, tmp_path))
        np.testing.assert_array_equal(a['image'], b['image'])
        np.testing.assert_array_equal(a['label'], b['label'])


def test_two_processes_racing_both_succeed_and_leave_one_dataset(tmp_path):
    code = (
        f'from diffjax.data import open_source; print(len(open_source("digits", "train", data_dir={str(tmp_path)!r})))'
    )
    racers = [
        subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for racer in racers:
        output, errors = racer.communicate(timeout=120)
        assert (racer.returncode, output.strip()) == (0, '1437'), errors
    assert [p.name for p in tmp_path.iterdir()] == ['digits']
    assert [p.name for p in (tmp_path / 'digits').iterdir()] == ['1.0.0']


def test_a_rival_that_finishes_first_wins(digits_dir, tmp_path, monkeypatch):
    rename = preparation.os.rename

    def rival_then_rename(source, target):
        if str(target).startswith(str(tmp_path / 'digits')):
            shutil.copytree(digits_dir / 'digits' / '1.0.0', target)
            (target / 'rival').touch()
        rename(source, target)

    monkeypatch.setattr(preparation.os, 'rename', rival_then_rename)
    assert len(open_source('digits', 'test', data_dir=tmp_path)) == 360
    assert (tmp_path / 'digits' / '1.0.0' / 'rival').exists()
    assert [p.name for p in tmp_path.iterdir()] == ['digits']


def test_an_interrupted_preparation_leaves_nothing_that_counts(tmp_path, monkeypatch):
    write = Builder._generate_examples

    def stop_midway(self, images, labels, ids):
        yield from list(write(self, images, labels, ids[:5]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Builder, '_generate_examples', stop_midway)
        with pytest.raises(KeyboardInterrupt):
            open_source('digits', 'train', data_dir=tmp_path)
    assert not list(tmp_path.rglob('*.json'))
    (tmp_path / '.digits-unfinished-killed' / 'digits' / '1.0.0').mkdir(parents=True)  # what kill -9 leaves
    assert len(open_source('digits', 'train', data_dir=tmp_path)) == 1437


def test_a_directory_in_the_way_is_named_and_left_alone(tmp_path):
    stray = tmp_path / 'digits' / '1.0.0' / 'notes.txt'
    stray.parent.mkdir(parents=True)
    stray.touch()
    with pytest.raises(ValueError, match=r'digits/1\.0\.0 is in the way'):
        open_source('digits', 'train', data_dir=tmp_path)
    assert stray.exists()
