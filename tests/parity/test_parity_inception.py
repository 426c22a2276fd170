"""Inception-v3 of 2015 against torch-fidelity's, which is pytorch-fid's: features under two resizes, and figures."""

# Full images on two cores: everything is measured on the same few, and compiled for one device.

import importlib.util
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.linalg

pytest.importorskip('torch', reason='parity with torch-fidelity needs the extra [parity]')
if importlib.util.find_spec('torch_fidelity') is None:
    pytest.skip('parity of Inception needs: pip install --no-deps torch-fidelity', allow_module_level=True)

import torch  # noqa: E402
from networks import nchw, relative_error  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from diffjax.evaluation.collection import collect  # noqa: E402
from diffjax.evaluation.distances import frechet_distance_of_statistics  # noqa: E402
from diffjax.evaluation.image_sets import image_array  # noqa: E402
from diffjax.evaluation.neighbours import precision_recall  # noqa: E402
from diffjax.evaluation.spaces import Features, Space, inception  # noqa: E402
from diffjax.nets import resizing  # noqa: E402
from diffjax.weights.engine import expected_shapes, export_tensors  # noqa: E402
from diffjax.weights.inception import ARCHITECTURE, COUNTER, open_weights  # noqa: E402

RNG = np.random.default_rng(0)


def module(name):
    """A file of torch-fidelity. Importing the package itself would want torchvision, of which nothing is used here."""
    if 'torch_fidelity' not in sys.modules:
        package = types.ModuleType('torch_fidelity')
        package.__path__ = [str(Path(importlib.util.find_spec('torch_fidelity').origin).parent)]
        unused = types.ModuleType('torch_fidelity.utils')
        unused.__getattr__ = lambda name: None
        sys.modules |= {'torch_fidelity': package, 'torch_fidelity.utils': unused}
    return importlib.import_module(f'torch_fidelity.{name}')


