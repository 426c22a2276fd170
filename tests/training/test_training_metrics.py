"""metrics.csv after any end of the run before: never a step twice, never half a row."""

import csv

import pytest

from diffjax.training.metrics import CsvLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'metrics.csv'


def rows(path):
    with open(path, newline='') as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def write(path, resume_step, *steps):
    log = CsvLog(path, resume_step)
    for step in steps:
        log.write({'step': step, 'loss': step / 3, 'grad_norm': 1e-9})


def test_rows_come_back_exactly(path):
    write(path, 0, 1, 2)
    assert rows(path) == [{'step': s, 'loss': s / 3, 'grad_norm': 1e-9} for s in (1, 2)]


def test_a_resume_drops_what_came_after_its_checkpoint(path):
    write(path, 0, 2, 4, 6, 8)
    write(path, 5, 6, 8, 10)
    assert [row['step'] for row in rows(path)] == [2, 4, 6, 8, 10]
    assert path.read_text().count('step') == 1
    write(path, 0, 2)  # all checkpoints were lost
    assert [row['step'] for row in rows(path)] == [2]


@pytest.mark.parametrize('cut', range(1, 40))
def test_a_half_written_row_goes(path, cut):
    """The file ends at any byte behind row 20. Of step 140 there may be left 14, or 1, which are below."""
    write(path, 0, 20, 140)
    whole = path.read_bytes()
    kept = whole[: whole.index(b'\n140,') + 1]
    path.write_bytes(whole[: max(len(whole) - cut, len(kept))])
    write(path, 20, 140)
    assert path.read_bytes() == whole


@pytest.mark.parametrize('length', range(30))
def test_a_file_torn_before_the_first_checkpoint(path, length):
    write(path, 0, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    write(path, 0, 2)
    assert path.read_bytes() == whole


def test_a_crash_while_rewriting_leaves_the_old_file(path, monkeypatch):
    write(path, 0, 2, 4, 6)
    before = path.read_bytes()

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('diffjax.training.metrics.os.replace', crash)
    with pytest.raises(KeyboardInterrupt):
        CsvLog(path, 2)
    assert path.read_bytes() == before
