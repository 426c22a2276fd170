"""DiT against diffusers' DiTTransformer2DModel: outputs, names and shapes, and the way back."""

import copy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip('diffusers', reason='parity with diffusers needs the extra [parity]')
torch = pytest.importorskip('torch', reason='parity with diffusers needs the extra [parity]')

sys.path.insert(0, str(Path(__file__).parents[1] / 'weights'))

from networks import arrays, check_published_shapes, nchw, network_case, nhwc, relative_error, tensor  # noqa: E402
from tiny_dit import original  # noqa: E402

from diffjax.weights import import_tensors  # noqa: E402
from diffjax.weights.dit import ARCHITECTURE, ORIGINAL  # noqa: E402
from diffjax.weights.engine import build_network  # noqa: E402
from diffjax.weights.export import export_folder  # noqa: E402
from diffjax.weights.store import import_source  # noqa: E402

NAME = 'DiTTransformer2DModel'
TINY = {
    'num_attention_heads': 2,
    'attention_head_dim': 16,
    'num_layers': 2,
    'sample_size': 8,
    'out_channels': 8,
    'num_embeds_ada_norm': 5,
    'norm_eps': 1e-6,
}
XL_2_256 = {  # transformer/config.json of facebook/DiT-XL-2-256
    'activation_fn': 'gelu-approximate',
    'attention_bias': True,
    'attention_head_dim': 72,
    'dropout': 0.0,
    'in_channels': 4,
    'norm_elementwise_affine': False,
    'norm_num_groups': 32,
    'norm_type': 'ada_norm_zero',
    'num_attention_heads': 16,
    'num_embeds_ada_norm': 1000,
    'num_layers': 28,
    'out_channels': 8,
    'patch_size': 2,
    'sample_size': 32,
    'upcast_attention': False,
}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 8, 8, 4)).astype(np.float32)
    return x, np.array([0.0, 17.0, 999.0], np.float32), np.array([0, 3, 5], np.int32)  # 5 is the null label


def theirs(x, t, labels, dtype=None):
    return lambda model: nhwc(model(nchw(x, dtype), tensor(t, dtype), tensor(labels)).sample)


@pytest.fixture(scope='module')
def case():
    return network_case(ARCHITECTURE, NAME, TINY)


def test_outputs_are_diffusers(case):
    inputs = batch()
    assert case.error(inputs, theirs(*inputs)) < 1e-5
    assert case.error(inputs, theirs(*inputs, dtype=torch.float64), dtype='float64') < 1e-5


def test_the_default_epsilon_of_diffusers_is_near_enough():
    inputs = batch()
    case = network_case(ARCHITECTURE, NAME, {**TINY, 'norm_eps': 1e-5}, seed=1)
    assert case.error(inputs, theirs(*inputs)) < 1e-4


def test_the_file_of_facebookresearch_is_the_model_without_the_changes_of_diffusers(case):
    """Which are the frequencies of the time embedding; the pairs of names are those of its conversion script."""
    tensors, there = original(arrays(case.model)), case.options
    tensors['pos_embed'] = case.model.pos_embed.pos_embed.numpy()
    options = {key: value for key, value in there.items() if key != 'frequency_shift'}
    params = import_tensors(ORIGINAL, options, tensors)
    network = build_network(ORIGINAL, options)
    inputs = batch()
    ours = jax.jit(network.apply)({'params': params}, *inputs)
    assert relative_error(ours, as_published(case.model, inputs)) < 1e-5
    assert relative_error(ours, run(case.model, inputs)) > 1e-2  # the change shows


def as_published(model, inputs):
    """What the model computes with the frequencies of the published code, 10000^(-i / 128)."""
    projections = [block.norm1.emb.time_proj for block in model.transformer_blocks]
    for projection in projections:
        projection.downscale_freq_shift = 0
    out = run(model, inputs)
    for projection in projections:
        projection.downscale_freq_shift = 1
    return out


def run(model, inputs):
    with torch.no_grad():
        return theirs(*inputs)(model)


def test_round_trip_is_exact(case):
    case.check_round_trip()


def test_diffusers_loads_what_is_exported(case, tmp_path):
    case.check_export_loads(tmp_path)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_folders_go_through_the_command_and_back(case, tmp_path, dtype):
    """Sharded as diffusers shards, imported, exported sharded again, and loaded by diffusers: bit for bit."""
    model = copy.deepcopy(case.model).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / 'theirs', max_shard_size='60KB')
    assert len(list((tmp_path / 'theirs').glob('*.safetensors'))) > 1
    imported = import_source(tmp_path / 'theirs', tmp_path / 'imported')
    export_folder(imported, tmp_path / 'exported', shard_bytes=60_000)
    assert len(list((tmp_path / 'exported').glob('*.safetensors'))) > 1
    again = type(model).from_pretrained(tmp_path / 'exported', torch_dtype=getattr(torch, dtype))
    there, back = model.state_dict(), again.state_dict()
    assert there.keys() == back.keys()
    for name, a in there.items():
        assert a.dtype == back[name].dtype == getattr(torch, dtype)
        assert torch.equal(a.view(torch.uint8), back[name].view(torch.uint8)), name


def test_the_published_size_has_the_names_and_shapes_of_the_table():
    check_published_shapes(ARCHITECTURE, NAME, XL_2_256)
    assert ARCHITECTURE.to_options(XL_2_256)['hidden_size'] == 1152
