"""A variational autoencoder, a generative adversarial network and diffusion, trained on the digits for equally long.

    python experiments/compare_models.py --seconds=150 --out=runs/compare_models

Each config is trained as it is shipped, but for so many steps as its compiled step makes in --seconds; a short stretch,
with the data read as in training, says how many. Samples of all are measured by the same code.

Into --out go report.md, models.csv (a row for each model, and one for the real images), classes.csv (the shares of the
classes, as asked for and as recognised), samples.png, classes.png, and the runs, each with its own report.
"""

import argparse
import csv
import math
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from command_line import Stop, values
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timed_training import trained_seconds

from diffjax.build import ConfigError
from diffjax.data import make_iterator, read_all, to_global
from diffjax.evaluation import fit_svc, markdown_table, sample_grid
from diffjax.kinds import kind_of
from diffjax.nets import count_parameters
from diffjax.restoring import sampling_params
from diffjax.training.loop import train
from diffjax.training.sharding import batch_sharding, replicated
from diffjax.workdir import write_config

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
MODELS = {'VAE': 'digits_vae', 'GAN': 'digits_gan', 'diffusion': 'digits'}
REAL = 'real images'
PROBE_SHARE = 0.1  # of the time for training: how long each step is timed,
TURNS = 5  # in so many turns,
STEPS_AT_ONCE = 4  # of so many steps at least
FIGURES = ('frechet_distance', 'frechet_ratio', 'precision', 'recall', 'memorised_fraction', 'class_accuracy')


class Model(NamedTuple):
    row: dict[str, Any]  # of the table
    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # [N], the classes asked for
    recognised: np.ndarray  # [N], the classes seen


def config_of(name: str, argument: str, seed: int) -> dict[str, Any]:
    return runpy.run_path(str(CONFIGS / f'{MODELS[name]}.py'))['get_config'](argument).to_dict() | {'seed': seed}


def stepper(experiment) -> Callable[[], float]:
    """A function that trains for STEPS_AT_ONCE steps on fresh batches and says how many seconds they took."""
    trainer, split = experiment.trainer(), batch_sharding(experiment.mesh)
    batches = make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=experiment.seed)
    make, _, shardings = trainer.init(experiment.batch_spec)
    step, state = trainer.step(shardings), make()
    frozen = jax.device_put(trainer.frozen, replicated(experiment.mesh))

    def advance():
        nonlocal state
        began = time.perf_counter()
        for _ in range(STEPS_AT_ONCE):
            state, _ = step(state, frozen, to_global(next(batches), split))
        jax.block_until_ready(state)
        return time.perf_counter() - began

    advance()  # compiles
    return advance


def steps_per_second(configs: dict[str, dict], seconds: float) -> dict[str, float]:
    """Of each model's compiled step, timed for so long, in turns: whatever else the machine does meets all alike."""
    steppers = {name: stepper(kind_of(config).build(config)) for name, config in configs.items()}
    counts, passed = (dict.fromkeys(configs, 0) for _ in range(2))
    while min(passed.values()) < seconds:
        for name, advance in steppers.items():
            turn = passed[name] + seconds / TURNS
            while passed[name] < turn:
                passed[name] += advance()
                counts[name] += STEPS_AT_ONCE
    return {name: counts[name] / passed[name] for name in configs}


def shares(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=num_classes) / len(labels)


def class_figures(labels: np.ndarray, data: np.ndarray) -> dict[str, float]:
    """How the classes of samples lie beside the data's shares [K]: total variation, and entropy over its largest."""
    found = shares(labels, len(data))
    entropy = np.sum(found * -np.log(np.maximum(found, 1e-30))) / math.log(len(data))
    return {'class_total_variation': 0.5 * float(np.abs(found - data).sum()), 'class_entropy': float(entropy)}


def study(config: dict[str, Any], name: str, workdir: Path) -> tuple[Model, Model]:
    """One model, trained, drawn from and measured; and the real images in its place."""
    kind, seed = kind_of(config), config['seed']
    experiment = kind.build(config)
    workdir.mkdir(parents=True)
    write_config(workdir, config)
    batches = make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=seed)
    state = train(experiment.trainer(), batches, workdir, announce=print).state
    params = sampling_params(experiment, state)
    train_split, test = read_all(experiment.source), read_all(experiment.test)
    found = kind.measure(experiment, params, workdir, int(state.step), seed=seed, progress=False)
    archive = np.load(workdir / 'samples.npz', allow_pickle=False)
    classify = fit_svc(train_split['image'], train_split['label'])
    data = shares(train_split['label'], experiment.source.num_classes)

    def model(images, labels, row):
        recognised = classify(images)
        return Model(row | class_figures(recognised, data), images, labels, recognised)

    cost = {'steps': int(state.step), 'seconds_trained': trained_seconds(workdir)}
    cost |= {'parameters': count_parameters(state.params)}
    cost |= {'parameters_drawing': count_parameters(params.get('generator', params))}
    cost |= {'seconds_per_sample': found['seconds_per_sample']}
    drawn = model(archive['arr_0'], archive['labels'], {'model': name, **cost, **{key: found[key] for key in FIGURES}})
    real = {'frechet_distance': found['frechet_distance_train'], 'frechet_ratio': 1.0}
    real |= {key: found[f'{key}_real'] for key in ('precision', 'recall', 'memorised_fraction')}
    real |= {'class_accuracy': found['classifier_test_accuracy']}
    empty = dict.fromkeys(cost, '')
    return drawn, model(test['image'], test['label'], {'model': REAL, **empty, **real})


