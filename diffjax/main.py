"""The command: a config and a workdir in, a run out.

  python -m diffjax.main --config=configs/digits.py --workdir=runs/digits            trains, samples, measures, reports
  python -m diffjax.main --mode=sample --workdir=runs/digits --num_samples=64 --config.sampler.solver=ddim
  python -m diffjax.main --mode=evaluate --workdir=runs/digits --config.sampler.num_steps=100
  python -m diffjax.main --mode=ema --workdir=runs/digits --sigma_rel=0.03,0.12      makes averages of other lengths
  python -m diffjax.main --mode=encode --workdir=runs/autoencoder                    makes a dataset of latents
  python -m diffjax.main --mode=sample --config=configs/dit_b.py:model=XL/2 --workdir=runs/dit
      --config.training.init_from=DIR           draws with published weights that python -m diffjax.weights has imported
  python -m diffjax.main --mode=sample --workdir=runs/clips --config.sampler.known=first_frames
      --config.sampler.num_frames=48            clips from the first frames of held-out ones, longer than was learned

A value of the config is changed by --config.KEY=VALUE, its argument follows a colon: --config=configs/digits.py:smoke.
Without --mode=train the config may be left out: the workdir knows its own. Running a command again goes on from the
newest checkpoint; on a finished workdir it says so.

A config with a section `first_stage` learns in the latents of an autoencoder, which is trained first, in the folder
first_stage of the workdir, or found where the section says; samples are decoded. --mode=encode turns a dataset of
images into one of latents by a trained autoencoder (or an imported one, by --config.training.init_from=DIR); the
section `encoding` says which and where to, and a command that was killed goes on when it is run again.

A run whose config has power averages in training.ema (such as power:sigma_rel=0.05 and power:sigma_rel=0.10) and a
training.ema_snapshot_every_steps leaves snapshots, from which --mode=ema makes the average of any relative width at any
--step afterwards; --config.sampler.params=ema/0.12 then samples and evaluates with it.
"""

import logging
import os
import sys
from functools import partial
from pathlib import Path

from absl import app
from absl import logging as absl_logging

from diffjax.command import FLAGS, config_argument, fail, parse
from diffjax.training.heap import few_heaps


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
    few_heaps()  # before JAX starts its threads
    import jax

    from diffjax.data import DatasetNotPrepared
    from diffjax.training.disk import CannotWrite
    from diffjax.training.nonfinite import NonFiniteError
    from diffjax.training.processes import parting

    keep_programs()
    jax.config.update('jax_traceback_filtering', 'tracebackhide')  # keeps JAX's frames, at which `_is_ours` looks
    with parting():
        try:
            modes = {
                'train': train_run,
                'sample': sample_run,
                'evaluate': evaluate_run,
                'ema': ema_run,
                'encode': encode_run,
            }
            modes[FLAGS.mode](Path(FLAGS.workdir))
        except DatasetNotPrepared as error:
            smoke = f'{config_argument() or "configs/digits.py"}:smoke'
            fail(f'{error} To run the same experiment now, shrunk, on embedded data: --config={smoke}')
        except (NonFiniteError, CannotWrite) as error:
            fail(str(error))
        except OSError as error:  # of a file, wherever it was raised: it is read-only, no folder, ...
            if error.filename is None and not _is_ours(error):
                raise
            fail(str(error) if error.filename is None else f'{error.filename}: {error.strerror}')
        except (ValueError, RuntimeError) as error:
            if not _is_ours(error):
                raise
            fail(str(error))


