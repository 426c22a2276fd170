"""The benchmarks: what they compute from times that are known, and that they run."""

import csv
import sys

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures('fast_compilation')
D, TOKENS, PIXELS, DEPTH = 32, 16, 4, 2  # of configs/digits.py:smoke: width, patches, pixels of a patch, blocks
MULTIPLY_ADDS = (  # of a forward pass: blocks with their attention and modulations, both ends, the embedding of time
    DEPTH * (12 * D * D * TOKENS + 2 * TOKENS * TOKENS * D + 6 * D * D)
    + TOKENS * (PIXELS * D + PIXELS * D)
    + (256 * D + D * D)
    + 2 * D * D
)
UNASKED = TOKENS * PIXELS * D + 256 * D  # gradients of what the network is given: nobody wants them
SD3 = 2028.3 + (1001 * (4 * 4096 + 2048) + 192**2 * 1536) / 1e6  # medium, its positions, and a text for each label
PEAK = 2e12, 'a product', 1e10


@pytest.fixture(scope='module')
def rows(experiment, fast_compilation, tmp_path_factory):
    """(the rows of a run whose peak and whose times of sampling are given, its CSV)."""
    benchmark, sampling, folder = (
        experiment('benchmark'),
        experiment('benchmark_sampling'),
        tmp_path_factory.mktemp('b'),
    )

    def in_turns(contestants, rounds, seconds):
        drawn, alone = contestants['sampler'](), contestants['alone']()
        assert drawn.shape == (24, 8, 8, 1) and alone.shape == (48, 8, 8, 1)  # with and without its label
        return {'sampler': [2.0, 4.0], 'alone': [1.5, 3.6]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, 'measure_peak', lambda dtype: experiment('stopwatch').Peak(*PEAK))
        patch.setattr(sampling, 'in_turns', in_turns)
        words = [
            '--models=smoke',
            '--remat=full',
            '--batch_size=24',
            '--rounds=1',
            '--steps=2',
            '--num_steps=3',
            f'--out={folder}/speed.csv',
        ]
        return benchmark.main(words), folder / 'speed.csv'


def test_a_step_is_measured(rows):
    (train, _), _ = rows
    assert (train['model'], train['what'], train['batch'], train['by']) == ('smoke', 'train', 24, 'diffjax')
    assert train['FLOPs'] == 24 * 2 * (3 * MULTIPLY_ADDS - UNASKED) and train['remat'] == 'full'  # counted once
    seconds = train['step, ms'] / 1e3
    assert train['examples/s'] == pytest.approx(24 / seconds)
    assert train['TFLOP/s'] == pytest.approx(train['FLOPs'] / seconds / jax.device_count() / 1e12)
    assert train['MFU'] == pytest.approx(train['TFLOP/s'] / 2)
    assert 0 < train['host, ms'] <= train['waited, ms'] and train['compile, s'] > 0
    state = 4 * 4 * 1e6 * train['parameters, M']  # parameters, two moments and an average
    assert state / 1e9 < train['memory, GB'] < 1 and train['memory by'] == 'compiler'
    assert train['bytes'] > 2 * state


def test_sampling_is_measured(rows):
    (_, sample), _ = rows
    assert sample['what'] == 'sample 3 x 2' and sample['batch'] == 24
    assert sample['FLOPs'] == 3 * 2 * 24 * 2 * MULTIPLY_ADDS
    assert sample['outside'] == pytest.approx(np.median([1 - 1.5 / 2, 1 - 3.6 / 4]))
    assert sample['examples/s'] == pytest.approx(24 / 3) and sample['step, ms'] == 3000


def test_rows_are_kept(rows, experiment):
    found, path = rows
    with open(path, newline='') as file:
        kept = list(csv.DictReader(file))
    assert [row['what'] for row in kept] == ['train', 'sample 3 x 2']
    assert kept[0]['jax'] == jax.__version__ and float(kept[0]['peak, TFLOP/s']) == 2
    assert float(kept[0]['FLOPs']) == found[0]['FLOPs'] and kept[0]['date'].count('-') == 2
    assert path.with_suffix('.png').stat().st_size > 10_000
    with pytest.raises(ValueError, match='has the columns date, commit'):
        experiment('stopwatch').append_rows(path, [{'other': 1}])
    assert len(path.read_text().splitlines()) == 3


