"""LPIPS against its equation in PyTorch, on torchvision's layers of VGG-16 written out; and its file of weights."""

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='parity with PyTorch needs the extra [parity]')

import jax  # noqa: E402
from networks import nchw, relative_error  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from diffjax.nets import LPIPS  # noqa: E402
from diffjax.weights.engine import expected_shapes, export_tensors, import_tensors  # noqa: E402
from diffjax.weights.lpips import ARCHITECTURE, open_weights  # noqa: E402

VGG16 = (64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M', 512, 512, 512)  # torchvision's list "D"
LAST = (3, 8, 15, 22, 29)  # the ReLUs whose outputs are compared


def trunk():
    layers, channels = [], 3
    for width in VGG16:
        if width == 'M':
            layers.append(torch.nn.MaxPool2d(2, 2))
        else:
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
            channels = width
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope='module')
def tensors():
    """Random, by the published names: those of torchvision's `features` and of lpips' linear layers."""
    rng = np.random.default_rng(0)
    found = {}
    for name, value in trunk().state_dict().items():
        scale = np.sqrt(2 / np.prod(value.shape[1:])) if value.ndim > 1 else 0.1
        found[f'features.{name}'] = np.float32(scale) * rng.standard_normal(tuple(value.shape), dtype=np.float32)
    for i, channels in enumerate((64, 128, 256, 512, 512)):
        found[f'lin{i}.model.1.weight'] = rng.uniform(0, 1, (1, channels, 1, 1)).astype(np.float32)
    return found


def theirs(tensors, a, b):
    """Zhang et al. 2018, equation 1, on inputs scaled as the package lpips scales them."""
    net = trunk()
    net.load_state_dict({name[9:]: torch.from_numpy(v) for name, v in tensors.items() if name.startswith('features')})
    shift, scale = (torch.tensor(v)[None, :, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    total = 0
    with torch.no_grad():
        f, g = ((nchw(x) - shift) / scale for x in (a, b))
        for i, layer in enumerate(net):
            f, g = layer(f), layer(g)
            if i in LAST:
                unit = [h / (h.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for h in (f, g)]
                weight = torch.from_numpy(tensors[f'lin{LAST.index(i)}.model.1.weight'])
                total = total + ((unit[0] - unit[1]) ** 2 * weight).sum(1).mean((1, 2))
    return total


def test_distances_are_those_of_pytorch(tensors, tmp_path):
    save_file(tensors, tmp_path / 'lpips.safetensors')
    params = open_weights(tmp_path / 'lpips.safetensors')()
    rng = np.random.default_rng(1)
    a, b = rng.uniform(-1, 1, (2, 3, 32, 48, 3)).astype(np.float32)
    ours = jax.jit(LPIPS().apply)({'params': params}, a, b)
    assert relative_error(ours, theirs(tensors, a, b)) < 1e-5
    assert float(LPIPS().apply({'params': params}, a[:1], a[:1])[0]) == 0


def test_every_tensor_comes_back(tensors):
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes(ARCHITECTURE, {})
    assert sum(a.size for a in tensors.values()) == 14_714_688 + 1_472
    back = export_tensors(ARCHITECTURE, {}, import_tensors(ARCHITECTURE, {}, tensors))
    assert all(np.array_equal(back[name], a) for name, a in tensors.items()) and sorted(back) == sorted(tensors)


def test_a_pickle_is_refused(tmp_path):
    torch.save({}, tmp_path / 'vgg.pth')
    with pytest.raises(ValueError, match='is a pickle.* four lines in diffjax/weights/lpips.py'):
        open_weights(tmp_path / 'vgg.pth')
    with pytest.raises(ValueError, match=r'\[B, H, W, 3\], H and W at least 16'):
        LPIPS().init(jax.random.key(0), np.zeros((1, 8, 16, 3)), np.zeros((1, 8, 16, 3)))
