"""The command: a config and a workdir in, a run out.

  python -m diffjax.main --config=configs/digits.py --workdir=runs/digits            trains, samples, measures, reports
  python -m diffjax.main --mode=sample --workdir=runs/digits --num_samples=64 --config.sampler.solver=ddim
  python -m diffjax.main --mode=evaluate --workdir=runs/digits --config.sampler.num_steps=100

A value of the config is changed by --config.KEY=VALUE, its argument follows a colon: --config=configs/digits.py:smoke.
With --mode=sample and --mode=evaluate the config may be left out: the workdir knows its own. Running a command again
goes on from the newest checkpoint; on a finished workdir it says so.
"""

import json
import logging
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

FLAGS = flags.FLAGS
flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, logs, samples, report.')
flags.DEFINE_enum('mode', 'train', ['train', 'sample', 'evaluate'], 'What to do.')
flags.DEFINE_string('labels', '', 'sample: classes to draw, such as 0,1,2 or 7; repeated up to --num_samples.')
flags.DEFINE_integer('num_samples', None, 'sample, evaluate: how many. Default: 10 of each class; the config.', 1)
flags.DEFINE_integer('seed', 0, 'sample, evaluate: seed of the samples.')
flags.DEFINE_string('out', '', 'sample: PNG and NPZ are written to OUT.png and OUT.npz. Default: in WORKDIR/samples/.')
flags.DEFINE_string('coordinator', '', 'Address host:port of process 0, or auto (TPU pods, Slurm). Empty: one process.')
flags.DEFINE_integer('num_processes', None, 'With --coordinator=host:port: number of processes.')
flags.DEFINE_integer('process_id', None, 'With --coordinator=host:port: number of this process.')


class Stop(Exception):
    """Ends the command with one line for the user."""


def parse(argv: list[str]) -> list[str]:
    """Flags, with every mistake in them told in one line."""
    try:
        if 'config' not in FLAGS:
            stored = _stored_config(argv)
            if stored is None:
                config_flags.DEFINE_config_file('config', None, 'The experiment: FILE.py or FILE.py:ARGUMENT.')
            else:
                config_flags.DEFINE_config_dict('config', stored, 'The experiment, read from the workdir.')
        rest = app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        fail(f'--config: {" ".join(text.split())}')
    if len(rest) > 1:
        fail(f'stray words on the command line: {" ".join(rest[1:])}; flags are written --name=value')
    return rest


def _stored_config(argv: list[str]) -> ConfigDict | None:
    """The workdir's config, for a command that names none."""
    values = {'--config': None, '--workdir': None}
    for i, word in enumerate(argv):
        name, equals, value = word.partition('=')
        if name in values:
            values[name] = value if equals else (argv[i + 1] if i + 1 < len(argv) else '')
    if values['--config'] is not None or not values['--workdir']:
        return None
    path = Path(values['--workdir']) / 'config.json'
    return ConfigDict(json.loads(path.read_text())) if path.exists() else None


def fail(message: str) -> None:
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> None:
    del argv
    logging.basicConfig(format='%(levelname)s: %(message)s', level=logging.WARNING)
    absl_logging.set_verbosity(absl_logging.WARNING)
    if not FLAGS.workdir:
        fail('--workdir is needed: the folder of the run')
    if FLAGS.config is None:
        fail(
            '--config is needed, such as --config=configs/digits.py'
            if FLAGS.mode == 'train'
            else f'{FLAGS.workdir} holds no run: there is no config.json in it'
        )
    from diffjax.training.loop import NonFiniteError

    try:
        {'train': train_run, 'sample': sample_run, 'evaluate': evaluate_run}[FLAGS.mode](Path(FLAGS.workdir))
    except (ValueError, FileNotFoundError, NonFiniteError, Stop) as error:
        if not _is_ours(error):
            raise
        fail(' '.join(str(error).split()))


