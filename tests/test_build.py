"""From a config to objects: whatever fits is built, and whatever does not is told in one line."""

import copy
import itertools
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import nets
from diffjax.build import (
    ConfigError,
    SamplerSettings,
    build,
    build_loss,
    build_plan,
    component,
    parse_component,
)
from diffjax.core import grids, likelihood, parameterizations, schedules, solvers, times, weights
from diffjax.core.solvers.plan_records import PlanRecord, describe
from diffjax.core.transforms import NO_TRANSFORMS
from diffjax.core.types import Model
from diffjax.plan_files import read_plan, write_plan
from diffjax.tasks import Denoising
from diffjax.training import optimizers


@pytest.fixture
def config(get_config):
    return get_config('digits', 'smoke').to_dict()


def changed(config, key, value):
    """The config with config[a][b] = value for key 'a.b'; a value of None removes the key."""
    config = copy.deepcopy(config)
    *sections, last = key.split('.')
    node = config
    for name in sections:
        node = node[name]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return config


# Specs of components.

names = st.from_regex(r'[A-Za-z][A-Za-z0-9_]{0,12}', fullmatch=True)
numbers = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
words = st.from_regex(r'[a-z][a-z_/]{0,9}', fullmatch=True).filter(lambda word: word not in ('none', 'true', 'false'))
values = numbers | words | st.booleans() | st.none()


@given(names, st.dictionaries(names, values, max_size=4))
def test_the_two_ways_to_write_a_component_agree(name, options):
    text = f'{name}:{",".join(f"{key}={value}" for key, value in options.items())}'
    as_dict = dict(options) | {'name': name}
    if 'name' not in options:
        assert parse_component(as_dict, 'x') == (name, options)
    parsed = parse_component(text, 'x')
    assert parsed == (name, options)
    assert [type(value) for value in parsed[1].values()] == [type(value) for value in options.values()]


@given(names)
def test_a_bare_name_has_no_options(name):
    assert parse_component(name, 'x') == parse_component(f'{name}:', 'x') == (name, {})
    assert parse_component({'name': name}, 'x') == (name, {})


@settings(max_examples=300)
@given(st.text() | st.text('{}[]()=:,"\'0123456789abc\x00\n-+*', max_size=30) | values | st.lists(values))
def test_any_spec_is_parsed_or_refused(spec):
    """And what is refused as a name is refused in one line that lists the right ones."""
    try:
        name, options = parse_component(spec, 'schedule')
    except ConfigError as error:
        assert str(error).startswith('schedule')
        return
    assert isinstance(name, str) and all(isinstance(key, str) for key in options)
    try:
        component(schedules, spec, 'schedule')
    except ConfigError as error:
        assert str(error).startswith('schedule')


@pytest.mark.parametrize('text', ["\"__import__('os').system('false')\"", '(lambda: 1/0)()', '[].append(1)', '1/0'])
def test_nothing_in_a_spec_is_executed(text, monkeypatch):
    def system(command):
        raise AssertionError(f'ran {command}')

    monkeypatch.setattr(os, 'system', system)
    _, options = parse_component(f'ddim:eta={text}', 'sampler.solver')
    assert isinstance(options['eta'], str)


def test_a_deeply_nested_value_is_a_string():
    text = '(' * 5000
    assert parse_component(f'ddim:eta={text}', 'x') == ('ddim', {'eta': text})


NEEDED = {
    'DiT': {'patch_size': 2, 'hidden_size': 32, 'depth': 1, 'num_heads': 2},
    'UNet': {'base_channels': 8},
    'Shifted': {'base': 'cosine', 'shift': 3.0},
    'times': {'values': [1.0, 0.8, 0.6, 0.3, 0.0]},
}


@pytest.mark.parametrize(
    'module', [schedules, parameterizations, times, weights, grids, solvers, optimizers, nets, likelihood]
)
def test_every_name_is_found_however_it_is_written(module):
    given = {'num_classes': 3, 'out_channels': 1} if module is nets else {'num_steps': 9}
    for name in module.__all__:
        for written in (name, name.lower(), name.upper(), name.replace('_', '')):
            spec = {'name': written, **NEEDED.get(name, {})}
            assert callable(component(module, spec, 'x', 'schedule', 'grid', 'level', **given))
            if name not in NEEDED:
                assert callable(component(module, f' {written} :', 'x', 'schedule', 'grid', 'level', **given))


