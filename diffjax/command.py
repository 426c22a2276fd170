"""The command line: flags, and every mistake in them told in one line."""

import difflib
import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

FLAGS = flags.FLAGS
flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, logs, samples, report.')
flags.DEFINE_enum('mode', 'train', ['train', 'sample', 'evaluate'], 'What to do.')
flags.DEFINE_string('labels', '', 'sample: classes to draw, such as 0,1,2 or 7; repeated up to --num_samples.')
flags.DEFINE_integer('num_samples', None, 'sample, evaluate: how many. Default: 10 of each class; the config.', 1)
flags.DEFINE_integer('seed', 0, 'sample, evaluate: seed of the samples.')
flags.DEFINE_string('out', '', 'sample: PNG and NPZ are written to OUT.png and OUT.npz. Default: in WORKDIR/samples/.')
flags.DEFINE_string('coordinator', '', 'Address host:port of process 0, or auto (TPU pods, Slurm). Empty: one process.')
flags.DEFINE_integer('num_processes', None, 'With --coordinator=host:port: number of processes.')
flags.DEFINE_integer('process_id', None, 'With --coordinator=host:port: number of this process.')


def fail(message: str) -> None:
    """Ends the program with one line on stderr."""
    print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> list[str]:
    """Flags, as `app.run(flags_parser=...)` wants it."""
    try:
        if 'config' not in FLAGS:
            stored = _stored_config(argv)
            if stored is None:
                config_flags.DEFINE_config_file('config', None, 'The experiment: FILE.py or FILE.py:ARGUMENT.')
            else:
                config_flags.DEFINE_config_dict('config', stored, 'The experiment, read from the workdir.')
        rest = FLAGS(argv)
        _ = FLAGS.config  # reads the file
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        fail(_unknown_key(argv) or _one_line(error))
    except OSError:
        name = _values(argv, '--config')['--config'].partition(':')[0]
        fail(
            f'--config={name}: there is no such file' if not Path(name).exists() else f'--config={name} cannot be read'
        )
    if len(rest) > 1:
        fail(f'stray words on the command line: {" ".join(rest[1:])}; flags are written --name=value')
    return rest


def config_argument() -> str:
    """FILE.py as given to --config, '' where the workdir's own config is used."""
    try:
        return config_flags.get_config_filename(FLAGS['config']).partition(':')[0]
    except (AttributeError, ValueError):
        return ''


def _values(argv: list[str], *names: str) -> dict[str, str | None]:
    """The values of some flags before flags are parsed."""
    values = dict.fromkeys(names)
    for i, word in enumerate(argv):
        name, equals, value = word.partition('=')
        if name in values:
            values[name] = value if equals else (argv[i + 1] if i + 1 < len(argv) else '')
    return values


def _stored_config(argv: list[str]) -> ConfigDict | None:
    """The workdir's config, for a command that names none."""
    given = _values(argv, '--config', '--workdir')
    if given['--config'] is not None or not given['--workdir']:
        return None
    path = Path(given['--workdir']) / 'config.json'
    return ConfigDict(json.loads(path.read_text())) if path.exists() else None


def _unknown_key(argv: list[str]) -> str:
    """The message for the first --config.KEY that the config does not have; '' where every key is known."""
    try:
        config = FLAGS['config'].value
    except (flags.Error, AttributeError, OSError, ValueError):
        return ''
    for word in argv:
        node, path = config, word.partition('=')[0].removeprefix('--').split('.')
        for depth, key in enumerate(path[1:] if path[0] == 'config' else []):
            if not isinstance(node, ConfigDict) or key not in node:
                known = list(node) if isinstance(node, ConfigDict) else []
                hint = difflib.get_close_matches(key, known, n=1)
                section = '.'.join(path[: depth + 1])
                return (
                    f'--{".".join(path)}: unknown key {key!r}{f" (did you mean {hint[0]}?)" if hint else ""}; '
                    f'valid in {section}: {", ".join(known) or "nothing, it is a value"}'
                )
            node = node[key]
    return ''


def _one_line(error: Exception) -> str:
    """What a person needs of an error: of a config file's traceback the last line."""
    text = str(error.args[0]) if error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not any(line.startswith('Traceback') for line in lines):
        return ' '.join(lines)
    return lines[-1].partition(': ')[2] or lines[-1]
