"""References as ADM publishes them, and figures against them by ADM's published algorithm, written out here."""

import numpy as np
import pytest
import scipy.linalg

from diffjax.evaluation.collection import collect
from diffjax.evaluation.image_sets import image_array, open_images
from diffjax.evaluation.references import (
    check_reference,
    image_reference,
    read_reference,
    reference_figures,
    write_reference,
)
from diffjax.evaluation.spaces import Features, Space, pixels

RNG = np.random.default_rng(0)
SHIFT = RNG.integers(0, 60, (1, 3, 3, 3))
REAL = RNG.integers(0, 256, (150, 3, 3, 3), dtype=np.uint8)
SAMPLES = (RNG.integers(0, 196, (120, 3, 3, 3)) + SHIFT).astype(np.uint8)


def maps(images):
    """Features as a network would give them: 9 points, 27 spatial ones, 9 logits."""
    x = images.astype(np.float32) / 64
    h = x.mean(3).reshape(len(x), -1)
    return Features(h, np.sqrt(x).reshape(len(x), -1), 2 * h)


SPACE = Space('a small map', maps, lambda shape: (9, 27), 32)


class ADM:
    """The figures of `guided-diffusion/evaluations/evaluator.py`, from features at once."""

    @staticmethod
    def frechet(a, b):
        (mu1, sigma1), (mu2, sigma2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
        root = scipy.linalg.sqrtm(sigma1.dot(sigma2))
        return (mu1 - mu2).dot(mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real

    @staticmethod
    def inception_score(logits):
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(1, keepdims=True)
        return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0, keepdims=True))), 1)))

    @staticmethod
    def precision_recall(reference, samples, k=3):
        def squared(u, v):
            return ((u[:, None].astype(np.float64) - v) ** 2).sum(2)

        radii = [np.sort(squared(x, x), 1)[:, k] for x in (reference, samples)]  # number 0 is the point itself
        between = squared(reference, samples)
        return (between <= radii[0][:, None]).any(0).mean(), (between <= radii[1]).any(1).mean()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """An ADM reference of images and moments, one of moments alone, one of images alone, and pytorch-fid's."""
    folder, features = tmp_path_factory.mktemp('references'), maps(REAL)
    mu, sigma = features.points.mean(0), np.cov(features.points, rowvar=False)
    mu_s, sigma_s = features.spatial.mean(0), np.cov(features.spatial, rowvar=False)
    np.savez(folder / 'adm.npz', arr_0=REAL, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    np.savez(folder / 'moments.npz', mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    np.savez(folder / 'images.npz', REAL)
    np.savez(folder / 'fid.npz', mu=mu, sigma=sigma)
    np.savez(folder / 'samples.npz', arr_0=SAMPLES)
    return folder


@pytest.mark.parametrize('name', ['adm', 'moments', 'images', 'fid'])
def test_figures_are_adms(files, name):
    figures = reference_figures(open_images(files / 'samples.npz'), read_reference(files / f'{name}.npz'), SPACE)
    real, samples = maps(REAL), maps(SAMPLES)
    assert figures['frechet_distance'] == pytest.approx(ADM.frechet(samples.points, real.points), rel=1e-5)
    assert figures['inception_score'] == pytest.approx(ADM.inception_score(samples.logits), rel=1e-5)
    assert (figures['features'], figures['num_samples']) == ('a small map', 120)
    assert figures['reference'].startswith(f'{name}.npz (')
    if name == 'fid':
        assert 'spatial_frechet_distance' not in figures
    else:
        expected = ADM.frechet(samples.spatial, real.spatial)
        assert figures['spatial_frechet_distance'] == pytest.approx(expected, rel=1e-5)
    if name in ('adm', 'images'):
        precision, recall = ADM.precision_recall(real.points, samples.points)
        assert 0 < recall < precision < 1
        assert (figures['precision'], figures['recall']) == (pytest.approx(precision), pytest.approx(recall))
    else:
        assert not {'precision', 'recall'} & set(figures)


def test_moments_in_the_archive_count_before_its_images(tmp_path, files):
    """ADM's are of the whole data set, its images 10,000 of them."""
    with np.load(files / 'adm.npz') as archive:
        moved = dict(archive) | {'mu': archive['mu'] + 1, 'mu_s': archive['mu_s'] + 2}
    np.savez(tmp_path / 'moved.npz', **moved)
    before, after = (
        reference_figures(image_array('REAL', REAL), read_reference(path), SPACE)
        for path in (files / 'adm.npz', tmp_path / 'moved.npz')
    )
    assert before['frechet_distance'] == pytest.approx(0, abs=1e-5)
    assert after['frechet_distance'] == pytest.approx(9, rel=1e-4)
    assert after['spatial_frechet_distance'] == pytest.approx(4 * 27, rel=1e-4)
    assert before['precision'] == before['recall'] == after['precision'] == 1


def test_what_is_written_is_read(tmp_path, files):
    found = collect(image_array('REAL', REAL), SPACE)
    write_reference(tmp_path / 'mine.npz', found)
    with np.load(tmp_path / 'mine.npz') as mine, np.load(files / 'moments.npz') as theirs:
        assert sorted(mine) == sorted(theirs)
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-6)
    again = read_reference(tmp_path / 'mine.npz')
    np.testing.assert_array_equal(again.statistics.covariance, found.moments.statistics.covariance)
    np.testing.assert_array_equal(again.spatial.mean, found.spatial.mean)


def test_real_images_in_the_place_of_samples():
    reference, half = image_reference(image_array('REAL', REAL[:75])), image_array('half', REAL[75:])
    figures = reference_figures(image_array('SAMPLES', SAMPLES), reference, SPACE, real=half)
    expected = ADM.frechet(maps(REAL[75:]).points, maps(REAL[:75]).points)
    assert figures['frechet_distance_train'] == pytest.approx(expected, rel=1e-5)
    assert figures['frechet_ratio'] == figures['frechet_distance'] / figures['frechet_distance_train'] > 1
    precision, recall = ADM.precision_recall(maps(REAL[:75]).points, maps(REAL[75:]).points)
    assert (figures['precision_real'], figures['recall_real']) == (pytest.approx(precision), pytest.approx(recall))
    assert figures['reference'] == 'REAL (75 images)'


def test_pixels_against_a_reference(files):
    figures = reference_figures(image_array('SAMPLES', SAMPLES), read_reference(files / 'images.npz'), pixels())
    flat = [images.reshape(len(images), -1) / 127.5 - 1 for images in (SAMPLES, REAL)]
    assert figures['frechet_distance'] == pytest.approx(ADM.frechet(*flat), rel=1e-6)
    assert figures['features'] == 'pixels' and 'inception_score' not in figures


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, files, monkeypatch):
    """And before a feature is taken."""
    monkeypatch.setattr('diffjax.evaluation.references.collect', lambda *args, **kwargs: pytest.fail('computed'))
    samples = image_array('SAMPLES', SAMPLES)
    for space, name, message in (
        (pixels(), 'fid', r'fid.npz \(moments\) holds moments of 9 features, and pixels have 27'),
        (SPACE._replace(dimensions=lambda shape: (9, 28)), 'moments', 'moments of 27 spatial ones, .* have 28'),
    ):
        with pytest.raises(ValueError, match=message):
            reference_figures(samples, read_reference(files / f'{name}.npz'), space)
    small = image_reference(image_array('small', REAL[:, :2]))
    with pytest.raises(ValueError, match=r'holds images of \[2, 3, 3\], and the samples are \[3, 3, 3\]'):
        reference_figures(samples, small, pixels())
    with pytest.raises(ValueError, match='196,608 dimensions, too many for a covariance'):
        check_reference(small, pixels(), (256, 256, 3))