def test_positional_and_given_parameters_are_not_options():
    for key in ('schedule', 'grid'):
        with pytest.raises(ConfigError, match=f'unknown key {key!r}'):
            component(solvers, {'name': 'ddim', key: 1}, 'sampler.solver', 'schedule', 'grid')
    with pytest.raises(ConfigError, match="unknown key 'num_steps'"):
        component(optimizers, {'name': 'adamw', 'num_steps': 3}, 'optimizer', num_steps=9)
    with pytest.raises(ConfigError, match="unknown key 'parent'"):
        component(nets, {'name': 'MLP', 'parent': 3}, 'network', num_classes=1, out_channels=1)


# Components that take components or lists.

TENFOLD = schedules.Shifted(base=schedules.VP(beta_max=10), logsnr_shift=-1.4)


@pytest.mark.parametrize(
    ('spec', 'expected'),
    [
        ('shifted:base=cosine,logsnr_shift=-1.4', schedules.Shifted(base=schedules.Cosine(), logsnr_shift=-1.4)),
        ('shifted:base=vp:beta_max=10,logsnr_shift=-1.4', TENFOLD),
        ("shifted:base={'name': 'vp', 'beta_max': 10},logsnr_shift=-1.4", TENFOLD),
        ({'name': 'shifted', 'base': {'name': 'vp', 'beta_max': 10}, 'logsnr_shift': -1.4}, TENFOLD),
        (
            {'name': 'Shifted', 'base': 'shifted:base=scaled_linear:zero_terminal=True,shift=2', 'resolution': 256},
            schedules.Shifted(
                base=schedules.Shifted(base=schedules.ScaledLinear(zero_terminal=True), shift=2), resolution=256
            ),
        ),
    ],
)
def test_a_schedule_may_be_made_of_another(spec, expected):
    before = copy.deepcopy(spec)
    assert component(schedules, spec, 'schedule')() == expected
    assert spec == before


@pytest.mark.parametrize(
    'grid',
    [
        '[1.0, 0.7, 0.3, 0.0]',
        [1.0, 0.7, 0.3, 0.0],
        (1.0, 0.7, 0.3, 0.0),
        '1, 0.7, 0.3, 0',
        'times:values=[1,0.7,0.3,0]',
    ],
)
def test_a_grid_may_be_a_list(config, grid):
    config['sampler'] |= {'solver': 'ddim', 'grid': grid, 'num_steps': 3}
    np.testing.assert_array_equal(build(config).plan().t, [1.0, 0.7, 0.3])


def test_an_eps_network_on_a_zero_terminal_table_is_refused(config):
    """At build, by name of the targets that can; one step lower it is accepted."""
    config['target'], config['weight'], config['times'] = 'eps', 'eps', 'discrete'
    config = changed(config, 'schedule', 'scaled_linear:zero_terminal=True')
    with pytest.raises(
        ValueError, match='target Eps cannot be used at t = 1, .* Targets that can: X0, V, Velocity, EDM;'
    ):
        build(changed(config, 'sampler.grid', 'trailing'))
    for schedule, grid in (('scaled_linear', 'trailing'), ('scaled_linear:zero_terminal=True', 'leading')):
        assert build(changed(changed(config, 'schedule', schedule), 'sampler.grid', grid)).plan().num_evaluations > 0


# Every combination.


def test_every_combination_of_a_loss_is_built_or_refused_with_a_reason():
    built, refused = [], []
    rest = parameterizations.__all__, times.__all__, weights.__all__, [False]
    every_schedule = itertools.product(schedules.__all__, rest[0], ['Uniform', 'Discrete'], *rest[2:])
    plain = itertools.chain(every_schedule, itertools.product(['Flow', 'Cosine', 'EDM'], *rest))
    learned = itertools.product(['Linear', 'Flow'], ['Eps', 'V'], times.__all__, ['eps', 'target'], [True])
    for names in itertools.chain(plain, learned):
        config = dict(zip(('schedule', 'target', 'times', 'weight', 'learned_variance'), names))
        config['schedule'] = {'name': names[0], **NEEDED.get(names[0], {})}
        try:
            loss = build_loss(config)
        except ValueError as error:
            assert '\n' not in str(error) and len(str(error)) > 40
            refused.append((names, str(error)))
            continue
        assert type(loss.schedule).__name__ == names[0] and type(loss.parameterization).__name__ == names[1]
        assert type(loss.times).__name__ == names[2] and (loss.bound_scale is not None) == names[4]
        built.append(names)
    assert {n[4] and n[2] != 'Discrete' for n in built} == {False}  # a learned variance needs the chain's times
    assert len(built) > len(refused) / 4
    published = [
        ('Linear', 'Eps', 'Discrete', 'eps', True),
        ('Linear', 'Eps', 'Discrete', 'eps', False),
        ('Cosine', 'V', 'Uniform', 'target', False),
        ('Flow', 'Velocity', 'Uniform', 'target', False),
        ('Flow', 'Velocity', 'LogitNormal', 'target', False),
        ('EDM', 'EDM', 'LogNormalSigma', 'edm', False),
        ('Cosine', 'Eps', 'Discrete', 'min_snr', False),
        ('Cosine', 'V', 'Uniform', 'sigmoid', False),
    ]
    missing = [(names, reason) for names, reason in refused if names in published]
    assert missing == []