def _is_ours(error: Exception) -> bool:
    """Whether the error was raised by diffjax itself (and is a message for the user), not by a library under it."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals.get('__name__', '').split('.')[0] in ('diffjax', '__main__')


def say(text: str) -> None:
    """Prints on process 0."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def start():
    """The experiment, after the processes have found each other and the workdir has been checked."""
    import jax

    if FLAGS.coordinator == 'auto':
        jax.distributed.initialize()
    elif FLAGS.coordinator:
        if jax.config.jax_platforms == 'cpu' or not jax.config.jax_cpu_collectives_implementation:
            jax.config.update('jax_cpu_collectives_implementation', 'gloo')
        jax.distributed.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    from diffjax.build import build
    from diffjax.workdir import check_same_run

    config = FLAGS.config.to_dict()
    check_same_run(FLAGS.workdir, config)
    experiment = build(config)
    device = jax.devices()[0]
    axes = ' x '.join(f'{name} {size}' for name, size in experiment.mesh.shape.items())
    say(f'device: {jax.device_count()} x {device.device_kind} ({device.platform})   mesh: {axes}')
    return config, experiment


def train_run(workdir: Path) -> None:
    """Trains to the end or to SIGTERM, then samples, measures and reports."""
    import jax

    from diffjax.data import make_iterator
    from diffjax.results import finished, measure, summary_lines
    from diffjax.run import sampling_params
    from diffjax.training.loop import train
    from diffjax.workdir import write_config

    config, experiment = start()
    training = experiment.training
    if finished(workdir, training.num_steps):
        say(
            f'{workdir} is finished ({training.num_steps} steps), nothing was trained again: '
            f'see {workdir / "report.md"}'
        )
        return
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_config(workdir, config)
    iterator = make_iterator(
        experiment.source,
        batch_size=training.batch_size,
        seed=experiment.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    result = train(experiment.trainer(), iterator, workdir, announce=say)
    if result.stopped:
        say(f'stopped by SIGTERM at step {result.step}, which is saved; the same command goes on from there')
        return
    say(f'trained {result.step} steps')
    if experiment.evaluation.num_samples:
        say(f'drawing and measuring {experiment.evaluation.num_samples} samples')
        params = sampling_params(experiment, result.state)
        figures = measure(experiment, params, workdir, result.step, seed=0, progress=sys.stderr.isatty())
        say('\n'.join(summary_lines(figures)) + f'\nreport: {workdir / "report.md"}')


def sample_run(workdir: Path) -> None:
    """Draws samples from a trained workdir as PNG and NPZ."""
    import numpy as np

    from diffjax.results import save_samples
    from diffjax.run import balanced_labels, check_labels, make_sampler, restore, sampling_params, to_output

    _, experiment = start()
    num_classes = experiment.task.num_classes
    try:
        wanted = [int(label) for label in FLAGS.labels.split(',')] if FLAGS.labels else None
    except ValueError:
        raise Stop(f'--labels are whole numbers with commas between them, got {FLAGS.labels!r}') from None
    if wanted is None:
        labels = balanced_labels(FLAGS.num_samples or 10 * min(max(num_classes, 1), 10), num_classes)
    else:
        labels = np.resize(check_labels(wanted, num_classes), FLAGS.num_samples or len(wanted))
    state, step = restore(experiment, workdir)
    sampler, settings = make_sampler(experiment), experiment.sampler
    x = sampler(
        sampling_params(experiment, state),
        experiment.plan(),
        labels,
        guidance=experiment.guidance(),
        negative_label=settings.negative_label,
        seed=FLAGS.seed,
        progress=sys.stderr.isatty(),
    )
    name = f'{str(settings.solver).replace(":", "-").replace("/", "_")}-{settings.num_steps}steps'
    stem = Path(FLAGS.out) if FLAGS.out else workdir / 'samples' / f'{name}-w{settings.guidance:g}-seed{FLAGS.seed}'
    archive, picture = save_samples(stem.with_name(stem.name.replace('.', '_')), to_output(experiment, x), labels)
    say(f'{len(labels)} samples at step {step}: {picture} and {archive}')


def evaluate_run(workdir: Path) -> None:
    """Draws and measures samples of a trained workdir again, with the sampler that the command line asks for."""
    from diffjax.results import measure, summary_lines
    from diffjax.run import restore, sampling_params

    _, experiment = start()
    if FLAGS.num_samples:
        from dataclasses import replace

        experiment = replace(experiment, evaluation=replace(experiment.evaluation, num_samples=FLAGS.num_samples))
    state, step = restore(experiment, workdir)
    params = sampling_params(experiment, state)
    figures = measure(experiment, params, workdir, step, seed=FLAGS.seed, progress=sys.stderr.isatty())
    say('\n'.join(summary_lines(figures)) + f'\nreport: {workdir / "report.md"}')


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
