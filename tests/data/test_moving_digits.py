"""Moving digits: real digits of their own split, on paths that the walls reflect, drawn where the labels say."""

import numpy as np
import pytest
from scipy.ndimage import center_of_mass
from sklearn.datasets import load_digits

from diffjax.data import list_splits, open_source
from diffjax.data.digits.digits_dataset_builder import split_digits
from diffjax.data.moving_digits import moving_digits_dataset_builder as builder
from diffjax.data.moving_digits.flights import DIGIT, SIDE, SPEEDS, Flight, draw, flights, path, walls

RECORDS = {split: [builder.record(split, i) for i in range(150)] for split in ('train', 'test')}


def step_by_step(flight, num_frames, parts=2000):
    """Another way to fly: many small steps, the velocity turned round wherever a wall has been passed."""
    low, high = walls()
    place, velocity, places = np.array(flight.start), np.array(flight.velocity) / parts, []
    for k in range(num_frames * parts):
        if k % parts == 0:
            places.append(place)
        place = place + velocity
        velocity = np.where((place < low) & (velocity < 0) | (place > high) & (velocity > 0), -velocity, velocity)
    return np.array(places)


def test_paths_are_those_of_small_steps_and_velocities_their_derivatives():
    for flight in (Flight(0, (0.3, 0.7), (0.21, -0.13)), Flight(0, (0.79, 0.21), (-0.5, 0.02))):
        places, velocities = path(flight, 12)
        np.testing.assert_allclose(places, step_by_step(flight, 12), atol=0.01)
        slowly = path(flight._replace(velocity=tuple(np.divide(flight.velocity, 1000))), 11_002)[0]
        np.testing.assert_allclose((slowly[1::1000] - slowly[::1000][:12]) * 1000, velocities, rtol=1e-6)
        assert len(np.unique(velocities[:, 0].round(6))) == 2  # it bounced


@pytest.mark.parametrize('split', RECORDS)
def test_labels_follow_the_physics(split):
    low, high = walls()
    counts = np.zeros(3, int)
    for example in RECORDS[split]:
        number, places, velocities = example['number'], example['position'], example['velocity']
        counts[number] += 1
        assert places.shape == velocities.shape == (16, 2, 2) and places.dtype == np.float32
        there = places[:, :number]
        assert there.min() >= low - 1e-6 and there.max() <= high + 1e-6
        assert (places[:, number:] == -1).all() and (velocities[:, number:] == -1).all()
        speed = np.linalg.norm(velocities[:, :number], axis=-1)
        np.testing.assert_allclose(speed, np.broadcast_to(speed[:1], speed.shape), rtol=1e-5)
        assert SPEEDS[0] - 1e-6 <= speed.min() and speed.max() <= SPEEDS[1] + 1e-6
        steps, straight = np.diff(there, axis=0), (velocities[1:] == velocities[:-1])[:, :number]
        np.testing.assert_allclose(steps[straight], velocities[:-1, :number][straight], atol=1e-6)
    assert counts[0] == 0 and abs(counts[1] - counts[2]) < 5 * np.sqrt(150)
    bounced = [(example['velocity'][0] != example['velocity'][-1]).any() for example in RECORDS[split]]
    assert 0.5 < np.mean(bounced) < 1


def test_a_digit_is_drawn_where_its_label_says():
    """The centre of its ink, found in the picture, follows the path to a small part of a pixel."""
    digits = load_digits()
    for example in [example for example in RECORDS['train'] if example['number'] == 1][:40]:
        ink = digits.images[example['id'][0]]
        offset = (np.array(center_of_mass(ink)) + 0.5 - 4) * DIGIT / 8
        for frame, place in zip(example['video'], example['position'][:, 0]):
            centre = np.array(center_of_mass(frame[..., 0].astype(float))) + 0.5
            np.testing.assert_allclose(centre, place * SIDE + offset, atol=0.2)


def test_a_digit_looks_alike_wherever_it_is():
    """Moved by whole pixels it has the same bytes; a shrunk frame is the scanned digit."""
    image = load_digits().images[7]
    places = np.array([[0.5, 0.5], [0.5 - 3 / SIDE, 0.5 + 2 / SIDE]])
    there, moved = draw(image[None], [places])[..., 0]
    np.testing.assert_array_equal(moved, np.roll(there, (-3, 2), (0, 1)))
    middle = np.linspace(SIDE / 2 - DIGIT / 2, SIDE / 2 + DIGIT / 2, 17)[1::2]  # the middles of the scanned pixels
    rows = middle.astype(int)
    seen = there[np.ix_(rows, rows)] * (16 / 255)
    assert np.corrcoef(seen.ravel(), image.ravel())[0, 1] > 0.95
    assert there.sum() * (16 / 255) == pytest.approx(image.sum() * (DIGIT / 8) ** 2, rel=0.05)


def test_two_digits_are_laid_over_each_other():
    images, path_ = load_digits().images[[3, 8]], np.array([[0.4, 0.5]])
    both = draw(images, [path_, path_ + 0.1])
    alone = [draw(images[i : i + 1], [path_ + 0.1 * i]) for i in range(2)]
    np.testing.assert_array_equal(both, np.maximum(*alone))


def test_train_clips_show_train_digits_and_test_clips_test_digits():
    digits, ids = load_digits(), {}
    for split, examples in RECORDS.items():
        ids[split] = {int(i) for example in examples for i in example['id'] if i >= 0}
        assert ids[split] <= set(split_digits()[split][2])
        for example in examples:
            chosen = example['id'][: example['number']]
            np.testing.assert_array_equal(example['digit'][: example['number']], digits.target[chosen])
            assert example['label'] == digits.target[chosen[0]]
        assert {example['label'] for example in examples} == set(range(10))
    assert not ids['train'] & ids['test']


def test_a_clip_depends_on_its_split_and_index_alone():
    assert flights('train', 5, 1437) == flights('train', 5, 1437)
    assert len({flights(split, i, 360) for split in RECORDS for i in range(150)}) == 300


def test_the_dataset_holds_what_was_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, 'NUM_EXAMPLES', {'train': 7, 'test': 3})
    names = ('number', 'digit', 'id', 'position', 'velocity')
    source = open_source('moving_digits', 'train', data_dir=tmp_path, annotations=names)
    assert (source.kind, source.image_shape, source.num_classes, len(source)) == ('video', (16, 32, 32, 1), 10, 7)
    assert source.frame_rate == 8 and source.num_bytes == 7 * (16 * 32 * 32 + 4 + 2 + 2 * 4 + 2 * 16 * 4 * 4)
    for i in (6, 0):
        example = source[i]
        assert set(example) == {'video', 'label', *names}
        for name, value in RECORDS['train'][i].items():
            np.testing.assert_array_equal(example[name], value)
    assert list_splits('moving_digits', data_dir=tmp_path) == {'train': 7, 'test': 3}