def keep_programs() -> None:
    """Compiled programs outlive the process, so that a run that goes on does not compile again.

    They stand in ~/.cache/diffjax/programs, or where JAX_COMPILATION_CACHE_DIR says ('': nowhere). Whoever can write
    there can make this process run what they like, as with any cache of code: the folder is the user's own.
    """
    import jax

    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or jax.config.jax_compilation_cache_dir is not None:
        return
    folder = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'diffjax' / 'programs'
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logging.warning('compiled programs are not kept: %s', error)
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))


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

    from diffjax.training.processes import connect

    connect(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.heartbeat_timeout_seconds)
    from diffjax.kinds import DENOISING, kind_of
    from diffjax.stages import open_latents, open_ready
    from diffjax.workdir import check_same_run

    config = FLAGS.config.to_dict()
    check_same_run(FLAGS.workdir, config)
    kind, options = kind_of(config), {}
    if kind is DENOISING:
        for_sampling = FLAGS.mode == 'sample'
        if FLAGS.mode == 'train':
            latents = open_latents(config, FLAGS.workdir)
        else:
            latents = open_ready(config, FLAGS.workdir, for_sampling=for_sampling)
        options = {'for_sampling': for_sampling, 'latents': latents}
    experiment = kind.build(config, **options)
    device = jax.devices()[0]
    axes = ' x '.join(f'{name} {size}' for name, size in experiment.mesh.shape.items())
    say(f'device: {jax.device_count()} x {device.device_kind} ({device.platform})   mesh: {axes}')
    return config, experiment


def train_run(workdir: Path) -> None:
    """Trains to the end or to SIGTERM, what comes first first; then samples, measures and reports."""
    import jax

    from diffjax.build import build
    from diffjax.stages import make_ready, open_ready
    from diffjax.workdir import write_config

    config, experiment = start()
    latents = getattr(experiment, 'latents', None)
    if latents is not None and not latents.ready:
        if jax.process_index() == 0:  # whoever goes on finds what was asked for
            workdir.mkdir(parents=True, exist_ok=True)
            write_config(workdir, config)
        if not make_ready(config, workdir, train_experiment, say, progress=sys.stderr.isatty()):
            return
        say('what is learned in its latents')
        experiment = build(config, latents=open_ready(config, workdir, for_sampling=False))
    train_experiment(config, experiment, workdir)


