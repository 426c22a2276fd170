"""`python -m diffjax.data`, run in this process."""

import importlib.util

import pytest

from diffjax.data.__main__ import main


def test_prepare_then_info(tmp_path, capsys):
    assert main(['prepare', 'digits', f'--data_dir={tmp_path}']) == 0
    assert f'Prepared: {tmp_path}/digits/1.0.0' in capsys.readouterr().out
    assert main(['info', 'digits', f'--data_dir={tmp_path}']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'digits train: 1,437 examples, image 8x8x1, 10 classes, 0.1 MiB decoded'
    assert lines[1].startswith('digits test: 360 examples')


def test_prepare_latents_from_a_manual_directory(tmp_path, capsys, write_shard):
    write_shard(tmp_path / 'shards' / 'train' / 'a.npz', 2)
    options = [f'--data_dir={tmp_path}', f'--manual_dir={tmp_path / "shards"}']
    assert main(['prepare', 'imagenet256_latents', *options]) == 0
    assert 'imagenet256_latents train: 2 examples, latent 32x32x4, 1000 classes' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['info', 'cifar10'], 'python -m diffjax.data prepare cifar10'),
        (['prepare', 'imagenet256_latents'], '--manual_dir=DIR'),
        (['prepare', 'digitz'], 'Did you mean digits'),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, words, tmp_path, capsys):
    assert main([*arguments, f'--data_dir={tmp_path}']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and words in line


@pytest.mark.skipif(importlib.util.find_spec('tensorflow') is not None, reason='TensorFlow is installed')
def test_a_builder_of_tfds_without_tensorflow_stops_before_downloading(tmp_path, capsys):
    assert main(['prepare', 'cifar10', f'--data_dir={tmp_path}']) == 2
    assert 'TensorFlow is not installed' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_explains_the_names(capsys):
    with pytest.raises(SystemExit) as caught:
        main(['--help'])
    assert caught.value.code == 0
    assert 'imagenet256_latents' in capsys.readouterr().out
