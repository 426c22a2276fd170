"""Damaged weights by the thousand: each is imported, or refused by a WeightsError in one line, and nothing else.

  python experiments/fuzz_weights.py --count=100000 --processes=2

A tiny DiT in two safetensors files with their index and config.json, as diffusers writes them, is damaged in one of its
files at a time: bits flipped, bytes removed, doubled and moved, files cut short; lengths, dtypes, shapes and offsets of
a header that overlap, lie outside, or speak of 2^60 bytes; JSON nested without end, with names that stand there twice,
of other types. What is not a WeightsError of one short line, or asks for more than a gigabyte, is a failure: the
damage is then kept in --keep, and the exit code is 1.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY = 2**30  # bytes that a process may ask for beside those that it has when it begins
FILES = 'model-1.safetensors', 'model-2.safetensors', 'model.safetensors.index.json', 'config.json'
SHARES = 48, 24, 26, 2  # of the damage: another valid config costs a trace of another network, half a second
CONFIG = {
    '_class_name': 'DiTTransformer2DModel',
    'activation_fn': 'gelu-approximate',
    'attention_head_dim': 8,
    'in_channels': 3,
    'norm_elementwise_affine': False,
    'norm_eps': 1e-5,
    'norm_type': 'ada_norm_zero',
    'num_attention_heads': 2,
    'num_embeds_ada_norm': 5,
    'num_layers': 2,
    'out_channels': 4,
    'patch_size': 2,
    'sample_size': 4,
}
VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        7,
        2**31,
        2**60,
        2**63,
        2**200,
        0.5,
        -0.0,
        1e-5,
        1e308,
        float('nan'),
        float('inf'),
    ),
    *('', 'a', '\ud800', '\0', '../x', '/etc/passwd', 'gelu', 'Transformer2DModel', 'F16', 'BF16', 'x' * 5000),
    *([], [1], [-1, 2], [2**31, 2**31], [[2]], ['a'], {}, {'a': 1}, {'data_offsets': [0, 1]}),
)


def write_source(folder: Path) -> dict[str, bytes]:
    """The whole source, its random values in float16; returns its files."""
    import numpy as np

    from diffjax.weights.dit import ARCHITECTURE
    from diffjax.weights.engine import expected_shapes
    from diffjax.weights.tensors import Spec, TensorWriter

    rng, tensors = np.random.default_rng(0), {}
    for name, shape in expected_shapes(ARCHITECTURE, ARCHITECTURE.to_options(CONFIG)).items():
        first = name.replace('transformer_blocks.1.norm1.emb', 'transformer_blocks.0.norm1.emb')  # all blocks share it
        tensors[name] = tensors[first] if first in tensors else rng.standard_normal(shape).astype(np.float16)
    places = {name: FILES[i % 2] for i, name in enumerate(tensors)}
    for file in FILES[:2]:
        specs = {name: Spec(a.shape, a.dtype) for name, a in tensors.items() if places[name] == file}
        with TensorWriter(folder / file, specs) as writer:
            for name in specs:
                writer.write(name, tensors[name])
    (folder / FILES[2]).write_text(json.dumps({'weight_map': places}))
    (folder / FILES[3]).write_text(json.dumps(CONFIG))
    return {name: (folder / name).read_bytes() for name in FILES}


# Damage ---------------------------------------------------------------------------------------------------------------


def scramble(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some of them changed, removed, doubled, moved, or a bit of them flipped."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 50))):
        if not content:
            break
        place, length = draw.randrange(len(content)), draw.choice((1, 1, 2, 8, 100))
        part = content[place : place + length]
        kind = draw.randrange(6)
        if kind == 0:
            content[place : place + length] = bytes(draw.randrange(256) for _ in part)
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place:place] = part
        elif kind == 3:
            del content[place:]
        elif kind == 4:
            content[place] ^= 1 << draw.randrange(8)
        else:
            content[place : place + 1] = draw.choice(b'{}[]",:0123456789-e').to_bytes()
    return bytes(content)


def change(tree: Any, draw: random.Random) -> Any:
    """JSON with one value, key or entry changed, at any depth."""
    node, parents = tree, []
    while isinstance(node, dict | list) and node and draw.random() < 0.8:
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        parents.append((node, key))
        node = node[key]
    if not parents:
        return draw.choice(VALUES)
    node, key = parents[-1]
    kind = draw.randrange(4)
    if kind == 0:
        node[key] = draw.choice(VALUES)
    elif kind == 1:
        del node[key]
    elif kind == 2 and isinstance(node, dict):
        node[draw.choice(('a', '\n', '\ud800', '..', 'shape', '__metadata__', 'x' * 2000))] = node[key]
    else:
        node[key] = draw.choice(({'a': node[key]}, [node[key], node[key]], str(node[key])))
    return tree


def misplace(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A header of which one tensor overlaps, leaves a gap, lies outside, or is of another size than it says."""
    name = draw.choice([name for name in header if name != '__metadata__'])
    entry, other = header[name], header[draw.choice([name for name in header if name != '__metadata__'])]
    begin, end = entry['data_offsets']
    far = draw.choice((1, 2, 4096, 2**31, 2**60, 2**62, 2**64))
    kind = draw.randrange(6)
    if kind == 0:
        entry['data_offsets'] = draw.choice(
            ([begin + far, end + far], [begin, end + far], [begin - far, end], [end, begin])
        )
    elif kind == 1:
        entry['data_offsets'] = other['data_offsets']
    elif kind == 2:
        entry['shape'] = draw.choice(
            (entry['shape'][::-1], [*entry['shape'], 1], [far, far], [far], [-1], [0, far], [])
        )
    elif kind == 3:
        entry['dtype'] = draw.choice(
            ('F64', 'F32', 'BF16', 'F8_E4M3', 'I64', 'U8', 'BOOL', 'C64', 'f16', '', 'O', '<f2')
        )
    elif kind == 4:
        entry['shape'], entry['data_offsets'] = [2**30, 2**29], [begin, begin + 2**60]
    else:
        del header[name]
    return header


