"""Rules: which axes of a mesh the parameters, and all that belongs to them, are split over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from diffjax.training import optimizers
from diffjax.training.sharding import parameter_specs, read_rules, state_shardings
from diffjax.training.state import TrainState

PARAMS = {
    'blocks': {'attention': {'qkv': {'kernel': (4, 64, 192)}, 'out': {'kernel': (4, 64, 64), 'bias': (4, 64)}}},
    'blocks_0': {'mlp_in': {'kernel': (64, 256), 'bias': (2048,)}, 'mlp_out': {'kernel': (256, 64)}},
    'last_block': {'image': {'heads': {'qkv': {'kernel': (64, 192)}}, 'modulation': {'kernel': (64, 128)}}},
    'condition': {'time': {'out': {'kernel': (64, 64)}}, 'label': {'table': {'embedding': (11, 64)}}},
}
SHAPES = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), PARAMS, is_leaf=lambda s: isinstance(s, tuple))


@pytest.fixture
def all_axes():
    """2 x 2 x 2 devices."""
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), ('data', 'fsdp', 'tensor'))


def specs_of(mesh, rules=()):
    return {'/'.join(path): tuple(spec) for path, spec in parameter_specs(mesh, SHAPES, read_rules(rules)).items()}


def test_transformers_are_split_as_megatron_does(all_axes):
    """First products by columns, last ones by rows, on what is left over fsdp; what is packed, by rows over both."""
    assert specs_of(all_axes) == {
        'blocks/attention/qkv/kernel': (None, ('tensor', 'fsdp'), None),
        'blocks/attention/out/kernel': (None, 'tensor', 'fsdp'),
        'blocks/attention/out/bias': (),
        'blocks_0/mlp_in/kernel': ('fsdp', 'tensor'),
        'blocks_0/mlp_in/bias': ('fsdp',),
        'blocks_0/mlp_out/kernel': ('tensor', 'fsdp'),
        'last_block/image/heads/qkv/kernel': (('tensor', 'fsdp'), None),
        'last_block/image/modulation/kernel': ('fsdp', 'tensor'),
        'condition/time/out/kernel': (None, 'fsdp'),
        'condition/label/table/embedding': (),
    }


def test_the_first_rule_that_matches_says_all(all_axes, make_mesh):
    """Of stacked layers and single ones alike; axes that a mesh has not are left out."""
    rules = [
        ['.*/mlp_in/kernel', ['data', ['tensor', 'fsdp']]],
        ('.*/(qkv|mlp_in)/kernel', (None, 'tensor')),
        ('blocks/.*bias', ('fsdp',)),
        ('.*(embedding|mlp_out/kernel)', ()),
    ]
    found = specs_of(all_axes, rules)
    assert found['blocks_0/mlp_in/kernel'] == ('data', ('tensor', 'fsdp'))
    assert found['blocks/attention/qkv/kernel'] == (None, None, 'tensor')
    assert found['last_block/image/heads/qkv/kernel'] == (None, 'tensor')
    assert found['blocks/attention/out/bias'] == (None, 'fsdp')
    assert found['condition/label/table/embedding'] == found['blocks_0/mlp_out/kernel'] == ()
    assert found['blocks/attention/out/kernel'] == (None, 'tensor', 'fsdp')  # no rule matches it
    found = specs_of(make_mesh(4, 2), rules)
    assert found['blocks_0/mlp_in/kernel'] == ('data', 'fsdp')
    assert found['blocks/attention/qkv/kernel'] == ()
    assert found['blocks/attention/out/kernel'] == (None, None, 'fsdp')


@pytest.mark.parametrize(
    'rules, message',
    [
        ('.*', "mesh.rules are pairs such as .*; got '.*'"),
        (3, 'mesh.rules are pairs such as .*; got 3'),
        ([('.*',)], "one is \\('.*',\\)"),
        ([('.*', 'tensor')], "one is \\('.*', 'tensor'\\)"),
        ([(None, ('tensor',))], 'one is '),
        ([('.*', (None, 3))], 'one is '),
        ([('.*', ({'tensor': 1},))], 'one is '),
        ([('a(b', (None,))], "'a\\(b' is no regular expression: "),
        ([('.*', (None, 'model'))], "unknown axis 'model'; the axes are data, fsdp, sequence, tensor"),
        ([('.*', ('fsdp', ('tensor', 'fsdp')))], "'fsdp' can split one dimension alone"),
        ([('.*/query/kernel', (None, 'tensor'))], "'.*/query/kernel' matches no parameter; there are blocks/attention"),
        ([('qkv/kernel', (None, 'tensor'))], "'qkv/kernel' matches no parameter"),
        ([('.*/mlp_in/bias', (None, 'tensor'))], 'splits 2 dimensions, and blocks_0/mlp_in/bias has 1, '),
        (
            [('.*/embedding', ('tensor',))],
            'tensor 2 does not divide the 11 of condition/label/table/embedding, .11, 64',
        ),
        ([('.*/embedding', (None, ('data', 'tensor', 'fsdp'))), ('.*bias', (('data', 'fsdp'),))], None),
    ],
)
def test_mistakes_in_rules(all_axes, rules, message):
    if message is None:
        assert specs_of(all_axes, rules)
        return
    with pytest.raises(ValueError, match=message):
        specs_of(all_axes, rules)


def test_an_axis_that_splits_nothing_or_no_width():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1, 8), ('data', 'fsdp', 'tensor'))
    wide = {'conv': {'kernel': jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)}}
    with pytest.raises(ValueError, match='mesh.tensor = 8 splits no parameter of this network'):
        parameter_specs(mesh, wide)
    rule = (('conv/.*', (None, None, None, 'tensor')),)
    assert parameter_specs(mesh, wide, rule) == {('conv', 'kernel'): P(None, None, None, 'tensor')}
    odd = {'blocks': {'mlp_in': {'kernel': jax.ShapeDtypeStruct((2, 64, 100), jnp.float32)}}}
    with pytest.raises(ValueError, match='mesh.tensor: tensor 8 does not divide the 100 of blocks/mlp_in/kernel'):
        parameter_specs(mesh, odd)


def test_state_of_a_parameter_is_split_as_it_is(all_axes):
    """By its whole path: two parameters of one shape and name are split by different rules, and so are their moments.

    Muon keeps a momentum for matrices and AdamW's two moments for the rest, each in a tree of its own.
    """
    rules = read_rules(
        [('a/kernel', ('tensor', None)), ('b/kernel', (None, ('tensor', 'fsdp'))), ('b/bias', ('data',))]
    )
    shape = {'kernel': jax.ShapeDtypeStruct((64, 64), jnp.float32), 'bias': jax.ShapeDtypeStruct((64,), jnp.float32)}
    params = {'a': shape, 'b': shape}
    wanted = {
        'a/kernel': P('tensor', None),
        'b/kernel': P(None, ('tensor', 'fsdp')),
        'a/bias': P(),
        'b/bias': P('data'),
    }
    for optimizer in (optimizers.adamw(num_steps=10), optimizers.muon(num_steps=10)):
        opt_state = jax.eval_shape(optimizer.init, params)
        state = TrainState(shape['bias'], params, {'codes': shape['kernel']}, opt_state, {'e': params}, shape['bias'])
        found = state_shardings(all_axes, state, rules)
        assert found.task_state['codes'].spec == P(None, 'fsdp') and found.step.spec == P()  # no parameters
        count = 0
        for path, sharding in jax.tree_util.tree_leaves_with_path((found.params, found.opt_state, found.ema)):
            name = '/'.join(str(getattr(entry, 'key', '')) for entry in path[-2:])
            if name in wanted:
                assert sharding.spec == wanted[name], path
                count += 1
        assert count >= 4 * 3 + 2
