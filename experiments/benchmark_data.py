"""What the input pipeline delivers: pictures of 256 x 256 decoded, cropped and flipped, and latents; beside the need.

    python experiments/benchmark_data.py --threads=2

Pictures of the embedded shapes, made larger and a little noisy, and random latents are written as TFDS array_record and
read back by the iterator that training uses, in its order, from disk. Pictures are cropped to their middle square of
256 by the reading threads; flips, draws from latents and the scale to [-1, 1] are the device's work, whose time for a
batch is `device`. What is needed is what DiT-B/2 would eat at `--share` of a datasheet's peak: computed, not measured,
and so is the step of which `hand over`, the work of the thread that trains, is the share `host of a step`. `core` is
the time of a processor that an example takes, which a busy machine moves less than its rate.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from benchmark_models import trace_plain
from command_line import values
from PIL import Image
from stopwatch import Seconds, append_rows, conditions

from diffjax.data import Prefetched, make_iterator, open_source, prepare
from diffjax.data.imagenet256_latents.imagenet256_latents_dataset_builder import Builder as Latents
from diffjax.data.shapes.rendering import draw
from diffjax.data.shapes.scenes import scene
from diffjax.evaluation import markdown_table
from diffjax.training.devices import find_device
from diffjax.training.flops import count_flops

SIDE, LONG, SHORT = 256, 341, 288  # pictures are [SHORT, LONG], as ImageNet's have 4 : 3; quality 90
KINDS = 'jpeg', 'png', 'latents'
SHARD = 64  # latents


def picture(index: int) -> Image.Image:
    """A scene of shapes with noise, without which it would compress far better than photographs do."""
    scaled = Image.fromarray(draw(scene('test', index)).image).resize((LONG, SHORT), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(index).normal(0, 4, (SHORT, LONG, 3))
    return Image.fromarray(np.clip(np.asarray(scaled) + noise, 0, 255).astype(np.uint8))


class Pictures(tfds.core.GeneratorBasedBuilder):
    """`image` [288, 341, 3] and `label`."""

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, version='1.0.0') for name in KINDS[:2]]
    NUM_EXAMPLES = 0  # set before it is used

    def _info(self):
        encoding = self.builder_config.name
        image = tfds.features.Image(shape=(SHORT, LONG, 3), dtype=np.uint8, encoding_format=encoding)
        features = {'image': image, 'label': tfds.features.ClassLabel(num_classes=10)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for index in range(self.NUM_EXAMPLES):
            file = io.BytesIO()
            picture(index).save(file, format=self.builder_config.name, quality=90)
            file.seek(0)
            yield index, {'image': file, 'label': index % 10}


def write(kind: str, folder: Path, num_examples: int) -> str:
    """The name under which `open_source` finds so many examples in the folder."""
    config = tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=folder / 'shards')
    if kind != 'latents':
        Pictures.NUM_EXAMPLES = num_examples
        prepare_quietly(Pictures(config=kind, data_dir=folder, file_format='array_record'), config)
        return f'pictures/{kind}'
    rng = np.random.default_rng(0)
    (folder / 'shards' / 'train').mkdir(parents=True, exist_ok=True)
    for start in range(0, num_examples, SHARD):
        size = min(SHARD, num_examples - start)
        mean, std = rng.standard_normal((size, 32, 32, 4), np.float32), rng.random((size, 32, 32, 4), np.float32)
        label = rng.integers(1000, size=size)
        np.savez(folder / 'shards' / 'train' / f'{start:06}.npz', mean=mean, std=std, label=label)
    prepare_quietly(Latents(data_dir=folder, file_format='array_record'), config)
    return 'imagenet256_latents'


def prepare_quietly(builder: tfds.core.DatasetBuilder, config: tfds.download.DownloadConfig) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(download_config=config)


def measure(kind: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one kind of dataset."""
    source = open_source(
        write(kind, folder, options.num_examples), 'train', data_dir=folder, resolution=0 if kind == 'latents' else SIDE
    )
    size = options.batch_size
    batches = make_iterator(source, batch_size=size, seed=0, num_threads=options.threads, memory_limit_bytes=0)
    taken = []
    for i in range(options.rounds + 1):
        if i == 1:  # the first round fills the queue of batches that are read ahead
            busy = time.process_time()
        began = time.perf_counter()
        for _ in range(options.batches):
            next(batches)
        taken.append((time.perf_counter() - began) / options.batches)
    read, busy = Seconds(tuple(taken[1:])), time.process_time() - busy
    del batches  # its threads end
    stored = folder / source.name.partition('/')[0]
    return {
        'data': f'{kind}, {"x".join(map(str, source.image_shape))}',
        'kB each': sum(f.stat().st_size for f in stored.rglob('*array_record*')) / 1e3 / len(source),
        'threads': options.threads,
        'examples/s': size / read.median,
        'spread': read.spread,
        'core, ms each': 1e3 * busy / (options.rounds * options.batches * size),
        'device, ms': 1e3 * on_device(source, size, options.rounds),
        'hand over, ms': 1e3 * hand_over(source, size, options),
    }