def test_every_combination_of_a_plan_is_built_or_refused_with_a_reason():
    """Finite tables, as many network calls as the solver takes, or one line: every solver on three grids, every grid
    with two solvers, on every schedule and target.
    """
    built = 0
    pairs = {*itertools.product(solvers.__all__, ['uniform', 'karras', 'logsnr'])}
    pairs |= {*itertools.product(['ddim', 'dpmpp_2m'], grids.__all__)}
    for schedule, target in itertools.product(schedules.__all__, parameterizations.__all__):
        try:
            objective = build_loss(
                {
                    'schedule': {'name': schedule, **NEEDED.get(schedule, {})},
                    'target': target,
                    'times': 'uniform:low=1e-3,high=0.999',
                    'weight': 'target',
                    'learned_variance': False,
                }
            )
        except ValueError:
            continue
        task = Denoising(model=Model(None, None), objective=objective)
        for solver, grid in sorted(pairs):
            grid = {'name': grid, **NEEDED.get(grid, {})}
            try:
                plan = build_plan(SamplerSettings(solver=solver, grid=grid, num_steps=4), task)
            except ValueError as error:
                assert '\n' not in str(error) and len(str(error)) > 40
                continue
            built += 1
            assert plan.num_evaluations >= 4
            assert all(np.isfinite(table).all() for table in plan)
    assert built > 150


# Plans in files.


@pytest.fixture
def saved(tmp_path):
    """(path, plan) of DDIM's on three uneven steps of the flow schedule, written by its formula here."""
    plan = solvers.ddim(schedules.Flow(), [1.0, 0.7, 0.2, 0.0])
    path = tmp_path / 'plan.json'
    write_plan(path, PlanRecord(plan, describe(schedules.Flow()), 'ddim', 'by hand', {'error': 0.1 + 0.2}))
    return str(path), plan


def test_a_solver_may_be_a_file(config, saved):
    """It is the plan that was written, bit for bit, whatever grid and num_steps say."""
    path, plan = saved
    for steps, grid in ((3, 'uniform'), (50, 'no such grid')):
        sampler = {'sampler.solver': path, 'sampler.num_steps': steps, 'sampler.grid': grid}
        for key, value in sampler.items():
            config = changed(config, key, value)
        experiment = build(config)
        for mine, theirs in zip(experiment.plan(), plan):
            assert mine.tobytes() == theirs.tobytes()
    assert read_plan(path).notes == {'error': 0.30000000000000004}
    assert experiment.sampler.what == {'solver': path}
    assert replace(experiment.sampler, solver='ddim').what == {
        'solver': 'ddim',
        'grid': 'no such grid',
        'num_steps': 50,
    }


