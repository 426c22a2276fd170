"""Where arrays live, and that it makes no difference to what is learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from diffjax.core import parameterizations, schedules, times, weights
from diffjax.core.losses import Loss
from diffjax.nets import DiT, Flux, MMDiT, PixArt, UViT, as_model
from diffjax.tasks import Denoising
from diffjax.training import optimizers
from diffjax.training.estimates import count_cost
from diffjax.training.loop import Settings, Trainer
from diffjax.training.sharding import (
    SCANNED,
    batch_sharding,
    check_batch,
    is_stacked,
    make_mesh,
    parameter_spec,
    placement,
    replicated,
    state_shardings,
)


@pytest.mark.parametrize(
    'shape, size, scanned, spec',
    [
        ((64, 32), 2, False, P('fsdp', None)),  # the larger axis
        ((32, 64), 2, False, P(None, 'fsdp')),
        ((64, 64), 2, False, P(None, 'fsdp')),  # the last of equals
        ((63, 32), 2, False, P(None, 'fsdp')),  # the larger is not divisible
        ((63, 33), 2, False, P()),
        ((3, 3, 16, 64), 8, False, P(None, None, None, 'fsdp')),
        ((1024,), 2, False, P('fsdp')),
        ((1022,), 2, False, P()),  # small
        ((64, 64), 1, False, P()),
        ((), 2, False, P()),
        ((0, 64), 2, False, P()),
        ((64, 32, 48), 2, True, P(None, None, 'fsdp')),  # the first axis is of layers
        ((64, 33, 32), 2, True, P(None, None, 'fsdp')),
        ((2048, 33), 2, True, P()),
        ((64, 33, 31), 2, True, P()),
    ],
)
def test_parameter_spec(shape, size, scanned, spec):
    assert parameter_spec(shape, size, scanned=scanned) == spec


FIELDS = {'num_heads': 2, 'num_classes': 3, 'out_channels': 1}
TEXT = {'text_size': 8, 'pooled_size': 8}
STACKING = {
    'DiT': DiT(patch_size=2, hidden_size=32, depth=5, **FIELDS),
    'PixArt': PixArt(patch_size=2, hidden_size=32, depth=5, text_size=8, **FIELDS),
    'UViT': UViT(patch_size=2, hidden_size=32, depth=11, **FIELDS),
    'MMDiT': MMDiT(hidden_size=32, depth=10, num_dual_blocks=5, **TEXT, **FIELDS),
    'Flux': Flux(hidden_size=16, depth=5, single_depth=5, rope_sizes=(2, 2, 4), **TEXT, **FIELDS),
}


@pytest.mark.parametrize('name', STACKING)
def test_stacked_layers_are_known_by_their_names(name):
    """Against the unrolled network: what has no parameters under the same name there is stacked."""

    def names(scan_layers):
        init = functools.partial(as_model(STACKING[name].clone(scan_layers=scan_layers)).init, jax.random.key(0))
        return jax.eval_shape(init, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, int))

    stacked, unrolled = names(True), names(False)
    assert {key for key in stacked if is_stacked(key)} == set(stacked) - set(unrolled) != set()
    assert not any(map(is_stacked, unrolled))


def test_the_axis_of_stacked_layers_is_never_split(make_mesh):
    """With more layers than anything else is long, the first axis would be the largest."""
    depth = 128
    network = DiT(patch_size=2, hidden_size=32, depth=depth, num_heads=2, num_classes=3, out_channels=1)
    init = functools.partial(as_model(network).init, jax.random.key(0))
    params = jax.eval_shape(init, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, int))
    assert SCANNED in params and params[SCANNED]['mlp_in']['kernel'].shape == (depth, 32, 128)
    optimizer = optimizers.adamw(num_steps=10)
    state = {'params': params, 'opt_state': jax.eval_shape(optimizer.init, params)}
    shardings = state_shardings(make_mesh(4, 2), state)
    split = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
        spec = tuple(sharding.spec)
        if leaf.shape[:1] == (depth,) and leaf.ndim > 1 and spec:
            assert spec[0] is None and 'fsdp' in spec
            split += 1
    assert split == 3 * 10  # parameters and both moments, five kernels and five biases


@pytest.mark.parametrize(
    'data, fsdp, shape', [(-1, 1, (8, 1)), (-1, 2, (4, 2)), (4, -1, (4, 2)), (1, 8, (1, 8)), (8, 1, (8, 1))]
)
def test_make_mesh(data, fsdp, shape):
    mesh = make_mesh(data, fsdp)
    assert dict(mesh.shape) == dict(zip(('data', 'fsdp'), shape))
    assert {d.id for d in mesh.devices.flat} == set(range(8))


@pytest.mark.parametrize('data, fsdp', [(-1, 3), (3, -1), (4, 4), (-1, -1), (0, 8), (2, 2), (-2, 4), (-1, 0), (-8, -1)])
def test_make_mesh_refuses(data, fsdp):
    with pytest.raises(ValueError, match=f'mesh.data = {data} times mesh.fsdp = {fsdp} does not cover the 8 devices'):
        make_mesh(data, fsdp)


def test_check_batch(make_mesh):
    mesh = make_mesh(4, 2)
    for batch_size, parts in ((8, 1), (64, 4), (32, 4)):
        check_batch(batch_size, parts, mesh)
    with pytest.raises(ValueError, match='8 devices x 1 microbatches; 96 or 104 would'):
        check_batch(100, 1, mesh)
    with pytest.raises(ValueError, match='8 devices x 4 microbatches; 32 would'):
        check_batch(8, 4, mesh)


def test_batches_are_split_over_every_device(make_mesh):
    x = jax.device_put(np.arange(16), batch_sharding(make_mesh(4, 2)))
    pieces = sorted(tuple(np.asarray(shard.data)) for shard in x.addressable_shards)
    assert pieces == [(2 * i, 2 * i + 1) for i in range(8)]
    assert jax.device_put(np.arange(16), replicated(make_mesh(4, 2))).is_fully_replicated


# Small diffusion transformers, their trunks scanned, on meshes of all kinds ------------------------------------------

STEPS = 10
LAYOUTS = {
    'one': (1, 1, 1),
    'data': (8, 1, 1),
    'both': (4, 2, 1),
    'fsdp': (2, 4, 1),
    'tensor': (2, 1, 4),
    'all': (2, 2, 2),
}
TRANSFORMERS = {
    'DiT': DiT(patch_size=2, hidden_size=32, depth=2, num_heads=4, num_classes=3, out_channels=1, scan_layers=True),
    'MMDiT': MMDiT(
        hidden_size=32,
        depth=3,
        num_heads=4,
        num_classes=3,
        out_channels=1,
        pos_embed_max_size=4,
        pos_embed_base_size=4,
        scan_layers=True,
        **TEXT,
    ),
}


def mesh_of(layout):
    sizes = dict(zip(('data', 'fsdp', 'tensor'), LAYOUTS[layout]))
    sizes = {name: size for name, size in sizes.items() if size > 1 or name != 'tensor'}
    devices = np.array(jax.devices()[: np.prod(list(sizes.values()))])
    return jax.sharding.Mesh(devices.reshape(list(sizes.values())), tuple(sizes))


def trainer_of(network, mesh, *, place, num_microbatches=1, batch_size=16):
    objective = Loss(
        schedule=schedules.Flow(),
        parameterization=parameterizations.Velocity(),
        times=times.Uniform(),
        weight=weights.target,
    )
    return Trainer(
        task=Denoising(model=as_model(network, place), objective=objective, num_classes=3, label_drop=0.2),
        optimizer=optimizers.adamw(num_steps=1000, learning_rate=3e-3, weight_decay=0.1, clip_norm=1.0),
        settings=Settings(num_steps=STEPS, batch_size=batch_size, num_microbatches=num_microbatches, ema={'e': 0.9}),
        prepare=lambda raw, key: raw,
        mesh=mesh,
    )


@functools.cache
def curve(layout, name='DiT'):
    """(losses, state at the start, state at the end) as host arrays, and the live final state."""
    mesh = mesh_of(layout)
    parts = 1 if layout == 'one' else 2
    trainer = trainer_of(TRANSFORMERS[name], mesh, place=placement(mesh), num_microbatches=parts)
    rng = np.random.default_rng(0)
    batch = {'x0': rng.uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32), 'label': np.arange(16, dtype=np.int32) % 3}
    make, _, shardings = trainer.init(batch)
    state = make()
    start = jax.tree.map(np.asarray, state.params)
    step, losses = trainer.step(shardings), []
    batch = jax.device_put(batch, batch_sharding(trainer.mesh))
    for _ in range(STEPS):
        state, metrics = step(state, (), batch)
        losses.append(float(metrics['loss']))
    return losses, start, jax.tree.map(np.asarray, state.params), state


@pytest.mark.parametrize(
    'layout, name',
    [('data', 'DiT'), ('both', 'DiT'), ('tensor', 'DiT'), ('all', 'DiT'), ('tensor', 'MMDiT'), ('all', 'MMDiT')],
)
def test_every_mesh_learns_the_same(layout, name):
    """Also with two microbatches: each example's noise and label drop are its own."""
    one, other = curve('one', name), curve(layout, name)
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])  # born alike, bit for bit
    np.testing.assert_allclose(other[0], one[0], rtol=2e-4)
    assert one[0][-1] < 0.9 * one[0][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one[2], other[2])