def header_of(content: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(content[:8], 'little')
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """length: that the file claims; None: the right one."""
    return (len(header) if length is None else length).to_bytes(8, 'little') + header + data


def damage_table(text: bytes, draw: random.Random) -> bytes:
    """JSON of which a value is another, a key stands there twice, or brackets have no end."""
    kind = draw.randrange(10)
    if kind == 0:
        return draw.choice((b'[', b'{"a":', b'[{"a":')) * draw.choice((10, 1000, 100_000))
    if kind == 1:
        key, value = draw.choice(list(json.loads(text).items()))
        return text.rstrip()[:-1] + b', ' + json.dumps({key: value}).encode()[1:]
    return json.dumps(change(json.loads(text), draw)).encode()


def damage(name: str, content: bytes, draw: random.Random) -> bytes:
    """One file of the source, damaged."""
    if draw.random() < 0.35:
        return scramble(content, draw)
    if name.endswith('.json'):
        return damage_table(content, draw)
    header, data = header_of(content)
    text, kind = json.dumps(header).encode(), draw.randrange(8)
    if kind == 0:
        near = 0, 1, 7, len(text) - 1, len(text) + 1, len(content)
        length = draw.choice((*near, 10**8, 10**8 + 1, 2**31, 2**60, 2**64 - 1))
        return with_header(text, data, length)
    if kind == 1:
        return with_header(damage_table(text, draw), data)
    if kind == 2:
        return with_header(scramble(text, draw), data)
    if kind == 3:
        return with_header(json.dumps(change(header, draw)).encode(), data)
    return with_header(json.dumps(misplace(header, draw)).encode(), data)


# What becomes of it ---------------------------------------------------------------------------------------------------


def attempt(path: Path) -> None:
    """Everything that an import does but writing."""
    from diffjax.weights.engine import import_leaves
    from diffjax.weights.sources import open_source

    source = open_source(path)
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    for leaf in import_leaves(source.architecture, source.options, source.tensors, shapes).values():
        leaf.read()


def outcome(path: Path) -> str:
    """'' where it was taken, or what was said. Anything but a WeightsError that prints in one short line is raised."""
    from diffjax.weights import WeightsError

    try:
        attempt(path)
    except WeightsError as error:
        text = str(error)
        if not text or '\n' in text or len(text) >= 3000:
            raise AssertionError(f'no line for a person: {text[:100]!r}') from error
        text.encode()
        return text
    return ''


def kind_of(text: str) -> str:
    """A message without the names and numbers in it."""
    text = re.sub(r'\S*/\S*', 'PATH', text)
    text = re.sub(r"'[^']*'|\[[^]]*\]|\([^)]*\)", '...', text)
    text = re.sub(r'[\w.]*[\d*][\w.*]*', '#', text)
    return text[:100]


def limit_memory() -> None:
    """From here on, what asks for more than MEMORY meets a MemoryError."""
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


def fuzz(seed: int, count: int, until: float, keep: str) -> tuple[collections.Counter, list[str]]:
    """(kinds of outcomes and how often, failures) of `count` damaged sources, or of fewer when time is up."""
    draw, outcomes, failures = random.Random(seed), collections.Counter(), []
    if time.monotonic() > until:
        return outcomes, failures
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        whole = write_source(folder)
        assert outcome(folder) == '', 'the whole source is not taken'
        limit_memory()
        for i in range(count):
            if time.monotonic() > until:
                break
            (name,) = draw.choices(FILES, SHARES)
            content = damage(name, whole[name], draw)
            (folder / name).write_bytes(content)
            try:
                outcomes[kind_of(outcome(folder)) or 'taken'] += 1
            except BaseException as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                told = f'{type(error).__name__}: {error} ({at.filename}:{at.lineno})'
                failures.append(f'{name}, {seed}-{i}: {told}')
                if keep:
                    Path(keep).mkdir(parents=True, exist_ok=True)
                    (Path(keep) / f'{seed}-{i}-{name}').write_bytes(content)
                if not isinstance(error, Exception):
                    raise
            (folder / name).write_bytes(whole[name])
    return outcomes, failures


def _work(arguments: tuple) -> tuple[collections.Counter, list[str]]:
    return fuzz(*arguments)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=100_000, help='of damaged sources; default 100,000')
    parser.add_argument('--processes', type=int, default=os.cpu_count())
    parser.add_argument('--seconds', type=float, default=float('inf'), help='after which it ends, whatever is done')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--keep', default='', metavar='FOLDER', help='where what fails is kept')
    options = parser.parse_args(argv)
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    began = time.monotonic()
    parts = options.processes * 8
    share = [options.count // parts + (i < options.count % parts) for i in range(parts)]
    until = began + options.seconds
    jobs = [(options.seed * parts + i, count, until, options.keep) for i, count in enumerate(share)]
    outcomes, failures = collections.Counter(), []
    with multiprocessing.get_context('spawn').Pool(options.processes, maxtasksperchild=1) as pool:
        for found, failed in pool.imap_unordered(_work, jobs):
            outcomes += found
            failures += failed
            print(f'{sum(outcomes.values()) + len(failures):,} done, {len(failures)} failures', file=sys.stderr)
    total = sum(outcomes.values()) + len(failures)
    refused = len(outcomes) - ('taken' in outcomes)
    print(
        f'{total:,} damaged sources in {time.monotonic() - began:.0f} s: {outcomes["taken"]:,} taken (their values '
        f'alone were damaged), {total - outcomes["taken"] - len(failures):,} refused in {refused} kinds of messages, '
        f'{len(failures)} failures'
    )
    for kind, count in outcomes.most_common(25):
        print(f'{count:9,}  {kind}')
    print('\n'.join(failures[:50]))
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
