"""`python -m diffjax.data prepare NAME` writes a dataset to disk; `python -m diffjax.data info NAME` describes it."""

import argparse
import sys
from collections.abc import Sequence

from diffjax.data import list_splits, open_source, prepare_dataset


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m diffjax.data',
        description='Prepare and describe datasets.',
        epilog='NAME is digits, shapes, moving_digits or moving_shapes (embedded, prepared by themselves on first '
        'use), imagenet256_latents or imagenet512_latents (from your own shards), or an image dataset of TFDS, for '
        'example cifar10.',
    )
    commands = parser.add_subparsers(dest='command', required=True)
    prepare = commands.add_parser('prepare', help='write a dataset to disk as array_record')
    info = commands.add_parser('info', help='show the splits, sizes and shapes of a prepared dataset')
    for command in (prepare, info):
        command.add_argument('name', metavar='NAME', help='name[/config][:version]')
        command.add_argument('--data_dir', help='where datasets live; default $TFDS_DATA_DIR or ~/tensorflow_datasets')
    prepare.add_argument('--manual_dir', help='where the files lie that you provide, for datasets that need them')
    return parser


def _describe(name: str, data_dir: str | None) -> None:
    for split, num_examples in list_splits(name, data_dir=data_dir).items():
        source = open_source(name, split, data_dir=data_dir)
        shape = 'x'.join(map(str, source.image_shape))
        classes = f'{source.num_classes} classes' if source.num_classes else 'no labels'
        size = f'{source.num_bytes / 2**20:,.1f} MiB decoded'
        print(f'{name} {split}: {num_examples:,} examples, {source.kind} {shape}, {classes}, {size}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after a one-line error."""
    args = _parser().parse_args(argv)
    try:
        if args.command == 'prepare':
            print(f'Prepared: {prepare_dataset(args.name, data_dir=args.data_dir, manual_dir=args.manual_dir)}')
        _describe(args.name, args.data_dir)
    except (ValueError, OSError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