def write(out: Path, models: list[Model], seconds: float, seed: int) -> None:
    """The report with its tables and pictures."""
    rows, names = [model.row for model in models], [model.row['model'] for model in models]
    num_classes = int(models[-1].labels.max()) + 1
    classes = [
        {'model': name, 'labels': kind, **{str(c): share for c, share in enumerate(shares(labels, num_classes))}}
        for name, model in zip(names, models)
        for kind, labels in (('asked for', model.labels), ('recognised', model.recognised))
    ]
    for name, table in (('models', rows), ('classes', classes)):
        with open(out / f'{name}.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    shown = np.concatenate([_two_of_each(model, num_classes) for model in models])
    owner = np.repeat(np.arange(len(models)), len(shown) // len(models))
    sample_grid(shown, owner, columns=2 * num_classes, names=names, path=out / 'samples.png')
    draw_classes(out / 'classes.png', names, [shares(model.recognised, num_classes) for model in models])
    best = min(rows[:-1], key=lambda row: row['frechet_ratio'])
    (out / 'report.md').write_text(
        f"""# One-step models and diffusion after {seconds:g} seconds of training each

Digits, seed {seed}. The smallest Frechet distance has {best['model']}: {best['frechet_ratio']:.2f} times that of the
real train images. Distances and neighbours are over raw pixels; the classes were asked for in equal numbers, and are
recognised by a support vector machine that was trained on the real train images. The entropy of what it recognises is
given as a share of the largest there is; the total variation is from the train images' own shares. For the real images,
the test images stand in the place of the samples, and in the Frechet distance the train images.

{markdown_table([{key.replace('_', ' '): _text(value) for key, value in row.items()} for row in rows])}

![Samples: two of each class, the first that were drawn](samples.png)

Shares of the classes:

{markdown_table([{key: _text(value) for key, value in row.items()} for row in classes])}

![Shares of the classes that are recognised](classes.png)
"""
    )


def _two_of_each(model: Model, num_classes: int) -> np.ndarray:
    """The first two images of each class, [2 K, H, W, C]."""
    return np.concatenate([model.images[model.labels == c][:2] for c in range(num_classes)])


def _text(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def draw_classes(path: Path, names: list[str], found: list[np.ndarray]) -> None:
    """Bars: for each class the share that each model's samples have of it."""
    figure = Figure(figsize=(8, 3), layout='constrained')
    FigureCanvasAgg(figure)
    ax, width = figure.subplots(), 0.8 / len(names)
    for i, (name, one) in enumerate(zip(names, found)):
        ax.bar(np.arange(len(one)) + (i - (len(names) - 1) / 2) * width, one, width, label=name)
    ax.axhline(1 / len(found[0]), color='0.4', linewidth=0.8, linestyle='--')
    ax.set(xlabel='class recognised', ylabel='share of the samples', xticks=range(len(found[0])))
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(frameon=False, ncols=len(names), loc='lower center', bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=150.0, help='of training, for each model')
    parser.add_argument('--models', default=','.join(MODELS), help=f'of {", ".join(MODELS)}')
    parser.add_argument('--argument', default='', help='of the configs: smoke for a quick look')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path('runs/compare_models'))
    options = parser.parse_args(argv)
    names = values(options.models)
    try:
        if not names or (unknown := [name for name in names if name not in MODELS]):
            raise Stop(f'--models are of {", ".join(MODELS)}; got {(unknown[0] if names else "none")!r}')
        if not options.seconds > 0:
            raise Stop(f'--seconds must be above 0, got {options.seconds:g}')
        if options.out.exists():
            raise Stop(f'{options.out} is there already: give another --out')
        configs = {name: config_of(name, options.argument, options.seed) for name in names}
        models = []
        for name, rate in steps_per_second(configs, PROBE_SHARE * options.seconds).items():
            least = configs[name]['optimizer']['warmup_steps'] + 1
            configs[name]['training']['num_steps'] = num_steps = max(round(rate * options.seconds), least)
            print(f'{name}: {rate:.1f} steps a second, {num_steps} steps in {options.seconds:g} s', flush=True)
        for name, config in configs.items():
            model, real = study(config, name, options.out / name.lower())
            models.append(model)
        write(options.out, [*models, real], options.seconds, options.seed)
    except (Stop, ConfigError, ValueError) as error:
        sys.exit(f'error: {error}')
    print((options.out / 'report.md').read_text())


if __name__ == '__main__':
    main()
