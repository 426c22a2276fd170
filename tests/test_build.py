"""From a config to objects: whatever fits is built, and whatever does not is told in one line."""

import copy
import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import nets
from diffjax.build import ConfigError, SamplerSettings, build, build_loss, build_plan
from diffjax.components import component, parse_component
from diffjax.core import grids, likelihood, parameterizations, schedules, solvers, times, weights
from diffjax.core.solvers.plan_records import PlanRecord, describe
from diffjax.core.types import Model
from diffjax.plan_files import read_plan, write_plan
from diffjax.tasks import Denoising
from diffjax.training import optimizers

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
    'EDM2': {'base_channels': 8},
    'Flux': {'hidden_size': 32, 'depth': 1, 'single_depth': 1, 'num_heads': 2},
    'MMDiT': {'hidden_size': 32, 'depth': 1, 'num_heads': 2},
    'PixArt': {'patch_size': 2, 'hidden_size': 32, 'depth': 1, 'num_heads': 2},
    'UNet': {'base_channels': 8},
    'UViT': {'patch_size': 2, 'hidden_size': 32, 'depth': 3, 'num_heads': 2},
    'Shifted': {'base': 'cosine', 'shift': 3.0},
    'SpaceTimeUNet': {'base_channels': 32, 'temporal_downsampling': (0,)},
    'VideoDiT': {'patch_size': 2, 'hidden_size': 8, 'depth': 1, 'num_heads': 2},
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


def test_an_eps_network_on_a_zero_terminal_table_is_refused(config, changed):
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


def test_a_solver_may_be_a_file(config, changed, saved):
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


def test_a_file_that_is_no_plan_for_this_network_is_refused_in_one_line(config, changed, saved, tmp_path, compiles):
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


def test_a_network_that_takes_no_labels_leaves_them_unused(config, changed):
    experiment = build(changed(config, 'network.num_classes', 0))
    assert experiment.task.num_classes == 0 and experiment.source.num_classes == 10
    assert build(changed(config, 'network.num_classes', 10)).task.num_classes == 10


def test_a_network_without_a_null_label_is_neither_guided_nor_dropped(get_config, changed):
    config = changed(get_config('digits_unet', 'smoke').to_dict(), 'network.null_label', False)
    with pytest.raises(ConfigError, match='label_drop = 0.1 needs a null label'):
        build(changed(config, 'label_drop', 0.1))
    config = changed(config, 'label_drop', 0.0)
    assert not build(changed(config, 'sampler.guidance', 1.0)).task.null_label
    with pytest.raises(ConfigError, match='guidance = 2 needs a null label'):
        build(changed(config, 'sampler.guidance', 2.0))
    assert build(changed(changed(config, 'sampler.guidance', 2.0), 'sampler.negative_label', 3)).guidance() is not None


@pytest.mark.parametrize('text, switch', [('True', True), ('False', False), ('auto', 'auto')])
def test_a_switch_that_is_a_word_by_default_takes_the_command_lines_texts(text, switch):
    fields = {'patch_size': 2, 'hidden_size': 8, 'depth': 1, 'num_heads': 2, 'num_classes': 3, 'out_channels': 1}
    network = component(nets, {'name': 'DiT', **fields, 'scan_layers': text}, 'network')()
    assert network.scan_layers is switch or network.scan_layers == switch == 'auto'