def train_experiment(config, experiment, workdir: Path) -> bool:
    """Whether it came to its end: False after SIGTERM."""
    import jax

    from diffjax.data import Prefetched, make_iterator
    from diffjax.kinds import kind_of
    from diffjax.restoring import sampling_params
    from diffjax.results import finished, summary_lines
    from diffjax.starting import imported_params
    from diffjax.training.loop import train
    from diffjax.training.posthoc_ema import is_reconstructed
    from diffjax.training.sharding import batch_sharding
    from diffjax.workdir import write_config

    training = experiment.training
    if is_reconstructed(experiment.params_name):
        fail(f'sampler.params={experiment.params_name} is made by --mode=ema after training, which needs another')
    if finished(workdir, training.num_steps):
        say(
            f'{workdir} is finished ({training.num_steps} steps), nothing was trained again: '
            f'see {workdir / "report.md"}'
        )
        return True
    params = imported_params(config, experiment, workdir)
    iterator = make_iterator(  # before anything is written: examples may be damaged
        experiment.source,
        batch_size=training.batch_size,
        seed=experiment.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_config(workdir, config)
    if params is not None:
        say(f'starting from the weights in {training.init_from}')
    batches = Prefetched(iterator, batch_sharding(experiment.mesh))
    result = train(experiment.trainer(), batches, workdir, params=params, announce=say)
    if result.stopped:
        say(f'stopped by SIGTERM at step {result.step}, which is saved; the same command goes on from there')
        return False
    if experiment.evaluation.num_samples:
        say(f'drawing and measuring {experiment.evaluation.num_samples} samples')
        params = sampling_params(experiment, result.state)
        measure, progress = kind_of(config).measure, sys.stderr.isatty()
        figures = measure(experiment, params, workdir, result.step, seed=0, progress=progress)
        say('\n'.join(summary_lines(figures)) + f'\nreport: {workdir / "report.md"}')
    return True


def find_params(config, experiment, workdir: Path):
    """(the parameters to sample with, their step): of a checkpoint, or of imported weights where there is none yet."""
    import jax

    from diffjax.restoring import restore_params
    from diffjax.starting import imported_params

    params = imported_params(config, experiment, workdir)
    if params is None:
        return restore_params(experiment, workdir)
    say(f'{workdir} holds no checkpoint: these are the weights in {experiment.training.init_from}')
    _, _, shardings = experiment.trainer().init(experiment.batch_spec)
    return jax.device_put(params, shardings.params), 0


def sample_run(workdir: Path) -> None:
    """Draws samples from a trained workdir as PNG and NPZ."""
    import jax
    import numpy as np

    from diffjax.kinds import kind_of
    from diffjax.results import save_samples
    from diffjax.run import check_labels, keep_samples, labels_to_draw, to_output

    config, experiment = start()
    if (drawing := kind_of(config).drawing) is None:
        fail('--mode=sample draws from what denoises or generates; an autoencoder reconstructs, with --mode=evaluate')
    num_classes, null_label = experiment.task.num_classes, experiment.task.null_label
    try:
        wanted = [int(label) for label in FLAGS.labels.split(',')] if FLAGS.labels else None
    except ValueError:
        fail(f'--labels are whole numbers with commas between them, got {FLAGS.labels!r}')
    edit = experiment.edit()
    if wanted is None:
        default = edit.num_clips if edit is not None and edit.from_file else 10 * min(max(num_classes, 1), 10)
        labels = labels_to_draw(experiment, FLAGS.num_samples or default)
    else:
        labels = check_labels(wanted, num_classes, null_label=null_label)
        labels = np.resize(labels, FLAGS.num_samples or len(labels))
    params, step = find_params(config, experiment, workdir)
    draw = drawing(experiment, at_most=len(labels))
    stem = Path(FLAGS.out) if FLAGS.out else workdir / 'samples' / f'{experiment.sampler.file_name}-seed{FLAGS.seed}'
    stem = stem.with_name(stem.name.replace('.', '_'))
    kept, finish = keep_samples(experiment, params, labels, FLAGS.seed, stem), partial(to_output, experiment)
    images = draw(params, labels, seed=FLAGS.seed, progress=sys.stderr.isatty(), finish=finish, kept=kept)
    if jax.process_index():
        return
    known = edit and edit.known(len(labels))
    archive, picture = save_samples(stem, images, labels, experiment.frame_rate, known)
    if kept is not None:
        kept.clear()
    say(f'{len(labels)} samples at step {step}: {picture} and {archive}')


def evaluate_run(workdir: Path) -> None:
    """Draws and measures samples of a trained workdir again, with the sampler that the command line asks for."""
    from diffjax.kinds import kind_of
    from diffjax.results import summary_lines

    config, experiment = start()
    if FLAGS.num_samples:
        from dataclasses import replace

        experiment = replace(experiment, evaluation=replace(experiment.evaluation, num_samples=FLAGS.num_samples))
    params, step = find_params(config, experiment, workdir)
    measure, progress = kind_of(config).measure, sys.stderr.isatty()
    figures = measure(experiment, params, workdir, step, seed=FLAGS.seed, progress=progress)
    say('\n'.join(summary_lines(figures)) + f'\nreport: {workdir / "report.md"}')


def ema_run(workdir: Path) -> None:
    """Averages of the widths that --sigma_rel names, from the snapshots that a run has left."""
    from diffjax.run import reconstruct_averages

    try:
        widths = [float(width) for width in FLAGS.sigma_rel.split(',')]
    except ValueError:
        fail(f'--sigma_rel is one relative width or several with commas between them, got {FLAGS.sigma_rel!r}')
    config, experiment = start()
    if 'task' in config:
        fail('--mode=ema is for networks that denoise')
    for name, made in reconstruct_averages(experiment, workdir, widths, FLAGS.step).items():
        say(
            f'{workdir / name}: from {made.num_snapshots} snapshots, its profile right to {made.error:.2g}; '
            f'--config.sampler.params={name}'
        )


def encode_run(workdir: Path) -> None:
    """Writes a dataset of latents by the autoencoder of a workdir, or by an imported one."""
    from diffjax.encoding import encode_dataset
    from diffjax.first_stage import FirstStage
    from diffjax.restoring import on_host

    config, experiment = start()
    if not isinstance(experiment, FirstStage):
        fail('--mode=encode is for autoencoders; what learns in latents encodes by itself, when it is trained')
    params, step = find_params(config, experiment, workdir)
    params = on_host(params['autoencoder'], experiment.mesh)
    network, settings = experiment.task.network, experiment.encoding
    folder = encode_dataset(network, params, experiment.dataset, settings, workdir, progress=sys.stderr.isatty())
    say(
        f'latents of step {step}: {folder}\nto learn in them: --config.dataset.name={folder.parent.name} '
        f'--config.dataset.data_dir={folder.parents[1]} --config.dataset.latent_scale=0'
    )


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
