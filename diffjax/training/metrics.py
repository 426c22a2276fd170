"""Where a run's numbers go: `metrics.csv`, TensorBoard, the terminal. Process 0 writes, the others keep quiet."""

import csv
import os
import sys
from pathlib import Path

import jax
from tqdm import tqdm


class CsvLog:
    """`metrics.csv`: one row for each logged step, never two for one step, whatever killed the run in between."""

    def __init__(self, path: Path, resume_step: int):
        """Keeps the rows up to `resume_step`; what a killed run wrote beyond it, or half wrote, goes."""
        self._path = Path(path)
        rows = []
        if self._path.exists():
            with open(self._path, newline='') as file:
                rows = list(csv.DictReader(file))
        kept = [row for row in rows if None not in row.values() and int(row['step']) <= resume_step]
        self._columns = list(kept[0]) if kept else None
        part = self._path.with_suffix('.part')
        with open(part, 'w', newline='') as file:
            if kept:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(kept)
        os.replace(part, self._path)

    def write(self, row: dict[str, float]) -> None:
        with open(self._path, 'a', newline='') as file:
            if self._columns is None:
                self._columns = list(row)
                csv.DictWriter(file, self._columns).writeheader()
            csv.DictWriter(file, self._columns).writerow(row)


class Log:
    """All of a run's logs at once."""

    def __init__(self, workdir: Path, resume_step: int, num_steps: int):
        from tensorboardX import SummaryWriter

        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._csv = CsvLog(Path(workdir) / 'metrics.csv', resume_step)
        self._events = SummaryWriter(str(Path(workdir) / 'tensorboard'), purge_step=resume_step + 1)
        self._tty = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps,
            initial=resume_step,
            unit='step',
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not self._tty,
        )
        self._num_steps = num_steps

    def advance(self) -> None:
        """One more step was started."""
        if self._writes:
            self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """A row at a logged step. values: 'loss', 'steps_per_second' and whatever else."""
        if not self._writes:
            return
        self._csv.write({'step': step, **values})
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
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
            self._events.close()