def test_a_file_that_is_no_plan_for_this_network_is_refused_in_one_line(config, saved, tmp_path, compiles):
    path, plan = saved
    texts = {
        'missing.json': None,
        'empty.json': '',
        'binary.json': b'\xff\xfe\x00',
        'python.json': "__import__('os').system('false')",
        'deep.json': '[' * 100_000,
        'digits.json': '{"format": ' + '9' * 5000 + '}',
        'other.json': '{"format": "onnx"}',
        'nan.json': Path(path).read_text().replace('0.7', 'NaN', 1),
    }
    for name, text in texts.items():
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with compiles() as programs, pytest.raises(ValueError) as caught:
            build(changed(config, 'sampler.solver', str(tmp_path / name)))
        assert str(tmp_path / name) in str(caught.value) and '\n' not in str(caught.value), name
        assert not [program for program in programs if 'step' in program or 'draw' in program]
    config['sampler']['solver'] = path
    with pytest.raises(ValueError, match=r'plan.json was made for the schedule Flow\(\), and .* here is Cosine\(\)'):
        build(changed(config, 'schedule', 'cosine'))
    config = changed(config, 'times', 'uniform:low=1e-3,high=0.999')
    with pytest.raises(ValueError, match='target Eps cannot be used at t = 1'):
        build(changed(config, 'target', 'eps'))
    with pytest.raises(ValueError, match='zero_init = 3 leaves no call'):
        build(changed(config, 'sampler.zero_init', 3))
    noisy = plan._replace(log_variance_range=np.ones((3, 1)))
    noisy = noisy._replace(to_x=np.pad(plan.to_x, ((0, 0), (0, 1))), to_anchor=np.pad(plan.to_anchor, ((0, 0), (0, 1))))
    write_plan(path, PlanRecord(noisy, describe(schedules.Flow()), 'ddpm', 'by hand', {}))
    with pytest.raises(ValueError, match='a learned variance, which this network does not have'):
        build(config)


@pytest.mark.parametrize('name', optimizers.__all__)
@pytest.mark.parametrize('decay', optimizers.DECAYS)
def test_every_optimiser(config, name, decay):
    config['optimizer'] = {'name': name, 'decay': decay, 'warmup_steps': 1, 'clip_norm': 1.0}
    assert build(config).optimizer.update is not None


# Mistakes.