def on_device(source, size: int, rounds: int) -> float:
    """Seconds of what the device does with a batch before it learns from it."""
    batch = jax.device_put({name: np.stack([a] * size) for name, a in source[0].items()})
    run = jax.jit(lambda batch, key: prepare(batch, key, flip=source.kind == 'image'))
    taken = []
    for i in range(rounds + 1):
        began = time.perf_counter()
        jax.block_until_ready(run(batch, jax.random.key(i)))
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


def hand_over(source, size: int, options: argparse.Namespace) -> float:
    """Seconds that the thread which trains spends on a batch that is ready: taking it, and starting its copy."""
    batches = make_iterator(source, batch_size=size, seed=0, num_threads=options.threads, memory_limit_bytes=0)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches, taken = Prefetched(batches, sharding), []
    next(batches)
    for _ in range(options.rounds):
        time.sleep(options.batches * options.pause)  # the threads read ahead meanwhile
        began = time.perf_counter()
        next(batches)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def need(model: str, device: str, share: float) -> float:
    """Images a second that training eats on one device."""
    flops = count_flops(trace_plain(model, jax.device_count())[0].jaxpr) / jax.device_count()
    return share * find_device(device, 1).flops_16 / flops


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kinds', type=values, default=list(KINDS), help=f'of {", ".join(KINDS)}; default: all')
    parser.add_argument('--num_examples', type=int, default=512)
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--threads', type=int, default=2, help='that read; default: %(default)s')
    parser.add_argument('--batches', type=int, default=16, help='in each round; default: %(default)s')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--pause', type=float, default=0.05, help='seconds for each of --batches, while threads read')
    parser.add_argument('--model', default='DiT-B/2', help='that is to be fed; default: %(default)s')
    parser.add_argument('--device', default='H200', help='on which, by its datasheet; default: %(default)s')
    parser.add_argument('--share', type=float, default=0.45, help="of the datasheet's peak; default: %(default)s")
    parser.add_argument('--out', type=Path, help='a CSV to which rows are appended')
    options = parser.parse_args(argv)
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f'--kinds: unknown {", ".join(unknown)}; valid: {", ".join(KINDS)}')
    if min(options.num_examples, options.batch_size, options.threads, options.batches, options.rounds) < 1:
        parser.error('--num_examples, --batch_size, --threads, --batches and --rounds are at least 1')
    try:
        wanted = need(options.model, options.device, options.share)
    except (KeyError, ValueError) as error:
        parser.error(f'--model and --device: {error}')
    told = {'needed/s': wanted, 'by': f'{options.model} at {options.share:.0%} of {options.device}, computed'}
    step = 1e3 * options.batch_size / wanted
    rows = []
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            row = conditions() | measure(kind, Path(folder), options) | told
            rows.append(
                row | {'of the need': row['examples/s'] / wanted, 'host of a step': row['hand over, ms'] / step}
            )
    when = rows[0]
    print(f'{when["device"]}, {options.threads} threads, batch {options.batch_size}, {when["date"]}\n')
    print(markdown_table([{key: value for key, value in row.items() if key not in conditions()} for row in rows]))
    if options.out:
        append_rows(options.out, rows)
    return rows


if __name__ == '__main__':
    main()
