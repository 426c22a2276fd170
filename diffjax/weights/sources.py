"""What a person points at, recognised: a folder of diffusers or transformers, a pipeline, or one safetensors file."""

import os
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.weights import dit
from diffjax.weights.architecture import Architecture, WeightsError
from diffjax.weights.folders import check_inside
from diffjax.weights.registry import ARCHITECTURES, OLDER_ATTENTION, OLDER_NAMES
from diffjax.weights.tensors import Spec, TensorFile, read_json

PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
BASES = ('diffusion_pytorch_model', 'model')
PARTS = ('transformer', 'unet')  # of a pipeline: what denoises


class Source(NamedTuple):
    """Published weights, recognised and not yet read."""

    path: Path  # the folder or file that was taken, which for a pipeline is the part of it
    architecture: Architecture
    config: dict[str, Any]
    options: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    specs: dict[str, Spec]
    files: tuple[str, ...]


class Shards(Mapping):
    """The tensors of several files as one mapping."""

    def __init__(self, files: Mapping[str, tuple[TensorFile, str]]):
        self._files = files  # name of a tensor -> the file that holds it, and its name there

    def __getitem__(self, name: str) -> np.ndarray:
        file, there = self._files[name]
        return file[there]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_source(path: str | os.PathLike, *, variant: str = '') -> Source:
    """The weights at `path`, by its config.json or, for a lone file, by the names of its tensors.

    Raises WeightsError for what does not exist, is not covered, is damaged, or is a pickle.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f'{path}: there is nothing of that name')
    if path.is_dir():
        return _open_folder(path, variant)
    if path.suffix in PICKLES:
        raise _pickle_error(path)
    if path.suffix != '.safetensors':
        raise WeightsError(f'{path}: neither a folder with a config.json nor a .safetensors file')
    return _open_lone_file(path)


def _open_folder(path: Path, variant: str) -> Source:
    if not (path / 'config.json').is_file():
        if (path / 'model_index.json').is_file():
            return _open_pipeline(path, variant)
        lone = sorted(path.glob('*.safetensors'))
        if len(lone) == 1:
            check_inside(lone[0], path)
            return _open_lone_file(lone[0])
        _refuse_pickles(path)
        raise WeightsError(f'{path}: there is no config.json in it, so what its weights are cannot be told')
    check_inside(path / 'config.json', path)
    config = read_json(path / 'config.json')
    architecture = recognise(config, path)
    files, tensors = _open_tensors(path, variant)
    places = {_name_now(name, tensors): (file, name) for name, file in tensors.items()}
    specs = {name: file.specs[there] for name, (file, there) in places.items()}
    return Source(path, architecture, config, architecture.to_options(config), Shards(places), specs, files)


def _name_now(name: str, names: Container[str]) -> str:
    """Of a tensor of attention, as diffusers writes it now; the name itself where `names` holds that too."""
    match = re.fullmatch(r'(.*\battentions\.\d+)\.(\w+)\.(weight|bias)', name)
    if match is None or match[2] not in OLDER_ATTENTION:
        return name
    now = f'{match[1]}.{OLDER_ATTENTION[match[2]]}.{match[3]}'
    return name if now in names else now


def _open_pipeline(path: Path, variant: str) -> Source:
    parts = [name for name in PARTS if (path / name / 'config.json').is_file()]
    if len(parts) != 1:
        found = ' and '.join(parts) or 'none'
        raise WeightsError(f'{path}: a pipeline, of which one of {", ".join(PARTS)} would be taken; it has {found}')
    check_inside(path / parts[0], path)
    return _open_folder(path / parts[0], variant)


def _open_lone_file(path: Path) -> Source:
    file = TensorFile(path)
    config = dit.original_config({name: spec.shape for name, spec in file.specs.items()})
    if config is None:
        raise WeightsError(
            f'{path}: a file without its config.json is read only if it is the DiT of facebookresearch, and it is not; '
            'give the folder that config.json and the weights lie in'
        )
    architecture = dit.ORIGINAL
    return Source(path, architecture, config, architecture.to_options(config), file, file.specs, (path.name,))


def recognise(config: Mapping[str, Any], path: Path) -> Architecture:
    """The covered architecture of a config.json. Raises WeightsError for any other."""
    names = config.get('architectures')
    name = config.get('_class_name', names[0] if isinstance(names, list) and names else None)
    if not isinstance(name, str):
        raise WeightsError(f'{path}/config.json names no class: neither _class_name nor architectures')
    kind = config.get('norm_type')
    name = OLDER_NAMES.get((name, kind if isinstance(kind, str) else ''), name)
    if name not in ARCHITECTURES:
        raise WeightsError(f'{path}: {name[:80]!r} is not covered; covered: {", ".join(sorted(ARCHITECTURES))}')
    return ARCHITECTURES[name]


def _open_tensors(path: Path, variant: str) -> tuple[tuple[str, ...], dict[str, TensorFile]]:
    """(the files read, name of a tensor -> its file) of a folder."""
    suffix = f'.{variant}' if variant else ''
    for base in BASES:
        lone = path / f'{base}{suffix}.safetensors'
        if lone.is_file():
            check_inside(lone, path)
            file = TensorFile(lone)
            return (lone.name,), dict.fromkeys(file, file)
        index = path / f'{base}.safetensors.index{suffix}.json'
        if index.is_file():
            check_inside(index, path)
            return _open_index(index)
    found = sorted(file.name for file in path.glob('*.safetensors'))
    if len(found) == 1 and not variant:
        check_inside(path / found[0], path)
        file = TensorFile(path / found[0])
        return (found[0],), dict.fromkeys(file, file)
    if found:
        wanted = f'the variant {variant!r}' if variant else 'one without a variant'
        raise WeightsError(f'{path}: {wanted} is not among its weights; there are {", ".join(found[:8])} (--variant)')
    _refuse_pickles(path)
    raise WeightsError(f'{path}: there are no .safetensors files in it')


def _open_index(index: Path) -> tuple[tuple[str, ...], dict[str, TensorFile]]:
    """Reads the files that an index names. They lie beside it: a name that leads elsewhere is refused."""
    places = read_json(index).get('weight_map')
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f'{index}: it has no weight_map from tensors to files')
    names = sorted(set(places.values()))
    for name in names:
        plain = name.isprintable() and not {'/', '\\', ':'} & set(name) and name.endswith('.safetensors')
        if not plain or len(name) > 255:
            raise WeightsError(f'{index}: {name[:80]!r} is no name of a .safetensors file beside it')
    for name in names:
        check_inside(index.parent / name, index.parent)
    if lacking := [name for name in names if not (index.parent / name).is_file()]:
        shown = ', '.join(lacking[:8])
        raise WeightsError(f'{index}: {len(lacking)} of the {len(names)} files it names are missing: {shown}')
    files = {name: TensorFile(index.parent / name) for name in names}
    told, held = set(places.items()), {(tensor, name) for name, file in files.items() for tensor in file}
    if told != held:
        tensor, name = min(told ^ held)
        word = 'does not hold' if (tensor, name) in told else 'holds, unknown to the index,'
        raise WeightsError(f'{index}: it differs from its files in {len(told ^ held)} places: {name} {word} {tensor!r}')
    return tuple(names), {tensor: files[name] for tensor, name in places.items()}


def _refuse_pickles(path: Path) -> None:
    for file in sorted(path.iterdir()):
        if file.suffix in PICKLES:
            raise _pickle_error(file)


def _pickle_error(path: Path) -> WeightsError:
    load = f"safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')"
    return WeightsError(
        f'{path}: a pickle runs whatever code it holds when it is opened, so it is not read. Where you trust it, '
        f'convert it with torch and safetensors: {load}'
    )