def test_state_is_born_split_and_stays_so():
    """Half of every large array on each half of the mesh: parameters, both moments and averages."""
    state = curve('both')[3]
    for tree in (state.params, state.opt_state, state.ema):
        total = on_device = 0
        for leaf in jax.tree.leaves(tree):
            total += leaf.size
            on_device += leaf.addressable_shards[0].data.size
            if leaf.size >= 2**10 and any(n % 2 == 0 for n in leaf.shape[-2:]):
                assert 'fsdp' in tuple(leaf.sharding.spec), leaf.shape
        assert on_device < 0.55 * total


@pytest.mark.parametrize('layout, parts', [('tensor', 4), ('all', 4)])
def test_each_device_keeps_its_part_of_the_blocks(layout, parts):
    """18 D^2 values in the kernels of each of two blocks: qkv 3, out 1, MLP 8, modulation 6. The moments too."""
    state = curve(layout)[3]
    moments = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu')]
    for tree in (state.params, moments[0].mu, moments[0].nu, state.ema['e']):
        kernels = [leaf for leaf in jax.tree.leaves(tree['blocks']) if leaf.ndim == 3]
        for device in range(8):
            kept = [leaf.addressable_shards[device].data.nbytes for leaf in kernels]
            assert sum(kept) == 2 * 18 * 32**2 * 4 // parts


