"""Runs that start from imported weights: what they start from, and what they refuse."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.build import ConfigError, build
from diffjax.data import DatasetNotPrepared, make_iterator
from diffjax.main import find_params
from diffjax.starting import imported_params
from diffjax.training.checkpoints import Checkpoints, abstract
from diffjax.training.loop import train
from diffjax.weights import WeightsError, import_tensors
from diffjax.weights.dit import ARCHITECTURE
from diffjax.weights.engine import expected_shapes
from diffjax.weights.fitting import load_for
from diffjax.weights.store import import_source


@pytest.fixture(scope='module', autouse=True)
def compiled_fast(fast_compilation):
    """What is trained here takes milliseconds."""


@pytest.fixture(scope='module')
def config(get_config):
    """The digits, shrunk, with a network that diffusers has too, and an optimiser that stands still."""
    config = get_config('digits', 'smoke').to_dict()
    config['network'] |= {'frequency_shift': 1}
    config['optimizer'] |= {'learning_rate': 0.0}
    return config


@pytest.fixture(scope='module')
def published(config, tmp_path_factory):
    """(imported folder, the same parameters by the engine alone) of random weights for the config's network."""
    folder, network = tmp_path_factory.mktemp('published'), config['network']
    theirs = {
        '_class_name': 'DiTTransformer2DModel',
        'num_attention_heads': network['num_heads'],
        'attention_head_dim': network['hidden_size'] // network['num_heads'],
        'num_layers': network['depth'],
        'patch_size': network['patch_size'],
        'sample_size': 8,
        'in_channels': 1,
        'num_embeds_ada_norm': 10,
    }
    options = ARCHITECTURE.to_options(theirs)
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in expected_shapes(ARCHITECTURE, options).items():
        first = name.replace('transformer_blocks.1.norm1.emb', 'transformer_blocks.0.norm1.emb')
        tensors[name] = tensors[first] if first in tensors else rng.standard_normal(shape).astype(np.float32)
    (folder / 'source').mkdir()
    save_file(tensors, folder / 'source' / 'diffusion_pytorch_model.safetensors')
    (folder / 'source' / 'config.json').write_text(json.dumps(theirs))
    return import_source(folder / 'source', folder / 'imported'), import_tensors(ARCHITECTURE, options, tensors)


def starting_at(config, folder, **changes):
    config = {**config, 'training': {**config['training'], 'init_from': str(folder)}}
    config['network'] = {**config['network'], **changes}
    return config, build(config)


def stacked(params):
    """Blocks side by side by hand."""
    rest = {key: value for key, value in params.items() if not key.startswith('blocks_')}
    layers = [params[f'blocks_{i}'] for i in range(len(params) - len(rest))]
    return rest | {'blocks': jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_parameters_come_as_the_network_wants_them(config, published, tmp_path, scan_layers):
    config, experiment = starting_at(config, published[0], scan_layers=scan_layers)
    params = imported_params(config, experiment, tmp_path)
    equal(params, stacked(published[1]) if scan_layers else published[1])


def test_training_starts_from_them_and_sampling_uses_them(config, published, tmp_path, capsys):
    config, experiment = starting_at(config, published[0], scan_layers=True)
    one_device = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    experiment = replace(experiment, mesh=one_device)
    params, step = find_params(config, experiment, tmp_path)
    equal(params, stacked(published[1]))
    assert step == 0 and 'holds no checkpoint: these are the weights in' in capsys.readouterr().out

    iterator = make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=0)
    given = imported_params(config, experiment, tmp_path)
    result = train(experiment.trainer(), iterator, tmp_path, params=given, announce=lambda text: None)
    equal(result.state.params, stacked(published[1]))  # the learning rate is 0
    for average in result.state.ema.values():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), average, stacked(published[1]))
    assert imported_params(config, experiment, tmp_path) is None  # from here on the checkpoint counts
    _, shapes, shardings = experiment.trainer().init(experiment.batch_spec)
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    assert checkpoints.restore_newest(abstract(shapes, shardings)).step == result.step > 0
    checkpoints.close()


def test_averages_start_there_too(config, published):
    config, experiment = starting_at(config, published[0], scan_layers=False)
    make, _, _ = experiment.trainer().init(experiment.batch_spec)
    state = make(published[1])
    equal(state.params, published[1])
    for average in state.ema.values():
        equal(average, published[1])
    assert state.step == 0


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_heads': 1}, 'holds a DiT with num_heads=4, and the config has num_heads=1'),
        ({'frequency_shift': 0}, 'holds a DiT with frequency_shift=1, and the config has frequency_shift=0'),
        ({'depth': 1}, 'holds a DiT with depth=.*, and the config has depth=1'),
    ],
)
def test_another_network_is_refused(config, published, tmp_path, changes, message):
    config, experiment = starting_at(config, published[0], **changes)
    with pytest.raises(ConfigError, match=f'training.init_from: .*{message}'):
        imported_params(config, experiment, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_another_kind_of_network_is_refused(config, published, tmp_path):
    config, experiment = starting_at(config, published[0])
    config['network'] = {'name': 'UNet'}
    with pytest.raises(ConfigError, match='training.init_from: .* holds a DiT, and the config asks for UNet'):
        imported_params(config, experiment, tmp_path)


def test_other_shapes_are_told_all_at_once(config, published):
    shapes = jax.eval_shape(lambda: stacked(published[1]))
    options = {key: value for key, value in config['network'].items() if key != 'name'}
    wrong = dict(shapes, final={'kernel': shapes['final']['kernel'], 'bias': jax.ShapeDtypeStruct((5,), np.float32)})
    wrong['more'] = wrong.pop('patch_embed')
    with pytest.raises(WeightsError) as caught:
        load_for(published[0], 'dit', options, wrong)
    told = str(caught.value)
    assert '2 missing: more/bias, more/kernel' in told and '2 unexpected: patch_embed/bias, patch_embed/kernel' in told
    assert '1 of another shape: final/bias is [4] and should be [5]' in told


def test_what_is_no_imported_folder_is_refused(config, tmp_path):
    config, experiment = starting_at(config, tmp_path)
    with pytest.raises(ConfigError, match='training.init_from: .*no network.json in it; python -m diffjax.weights'):
        imported_params(config, experiment, tmp_path / 'run')


def test_sampling_needs_no_latents_on_disk(get_config, tmp_path):
    """Published weights of ImageNet latents are sampled by people who have none."""
    config = get_config('dit_b').to_dict()
    config['dataset']['data_dir'] = str(tmp_path)
    config['network'] |= {'hidden_size': 32, 'depth': 1, 'num_heads': 2}
    with pytest.raises(DatasetNotPrepared, match='imagenet256_latents'):
        build(config)
    experiment = build(config, for_sampling=True)
    assert experiment.sample_shape == (32, 32, 4) and experiment.task.num_classes == 1000
    assert experiment.batch_spec['std'].shape == (1, 32, 32, 4) and list(tmp_path.iterdir()) == []
    config['dataset']['name'] = 'imagenet2012'  # whose images have no one size
    with pytest.raises(DatasetNotPrepared, match=f'imagenet2012.*--data_dir={tmp_path}'):
        build(config, for_sampling=True)


def test_without_init_from_nothing_is_read(config, tmp_path):
    assert imported_params(config, build(config), tmp_path) is None
