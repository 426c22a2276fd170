"""`python -m diffjax.weights import SOURCE --out=DIR` brings published weights here; `export` takes them back."""

import argparse
import logging
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from diffjax.weights.architecture import WeightsError

# Received and not yet obeyed. Orbax writes in threads, which an exception in the main one would leave behind: the
# command stops between two arrays instead, where it can clear up.
_signals: list[int] = []
UNITS = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


def _size(text: str) -> int:
    match = re.fullmatch(r'(\d+)(KB|MB|GB|)', text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f'a size is written 5GB, 500MB or a number of bytes; got {text!r}')
    return int(match[1]) * UNITS[match[2]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m diffjax.weights',
        description='Published weights, in and out.',
        epilog='SOURCE is a local folder of diffusers or transformers (config.json and safetensors, sharded or not), '
        'a pipeline of diffusers (its transformer or unet is taken), or a safetensors copy of a checkpoint of '
        'facebookresearch/DiT. Nothing is downloaded, and pickles are not read.',
    )
    commands = parser.add_subparsers(dest='command', required=True)
    bring = commands.add_parser('import', help='read published weights and write them as a folder of diffjax')
    bring.add_argument('source', metavar='SOURCE', help='a folder or a .safetensors file')
    bring.add_argument('--out', required=True, metavar='DIR', help='the folder to write, which must not be there')
    bring.add_argument(
        '--dtype',
        choices=('float32', 'source'),
        default='float32',
        help='of the parameters on disk. float32 (default) holds 16-bit weights exactly; source keeps what they were',
    )
    take = commands.add_parser('export', help='write an imported folder as diffusers or transformers load it')
    take.add_argument('folder', metavar='DIR', help='what `import` wrote')
    take.add_argument('--out', required=True, metavar='FOLDER', help='the folder to write, which must not be there')
    take.add_argument('--shard_size', type=_size, default='5GB', help='of a file at most; default 5GB')
    commands.add_parser('list', help='show the covered architectures')
    look = commands.add_parser('inspect', help='say what a SOURCE, or a DIR that `import` wrote, is')
    look.add_argument('source', metavar='SOURCE')
    for command in (bring, look):
        command.add_argument('--variant', default='', help='of the files, such as fp16')
    return parser


def _bar(num_bytes: int):
    """What is told of progress: a bar with rate and remaining time where somebody looks. It ends what was signalled."""
    from tqdm import tqdm

    bar = tqdm(total=num_bytes, unit='B', unit_scale=True, disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def report(done: int) -> None:
        bar.update(done)
        if _signals:
            bar.close()
            raise WeightsError(f'stopped by {signal.Signals(_signals[0]).name}, and nothing was written')

    return report


def _import(args: argparse.Namespace) -> None:
    from diffjax.weights.store import import_source, read_record

    def start(source, num_bytes):
        print(f'{source.path}: {source.architecture.class_name}, {_count(source.specs)}', flush=True)
        return _bar(num_bytes)

    dtype = None if args.dtype == 'source' else args.dtype
    out = import_source(args.source, args.out, variant=args.variant, dtype=dtype, start=start)
    print(f'{out}: {_network(read_record(out))}')


def _export(args: argparse.Namespace) -> None:
    from diffjax.weights.export import export_folder

    def start(architecture, num_bytes):
        print(f'{args.folder}: {architecture.class_name}, {num_bytes / 1e6:,.1f} MB', flush=True)
        return _bar(num_bytes)

    print(f'written: {export_folder(args.folder, args.out, shard_bytes=args.shard_size, start=start)}')


def _list(args: argparse.Namespace) -> None:
    del args
    from diffjax.weights.registry import ARCHITECTURES, OLDER_NAMES

    for name, architecture in ARCHITECTURES.items():
        older = [f'{old} with norm_type {kind}' for (old, kind), now in OLDER_NAMES.items() if now == name]
        print(f'{name:28} {architecture.network}{f"   (also {older[0]})" if older else ""}')


def _inspect(args: argparse.Namespace) -> None:
    from diffjax.weights.engine import check_names, expected_shapes
    from diffjax.weights.sources import open_source
    from diffjax.weights.store import read_record

    if (Path(args.source) / 'network.json').is_file():
        record = read_record(args.source)
        print(f'{args.source}: {record["class_name"]} from {record["source"]["path"]}\n{_network(record)}')
        return
    source = open_source(args.source, variant=args.variant)
    print(f'{source.path}: {source.architecture.class_name}, {_count(source.specs)}, {", ".join(source.files[:8])}')
    print(f'our {source.architecture.network}: {source.options}')
    expected = expected_shapes(source.architecture, source.options)
    constants = source.architecture.constants(source.options)
    found = {name: spec.shape for name, spec in source.specs.items()}
    wanted = {name: shape for name, shape in expected.items() if name not in constants}
    check_names(source.architecture.class_name, found, wanted, constants)
    print('every tensor has the name and shape of the table')


def _count(specs) -> str:
    from diffjax.weights.tensors import total_bytes

    kinds = sorted({str(spec.dtype) for spec in specs.values()})
    return f'{len(specs)} tensors, {total_bytes(specs.values()) / 1e6:,.1f} MB, {" and ".join(kinds)}'


def _network(record) -> str:
    import math

    numbers = sum(math.prod(known['shape']) for known in record['parameters'].values())
    options = ', '.join(f'{key}={value!r}' for key, value in record['network'].items() if key != 'name')
    return f'{record["network"]["name"]}({options}), {numbers:,} parameters'


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 after a one-line error, 128 and its number after a signal."""
    args = _parser().parse_args(argv)
    logging.getLogger('absl').setLevel(logging.ERROR)
    _signals.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: _signals.append(number))
    try:
        {'import': _import, 'export': _export, 'list': _list, 'inspect': _inspect}[args.command](args)
    except (WeightsError, OSError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 128 + _signals[0] if _signals else 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
