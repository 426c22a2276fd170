"""Folders as diffusers writes them, by the library safetensors."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))

from tiny_dit import CONFIG, draw  # noqa: E402


@pytest.fixture
def tensors():
    return draw()


@pytest.fixture
def write_folder(tmp_path):
    """(tensors, name, config, files) -> a folder. files: file name -> the names of its tensors."""

    def write(tensors, name='source', config=CONFIG, files=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if config is not None:
            (folder / 'config.json').write_text(json.dumps(config))
        for file, names in (files or {'diffusion_pytorch_model.safetensors': list(tensors)}).items():
            save_file({name: tensors[name] for name in names}, folder / file)
        return folder

    return write


@pytest.fixture
def source(write_folder, tensors):
    return write_folder(tensors)
