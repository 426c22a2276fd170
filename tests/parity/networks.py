"""A network of theirs with random weights, and ours with the same: the harness of the parity tests of networks.

A parity test of an architecture is

    case = network_case(ARCHITECTURE, 'DiTTransformer2DModel', CONFIG)
    assert case.error((x, t, labels), lambda model: nhwc(model(nchw(x), tensor(t), tensor(labels)).sample)) < 1e-4
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from diffjax.weights.engine import build_network, expected_shapes, export_tensors, import_tensors


def their_class(name):
    """The class of that name, of diffusers or else of transformers."""
    import diffusers

    if hasattr(diffusers, name):
        return getattr(diffusers, name)
    import transformers

    return getattr(transformers, name)


def their_model(name, config):
    """Their model of a config, in evaluation mode, from a dict that may carry more than its class takes."""
    cls = their_class(name)
    return (cls.from_config(config) if hasattr(cls, 'from_config') else cls(cls.config_class(**config))).eval()


def randomise(model, seed=0):
    """Draws every parameter anew, those that start at zero too, such that activations keep their size."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            embedding = any(word in name for word in ('embedding_table', 'position_embedding', 'token_embedding'))
            if p.ndim >= 2 and not embedding:
                noise /= np.sqrt(np.prod(p.shape[1:]))
            elif p.ndim < 2:
                noise = 0.3 * noise + float(torch.all(p == 1))  # scales of norms around 1, biases around 0
            p.copy_(noise)


def copy_tied(model, architecture, options):
    """Makes equal what their files hold several times."""
    import torch

    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for leaf in architecture.table(options):
            for copy in leaf.copies:
                for name, other in zip(leaf.theirs, copy, strict=True):
                    tensors[other].copy_(tensors[name])


def arrays(model):
    """Their state dict as NumPy arrays."""
    return {name: p.detach().numpy() for name, p in model.state_dict().items()}


def relative_error(ours, theirs):
    """max |a - b| / max |b|. Both finite, of one shape, and theirs not next to nothing."""
    a, b = (np.asarray(value, np.float64) for value in (ours, theirs))
    assert a.shape == b.shape, f'{a.shape} and {b.shape}'
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert np.std(b) > 1e-3
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def tensor(a, dtype=None):
    import torch

    a = torch.from_numpy(np.array(a))
    return a if dtype is None else a.to(dtype)


def nchw(a, dtype=None):
    """`[B, H, W, C]` as a tensor `[B, C, H, W]`."""
    return tensor(np.moveaxis(np.asarray(a), -1, 1), dtype)


def nhwc(a):
    """Their `[B, C, H, W]` as an array `[B, H, W, C]`."""
    return np.moveaxis(a.detach().numpy(), 1, -1)


@dataclass
class Case:
    """Theirs and ours, of one config, with one set of weights. `apply(params, *inputs)` is compiled once."""

    architecture: Any
    model: Any
    options: dict[str, Any]
    params: Any
    apply: Any

    def error(self, inputs, theirs, dtype=None):
        """The relative error of `apply(params, *inputs)` to theirs(model), which answers in our layout.

        dtype: 'float64' lets theirs compute in double precision; `theirs` then has to cast what it passes.
        """
        import torch

        before = next(self.model.parameters()).dtype
        model = self.model if dtype is None else self.model.to(getattr(torch, dtype))
        try:
            with torch.no_grad():
                expected = theirs(model)
        finally:
            self.model.to(before)
        return relative_error(self.apply(self.params, *inputs), expected)

    def check_round_trip(self):
        """Import, then export: every tensor comes back bit for bit, and no other."""
        there, back = arrays(self.model), export_tensors(self.architecture, self.options, self.params)
        assert sorted(there) == sorted(back)
        for name, a in there.items():
            assert a.dtype == back[name].dtype and a.shape == back[name].shape, name
            assert a.tobytes() == np.ascontiguousarray(back[name]).tobytes(), name

    def check_export_loads(self, folder):
        """`from_pretrained` of the exported folder computes what the first model did: the same tensors, bit for bit."""
        from safetensors.numpy import save_file

        tensors = export_tensors(self.architecture, self.options, self.params)
        name = 'diffusion_pytorch_model' if hasattr(self.model, 'from_config') else 'model'
        save_file(tensors, folder / f'{name}.safetensors', metadata={'format': 'pt'})
        (folder / 'config.json').write_text(json.dumps(self.architecture.to_config(self.options)))
        again = type(self.model).from_pretrained(folder)
        there = arrays(self.model)
        assert sorted(there) == sorted(arrays(again))
        for name, a in arrays(again).items():
            assert a.tobytes() == there[name].tobytes(), name


@functools.cache
def _apply(network):
    return jax.jit(lambda params, *inputs: network.apply({'params': params}, *inputs))


def network_case(architecture, class_name, config, seed=0):
    """Their model of `config` with random weights, imported; the config goes through their own `to_json` and ours."""
    model = their_model(class_name, config)
    randomise(model, seed)
    options = architecture.to_options(dict(model.config) if hasattr(model, 'from_config') else model.config.to_dict())
    copy_tied(model, architecture, options)
    params = import_tensors(architecture, options, arrays(model))
    return Case(architecture, model, options, params, _apply(build_network(architecture, options)))


def check_published_shapes(architecture, class_name, config):
    """Every tensor name and shape of the published configuration, theirs built on the meta device, is the table's."""
    import torch

    with torch.device('meta'):
        model = their_model(class_name, config)
    theirs = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    ours = expected_shapes(architecture, architecture.to_options(config))
    assert sorted(ours) == sorted(theirs)
    assert [name for name in theirs if ours[name] != theirs[name]] == []