MISTAKES = [
    ('sead', 1, ["unknown key 'sead'", 'did you mean seed?', 'dataset', 'optimizer']),
    ('network.hiden_size', 32, ["unknown key 'hiden_size'", 'did you mean hidden_size?', 'patch_size', 'depth']),
    ('training.batchsize', 16, ["unknown key 'batchsize'", 'did you mean batch_size?', 'log_every_steps']),
    ('mesh.model', 1, ["mesh: unknown key 'model'", 'valid: data, fsdp']),
    ('seed', None, ['the config lacks seed']),
    ('training', None, ['lacks training']),
    ('network.depth', None, ["network 'DiT' needs depth"]),
    ('dataset.name', None, ['dataset lacks name']),
    ('training', 3, ['training is a section with keys, got 3']),
    ('schedule', 'cosin', ["schedule: unknown name 'cosin'", 'did you mean Cosine?', 'Flow']),
    ('schedule', 'shifted:shift=3', ["schedule 'shifted' needs base"]),
    ('schedule', 'shifted:base=cosin,shift=3', ["schedule 'shifted' base: unknown name 'cosin'", 'mean Cosine?']),
    ('schedule', 'shifted:base=vp:beta=3,shift=3', ["schedule 'shifted' base 'vp': unknown key 'beta'", 'beta_max']),
    ('schedule', 'shifted:base=3,shift=3', ["schedule 'shifted' base is a name", 'got 3']),
    ('schedule', 'shifted:base=flow', ["schedule 'shifted': give one of logsnr_shift, resolution", 'got none']),
    ('schedule', 'linear:zero_terminal=no', ["schedule 'linear': zero_terminal is True or False, got 'no'"]),
    ('sampler.grid', '[1.0, 0.5, 0.0]', ["sampler.grid 'times': 3 times make 2 steps", 'set it to 2']),
    ('sampler.grid', [0.0, 1.0], ["sampler.grid 'times'", 'two times that fall within [0, 1]', '[0.0, 1.0]']),
    ('sampler.grid', 'times', ["sampler.grid 'times' needs values"]),
    ('sampler.grid', 'karras:end=sigma_min', ["sampler.grid 'karras'", "or 'lowest'", "got 'sigma_min'"]),
    ('target', 'noise', ["target: unknown name 'noise'", 'Eps', 'Velocity']),
    ('network.name', 'resnet', ["network: unknown name 'resnet'", 'DiT, UNet']),
    ('optimizer.name', 'lion', ["optimizer: unknown name 'lion'", 'valid: adam, adamw, sgd']),
    ('sampler.solver', 'unipd', ["sampler.solver: unknown name 'unipd'", 'did you mean unipc?', 'heun']),
    ('sampler.solver', 'ddim:etta=1', ["sampler.solver 'ddim': unknown key 'etta'", 'did you mean eta?']),
    ('sampler.solver', 'ddim:eta', ['options are written name:option=value', "'eta'"]),
    ('sampler.solver', 'ddim:eta=2', ["sampler.solver 'ddim'", 'eta lies in [0, 1], got 2']),
    ('sampler.solver', 'heun:coordinate=lambda', ['coordinate is one of', "'lambda'"]),
    ('sampler.solver', 'ddpm:variance=learned', ['a learned variance, which this network does not have']),
    ('sampler.grid', 'cosine', ["sampler.grid: unknown name 'cosine'", 'karras, leading']),
    ('sampler.num_steps', 0, ['sampler.num_steps must be at least 1, got 0']),
    ('sampler.batch_size', 0, ['sampler.batch_size must be at least 1, got 0']),
    ('sampler.params', 'emma', ["sampler.params is 'raw' or one of ema; got 'emma'"]),
    ('sampler.negative_label', 11, ['sampler.negative_label is a class from 0 to 9', 'got 11']),
    ('sampler.guidance_rescale', 1.5, ['sampler.guidance_rescale lies in [0, 1], got 1.5']),
    ('sampler.zero_init', -1, ['sampler.zero_init must be at least 0, got -1']),
    ('sampler.zero_init', 5, ['zero_init = 5 leaves no call with a velocity', 'makes 5 network calls']),
    ('sampler.threshold', -1.0, ['sampler.threshold must be at least 0, got -1.0']),
    ('sampler.threshold', float('nan'), ['sampler.threshold must be at least 0, got nan']),
    ('sampler.dynamic_threshold', 99.5, ['sampler.dynamic_threshold lies in [0, 1], got 99.5']),
    ('sampler.dynamic_threshold_max', 2.0, ['needs a sampler.dynamic_threshold such as 0.995', 'got 2 with 0']),
    ('evaluation.classifier', 'resnet', ["evaluation.classifier is 'none' or 'svc', got 'resnet'"]),
    ('evaluation.num_samples', -1, ['evaluation.num_samples must be at least 0, got -1']),
    ('evaluation.noise_levels', 0, ['evaluation.noise_levels must be at least 1, got 0']),
    ('evaluation.num_likelihoods', -1, ['evaluation.num_likelihoods must be at least 0, got -1']),
    ('evaluation.likelihood_trace', 'exakt', ["evaluation.likelihood_trace: unknown name 'exakt'", 'Exact']),
    ('evaluation.likelihood_trace', 'gaussian:num_probes=0', ['num_probes must be at least 1, got 0']),
    ('evaluation.likelihood_tolerance', 0.0, ['evaluation.likelihood_tolerance lies in (0, 1), got 0.0']),
    ('evaluation.likelihood_t_min', 1.0, ['evaluation.likelihood_t_min lies in [0, 1), got 1.0']),
    ('optimizer.decay', 'cos', ["optimizer 'adamw'", 'constant, cosine, linear, rsqrt']),
    ('optimizer.warmup_steps', 4, ['warmup_steps = 4 must be below num_steps = 4']),
    ('training.batch_size', 20, ['batch_size = 20 does not divide over 8 devices', '16 or 24 would']),
    ('training.num_microbatches', 4, ['batch_size = 16 does not divide over 8 devices x 4 microbatches', '32 would']),
    ('training.num_steps', 0, ['training.num_steps must be at least 1, got 0']),
    ('training.ema.ema', 1.0, ['training.ema.ema is a decay between 0 and 1, got 1.0']),
    ('mesh.fsdp', 3, ['mesh.data = -1 times mesh.fsdp = 3 does not cover the 8 devices here']),
    ('network.num_heads', 5, ['hidden_size=32 must be a multiple of 5']),
    ('network.patch_size', 3, ['height and width must be multiples of patch_size=3, got 8x8']),
    ('network.compute_dtype', 'fp8', ["compute_dtype='fp8'", 'bfloat16']),
    ('network', {'name': 'MLP'}, ['MLP takes x of shape [B, D], got (1, 8, 8, 1)']),
    ('network', 'DiT', ["network 'DiT' needs patch_size, hidden_size, depth, num_heads"]),
    ('network', 7, ['network is a name', 'got 7']),
    ('network', {'name': 7}, ['network is a name', '7']),
    ('label_drop', 1.0, ['label_drop is a probability below 1, got 1.0']),
    ('learned_variance', True, ['a learned variance needs discrete times, got Uniform']),
    ('target', 'eps', ['t =']),  # an eps network cannot be asked at alpha = 0
    ('dataset.name', 'digitz', ["There is no dataset called 'digitz'", 'Did you mean digits']),
    ('dataset.split', 'training', ["'digits' has no split 'training'", 'test', 'train']),
    ('dataset.test_split', 'validation', ["'digits' has no split 'validation'", 'test', 'train']),
    ('dataset.name', 'cifar10', ["'cifar10' is not prepared", 'python -m diffjax.data prepare cifar10']),
    ('dataset.name', 'imagenet256_latents', ['is not prepared', '--manual_dir=DIR']),
]


