"""A recogniser as an experiment: a config with the section `task` in, a trained network and its report out.

The section `task` names `recognition` (`tasks/recognition.py`) and beside it `questions`, what each picture is asked:
'scenes' (of the embedded shapes) or 'classes' (the labels of any dataset); or each clip: 'flights' (of moving_digits)
or 'plays' (of moving_shapes), by a network called ClipRecognizer. The run leaves `recognizer.safetensors`, the
file that `task.perceptual` of an autoencoder takes.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from diffjax import nets, tasks
from diffjax.build import open_split, with_averages
from diffjax.components import check_keys, component, parse_component, section
from diffjax.core.types import PyTree
from diffjax.data import Source, prepare
from diffjax.data.clips import MAX_ACTORS, NUM_FRAMES
from diffjax.data.shapes.scenes import CLASSES, COLORS, HELD_OUT, MAX_OBJECTS, SHAPES, SIZES
from diffjax.evaluation.pictures import captioned_grid
from diffjax.evaluation.report import write_report
from diffjax.learning import HeldOut, HeldOutSettings, check_params, check_shapes
from diffjax.results import loss_picture
from diffjax.settings import ConfigError, DatasetSettings
from diffjax.tasks import Recognition, questions
from diffjax.tasks.questions import Answers, Classes, Flights, Plays, Scenes
from diffjax.training import optimizers
from diffjax.training.loop import Settings
from diffjax.training.sharding import make_mesh, replicated
from diffjax.values import check_whole
from diffjax.weights.recognizer import write_recognizer

KEYS = ('seed', 'task')
SECTIONS = ('dataset', 'network', 'optimizer', 'training', 'mesh', 'evaluation')
SHOWN = 20  # pictures, each with what it was recognised as
FILE = 'recognizer.safetensors'
KNOWN = {  # of the embedded datasets
    'num_shapes': len(SHAPES),
    'num_colors': len(COLORS),
    'num_sizes': len(SIZES),
    'max_objects': MAX_OBJECTS,
    'num_frames': NUM_FRAMES,
    'max_actors': MAX_ACTORS,
}


@dataclass(frozen=True, kw_only=True)
class RecognitionRun(HeldOut):
    """A config of a recogniser as objects."""

    task: Recognition


def build_recognition(config: Mapping[str, Any]) -> RecognitionRun:
    """Everything that a config describes, checked. Raises ConfigError or another ValueError in one line."""
    check_keys('the config', config, KEYS + SECTIONS, required=KEYS + SECTIONS)
    dataset = section(DatasetSettings, config, 'dataset')
    training = section(Settings, config | {'training': with_averages(config['training'])}, 'training')
    evaluation = section(HeldOutSettings, config, 'evaluation')
    check_params('evaluation.params', evaluation.params, training.ema)
    if training.init_from:
        raise ConfigError('training.init_from is for networks that denoise; a recogniser starts from nothing')
    name, options = parse_component(config['task'], 'task')
    if 'questions' not in options:
        raise ConfigError(f'task {name!r} needs questions, one of {", ".join(map(str.lower, questions.__all__))}')
    asked = options.pop('questions')
    probe = open_split(dataset, dataset.split, for_sampling=False)
    answers = component(questions, asked, 'task.questions', **KNOWN, num_classes=probe.num_classes)()
    of_clips = isinstance(answers, Flights | Plays)
    if probe.kind != ('video' if of_clips else 'image') or dataset.cuts_clips:
        raise ConfigError(
            f'dataset: {asked!r} are questions about {"whole clips" if of_clips else "images"}, and {dataset.name} has '
            f'{"them cut" if dataset.cuts_clips else f"{probe.kind}s"} here'
        )
    if not answers.num_choices:
        raise ConfigError(f'task.questions = {asked!r} asks for labels, and {dataset.name} has none')
    source, test = (
        open_split(dataset, split, for_sampling=False, annotations=answers.annotations) if split else None
        for split in (dataset.split, dataset.test_split)
    )
    outputs = {'num_outputs': answers.num_questions + answers.num_choices}
    if of_clips:
        outputs |= {'num_frames': answers.num_frames, 'num_frame_outputs': answers.num_frame_questions}
        outputs |= {'num_kinds': answers.num_kinds, 'num_choices': answers.num_choices}
    network = component(nets.recognizer, config['network'], 'network', **outputs)()
    if of_clips != isinstance(network, nets.recognizer.ClipRecognizer):
        raise ConfigError(f'network: {asked!r} wants a {"ClipRecognizer" if of_clips else "Recognizer"}')
    task = component(tasks.recognition, {'name': name, **options}, 'task', network=network, questions=answers)()
    run = RecognitionRun(
        seed=check_whole('seed', config['seed'], 0, 2**32 - 1),
        dataset=dataset,
        source=source,
        test=test,
        task=task,
        evaluation=evaluation,
        training=training,
        mesh=section(make_mesh, config, 'mesh'),
        optimizer=component(optimizers, config['optimizer'], 'optimizer', num_steps=training.num_steps)(),
    )
    check_shapes(run)
    return run


# What a trained one is worth ------------------------------------------------------------------------------------------


def f1(said: np.ndarray, true: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of zeros and ones, pooled over all; 0 where nothing is there and nothing said."""
    hits = float((said * true).sum())
    return 2 * hits / max(float(said.sum() + true.sum()), 1.0)


