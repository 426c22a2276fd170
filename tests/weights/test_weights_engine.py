"""The engine: what a table says is what is done, and every kind of mismatch is told, all at once."""

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_dit import CLASSES, CONFIG, DEPTH, HIDDEN, PATCH, draw, original

from diffjax.nets import DiT
from diffjax.weights import ARCHITECTURES, WeightsError, export_tensors, import_tensors
from diffjax.weights.architecture import INPUT, Architecture
from diffjax.weights.dit import ARCHITECTURE, ORIGINAL, original_config
from diffjax.weights.engine import check_names, expected_shapes, flat, summary
from diffjax.weights.rules import (
    LINEAR,
    SAME,
    Leaf,
    array,
    conv,
    dense,
    embed,
    fixed,
    norm,
    patches,
    reordered,
    shared,
)

OPTIONS = ARCHITECTURE.to_options(CONFIG)


@pytest.fixture(scope='module')
def params():
    return import_tensors(ARCHITECTURE, OPTIONS, draw())


def test_parameters_are_the_tensors_rearranged(params, tensors):
    block = 'transformer_blocks.1'
    expected = {
        'blocks_1/attention/qkv/kernel': np.hstack([tensors[f'{block}.attn1.to_{part}.weight'].T for part in 'qkv']),
        'blocks_1/attention/qkv/bias': np.hstack([tensors[f'{block}.attn1.to_{part}.bias'] for part in 'qkv']),
        'blocks_1/attention/out/kernel': tensors[f'{block}.attn1.to_out.0.weight'].T,
        'blocks_1/modulation/kernel': tensors[f'{block}.norm1.linear.weight'].T,
        'blocks_0/mlp_in/kernel': tensors['transformer_blocks.0.ff.net.0.proj.weight'].T,
        'condition/label/table/embedding': tensors[f'{block}.norm1.emb.class_embedder.embedding_table.weight'],
        'final/bias': tensors['proj_out_2.bias'],
    }
    leaves = flat(params)
    for path, a in expected.items():
        np.testing.assert_array_equal(leaves[path], a, err_msg=path)
    kernel, weight = leaves['patch_embed/kernel'], tensors['pos_embed.proj.weight']
    for (row, place), value in np.ndenumerate(weight.reshape(HIDDEN, -1)):
        channel, i, j = np.unravel_index(place, weight.shape[1:])
        assert kernel[(i * PATCH + j) * weight.shape[1] + channel, row] == value


def test_the_network_takes_the_parameters(params):
    network = DiT(**{key: value for key, value in OPTIONS.items() if key != INPUT})
    x, t, labels = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ARCHITECTURE.inputs(OPTIONS))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, t, labels)['params']
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_kept_dtypes_come_back_bit_for_bit(dtype):
    there = draw(dtype)
    back = export_tensors(ARCHITECTURE, OPTIONS, import_tensors(ARCHITECTURE, OPTIONS, there, dtype=None))
    assert back.keys() == there.keys()
    assert all(back[name].dtype == a.dtype and back[name].tobytes() == a.tobytes() for name, a in there.items())
    ours = import_tensors(ARCHITECTURE, OPTIONS, there)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(ours))


def test_the_two_layouts_of_dit_are_the_same_parameters(params, tensors):
    """But for how the positions come and how the frequencies of time are spaced, which is no parameter."""
    published = original(tensors) | {'pos_embed': np.asarray(params['pos_embed'])[None]}
    with pytest.raises(WeightsError, match='hidden_size is 16; covered: 384, 768, 1024, 1152'):
        ORIGINAL.to_options(original_config({name: a.shape for name, a in published.items()}))
    options = {key: value for key, value in OPTIONS.items() if key != 'frequency_shift'}
    ours = import_tensors(ORIGINAL, options, published)
    assert jax.tree.structure(ours) == jax.tree.structure(params)
    for path, a in flat(ours).items():
        np.testing.assert_array_equal(a, flat(params)[path], err_msg=path)
    back = export_tensors(ORIGINAL, options, ours)
    assert back.keys() == published.keys()
    assert all(back[name].tobytes() == a.tobytes() for name, a in published.items())


def test_the_published_files_of_dit_say_their_sizes():
    """DiT-XL/2 at 256 pixels: the shapes of x_embedder, y_embedder, final_layer and pos_embed in the released file."""
    shapes = {
        'x_embedder.proj.weight': (1152, 4, 2, 2),
        'y_embedder.embedding_table.weight': (1001, 1152),
        'final_layer.linear.weight': (32, 1152),
        'pos_embed': (1, 256, 1152),
    } | {f'blocks.{i}.attn.qkv.bias': (3456,) for i in range(28)}
    assert ORIGINAL.to_options(original_config(shapes)) == {
        'patch_size': 2,
        'hidden_size': 1152,
        'depth': 28,
        'num_heads': 16,
        'num_classes': 1000,
        'out_channels': 8,
        'scan_layers': False,
        INPUT: {'shape': [32, 32, 4]},
    }
    assert original_config({'model.diffusion_model.x': (3,)}) is None


