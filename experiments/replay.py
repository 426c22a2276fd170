"""Where in a step the first NaN arises: the step is made again from the batch that its run has kept.

    python experiments/replay.py --workdir=runs/digits

A run that meets a NaN keeps the batch in WORKDIR/nonfinite and ends with a line that names it. This restores the newest
checkpoint before, trains up to the step (the same numbers to the bit), and runs the step operation by operation. It
prints what is not finite in the batch, in the state before and in the parameters after, and the first operation that
gives a NaN, or an infinite value, with the lines of the network or loss that ask for it. --jump leaves the training in
between out. Nothing in the workdir changes.
"""

import argparse
import sys
from pathlib import Path

from command_line import Stop

from diffjax.data import make_iterator
from diffjax.kinds import DENOISING, kind_of
from diffjax.settings import ConfigError
from diffjax.stages import open_ready
from diffjax.starting import imported_params
from diffjax.training.replay import Replayed, replay
from diffjax.workdir import read_config


def replay_run(workdir: Path, step: int | None, *, jump: bool) -> Replayed:
    """`training.replay` of the run in a workdir."""
    config = read_config(workdir)
    if config is None:
        raise Stop(f'{workdir} holds no run: there is no config.json in it')
    kind = kind_of(config)
    options = {'latents': open_ready(config, workdir, for_sampling=False)} if kind is DENOISING else {}
    experiment = kind.build(config, **options)
    iterator = make_iterator(experiment.source, batch_size=experiment.training.batch_size, seed=experiment.seed)
    params = imported_params(config, experiment, workdir)
    return replay(experiment.trainer(), iterator, workdir, step=step, params=params, jump=jump)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=Path, required=True, help='a run that ended with NaN or infinite values')
    parser.add_argument('--step', type=int, help='of the batches that are kept; default: the newest')
    parser.add_argument('--jump', action='store_true', help="takes the checkpoint's parameters, without training on")
    options = parser.parse_args(argv)
    try:
        replay_run(options.workdir, options.step, jump=options.jump)
    except (Stop, ConfigError, FileNotFoundError) as error:
        sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
    main()
