"""`python -m diffjax.evaluation fid SAMPLES REFERENCE --weights=...`: ADM's figures of images that lie in files.

`python -m diffjax.evaluation statistics IMAGES OUT.npz --weights=...` writes a reference for them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffjax.evaluation.collection import collect
from diffjax.evaluation.image_sets import open_images
from diffjax.evaluation.references import (
    check_reference,
    image_reference,
    read_reference,
    reference_figures,
    write_reference,
)
from diffjax.evaluation.report import figure_lines
from diffjax.evaluation.spaces import Space, inception, pixels, shapes
from diffjax.nets import resizing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m diffjax.evaluation',
        description='FID, sFID, Inception Score, precision and recall in the protocol of ADM (Dhariwal & Nichol 2021).',
        epilog="IMAGES and SAMPLES are NPZ archives with a uint8 array 'arr_0' [N, H, W, C] (such as a run's "
        'samples.npz, or those of ADM), or folders of pictures of one size. WEIGHTS is a safetensors copy of '
        'pt_inception-2015-12-05-6726825d.pth: the two lines that make it stand in diffjax/weights/inception.py. '
        'Published figures are of 50,000 samples; fewer show higher distances.',
    )
    commands = parser.add_subparsers(dest='command', required=True)
    fid = commands.add_parser('fid', help='figures of samples against a reference')
    fid.add_argument('images', metavar='SAMPLES')
    fid.add_argument('reference', metavar='REFERENCE', help="ADM's .npz (mu, sigma, mu_s, sigma_s, arr_0), or images")
    fid.add_argument('--num_samples', type=int, default=0, help='the first so many samples; default all')
    fid.add_argument('--out', default='', help='a JSON file for the figures')
    statistics = commands.add_parser('statistics', help='write the moments of images as a reference')
    statistics.add_argument('images', metavar='IMAGES')
    statistics.add_argument('out', metavar='OUT.npz')
    for command in (fid, statistics):
        command.add_argument('--weights', default='', help='Inception weights, a safetensors file')
        command.add_argument('--features', choices=('inception', 'pixels', 'shapes'), default='inception')
        command.add_argument(
            '--resize', choices=resizing.__all__, default='tensorflow', help="default tensorflow, as ADM's evaluator"
        )
        command.add_argument('--batch_size', type=int, default=64, help='images at once, over all devices; default 64')
    return parser


def _space(args: argparse.Namespace) -> Space:
    if args.features == 'pixels':
        return pixels(batch_size=args.batch_size)
    if args.features == 'shapes':
        return shapes(batch_size=args.batch_size)
    return inception(weights=args.weights, resize=args.resize, batch_size=args.batch_size)


def _fid(args: argparse.Namespace) -> None:
    if args.num_samples < 0:
        raise ValueError(f'--num_samples is at least 1, or 0 for all; got {args.num_samples}')
    samples, reference, space = open_images(args.images), read_reference(args.reference), _space(args)
    samples = samples.first(args.num_samples or samples.shape[0])
    figures = reference_figures(samples, reference, space, progress=sys.stderr.isatty())
    print('\n'.join(figure_lines(figures)))
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=2) + '\n')


def _statistics(args: argparse.Namespace) -> None:
    images, space = open_images(args.images), _space(args)
    check_reference(image_reference(images), space, images.shape[1:])
    if Path(args.out).suffix != '.npz' or not Path(args.out).resolve().parent.is_dir():
        raise ValueError(f'{args.out}: the moments are written to a file .npz in a folder that is there')
    found = collect(images, space, progress=sys.stderr.isatty())
    write_reference(args.out, found)
    print(f'{args.out}: moments of {found.count:,} images, {space.name}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after a one-line error."""
    args = _parser().parse_args(argv)
    try:
        {'fid': _fid, 'statistics': _statistics}[args.command](args)
    except (ValueError, OSError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
