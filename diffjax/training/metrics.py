"""Where a run's numbers go: `metrics.csv`, TensorBoard, the terminal. Process 0 writes, the others keep quiet."""

import contextlib
import csv
import os
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

from diffjax.training.disk import writing


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a `metrics.csv`, [] where there is none; the last may be cut short, its values then None.

    Raises ValueError, in one line, for a file that is damaged.
    """
    try:
        with open(path, newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if None in row:
                raise ValueError('a row is longer than the first')
            if None not in row.values():
                int(row['step']), float(row.get('loss') or 0)
    except FileNotFoundError:
        return []
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise ValueError(f'{path} is damaged, or no log of a run: move it away, and a new one is begun') from error
    return rows


class CsvLog:
    """`metrics.csv`: one row for each logged step, never two for one step, whatever killed the run in between."""

    def __init__(self, path: Path, resume_step: int):
        """Keeps the rows up to `resume_step`; what a killed run wrote beyond it, or half wrote, goes."""
        self._path = Path(path)
        rows = read_rows(self._path)
        kept = [row for row in rows if None not in row.values() and int(row['step']) <= resume_step]
        self._columns = list(kept[0]) if kept else None
        self._rewrite(kept)

    def write(self, row: dict[str, float]) -> None:
        """Appends a row. A column that the rows before did not have is empty there."""
        if self._columns is not None and (new := [name for name in row if name not in self._columns]):
            self._columns += new
            self._rewrite([dict.fromkeys(new, '') | each for each in read_rows(self._path)])
        with open(self._path, 'a', newline='') as file:
            if self._columns is None:
                self._columns = list(row)
                csv.DictWriter(file, self._columns).writeheader()
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """At once: whoever reads finds the old file or the new one."""
        part = self._path.with_suffix('.part')
        with open(part, 'w', newline='') as file:
            if rows:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)
        os.replace(part, self._path)


class EventLog:
    """A TensorBoard file, written by the one who calls.

    tensorboardX's own `SummaryWriter` writes in a thread: on a full disk the thread dies, and whoever calls waits
    for ever as soon as its queue is full.
    """

    def __init__(self, folder: Path, resume_step: int):
        """TensorBoard forgets what earlier files say of later steps than `resume_step`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / 'events'))
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._file.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Log:
    """All of a run's logs at once."""

    def __init__(self, workdir: Path, resume_step: int, num_steps: int):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._workdir, self._num_steps, self._tty = Path(workdir), num_steps, sys.stderr.isatty()
        with self._writing():
            self._workdir.mkdir(parents=True, exist_ok=True)  # where the checkpoints lie elsewhere it may be new
            self._csv = CsvLog(self._workdir / 'metrics.csv', resume_step)
            self._events = EventLog(self._workdir / 'tensorboard', resume_step)
        self._bar = tqdm(
            total=num_steps,
            initial=resume_step,
            unit='step',
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not self._tty,
        )

    def advance(self) -> None:
        """One more step was started."""
        if self._writes:
            self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """A row at a logged step. values: 'loss', 'steps_per_second' and whatever else.

        Raises CannotWrite.
        """
        if not self._writes:
            return
        with self._writing():
            self._csv.write({'step': step, **values})
            self._events.write(step, values)
        self._bar.set_postfix(loss=f'{values["loss"]:.4f}', refresh=False)
        if not self._tty:
            eta = (self._num_steps - step) / values['steps_per_second']
            print(
                f'step {step}/{self._num_steps}  loss {values["loss"]:.4f}  {values["steps_per_second"]:.1f} steps/s'
                f'  ETA {int(eta // 60)}:{int(eta % 60):02d}',
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._writes:
            self._bar.close()
            with contextlib.suppress(OSError):  # every row was flushed: what is refused now was refused, and told, then
                self._events.close()

    def _writing(self):
        then = 'make room and run the command again: it goes on from the newest checkpoint'
        return writing("the run's metrics", self._workdir, then)