# What devices tell each other -----------------------------------------------------------------------------------------

TRUNK = DiT(patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=3, out_channels=1, scan_layers=True)


@functools.cache
def cost_on(layout):
    mesh = mesh_of(layout)
    trainer = trainer_of(TRUNK, mesh, place=placement(mesh), batch_size=32)
    example = {'x0': jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.float32), 'label': jax.ShapeDtypeStruct((1,), jnp.int32)}
    shapes, shardings = trainer.init(example)[1:]
    return count_cost(trainer, example), jax.tree.leaves(shapes.params), jax.tree.leaves(shardings.params)


def test_parameters_are_exchanged_and_no_activations():
    """A scanned trunk on data 2 x fsdp 4, against the least there is: each split parameter is gathered twice and its
    gradient scattered, (g - 1) / g of it each time, and the part that is left, like all that is not split, is summed
    over the other devices, 2 (g - 1) / g of it. Nothing is computed twice.
    """
    cost, params, shardings = cost_on('fsdp')
    split = sum(4 * a.size for a, sharding in zip(params, shardings) if any(sharding.spec))
    whole = sum(4 * a.size for a in params) - split
    least = 3 * 3 / 4 * split + 2 * 1 / 2 * split / 4 + 2 * 7 / 8 * whole
    sent = sum(c.count * c.sent for c in cost.collectives)
    assert split > 20 * whole
    assert 0.9 * least < sent < 1.02 * least  # parameters outside the trunk need be gathered but once
    np.testing.assert_allclose(sum(cost.flops.values()), cost.model_flops / 8, rtol=1e-3)


def test_heads_and_hidden_features_meet_in_sums():
    """data 2 x tensor 4: of tokens, each block's two sums there and two back are all that is exchanged."""
    cost, params, _ = cost_on('tensor')
    tokens = 16 * 64 * 64 * 4  # bytes of [B / 2, L, D]
    of_tokens = [c for c in cost.collectives if c.size == tokens]
    assert {c.kind for c in of_tokens} == {'all-reduce'} and {c.group_size for c in of_tokens} == {4}
    assert sum(c.count for c in of_tokens) == 4 * 2
    assert max(c.size for c in cost.collectives) == tokens
    assert sum(cost.flops.values()) < 1.06 * cost.model_flops / 8  # embeddings and the output are computed by all four


def test_where_parameters_are_whole_nothing_is_placed(make_mesh):
    assert placement(make_mesh(8, 1)) is None and placement(make_mesh(1, 1)) is None
    place = placement(jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), ('data', 'fsdp', 'tensor')))

    def spec(shape, *axes):
        return jax.jit(lambda x: place(x, axes))(jnp.zeros(shape)).sharding.spec

    assert spec((4, 3, 8), 'batch', None, 'hidden') == P(('data', 'fsdp'), None, 'tensor')
    assert spec((4, 8), 'batch', 'whole')[0] == ('data', 'fsdp')
    assert spec((6, 9), 'batch', 'heads') == P()  # neither divides


def test_positions_never_change():
    """Neither gradient nor weight decay nor averaging moves them."""
    from diffjax.nets.layers import sincos_positions

    for layout in ('one', 'both'):
        _, start, end, state = curve(layout)
        np.testing.assert_array_equal(start['pos_embed'], sincos_positions(32, 4, 4))
        np.testing.assert_array_equal(end['pos_embed'], start['pos_embed'])
        np.testing.assert_array_equal(state.ema['e']['pos_embed'], start['pos_embed'])
        assert not np.array_equal(end['patch_embed']['kernel'], start['patch_embed']['kernel'])