def test_all_mismatches_are_one_error(tensors):
    for i in range(DEPTH):
        del tensors[f'transformer_blocks.{i}.norm1.linear.bias']
    del tensors['proj_out_1.bias']
    tensors['stranger'] = np.zeros(3, np.float32)
    tensors['proj_out_2.bias'] = np.zeros(7, np.float32)
    with pytest.raises(WeightsError) as caught:
        import_tensors(ARCHITECTURE, OPTIONS, tensors)
    assert '3 missing: transformer_blocks.*.norm1.linear.bias (2), proj_out_1.bias' in str(caught.value)
    assert '1 unexpected: stranger' in str(caught.value)
    assert '1 of another shape: proj_out_2.bias is [7] and should be [16]' in str(caught.value)
    assert '\n' not in str(caught.value)


def test_nothing_is_read_before_the_shapes_are_right(tensors):
    class Unread(dict):
        def __getitem__(self, name):
            raise AssertionError(f'{name} was read')

    class Shaped:
        def __init__(self, shape):
            self.shape, self.ndim = shape, len(shape)

    there = Unread({name: Shaped(a.shape) for name, a in tensors.items()})
    there.pop('proj_out_1.bias')
    with pytest.raises(WeightsError, match='1 missing: proj_out_1.bias'):
        import_tensors(ARCHITECTURE, OPTIONS, there)


def test_copies_must_agree(tensors):
    name = 'transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias'
    tensors[name] = np.nextafter(tensors[name], 2)
    with pytest.raises(WeightsError, match=f'and {name} should hold the same values'):
        import_tensors(ARCHITECTURE, OPTIONS, tensors)


def test_whole_numbers_are_no_weights(tensors):
    tensors['proj_out_1.bias'] = tensors['proj_out_1.bias'].astype(np.int32)
    with pytest.raises(WeightsError, match='proj_out_1.bias comes as int32'):
        import_tensors(ARCHITECTURE, OPTIONS, tensors)


def test_parts_of_several_dtypes(tensors, params):
    block = 'transformer_blocks.0.attn1'
    mixed = tensors | {
        f'{block}.to_k.bias': tensors[f'{block}.to_k.bias'].astype(np.float16),
        f'{block}.to_v.bias': tensors[f'{block}.to_v.bias'].astype(ml_dtypes.bfloat16),
    }
    bias = import_tensors(ARCHITECTURE, OPTIONS, mixed)['blocks_0']['attention']['qkv']['bias']
    np.testing.assert_array_equal(bias, np.hstack([mixed[f'{block}.to_{part}.bias'].astype(float) for part in 'qkv']))
    mixed[f'{block}.to_k.bias'] = mixed[f'{block}.to_k.bias'].astype(int)
    with pytest.raises(WeightsError, match=f'{block}.to_k.bias comes as int64'):
        import_tensors(ARCHITECTURE, OPTIONS, mixed)


def test_export_checks_what_theirs_cannot_hold(params):
    with pytest.raises(WeightsError, match='pos_embed follows from the configuration'):
        export_tensors(ARCHITECTURE, OPTIONS, params | {'pos_embed': params['pos_embed'] + 0.01})
    with pytest.raises(WeightsError, match='1 missing: pos_embed; 1 unexpected: more'):
        rest = {key: value for key, value in params.items() if key != 'pos_embed'}
        export_tensors(ARCHITECTURE, OPTIONS, rest | {'more': np.zeros(3, np.float32)})


def test_constants_are_compared_when_they_come_and_always_written(tensors, params):
    table = np.linspace(0, 1, 7, dtype=np.float32)
    architecture = ARCHITECTURE._replace(constants=lambda options: {'table': table})
    without = import_tensors(architecture, OPTIONS, tensors)
    halves = import_tensors(architecture, OPTIONS, tensors | {'table': table.astype(np.float16)})
    assert jax.tree.structure(without) == jax.tree.structure(halves) == jax.tree.structure(params)
    for wrong in (table + 0.01, np.full(7, np.nan, np.float32)):
        with pytest.raises(WeightsError, match='table follows from the configuration'):
            import_tensors(architecture, OPTIONS, tensors | {'table': wrong})
    with pytest.raises(WeightsError, match=r'table is \[6\] and should be \[7\]'):
        import_tensors(architecture, OPTIONS, tensors | {'table': table[1:]})
    assert export_tensors(architecture, OPTIONS, params)['table'] is table
    assert expected_shapes(architecture, OPTIONS)['table'] == (7,)


