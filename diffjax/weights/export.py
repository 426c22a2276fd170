"""From an imported folder back to one that diffusers or transformers load: config.json and safetensors, sharded."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffjax.weights.architecture import INPUT, Architecture, WeightsError
from diffjax.weights.engine import expected_shapes, export_leaves
from diffjax.weights.folders import appearing, check_absent
from diffjax.weights.registry import ARCHITECTURES
from diffjax.weights.store import Report, StoredLeaves, read_record
from diffjax.weights.tensors import DTYPES, Spec, TensorWriter


def export_folder(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    shard_bytes: int = 5_000_000_000,
    start: Callable[[Architecture, int], Report] = lambda architecture, num_bytes: lambda n: None,
) -> Path:
    """Writes an imported folder as `out`, which must not be there; each tensor in the dtype that it came in."""
    check_absent(out)
    record = read_record(folder)
    architecture, options = ARCHITECTURES[record['class_name']], exported_options(record)
    config = architecture.to_config(options)
    if config and architecture.to_options(json.loads(json.dumps(config))) != options:
        raise WeightsError(f'{architecture.class_name} has no settings for this network, {record["network"]}')
    dtypes = record['dtypes']
    specs = {
        name: Spec(shape, DTYPES[dtypes['others'].get(name, dtypes['most'])])
        for name, shape in expected_shapes(architecture, options).items()
    }
    report = start(architecture, sum(spec.num_bytes for spec in specs.values()))
    shapes = {path: tuple(known['shape']) for path, known in record['parameters'].items()}
    leaves = StoredLeaves(folder, record)
    with appearing(out) as part:
        if config:
            (part / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
        base = 'diffusion_pytorch_model' if '_class_name' in config else 'model'
        with contextlib.ExitStack() as stack:
            files = _open_shards(part, base, specs, shard_bytes, stack)
            for name, a in export_leaves(architecture, options, leaves, shapes):
                files[name].write(name, a)
                report(specs[name].num_bytes)
                del a  # before the next is read
    return Path(out)


def exported_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an architecture, from network.json."""
    return {key: value for key, value in record['network'].items() if key != 'name'} | {INPUT: record['input']}


def _open_shards(
    folder: Path, base: str, specs: Mapping[str, Spec], limit: int, stack: contextlib.ExitStack
) -> dict[str, TensorWriter]:
    """Name of a tensor -> the file it goes to: one file, or several of at most `limit` bytes, and then an index."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.num_bytes
    names = [f'{base}-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
    if len(shards) == 1:
        names = [f'{base}.safetensors']
    else:
        total = sum(spec.num_bytes for spec in specs.values())
        places = {tensor: name for shard, name in zip(shards, names) for tensor in shard}
        index = {'metadata': {'total_size': total}, 'weight_map': places}
        (folder / f'{base}.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')
    writers = [stack.enter_context(TensorWriter(folder / name, shard)) for shard, name in zip(shards, names)]
    return {tensor: writer for shard, writer in zip(shards, writers) for tensor in shard}
