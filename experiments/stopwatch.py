"""How the benchmarks measure: what a machine can reach, and how long programs take on it."""

import csv
import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

SETTLE_SECONDS = 0.3  # between contestants: another library's threads go to sleep
PEAK_SECONDS = 0.3  # of each product
WIDTHS = {'cpu': (384, 768), 'gpu': (768, 1024, 1152)}  # of DiT-S and B; B, L and XL
TOKENS = {'cpu': 2048, 'gpu': 65_536}  # 8 and 256 images of 256 tokens
SQUARES = {'cpu': (1024, 2048), 'gpu': (4096, 8192, 16_384)}
COPIED = {'cpu': 2**25, 'gpu': 2**29}  # values


class Seconds(NamedTuple):
    """What was measured in each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.rounds))

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, of the median."""
        low, high = np.percentile(self.rounds, (25, 75))
        return float((high - low) / 2 / self.median)


class Peak(NamedTuple):
    flops: float  # FLOP/s of the fastest product
    of: str  # which
    bandwidth: float  # bytes/s of a copy


def of_platform(table: Mapping[str, Any]) -> Any:
    return table['cpu' if jax.default_backend() == 'cpu' else 'gpu']


def measure_peak(dtype: str) -> Peak:
    """The best of products as they occur in DiT, [tokens, width] x [width, 4 width] and back, and of large squares."""
    tokens, best = of_platform(TOKENS), (0.0, '')
    shapes = [(n, n, n) for n in of_platform(SQUARES)]
    shapes += [shape for w in of_platform(WIDTHS) for shape in ((tokens, w, 4 * w), (tokens, 4 * w, w))]
    for m, k, n in shapes:
        a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        seconds = seconds_of_many(jax.jit(jnp.matmul), (a, b))
        best = max(best, (2 * m * k * n / seconds, f'{m} x {k} x {n}'))
    long = jnp.ones(of_platform(COPIED))
    return Peak(*best, bandwidth=2 * long.nbytes / seconds_of_many(jax.jit(lambda x: x + 1), (long,)))


def seconds_of_many(run: Callable, arguments: tuple) -> float:
    """Of one call, the best of three rows of calls that are queued without waiting."""
    jax.block_until_ready(run(*arguments))
    began = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    calls = max(1, int(PEAK_SECONDS / 3 / max(time.perf_counter() - began, 1e-6)))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            out = run(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / calls)
    return min(times)


class StepTimes(NamedTuple):
    """Seconds of a step whose state goes in a circle."""

    queued: Seconds  # each started before the one before has ended: the rate of training
    waited: Seconds  # the host waits for each
    host: Seconds  # until a call returns, the device idle: what the host does for a step


def time_steps(start: Callable[[], Any], rounds: int, num_steps: int) -> StepTimes:
    """start() starts a step and returns something to wait for. One unmeasured row comes first."""

    def row() -> float:
        began = time.perf_counter()
        for _ in range(num_steps):
            out = start()
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / num_steps

    def one() -> tuple[float, float]:
        began = time.perf_counter()
        out = start()
        returned = time.perf_counter()
        jax.block_until_ready(out)
        return returned - began, time.perf_counter() - began

    row()
    queued, single = [], []
    for _ in tqdm(range(rounds), unit='round', dynamic_ncols=True, disable=None, leave=False):
        queued.append(row())
        single.append(np.median([one() for _ in range(num_steps)], axis=0))
    host, waited = zip(*single)
    return StepTimes(Seconds(tuple(queued)), Seconds(waited), Seconds(host))


def in_turns(contestants: dict[str, Callable], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of one call of each in each round; each runs about `seconds` in one, after a call unmeasured."""
    times = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in tqdm(range(rounds), unit='round', dynamic_ncols=True, disable=None):
        for name, run in contestants.items():
            time.sleep(SETTLE_SECONDS)
            run()
            began, calls = time.perf_counter(), 0
            while not calls or time.perf_counter() - began < seconds:
                run()
                calls += 1
            times[name].append((time.perf_counter() - began) / calls)
    return times


def conditions() -> dict[str, Any]:
    """When, of what, with what and where a row was measured."""
    root, device = Path(__file__).parents[1], jax.devices()[0]

    def git(*words):
        try:
            return subprocess.run(('git', *words), cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no repository: an installed copy
            return ''

    commit = git('rev-parse', '--short', 'HEAD')
    return {
        'date': datetime.date.today().isoformat(),
        'commit': commit + ('+' if commit and git('status', '--porcelain', '--untracked-files=no') else ''),
        'jax': jax.__version__,
        'python': platform.python_version(),
        'device': device.device_kind,
        'devices': jax.device_count(),
    }


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """To a CSV with these columns, or to a new one. Raises ValueError where it has others."""
    new = not path.exists()
    if not new:
        with open(path, newline='') as file:
            columns = next(csv.reader(file), [])
        if columns != list(rows[0]):
            raise ValueError(
                f'{path} has the columns {", ".join(columns)}: give another --out for {", ".join(rows[0])}'
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
