"""What a run survives, at length: kills and SIGTERM at random points, and a long run whose memory must not grow.

    python experiments/faults.py --kills=20 --out=runs/kills
    python experiments/faults.py --sigterms=20 --out=runs/sigterms
    python experiments/faults.py --soak=20000 --out=runs/soak

--kills trains digits twice: once undisturbed, and once killed (SIGKILL) so many times, in turn while a checkpoint is
written, between two rows of the log, and at any moment after its start. Both must end in the same bytes of the state,
the same rows of the log, and the same samples. Into --out go kills.csv (each kill: where it struck) and report.md.

--sigterms trains digits once, and sends SIGTERM at such moments and, a quarter as often, while samples are drawn and
measured. A run that trains must save and end with code 0, any other end by the signal, all within 20 seconds; the run
is finished then. Into --out go sigterms.csv (each signal: when it struck, and the seconds to the end) and report.md.

--soak trains so many steps with checkpoints and measures samples at the end, while the memory of the process (its own
pages, not those of files), its open files and its threads are sampled. Over the training after a warm-up, memory must
grow by less than 1 % and the number of open files not at all, by fitted lines. That of memory goes through the largest
of each fortieth of the run: within a second memory swings by a tenth, as steps take and free what they compute with,
and by what chance samples meet a line through all of them moves more than 1 %. Into --out go soak.csv, soak.png and
report.md.

Further words of the command line are handed to `python -m diffjax.main`. The exit code is 1 where a promise is broken.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from command_line import Stop

from diffjax.evaluation import line_plot, markdown_table

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 400
KILLED = (
    f'--config={ROOT}/configs/digits.py:smoke',
    f'--config.training.num_steps={NUM_STEPS}',
    '--config.training.log_every_steps=5',
    '--config.training.checkpoint_every_steps=10',
)
TERMINATED = (
    f'--config={ROOT}/configs/digits.py',
    '--config.training.num_steps=2000',
    '--config.training.log_every_steps=10',
    '--config.training.checkpoint_every_steps=50',
)
GRACE_SECONDS = 20  # from SIGTERM to SIGKILL
SOAKED = (f'--config={ROOT}/configs/digits.py', '--config.training.checkpoint_every_steps=500')
DRAWING = 'drawing and measuring'  # said by a run after training
WARM_UP = 0.1  # of the steps
MAX_GROWTH = 0.01
NUM_WINDOWS = 40  # parts of a run whose peaks of memory are compared


class Moment(NamedTuple):
    """When to kill: after `reached()` is true and so many seconds more."""

    kind: str
    reached: Callable[[], bool]
    seconds: float


def start(workdir: Path, words: list[str]) -> subprocess.Popen:
    """The command, its output kept in a file beside the workdir."""
    with open(workdir.with_suffix('.log'), 'a') as file:
        command = [sys.executable, '-m', 'diffjax.main', f'--workdir={workdir}', *words]
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, workdir: Path) -> None:
    if process.wait():
        raise Stop(f'the run ended with code {process.returncode}: see {workdir.with_suffix(".log")}')


def rows(workdir: Path) -> list[dict[str, str]]:
    """metrics.csv without the column that depends on the clock."""
    path = workdir / 'metrics.csv'
    if not path.exists():
        return []
    with open(path, newline='') as file:
        return [{k: v for k, v in row.items() if k != 'steps_per_second'} for row in csv.DictReader(file)]


def unfinished(workdir: Path) -> set[str]:
    """The checkpoints that are being written."""
    return {path.name for path in (workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp')}


def moments(workdir: Path, rng: random.Random) -> Iterator[Callable[[], Moment]]:
    """Of each kind in turn, for ever. A moment is made when the process has just been started."""

    def checkpoint():
        left = unfinished(workdir)  # by the kill before, and removed when the run goes on
        return Moment('in a checkpoint', lambda: bool(unfinished(workdir) - left), rng.uniform(0, 0.02))

    def row():
        until = len(rows(workdir)) + rng.randint(1, 6)
        return Moment('between rows', lambda: len(rows(workdir)) >= until, rng.uniform(0, 0.2))

    def clock():
        return Moment('at any moment', lambda: True, rng.uniform(0.5, 15))

    while True:
        yield from (checkpoint, row, clock)


def alive_at(process: subprocess.Popen, workdir: Path, moment: Moment, seconds: float = 600) -> bool:
    """Waits for the moment; False where the run has ended before."""
    began = time.monotonic()
    while not moment.reached():
        if process.poll() is not None:
            return False
        if time.monotonic() - began > seconds:
            raise Stop(f'no moment came {moment.kind} within {seconds:.0f} s: see {workdir.with_suffix(".log")}')
        time.sleep(0.0005)
    time.sleep(moment.seconds)
    return process.poll() is None


def kill_once(process: subprocess.Popen, workdir: Path, moment: Moment) -> dict[str, Any] | None:
    """What the kill met; None where the run has ended before."""
    began = time.monotonic()
    if not alive_at(process, workdir, moment):
        return None
    process.kill()
    process.wait()
    logged = rows(workdir)
    return {
        'moment': moment.kind,
        'seconds_after_start': round(time.monotonic() - began, 3),
        'last_row': int(logged[-1]['step']) if logged else 0,
        'left_unfinished': ' '.join(sorted(unfinished(workdir))),
    }


def final_state(workdir: Path) -> dict[str, bytes]:
    """{path: bytes} of the newest checkpoint, as Orbax alone reads it."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir.absolute() / 'checkpoints') as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(manager.latest_step(), args=args).state

    def read(leaf):
        is_key = isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return {jax.tree_util.keystr(path): read(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def differences(one: Path, other: Path) -> list[str]:
    """What of two finished runs is not the same: nothing, if all is well."""
    found = []
    states = final_state(one), final_state(other)
    if states[0] != states[1]:
        found.append('the state')
    if rows(one) != rows(other):
        found.append('the rows of metrics.csv')
    samples = [np.load(workdir / 'samples.npz', allow_pickle=False)['arr_0'] for workdir in (one, other)]
    if samples[0].tobytes() != samples[1].tobytes():
        found.append('the samples')
    return found


def study_kills(num_kills: int, out: Path, words: list[str], seed: int) -> bool:
    """Whether a run that was killed so many times ends as one that was not."""
    whole, killed, rng = out / 'whole', out / 'killed', random.Random(seed)
    if killed.exists():
        raise Stop(f'{killed} is there already: give another --out')
    finish(start(whole, [*KILLED, *words]), whole)
    kills, tries = [], 0
    for make in moments(killed, rng):
        process = start(killed, [*KILLED, *words])
        try:
            kill = kill_once(process, killed, make())
        finally:
            process.kill()
            process.wait()
        kills, tries = kills + ([kill] if kill else []), tries + 1
        print(f'{len(kills)} of {num_kills}: {kill or "it had ended"}', flush=True)
        if len(kills) == num_kills:
            break
        if kill is None:
            raise Stop(f'the run ended after {len(kills)} kills: more --config.training.num_steps make it longer')
    finish(start(killed, [*KILLED, *words]), killed)
    different = differences(whole, killed)
    inside = sum(bool(kill['left_unfinished']) for kill in kills)
    said = (
        f'differ in {" and ".join(different)}' if different else 'are the same in every byte of state, log and samples'
    )
    write(
        out,
        'kills',
        kills,
        f'{len(kills)} kills (seed {seed}), {inside} of them while a checkpoint was being written: the run that was '
        f'killed and the run that was not {said}.',
    )
    return not different


def terminate_once(process: subprocess.Popen, workdir: Path, moment: Moment) -> dict[str, Any] | None:
    """What the signal met and how long the end took; None where the run has ended before."""
    if not alive_at(process, workdir, moment):
        return None
    met, began = unfinished(workdir), time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10 * GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        raise Stop(f'it still runs {10 * GRACE_SECONDS} s after SIGTERM {moment.kind}') from None
    seconds, logged = time.monotonic() - began, rows(workdir)
    return {
        'moment': moment.kind,
        'last_row': int(logged[-1]['step']) if logged else 0,
        'checkpoint_under_way': ' '.join(sorted(met)),
        'seconds_to_the_end': round(seconds, 3),
        'exit_code': process.returncode,
    }


def drawing(workdir: Path, rng: random.Random) -> Moment:
    """Anywhere in the seconds after training; made when the process has just been started."""
    log = workdir.with_suffix('.log')
    before = log.read_text().count(DRAWING)
    return Moment('while it draws', lambda: log.read_text().count(DRAWING) > before, rng.uniform(0, 10))


def study_sigterms(number: int, out: Path, words: list[str], seed: int) -> bool:
    """Whether each signal ends the run in time, with what it has done saved."""
    workdir, rng, found = out / 'run', random.Random(seed), []
    if workdir.exists():
        raise Stop(f'{workdir} is there already: give another --out')
    makes = [*islice(moments(workdir, rng), number), *[lambda: drawing(workdir, rng)] * max(1, number // 4)]
    for make in makes:
        process = start(workdir, [*TERMINATED, *words])
        try:
            met = terminate_once(process, workdir, make())
        finally:
            process.kill()
            process.wait()
        if met is None:
            raise Stop(f'the run ended after {len(found)} signals: more --config.training.num_steps make it longer')
        found.append(met)
        print(f'{len(found)} of {len(makes)}: {met}', flush=True)
    finish(start(workdir, [*TERMINATED, *words]), workdir)
    in_time = sum(met['seconds_to_the_end'] <= GRACE_SECONDS for met in found)
    slowest = max(found, key=lambda met: met['seconds_to_the_end'])
    codes = {code: sum(met['exit_code'] == code for met in found) for code in (0, -signal.SIGTERM)}
    write(
        out,
        'sigterms',
        found,
        f'{len(found)} times SIGTERM (seed {seed}): {in_time} ended within {GRACE_SECONDS} s, the slowest after '
        f'{slowest["seconds_to_the_end"]:.1f} s ({slowest["moment"]}); {codes[0]} saved and ended with 0, '
        f'{codes[-signal.SIGTERM]} by the signal. The run was finished by the same command.',
    )
    saved = all(met['exit_code'] == 0 for met in found if met['moment'] in ('in a checkpoint', 'between rows'))
    return saved and in_time == sum(codes.values()) == len(found)


def sample(process_id: int, workdir: Path, began: float) -> dict[str, float] | None:
    """The process as Linux sees it now; None when it has ended."""
    folder = Path('/proc') / str(process_id)
    try:
        lines = (folder / 'status').read_text().splitlines()
        status = dict(line.split(':', 1) for line in lines if ':' in line)
        num_files = len(os.listdir(folder / 'fd'))
        memory = int(status['RssAnon'].split()[0]) / 1024
    except (FileNotFoundError, KeyError):  # a process that has ended, and is not yet waited for, has no memory
        return None
    logged = rows(workdir)
    return {
        'seconds': round(time.monotonic() - began, 1),
        'step': int(logged[-1]['step']) if logged else 0,
        'memory_mb': round(memory, 2),
        'open_files': num_files,
        'threads': int(status['Threads']),
    }


def growth(samples: list[dict[str, float]], name: str) -> tuple[float, float]:
    """(value at the first sample, growth to the last): those of a straight line fitted over the steps."""
    steps, values = (np.array([each[key] for each in samples], np.float64) for key in ('step', name))
    slope, constant = np.polyfit(steps, values, 1)
    return constant + slope * steps[0], slope * (steps[-1] - steps[0])


def peaks(samples: list[dict[str, float]], name: str, every: float) -> list[dict[str, float]]:
    """The largest value of each so many steps, as samples at their first steps."""
    largest = {}
    for each in samples:
        begin = each['step'] // every * every
        largest[begin] = max(each[name], largest.get(begin, -np.inf))
    return [{'step': step, name: value} for step, value in largest.items()]


def study_soak(num_steps: int, out: Path, words: list[str], every_seconds: float) -> bool:
    """Whether memory and open files stay as they are."""
    workdir, began, samples = out / 'run', time.monotonic(), []
    if workdir.exists():
        raise Stop(f'{workdir} is there already: give another --out')
    out.mkdir(parents=True, exist_ok=True)
    process = start(workdir, [*SOAKED, f'--config.training.num_steps={num_steps}', *words])
    try:
        while process.poll() is None:
            if (now := sample(process.pid, workdir, began)) is not None:
                samples.append(now)
            time.sleep(every_seconds)
    finally:
        process.kill()
    finish(process, workdir)
    settled = [each for each in samples if WARM_UP * num_steps <= each['step'] < num_steps]
    if len({each['step'] for each in settled}) < 3:
        raise Stop(f'{len(settled)} samples after the warm-up are too few: lower --every_seconds, or more steps')
    largest = peaks(settled, 'memory_mb', num_steps / NUM_WINDOWS)
    (memory, more_memory), (files, more_files) = growth(largest, 'memory_mb'), growth(settled, 'open_files')
    flat = more_memory < MAX_GROWTH * memory and more_files < 1
    curves = {
        'memory, relative': ([each['step'] for each in settled], [each['memory_mb'] / memory for each in settled]),
        'its peaks': ([each['step'] for each in largest], [each['memory_mb'] / memory for each in largest]),
        'open files, relative': ([each['step'] for each in settled], [each['open_files'] / files for each in settled]),
    }
    line_plot(out / 'soak.png', curves, xlabel='step', ylabel='as a ratio to the start after warm-up')
    write(
        out,
        'soak',
        samples,
        f'{num_steps:,} steps with checkpoints and an evaluation, {len(settled)} samples after step '
        f'{settled[0]["step"]:,}: memory {memory:,.1f} MB {more_memory:+,.2f} MB ({more_memory / memory:+.2%}) by the '
        f'peaks of {len(largest)} parts, {growth(settled, "memory_mb")[1]:+,.2f} MB by all samples; '
        f'open files {files:.1f} {more_files:+.2f}: {"flat" if flat else "NOT FLAT"}.\n\n![Samples](soak.png)',
    )
    return flat


def write(out: Path, name: str, table: list[dict[str, Any]], summary: str) -> None:
    """NAME.csv and report.md, and the summary printed."""
    with open(out / f'{name}.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    shown = table if len(table) <= 40 else table[:: -(-len(table) // 40)]
    (out / 'report.md').write_text(f'# {name.capitalize()}\n\n{summary}\n\n{markdown_table(shown)}\n')
    print(summary)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--kills', type=int, help='how many times to kill')
    what.add_argument('--sigterms', type=int, help='how many times to send SIGTERM while it trains')
    what.add_argument('--soak', type=int, help='how many steps to train')
    parser.add_argument('--out', type=Path, required=True, help='a new folder')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--every_seconds', type=float, default=1, help='between samples of a soak')
    options, words = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        if options.kills is not None:
            kept = study_kills(options.kills, options.out, words, options.seed)
        elif options.sigterms is not None:
            kept = study_sigterms(options.sigterms, options.out, words, options.seed)
        else:
            kept = study_soak(options.soak, options.out, words, options.every_seconds)
    except Stop as error:
        sys.exit(f'error: {error}')
    sys.exit(0 if kept else 1)


if __name__ == '__main__':
    main()