def answer_figures(asked: Scenes | Classes | Flights | Plays, said: Answers, true: Answers) -> dict[str, float]:
    """How often the answers to [N] pictures or clips are right."""
    right = float((said.choice == true.choice).mean())
    if isinstance(asked, Classes):
        return {'accuracy': right}
    if isinstance(asked, Flights | Plays):
        frames, clips = zip(*(_by_frame(asked, answers) for answers in (said, true)))
        return {
            'presence_f1': f1(*(a[:, :, 0] for a in frames)),
            'position_f1': f1(*(a[:, :, 1:] for a in frames)),
            'motion_f1': f1(*clips),
            'count_accuracy': right,
        }
    size = len(true.choice), -1, asked.num_combinations
    said_yes, true_yes = (np.asarray(answers.yes).reshape(size) for answers in (said, true))
    unseen = [CLASSES.index(f'{color} {shape}') for shape, color in HELD_OUT]
    presence = said_yes[:, 0], true_yes[:, 0]
    return {
        'presence_accuracy': float((presence[0] == presence[1]).mean()),
        'presence_f1': f1(*presence),
        'presence_f1_of_rare_combinations': f1(*(a[:, unseen] for a in presence)),
        'scenes_all_right': float((presence[0] == presence[1]).all(-1).mean()),
        'position_f1': f1(said_yes[:, 1:5], true_yes[:, 1:5]),
        'size_f1': f1(said_yes[:, 5:], true_yes[:, 5:]),
        'count_accuracy': right,
    }