@pytest.fixture(scope='module')
def theirs():
    """Their network with every weight drawn at random, and what its Mixed_6d.branch1x1 put out last."""
    file = module('feature_extractor_inceptionv3')

    class Random(file.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            generator = torch.Generator().manual_seed(0)
            for name, a in self.state_dict().items():
                noise = torch.randn(a.shape, generator=generator)
                if a.ndim > 1:
                    a.copy_(noise * (2 / np.prod(a.shape[1:])) ** 0.5)
                elif name.endswith('running_var'):
                    a.copy_(torch.rand(a.shape, generator=generator) + 0.5)
                elif a.ndim:
                    a.copy_(0.3 * noise + name.endswith('bn.weight'))

    file.load_state_dict_from_url = lambda url, progress: {}  # nothing is downloaded
    network, seen = Random('random', ['2048', 'logits_unbiased']), {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda layer, given, out: seen.update(out=out))
    return network, seen


@pytest.fixture(scope='module')
def weights(theirs, tmp_path_factory):
    """The two lines of `weights/inception.py`, counters of batches included."""
    path = tmp_path_factory.mktemp('weights') / 'inception.safetensors'
    save_file({name: a.contiguous() for name, a in theirs[0].state_dict().items()}, path)
    return path


@pytest.fixture(scope='module')
def images():
    """Two sets of images that differ, `[2, 8, 9, 12, 3]`."""
    sets = RNG.integers(0, 256, (8, 9, 12, 3)), np.clip(RNG.normal(150, 40, (8, 9, 12, 3)), 0, 255)
    return np.stack(sets).astype(np.uint8)


@pytest.fixture(scope='module')
def mine(weights, images, fast_compilation):
    """Resize -> our features of all images, or of the first two for the second resize, one set a batch."""
    before, jax.local_devices = jax.local_devices, lambda: jax.devices()[:1]
    found = {}
    for resize, parts in (('tensorflow', images), ('pytorch', [images[0, :2]])):
        space = inception(weights=weights, resize=resize, batch_size=len(parts[0]))
        found[resize] = [jax.tree.map(np.asarray, space.extract(part)) for part in parts]
    jax.local_devices = before
    return found


@pytest.fixture(scope='module')
def expected(theirs, images):
    parts = {'tensorflow': images, 'pytorch': [images[0, :2]]}
    return {resize: [features(theirs, part, resize) for part in sets] for resize, sets in parts.items()}


def features(theirs, images, resize):
    """Their pool, spatial features and unbiased logits."""
    network, seen = theirs
    file = module('feature_extractor_inceptionv3')
    before = file.interpolate_bilinear_2d_like_tensorflow1x

    def pytorch_fid(x, size, align_corners):  # in the place of the resize, and then of (x - 128) / 128
        x = torch.nn.functional.interpolate(x / 255, size, mode='bilinear', align_corners=False)
        return 128 + 128 * (2 * x - 1)

    file.interpolate_bilinear_2d_like_tensorflow1x = {'tensorflow': before, 'pytorch': pytorch_fid}[resize]
    try:
        with torch.no_grad():
            pool, unbiased = network(nchw(images))
    finally:
        file.interpolate_bilinear_2d_like_tensorflow1x = before
    spatial = seen['out'].permute(0, 2, 3, 1)[..., :7].reshape(len(images), -1)
    return Features(*(a.numpy() for a in (pool, spatial, unbiased)))


@pytest.mark.parametrize('resize', ['tensorflow', 'pytorch'])
def test_features_are_torch_fidelitys(mine, expected, resize):
    """What is measured is about 2e-6."""
    for ours, those in zip(mine[resize], expected[resize], strict=True):
        for a, b in zip(ours, those, strict=True):
            assert relative_error(a, b) < 1e-5


def test_the_two_resizes_differ(expected):
    """By far more than the tolerance: it is no test of one resize against itself."""
    one, other = (expected[name][0].points[:2] for name in ('tensorflow', 'pytorch'))
    assert relative_error(one, other) > 1e-3


@pytest.mark.parametrize('size', [(8, 8), (32, 32), (64, 48), (256, 256), (299, 299), (320, 500)])
def test_resizes_are_theirs(size):
    x = RNG.integers(0, 256, (1, *size, 1)).astype(np.float32)
    tensorflow = module('interpolate_compat_tensorflow').interpolate_bilinear_2d_like_tensorflow1x
    for method, expected in (
        (resizing.tensorflow, tensorflow(nchw(x), (299, 299), align_corners=False)),
        (resizing.pytorch, torch.nn.functional.interpolate(nchw(x), (299, 299), mode='bilinear')),
    ):
        np.testing.assert_allclose(resizing.resize(x, 299, method)[0, ..., 0], expected[0, 0].numpy(), atol=5e-3)


def test_every_tensor_goes_in_and_out_bit_for_bit(theirs, weights):
    there = {name: a.numpy() for name, a in theirs[0].state_dict().items() if not name.endswith(COUNTER)}
    back = export_tensors(ARCHITECTURE, {}, open_weights(weights)())
    assert sorted(there) == sorted(back) == sorted(expected_shapes(ARCHITECTURE, {}))
    assert all(a.tobytes() == back[name].tobytes() and a.shape == back[name].shape for name, a in there.items())
    fresh = torch.nn.Module.load_state_dict(theirs[0], {name: torch.from_numpy(a) for name, a in back.items()})
    assert not fresh.missing_keys and not fresh.unexpected_keys


def adm_frechet(a, b):
    """ADM's evaluator, `FIDStatistics.frechet_distance` of `compute_statistics`."""
    (mu1, sigma1), (mu2, sigma2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(sigma1.dot(sigma2)).real
    return (mu1 - mu2).dot(mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)


def test_figures_are_torch_fidelitys_and_adms(mine, expected, images):
    """Of two sets of images; of 4 features that are not constant, whose covariances of 8 points the formulas of others
    can take."""
    ours, those = mine['tensorflow'], expected['tensorflow']
    kept = [np.flatnonzero(np.ptp(np.concatenate([each[i] for each in those]), axis=0) > 0.1)[:4] for i in (0, 1)]
    found = []
    for features, part in zip(ours, images):
        chosen = Features(features.points[:, kept[0]], features.spatial[:, kept[1]], features.logits)
        found.append(collect(image_array('x', part), Space('', lambda x, chosen=chosen: chosen, None, 8)))
    fid = module('metric_fid')
    for name, i in (('moments', 0), ('spatial', 1)):
        value = frechet_distance_of_statistics(*(getattr(each, name).statistics for each in found))
        a, b = (each[i][:, kept[i]].astype(np.float64) for each in those)
        assert value == pytest.approx(adm_frechet(a, b), rel=1e-3)
        stats = [fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
        assert value == pytest.approx(fid.fid_statistics_to_metric(*stats, False)[fid.KEY_METRIC_FID], rel=1e-3)
        assert value > 0.01
    isc = module('metric_isc')
    score = isc.isc_features_to_metric(torch.from_numpy(those[0].logits), splits=1, shuffle=False)
    assert found[0].inception_score == pytest.approx(score[isc.KEY_METRIC_ISC_MEAN], rel=1e-4)
    real, samples = (torch.from_numpy(each.points[:, kept[0]]).double() for each in those)
    prc = module('metric_prc').calculate_precision_recall_full(samples, real, 3, 99)
    assert precision_recall(found[0].points, found[1].points, k=3) == pytest.approx(prc, abs=1e-6)
    assert min(prc) > 0 and max(prc) <= 1