def test_what_is_no_reference_is_refused_in_one_line(tmp_path):
    eye, zeros = np.eye(4), np.zeros(4)
    for arrays, message in (
        ({'features': eye}, 'is no reference: it holds features; needed: mu and sigma, or arr_0'),
        ({'mu': zeros}, 'holds mu alone; mu and sigma belong together'),
        ({'mu': zeros, 'sigma': eye, 'sigma_s': eye}, 'holds sigma_s alone'),
        ({'mu': zeros[:3], 'sigma': eye}, r'mu \[D\] and sigma \[D, D\] are needed, got \[3\], \[4, 4\]'),
        ({'mu': zeros, 'sigma': np.nan * eye}, 'mu or sigma holds NaN or infinity'),
    ):
        np.savez(tmp_path / 'x.npz', **arrays)
        with pytest.raises(ValueError, match=message) as caught:
            read_reference(tmp_path / 'x.npz')
        assert '\n' not in str(caught.value)
    with pytest.raises(FileNotFoundError, match='y.npz is neither'):
        read_reference(tmp_path / 'y.npz')


def test_a_damaged_archive_is_one_error(tmp_path):
    """A byte turned over inside a member: the archive opens, its checksum does not hold."""
    path = tmp_path / 'reference.npz'
    write_reference(path, collect(image_array('real', REAL), SPACE))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match='reference.npz is damaged: '):
        read_reference(path)
    images = tmp_path / 'images.npz'
    np.savez_compressed(images, arr_0=REAL)
    data = bytearray(images.read_bytes())
    data[len(data) // 2] ^= 0xFF
    images.write_bytes(data)
    with pytest.raises(ValueError, match='images.npz is damaged: '):
        collect(open_images(images), SPACE)
