"""`python -m diffjax.evaluation`: figures of files, references written and read, and mistakes in one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffjax.evaluation.__main__ import main
from diffjax.evaluation.distances import frechet_distance
from diffjax.evaluation.features import pixels
from diffjax.evaluation.neighbours import precision_recall

RNG = np.random.default_rng(0)
REAL, SAMPLES = (
    RNG.integers(0, 256, (40, 3, 4, 3), dtype=np.uint8),
    RNG.integers(60, 256, (30, 3, 4, 3), dtype=np.uint8),
)


@pytest.fixture
def files(tmp_path):
    (tmp_path / 'real').mkdir()
    for i, image in enumerate(REAL):
        Image.fromarray(image).save(tmp_path / 'real' / f'{i:02d}.png')
    np.savez(tmp_path / 'samples.npz', SAMPLES)
    return tmp_path


def test_figures_of_an_archive_against_a_folder(files, capsys):
    words = ['fid', f'{files}/samples.npz', f'{files}/real', '--features=pixels', f'--out={files}/figures.json']
    assert main(words) == 0
    out, _ = capsys.readouterr()
    figures = json.loads((files / 'figures.json').read_text())
    distance = frechet_distance(pixels(SAMPLES), pixels(REAL))
    assert figures['frechet_distance'] == pytest.approx(distance, rel=1e-9)
    assert (figures['precision'], figures['recall']) == precision_recall(pixels(REAL), pixels(SAMPLES))
    for line in (f'Frechet distance: {distance:.4g}', 'samples: 30', 'features: pixels', 'reference: real (40 images)'):
        assert line in out.splitlines()
    assert main([*words, '--num_samples=20']) == 0
    figures = json.loads((files / 'figures.json').read_text())
    assert figures['num_samples'] == 20
    assert figures['frechet_distance'] == pytest.approx(frechet_distance(pixels(SAMPLES[:20]), pixels(REAL)), rel=1e-9)


def test_a_reference_is_written_and_read(files, capsys):
    assert main(['statistics', f'{files}/real', f'{files}/ref.npz', '--features=pixels', '--batch_size=7']) == 0
    assert capsys.readouterr().out == f'{files}/ref.npz: moments of 40 images, pixels\n'
    with np.load(files / 'ref.npz') as written:
        np.testing.assert_allclose(written['mu'], pixels(REAL).mean(0), rtol=1e-10)
        np.testing.assert_allclose(written['sigma'], np.cov(pixels(REAL), rowvar=False), rtol=1e-10, atol=1e-12)
    assert main(['fid', f'{files}/samples.npz', f'{files}/ref.npz', '--features=pixels']) == 0
    distance = frechet_distance(pixels(SAMPLES), pixels(REAL))
    assert f'Frechet distance: {distance:.4g}' in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(files, capsys):
    np.savez(files / 'adm.npz', mu=np.zeros(2048), sigma=np.eye(2048))
    samples, real = f'{files}/samples.npz', f'{files}/real'
    for words, message in (
        (['fid', samples, real], 'Inception needs its weights'),
        (['fid', samples, real, '--weights=none.safetensors'], 'none.safetensors: No such file'),
        (['fid', f'{files}/x.npz', real, '--features=pixels'], 'x.npz is neither an NPZ archive nor a folder'),
        (['fid', samples, f'{files}/adm.npz', '--features=pixels'], 'moments of 2048 features, and pixels have 36'),
        (['fid', samples, real, '--features=pixels', '--num_samples=-1'], '--num_samples is at least 1'),
        (['fid', samples, real, '--features=pixels', '--batch_size=0'], 'batch_size is at least 1, got 0'),
        (['statistics', real, f'{files}/out', '--features=pixels'], 'written to a file .npz in a folder that is there'),
        (['statistics', real, f'{files}/no/out.npz', '--features=pixels'], 'in a folder that is there'),
    ):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == '' and err.startswith('error: ') and err.count('\n') == 1 and message in err, (words, err)


def test_help_says_what_files_are_needed():
    done = subprocess.run([sys.executable, '-m', 'diffjax.evaluation', '--help'], capture_output=True, text=True)
    assert done.returncode == 0
    for word in ('SAMPLES', 'arr_0', 'pt_inception-2015-12-05', '50,000', 'statistics'):
        assert word in done.stdout