def _by_frame(asked: Flights | Plays, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """[N, T, aspects, kinds] of frames and [N, aspects, kinds] of clips."""
    n, frames = len(answers.choice), asked.num_frames * asked.num_frame_questions
    yes = np.asarray(answers.yes)
    return (
        yes[:, :frames].reshape(n, asked.num_frames, -1, asked.num_kinds),
        yes[:, frames:].reshape(n, -1, asked.num_kinds),
    )


def recognised(run: RecognitionRun, params: PyTree, source: Source, *, progress: bool) -> Iterator[tuple[Answers, ...]]:
    """(said, true) of each batch of the source's first `evaluation.num_samples` images or clips."""
    task, size, count = run.task, run.evaluation.batch_size, min(run.evaluation.num_samples, len(source))

    @functools.partial(jax.jit, out_shardings=replicated(run.mesh))
    def both(params, batch):
        batch = prepare(batch, jax.random.key(0), flip=False)
        return task.answer(params, batch['x0']), task.questions(batch)

    for start in tqdm(range(0, count, size), unit='batch', disable=not progress, dynamic_ncols=True):
        part = source.read(range(start, min(start + size, count)))
        padded = {name: np.resize(a, (size, *a.shape[1:])) for name, a in part.items()}
        yield jax.tree.map(lambda a: np.asarray(a)[: len(part[source.kind])], both(params, padded))  # noqa: B023


def measure(
    run: RecognitionRun, params: PyTree, workdir: Path, step: int, *, seed: int = 0, progress: bool = False
) -> dict[str, Any]:
    """Recognises held-out images; writes recognizer.safetensors, recognised.png, figures.json and report.md."""
    del seed  # nothing is drawn
    workdir, source = Path(workdir), run.test or run.source
    parts = list(recognised(run, params, source, progress=progress))
    said, true = jax.tree.map(lambda *each: np.concatenate(each), *parts)
    params = jax.device_get(jax.device_put(params, replicated(run.mesh)))
    if jax.process_index():
        return {}
    write_recognizer(workdir / FILE, run.task.network, params)
    figures = {'num_samples': len(true.choice), **answer_figures(run.task.questions, said, true)}
    figures |= {'parameters': nets.count_parameters(params), 'step': step}
    images = source.read(range(min(SHOWN, len(true.choice))))[source.kind]
    images = images[:, images.shape[1] // 2] if source.kind == 'video' else images
    captions = [_caption(run.task.questions, said, true, i) for i in range(len(images))]
    captioned_grid(images, captions, columns=5, path=workdir / 'recognised.png')
    _write(run, workdir, figures)
    return figures


def _caption(asked: Scenes | Classes | Flights | Plays, said: Answers, true: Answers, i: int) -> str:
    """What picture i was recognised as, one combination a line; '-' marks what is missing, '+' what is too much.

    Of a clip: what its middle frame was recognised as.
    """
    if isinstance(asked, Classes):
        return f'{said.choice[i]}' if said.choice[i] == true.choice[i] else f'{said.choice[i]} (- {true.choice[i]})'
    if isinstance(asked, Flights | Plays):
        start = asked.num_frames // 2 * asked.num_frame_questions
        names = CLASSES if isinstance(asked, Plays) else [str(k) for k in range(asked.num_kinds)]
    else:
        start, names = 0, CLASSES
    noun = 'object' if said.choice[i] == 1 else 'objects'
    lines = [f'{said.choice[i]} {noun}' + ('' if said.choice[i] == true.choice[i] else f' (- {true.choice[i]})')]
    mine, real = (np.asarray(answers.yes)[i, start : start + len(names)] for answers in (said, true))
    for k in np.flatnonzero(mine + real):
        mark = {(1, 1): '', (1, 0): '+ ', (0, 1): '- '}[int(mine[k]), int(real[k])]
        lines.append(mark + names[k])
    return '\n'.join(lines)


def _write(run: RecognitionRun, workdir: Path, figures: dict[str, Any]) -> None:
    held_out = 'Held-out' if run.test is not None else 'Training'
    what = 'clips' if run.source.kind == 'video' else 'images'
    of = 'clips, their middle frames,' if what == 'clips' else what
    pictures = {f'{held_out} {of} and what was recognised': workdir / 'recognised.png'}
    pictures |= loss_picture(workdir)
    source, network = run.source, run.task.network
    write_report(
        workdir / 'report.md',
        figures,
        title=f'{source.name}: a recogniser',
        summary=(
            f'Trained for {figures["step"]:,} steps of batch {run.training.batch_size} on {source.num_examples:,} '
            f'{what} ({run.dataset.split}); figures of {figures["num_samples"]:,} {what} '
            f'({run.dataset.test_split or run.dataset.split}). F1 is pooled over {what} and questions. Beneath the '
            'pictures + is what was seen and is not there, and - what is there and was not seen.'
        ),
        pictures=pictures,
        config={'channels': tuple(network.channels), 'outputs': network.num_outputs, 'seed': run.seed},
    )
    part = workdir / 'figures.part'
    part.write_text(json.dumps(figures, indent=2) + '\n')
    os.replace(part, workdir / 'figures.json')