def test_a_table_that_is_not_the_networks_is_told():
    def table(options):
        return [leaf for leaf in ARCHITECTURE.table(options) if leaf.ours != 'final/bias']

    with pytest.raises(WeightsError, match='the table of .* and the parameters of DiT differ in final/bias'):
        expected_shapes(ARCHITECTURE._replace(table=table), OPTIONS)
    twice = ARCHITECTURE._replace(table=lambda o: [*ARCHITECTURE.table(o), *array('final/bias', 'other')])
    with pytest.raises(WeightsError, match='differ in final/bias'):
        expected_shapes(twice, OPTIONS)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'norm_type': 'ada_norm'}, "norm_type is 'ada_norm'; covered: 'ada_norm_zero'"),
        ({'num_layers': 10**9}, 'num_layers is 1000000000; covered: a whole number from 1 to 512'),
        ({'num_layers': True}, 'num_layers is True; covered: a whole number'),
        ({'num_layers': None}, 'num_layers is None'),
        ({'attention_head_dim': 2.5}, 'attention_head_dim is 2.5'),
        ({'attention_bias': 1}, 'attention_bias is 1; covered: True'),
        ({'norm_eps': 1e-3}, 'norm_eps is 0.001; covered: 1e-05 or 1e-06'),
        ({'sample_size': 5}, 'sample_size is 5; covered: a multiple of patch_size=2'),
        ({'sample_size': 4096, 'attention_head_dim': 100}, 'sample_size is 4096; covered: at most 268435456 tokens'),
        ({'rope': True}, "settings that are not covered: 'rope'"),
    ],
)
def test_settings_that_are_not_covered_are_refused(changes, message):
    with pytest.raises(WeightsError, match=message):
        ARCHITECTURE.to_options(CONFIG | changes)


def test_options_that_the_network_refuses_are_told():
    options = ARCHITECTURE.to_options(CONFIG | {'attention_head_dim': 1, 'num_attention_heads': 3})
    with pytest.raises(WeightsError, match='DiTTransformer2DModel as DiT: hidden_size=3 must be a multiple of'):
        expected_shapes(ARCHITECTURE, options)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_architectures_are_what_they_say(name):
    architecture = ARCHITECTURES[name]
    assert isinstance(architecture, Architecture) and architecture.class_name == name


def test_configs_come_back():
    assert ARCHITECTURE.to_options(ARCHITECTURE.to_config(OPTIONS)) == OPTIONS
    config = ARCHITECTURE.to_config(OPTIONS)
    assert {key: value for key, value in CONFIG.items() if key in config} == config | {'norm_eps': 1e-5}


# Rows -----------------------------------------------------------------------------------------------------------------


def test_layouts_undo_themselves():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((6, 5, 3, 3))  # O I H W
    row = conv('a', 'b')[0].layout
    assert row.to_ours(kernel)[1, 2, 3, 4] == kernel[4, 3, 1, 2]
    for layout, theirs in (
        (row, kernel),
        (LINEAR, kernel[:, :, 0, 0]),
        (patches(3), kernel),
        (reordered(LINEAR, 3, [2, 0, 1]), kernel[:, :, 0, 0]),
    ):
        np.testing.assert_array_equal(layout.to_theirs(layout.to_ours(theirs)), theirs)
    turned = reordered(LINEAR, 3, [2, 0, 1]).to_ours(kernel[:, :, 0, 0])
    np.testing.assert_array_equal(turned, kernel[[4, 5, 0, 1, 2, 3], :, 0, 0].T)


def test_rows_name_what_they_read():
    assert [leaf.theirs for leaf in dense('a', 'b', 'c')] == [('b.weight', 'c.weight'), ('b.bias', 'c.bias')]
    assert [leaf.ours for leaf in norm('a', 'b')] == ['a/scale', 'a/bias']
    assert norm('a', 'b', bias=False) == [Leaf('a/scale', ('b.weight',), SAME)]
    assert embed('a', 'b') == [Leaf('a/embedding', ('b.weight',), SAME)]
    assert fixed('a', lambda: np.zeros(2))[0].theirs == ()
    rows = shared(dense('a', 'x.0.b'), ('x.0', 'x.1'), ('x.0', 'y'))
    assert rows[0].copies == (('x.1.b.weight',), ('y.b.weight',))
    with pytest.raises(ValueError, match="b.weight does not begin with 'x.'"):
        shared(dense('a', 'b'), ('x.', 'y.'))


def test_summaries_stay_short():
    names = [f'blocks.{i}.attn.weight' for i in range(57)] + ['head.2.bias'] + [f'x{i}.w{i}' for i in range(40)]
    text = summary(names)
    assert text.startswith('blocks.*.attn.weight (57), head.2.bias, x0.w0')
    assert text.endswith(' and 30 more') and len(text) < 300
    check_names('nothing', {}, {})


def test_labels_have_a_row_for_none(params):
    assert params['condition']['label']['table']['embedding'].shape == (CLASSES + 1, HIDDEN)


@pytest.mark.parametrize('change', [{'patch_size': 2}, {'frames': 3}])
@pytest.mark.parametrize('name', ['AutoencoderKL', 'VQModel'])
def test_autoencoders_that_diffusers_has_not_are_not_exported(name, change):
    architecture = ARCHITECTURES[name]
    config = {'block_out_channels': [32, 32], 'down_block_types': ['DownEncoderBlock2D'] * 2}
    config |= {'up_block_types': ['UpDecoderBlock2D'] * 2, '_class_name': name}
    options = architecture.to_options(config)
    assert architecture.to_config(options)['_class_name'] == name
    with pytest.raises(WeightsError, match=f'{next(iter(change))} is {next(iter(change.values()))}, and theirs have 1'):
        architecture.to_config(options | change)