def test_what_a_step_waits_for(experiment, monkeypatch):
    """A host that needs 2 ms to start a step, before a device that needs 10."""
    stopwatch, now, ends = experiment('stopwatch'), [0.0], [0.0]

    class Clock:
        perf_counter = staticmethod(lambda: now[0])

    def start():
        now[0] += 0.002
        ends[0] = max(now[0], ends[0]) + 0.010

    monkeypatch.setattr(stopwatch, 'time', Clock)
    monkeypatch.setattr(stopwatch.jax, 'block_until_ready', lambda out: now.__setitem__(0, max(now[0], ends[0])))
    times = stopwatch.time_steps(start, rounds=3, num_steps=4)
    assert times.queued.rounds == pytest.approx([0.0105] * 3)  # four steps, only the first of which is waited for
    assert times.waited.median == pytest.approx(0.012) and times.host.median == pytest.approx(0.002)
    assert stopwatch.Seconds((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(1 / 3)


def test_the_peak_is_the_fastest_product(experiment, monkeypatch):
    stopwatch = experiment('stopwatch')

    def seconds(run, arguments):
        return 1e-3 if len(arguments) == 1 or arguments[0].shape == (8, 3) else 1.0

    for name, value in (('SQUARES', (16, 32)), ('TOKENS', 8), ('WIDTHS', (3, 5)), ('COPIED', 1000)):
        monkeypatch.setattr(stopwatch, name, {'cpu': value})
    monkeypatch.setattr(stopwatch, 'seconds_of_many', seconds)
    peak = stopwatch.measure_peak('float32')
    assert peak.of == '8 x 3 x 12' and peak.flops == pytest.approx(2 * 8 * 3 * 12 * 1e3)
    assert peak.bandwidth == pytest.approx(2 * 4 * 1000 * 1e3)


@pytest.mark.parametrize(
    ('name', 'millions', 'options'),  # of parameters, as published
    [
        ('DiT-XL/2', (675, 675.2), {'scan_layers': True}),
        ('UNet', (35.7, 35.9), {}),
        ('MMDiT', (SD3 - 1, SD3 + 1), {'scan_layers': True}),
    ],
)
def test_large_models_can_be_opened(experiment, name, millions, options):
    """Their steps have shapes, and 50 guided evaluations a plan, without data and before anything is allocated."""
    models = experiment('benchmark_models')
    sampler = {'solver': 'unipc', 'grid': 'uniform', 'num_steps': 50, 'guidance': 4.0, 'batch_size': 48}
    opened = models.open_model(models.config_of(name, compute_dtype='bfloat16', **options), 16, sampler)
    _, shapes, _ = opened.trainer().init(models.batch_shapes(opened))
    assert millions[0] < sum(a.size for a in jax.tree.leaves(shapes.params)) / 1e6 < millions[1]
    assert opened.plan().num_evaluations == 50 and opened.guidance().scale == 4
    assert opened.training.batch_size == 16 and opened.sampler.batch_size == 48


def test_a_power_is_fitted(experiment):
    growth = experiment('benchmark_growth')
    assert growth.fit({n: 3 * n**1.5 for n in (2, 4, 16)}) == pytest.approx((3, 1.5))
    rows = [{'line': 'scanned', 'n': n, 'seconds': 2 * n, 'size': 70} for n in (2, 8)] + [{'line': 'batch', 'n': 1}]
    (found,) = growth.slopes(rows)
    assert found['slope of seconds'] == pytest.approx(1) and found['slope of size'] == pytest.approx(0)


def test_what_has_been_measured_outlives_a_point_that_fails(experiment, monkeypatch, tmp_path):
    growth = experiment('benchmark_growth')

    def measure(varied, n, options):
        if n == 16:
            raise MemoryError
        return [{'line': varied, 'n': n, 'seconds': 0.5}]

    monkeypatch.setattr(growth, 'measure', measure)
    with pytest.raises(MemoryError):
        growth.main(['--varied=batch', f'--out={tmp_path / "growth.csv"}'])
    with open(tmp_path / 'growth.csv', newline='') as file:
        (row,) = csv.DictReader(file)
    assert (row['line'], row['n'], row['seconds'], row['size']) == ('batch', '8', '0.5', '')


def test_a_scanned_trunk_is_one_block_whatever_its_depth(experiment):
    """Counted in the program of a training step: what it takes to compile does not grow with the depth."""
    growth = experiment('benchmark_growth')

    def size(depth, scanned):
        network = {'hidden_size': 16, 'num_heads': 2, 'patch_size': 8, 'depth': depth, 'scan_layers': scanned}
        return growth.program_size(growth.lower(growth.small_dit(8, 'float32', **network)))

    assert size(2, True) == size(4, True)
    two, three, four = size(2, False), size(3, False), size(4, False)
    assert four - three == three - two > 300


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='of the compiler for CPUs')
def test_the_step_keeps_its_blocks_apart(experiment):
    """As it is compiled for training; what that is for: tests/training/test_training_program.py."""
    growth = experiment('benchmark_growth')
    network = {'hidden_size': 16, 'num_heads': 2, 'patch_size': 8, 'depth': 2, 'scan_layers': 'auto'}
    assert 'opt-barrier' in growth.lower(growth.small_dit(8, 'float32', **network)).compile().as_text()


@pytest.mark.parametrize('kind', ['jpeg', 'latents'])
def test_the_input_pipeline_is_measured(experiment, monkeypatch, kind):
    data = experiment('benchmark_data')
    monkeypatch.setattr(data, 'need', lambda model, device, share: 1e6 * share)
    words = [f'--kinds={kind}', '--num_examples=8', '--batch_size=4', '--batches=2', '--rounds=1', '--pause=0']
    (row,) = data.main([*words, '--share=0.5'])
    assert row['data'] == {'jpeg': 'jpeg, 256x256x3', 'latents': 'latents, 32x32x4'}[kind]
    assert row['of the need'] == pytest.approx(row['examples/s'] / 0.5e6)
    assert row['host of a step'] == pytest.approx(row['hand over, ms'] / (1e3 * 4 / 0.5e6))
    least = 2 * 2 * 32 * 32 * 4 if kind == 'latents' else 3000  # bytes: mean and std in 16 bits; JPEG is not nothing
    assert least < 1e3 * row['kB each'] < 40_000 and row['device, ms'] > 0 and row['core, ms each'] > 0


def test_the_need_is_the_papers(experiment):
    """DiT-S/2 has 6.06 G multiply-adds (Peebles & Xie 2023, table 4), a step three times as many; H200: 989 TFLOP/s."""
    need = experiment('benchmark_data').need('DiT-S/2', 'H200', 0.45)
    assert need == pytest.approx(0.45 * 989e12 / (6.06e9 * 2 * 3), rel=0.01)


def test_what_is_not_there_is_refused(experiment, monkeypatch, capsys):
    for module, words, message in (
        ('benchmark', ['--models=DiT-Q/2'], 'unknown DiT-Q/2; valid: DiT-S/2'),
        ('benchmark', ['--what=eat'], 'unknown eat; valid: train, sample'),
        ('benchmark', ['--rounds=0'], 'at least 1'),
        ('benchmark', ['--compare=torch'], 'torch is not installed'),
        ('benchmark', ['--models=smoke', '--remat=some'], "remat='some' is not known"),
        ('benchmark_data', ['--kinds=gif'], 'unknown gif; valid: jpeg, png, latents'),
        ('benchmark_data', ['--device=abacus'], 'unknown device'),
        ('benchmark_growth', ['--varied=mood'], 'unknown mood; valid: batch'),
        ('benchmark_growth', ['--varied=tokens', '--tokens=17'], '17 does not cut'),
    ):
        if module == 'benchmark':
            monkeypatch.setattr(experiment(module), 'measure_peak', lambda dtype: experiment('stopwatch').Peak(*PEAK))
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            if 'torch' in words[0]:
                patch.setitem(sys.modules, 'torch', None)  # as where it is not installed
            experiment(module).main(words)
        assert message in capsys.readouterr().err, words
