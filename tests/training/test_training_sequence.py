"""Frames of clips over a mesh axis: the same is computed, and each device does its part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.nets import SpaceTimeUNet, VideoDiT, as_model
from diffjax.training.sharding import batch_sharding, check_batch, make_mesh, num_parts, over_time

pytestmark = pytest.mark.usefixtures('fast_compilation')
FIELDS = {'num_heads': 2, 'num_classes': 3, 'out_channels': 1}
UNET = {'base_channels': 8, 'channel_multipliers': (1, 2), 'num_res_blocks': 1, 'attention_resolutions': ()}
NETWORKS = {
    'SpaceTimeUNet': SpaceTimeUNet(temporal_downsampling=(1,), **UNET, **FIELDS),
    'VideoDiT': VideoDiT(patch_size=4, hidden_size=16, depth=1, scan_layers=False, **FIELDS),
}


def test_the_mesh():
    mesh = make_mesh(sequence=8)
    assert dict(mesh.shape) == {'data': 1, 'fsdp': 1, 'sequence': 8} and num_parts(mesh) == 1
    assert dict(make_mesh(fsdp=2, sequence=2).shape) == {'data': 2, 'fsdp': 2, 'sequence': 2}
    assert dict(make_mesh().shape) == {'data': 8, 'fsdp': 1}
    check_batch(3, 1, mesh)
    pair = make_mesh(2, 1, 4)
    with pytest.raises(ValueError, match='batch_size = 3 does not divide over 2 devices'):
        check_batch(3, 1, pair)
    x = jax.device_put(np.arange(4), batch_sharding(pair))
    assert sorted(tuple(np.asarray(shard.data)) for shard in x.addressable_shards) == [(0, 1)] * 4 + [(2, 3)] * 4
    for sequence in (3, 0, 16):
        with pytest.raises(ValueError, match=f'mesh.sequence = {sequence} does not divide the 8 devices'):
            make_mesh(sequence=sequence)
    with pytest.raises(ValueError, match='mesh.data = 3 times mesh.fsdp = 1 times mesh.sequence = 2 does not cover'):
        make_mesh(3, 1, 2)


def test_images_and_odd_clips_are_left_alone():
    seen = []
    model = as_model(NETWORKS['VideoDiT'])._replace(apply=lambda params, x: seen.append(x) or x)
    mesh = make_mesh(sequence=4)
    assert over_time(model, make_mesh()) is model
    for shape, split in (((2, 8, 4, 4, 1), True), ((2, 1, 4, 4, 1), False), ((2, 6, 4, 4, 1), False)):
        text = jax.jit(over_time(model, mesh).apply).lower({}, np.zeros(shape, np.float32)).as_text()
        assert ('sharding_constraint' in text.lower()) == split


@pytest.mark.parametrize('name', NETWORKS)
def test_clips_split_over_eight_devices_are_learned_as_on_one(name):
    """Output and every gradient; and no device does all of the work."""
    model, mesh, rng = as_model(NETWORKS[name]), make_mesh(sequence=8), np.random.default_rng(0)
    x, t, labels = rng.standard_normal((1, 16, 8, 8, 1)).astype(np.float32), np.full(1, 0.4, np.float32), np.array([1])
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t, labels)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32) * 0.2, shapes)

    def compiled(model, everywhere):
        def loss(params, x, t, labels):
            y = model.apply(params, x, t, labels)
            return jnp.mean(jnp.sin(3 * y)), y

        run = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=everywhere, out_shardings=everywhere)
        return run.lower(params, x, t, labels).compile()

    split = compiled(over_time(model, mesh), NamedSharding(mesh, P()))
    alone = compiled(model, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    ((_, y), gradients), ((_, expected), wanted) = (run(params, x, t, labels) for run in (split, alone))
    np.testing.assert_allclose(y, expected, atol=2e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), gradients, wanted)
    flops = [run.cost_analysis()['flops'] for run in (split, alone)]
    assert flops[0] < 0.4 * flops[1]