@pytest.mark.parametrize('key, value, fragments', MISTAKES, ids=[f'{key}={value}' for key, value, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(config, compiles, key, value, fragments):
    """With what is right; and no program of any size has been compiled by then."""
    with compiles() as programs, pytest.raises(ValueError) as caught:
        build(changed(config, key, value))
    message = str(caught.value)
    assert '\n' not in message
    for fragment in fragments:
        assert fragment in message
    assert not [name for name in programs if 'step' in name or 'make' in name or 'draw' in name]


def test_guidance_needs_labels(config):
    experiment = build(config)
    no_labels = Denoising(model=experiment.task.model, objective=experiment.task.objective)
    unconditional = replace(experiment, task=no_labels)
    assert unconditional.guidance() is None
    with pytest.raises(ConfigError, match='sampler.guidance = 2 needs labels'):
        unconditional.guidance(replace(experiment.sampler, guidance=2.0))
    assert experiment.guidance() is None
    plain = experiment.guidance(replace(experiment.sampler, guidance=2.0, guidance_low=0.25))
    assert plain == (2.0, 0.25, 1.0, None, None)
    refined = replace(experiment.sampler, guidance=2.0, guidance_rescale=0.5, cfg_zero_star=True)
    assert experiment.guidance(refined) == (2.0, 0.0, 1.0, 0.5, True)
    assert experiment.guidance(replace(refined, guidance=1.0)) is None  # at scale 1 both change nothing


def test_transforms_are_built_where_they_are_chosen(config):
    experiment = build(config)
    assert experiment.transforms() == NO_TRANSFORMS == (None, None, None, None)
    for changes, expected in (
        ({'threshold': 1.0}, (1.0, None, None, None)),
        ({'dynamic_threshold': 0.5}, (None, 0.5, np.inf, None)),
        ({'dynamic_threshold': 0.5, 'dynamic_threshold_max': 4.0, 'zero_init': 2}, (None, 0.5, 4.0, 2)),
    ):
        assert experiment.transforms(replace(experiment.sampler, **changes)) == expected
    for wrong, fragment in (
        ({'threshold': 1.0, 'dynamic_threshold': 0.9}, 'two ways to bound x0: set one to 0'),
        ({'dynamic_threshold': 0.9, 'dynamic_threshold_max': 0.5}, 'is at least 1 .* got 0.5 with 0.9'),
    ):
        with pytest.raises(ConfigError, match=fragment):
            replace(experiment.sampler, **wrong)


def test_building_twice_gives_equal_shapes_and_changes_no_config(config):
    before = copy.deepcopy(config)
    first, second = build(config), build(config)
    assert config == before
    shapes = [jax.tree.map(lambda s: s.shape, e.trainer().init(e.batch_spec)[1].params) for e in (first, second)]
    assert shapes[0] == shapes[1]
    assert first.sample_shape == (8, 8, 1) and len(first.source) == 1437 and len(first.test) == 360


def test_likelihood_needs_held_out_images_and_a_network_that_can_be_asked(config):
    config['evaluation'] |= {'num_likelihoods': 4, 'likelihood_trace': 'gaussian:num_probes=3'}
    assert build(config).likelihood_trace() == likelihood.Gaussian(num_probes=3)
    assert build(changed(config, 'evaluation.num_likelihoods', 0)).likelihood_trace() is None
    with pytest.raises(ConfigError, match='num_likelihoods = 4 needs held-out images, and there are none'):
        build(changed(config, 'dataset.test_split', ''))
    config |= {'schedule': 'vp', 'target': 'score', 'sampler': {**config['sampler'], 'grid': 'karras:end=lowest'}}
    config['times'] = 'uniform:low=1e-3'
    with pytest.raises(ConfigError, match='num_likelihoods, from likelihood_t_min to t = 1: .* Score cannot .* t = 0'):
        build(config)
    assert build(changed(config, 'evaluation.likelihood_t_min', 1e-3)).likelihood_trace() is not None
