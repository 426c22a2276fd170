"""Inception-I3D against the same network in PyTorch, with random weights.

No package that could be installed has it: it is written here from the papers' tables and the names of the files.
"""

import itertools

import jax
import numpy as np
import pytest

pytest.importorskip('torch', reason='parity with PyTorch needs the extra [parity]')

import torch  # noqa: E402
from networks import relative_error, tensor  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from diffjax.nets import I3D  # noqa: E402
from diffjax.weights.engine import expected_shapes, export_tensors  # noqa: E402
from diffjax.weights.i3d import ARCHITECTURE, COUNTER, open_weights  # noqa: E402

# GoogLeNet's table 1: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj of inception (3a) to (5b).
GOOGLENET = """
    64 96 128 16 32 32, 128 128 192 32 96 64,
    192 96 208 16 48 64, 160 112 224 24 64 64, 128 128 256 24 64 64, 112 144 288 32 64 64, 256 160 320 32 128 128,
    256 160 320 32 128 128, 384 192 384 48 128 128"""
MIXED = ('3b', '3c', '4b', '4c', '4d', '4e', '4f', '5b', '5c')


def same(x, kernel, stride):
    """Zeros of TensorFlow's 'SAME' around the last three axes."""
    pads = []
    for n, k, s in zip(x.shape[2:], kernel, stride):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads.insert(0, (total // 2, total - total // 2))
    return F.pad(x, list(itertools.chain(*pads)))


def maximum(x, kernel, stride):
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)  # after a ReLU zeros never win


class Unit(nn.Module):
    def __init__(self, inputs, outputs, kernel=1, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv3d(same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Mixed(nn.Module):
    def __init__(self, inputs, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit(inputs, b0)
        self.b1a, self.b1b = Unit(inputs, b1a), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(inputs, b2a), Unit(b2a, b2b, 3)
        self.b3b = Unit(inputs, b3b)

    def forward(self, x):
        pooled = maximum(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class Reference(nn.Module):
    """`[B, 3, T, H, W]` in [-1, 1] -> (features `[B, 1024]`, logits `[B, 400]`)."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        inputs = 192
        for name, row in zip(MIXED, GOOGLENET.split(',')):
            widths = [int(n) for n in row.split()]
            setattr(self, f'Mixed_{name}', Mixed(inputs, *widths))
            inputs = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(inputs, 400, 1)

    def forward(self, x):
        x = maximum(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = maximum(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            if name in ('4b', '5b'):
                x = maximum(x, *{'4b': ((3, 3, 3), (2, 2, 2)), '5b': ((2, 2, 2), (2, 2, 2))}[name])
            x = getattr(self, f'Mixed_{name}')(x)
        x = F.avg_pool3d(x, (2, *x.shape[3:]), (1, 1, 1))  # 7 x 7 of 224 x 224
        return x.mean((2, 3, 4)), self.logits.conv3d(x).mean((2, 3, 4))


@pytest.fixture(scope='module')
def reference():
    model, generator = Reference().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, a in model.state_dict().items():
            noise = torch.randn(a.shape, generator=generator)
            if a.ndim > 1:
                a.copy_(noise * (2 / np.prod(a.shape[1:])) ** 0.5)
            elif name.endswith('running_var'):
                a.copy_(torch.rand(a.shape, generator=generator) + 0.5)
            elif a.ndim:
                a.copy_(0.3 * noise + name.endswith('bn.weight'))
    return model


@pytest.fixture(scope='module')
def weights(reference, tmp_path_factory):
    """The two lines of `weights/i3d.py`, counters of batches included."""
    path = tmp_path_factory.mktemp('weights') / 'i3d.safetensors'
    save_file({name: a.contiguous() for name, a in reference.state_dict().items()}, path)
    return path


def tensorflow_1(x, size):
    """`[N, C, H, W] -> [N, C, size, size]`, bilinear between the two pixels around i H / size, the last continued."""
    for axis in (2, 3):
        n = x.shape[axis]
        at = torch.arange(size, dtype=torch.float32) * np.float32(n / size)
        low = at.long()
        part = (at - low).view(-1, 1) if axis == 2 else at - low
        x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, (low + 1).clamp(max=n - 1)) * part
    return x


def pytorch(x, size):
    return F.interpolate(x, (size, size), mode='bilinear', align_corners=False)


def theirs(reference, clips, resize, size):
    """Their features and logits of uint8 clips `[B, T, H, W, 3]`."""
    batch, frames = clips.shape[:2]
    x = tensor(np.moveaxis(clips, -1, 2), torch.float32).flatten(0, 1)
    x = {'tensorflow': tensorflow_1, 'pytorch': pytorch}[resize](x, size)
    x = (2 * x / 255 - 1).unflatten(0, (batch, frames)).transpose(1, 2)
    with torch.no_grad():
        return [a.numpy() for a in reference(x)]


def clips(frames, height, width):
    return np.random.default_rng(frames).integers(0, 256, (2, frames, height, width, 3), dtype=np.uint8)


def check(reference, weights, resize, frames, size, shape):
    x, network = clips(frames, *shape), I3D(resize=resize, size=size)
    params = open_weights(weights)()
    ours = jax.jit(network.apply)({'params': params}, x)
    return [relative_error(a, b) for a, b in zip(ours, theirs(reference, x, resize, size), strict=True)]


@pytest.mark.parametrize('resize, frames, size', [('tensorflow', 18, 64), ('pytorch', 9, 48)])
def test_features_are_those_of_the_reference(reference, weights, resize, frames, size, fast_compilation):
    """Sizes along the way odd and even, in time and space; what is measured is about 1e-6."""
    assert max(check(reference, weights, resize, frames, size, (30, 41))) < 1e-5


@pytest.mark.slow
def test_features_at_full_size(reference, weights):
    assert max(check(reference, weights, 'tensorflow', 16, 224, (64, 64))) < 1e-4


def test_the_two_resizes_differ(reference):
    """By far more than the tolerance: it is no test of one resize against itself."""
    x = clips(9, 30, 41)
    one, other = (theirs(reference, x, resize, 48)[1] for resize in ('tensorflow', 'pytorch'))
    assert relative_error(one, other) > 1e-3


def test_every_tensor_goes_in_and_out_bit_for_bit(reference, weights):
    there = {name: a.numpy() for name, a in reference.state_dict().items() if not name.endswith(COUNTER)}
    back = export_tensors(ARCHITECTURE, {}, open_weights(weights)())
    assert sorted(there) == sorted(back) == sorted(expected_shapes(ARCHITECTURE, {}))
    assert all(a.tobytes() == back[name].tobytes() and a.shape == back[name].shape for name, a in there.items())
    assert sum(p.numel() for p in reference.parameters()) == 12_697_264
