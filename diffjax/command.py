"""The command line: flags, and every mistake in them told in one line."""

import difflib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from diffjax.json_files import read_json

FLAGS = flags.FLAGS
WITH_DEFAULTS = 'network', 'dataset', 'training', 'sampler', 'first_stage', 'encoding'  # keys may be left out
OPEN = {'lock_config': False, 'accept_new_attributes': True}  # what is not known is refused here, and by `build`
flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, logs, samples, report.')
flags.register_validator(
    'workdir',
    lambda workdir: '://' not in (workdir or ''),
    'is a folder of this machine: logs and pictures are written to it. Checkpoints alone can lie in a bucket, by '
    '--config.training.checkpoints=gs://BUCKET/FOLDER',
)
flags.DEFINE_enum('mode', 'train', ['train', 'sample', 'evaluate', 'ema', 'encode'], 'What to do.')
flags.DEFINE_string('labels', '', 'sample: classes to draw, such as 0,1,2 or 7; repeated up to --num_samples.')
flags.DEFINE_integer('num_samples', None, 'sample, evaluate: how many. Default: 10 of each class; the config.', 1)
flags.DEFINE_integer('seed', 0, 'sample, evaluate: seed of the samples.')
flags.DEFINE_string('out', '', 'sample: PNG and NPZ are written to OUT.png and OUT.npz. Default: in WORKDIR/samples/.')
flags.DEFINE_string('sigma_rel', '', 'ema: relative widths of the averages to make, such as 0.08 or 0.03,0.06,0.12.')
flags.DEFINE_integer('step', None, 'ema: the step at which the averages end. Default: that of the newest snapshot.', 1)
flags.DEFINE_string('coordinator', '', 'Address host:port of process 0, or auto (TPU pods, Slurm). Empty: one process.')
flags.DEFINE_integer('num_processes', None, 'With --coordinator=host:port: number of processes.')
flags.DEFINE_integer('process_id', None, 'With --coordinator=host:port: number of this process.')
flags.DEFINE_integer('heartbeat_timeout_seconds', 60, 'Of several processes: a silence after which one counts as dead.')


def fail(message: str) -> None:
    """Ends the program with one line on stderr."""
    print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> list[str]:
    """Flags, as `app.run(flags_parser=...)` wants it."""
    stored = _stored_config(argv)
    try:
        if 'config' not in FLAGS:
            if stored is None:
                config_flags.DEFINE_config_file('config', None, 'The experiment: FILE.py or FILE.py:ARGUMENT.', **OPEN)
            else:
                config_flags.DEFINE_config_dict('config', stored, 'The experiment, read from the workdir.', **OPEN)
        unknown = _unknown_key(argv, stored)
        rest = argv[:1] if unknown else FLAGS(argv)
        if not unknown and (FLAGS.config is not None or _config_file(argv)):
            _check_plain(FLAGS.config)  # a file that did not load raises here
    except (Exception, SystemExit) as error:  # a config file may raise anything
        name = _config_file(argv)
        if name and not Path(name).is_file():
            fail(f'--config={name}: there is no such file')
        fail(_unknown_key(argv, stored) or _in_file(name, error) or _one_line(error))
    if unknown:
        fail(unknown)
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


def _config_file(argv: list[str]) -> str:
    """FILE.py of --config=FILE.py:ARGUMENT, '' without one."""
    return (_values(argv, '--config')['--config'] or '').partition(':')[0]


def _check_plain(config: Any) -> None:
    """Raises TypeError where a config is no ConfigDict of plain values under names."""
    if not isinstance(config, ConfigDict):
        raise TypeError(f'get_config returns a ml_collections.ConfigDict, got {config!r:.80}')

    def check(values: dict[str, Any]) -> None:
        for key, value in values.items():
            if not isinstance(key, str):
                raise TypeError(f'the keys of a config are texts, got {key!r:.80}')
            if isinstance(value, dict):
                check(value)

    check(config.to_dict())


def _in_file(name: str, error: BaseException) -> str:
    """What a config file has raised, and in which of its lines; '' for any other error."""
    if isinstance(error, SyntaxError):
        return f'--config={name} is no Python: {error.msg} (line {error.lineno})' if name else ''
    if name and isinstance(error, AttributeError) and "attribute 'get_config'" in str(error):
        return f'--config={name} has no function get_config'
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _same_file(frame.filename, name)]
    if not name or isinstance(error, flags.Error | ValueError):  # which are words for a person
        return ''
    if not frames:
        return f'--config={name}: {_one_line(error)}'
    return f'--config={name}, line {frames[-1].lineno}: {type(error).__name__}: {error}'


def _same_file(path: str, other: str) -> bool:
    return bool(other) and Path(path).resolve() == Path(other).resolve()


def _stored_config(argv: list[str]) -> ConfigDict | None:
    """The workdir's config, for a command that names none. Ends the program where it cannot be read."""
    given = _values(argv, '--config', '--workdir')
    if given['--config'] is not None or not given['--workdir']:
        return None
    try:
        stored = read_json(Path(given['--workdir']) / 'config.json')
    except ValueError as error:
        fail(str(error))
    return None if stored is None else ConfigDict(stored)


def _plain_config(argv: list[str]) -> ConfigDict | None:
    """The config file's own values, before the command line changes them. None if it gives none."""
    path, argument = _config_file(argv), (_values(argv, '--config')['--config'] or '').partition(':')[2]
    spec = importlib.util.spec_from_file_location('plain_config', path) if path else None
    if spec is None:
        return None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
        _check_plain(config)
        return config
    except (Exception, SystemExit):  # whatever the file raises has been caught once already, and is reported from there
        return None


def _unknown_key(argv: list[str], stored: ConfigDict | None) -> str:
    """The message for the first --config.KEY that the config does not have; '' where every key is known."""
    config = stored or _plain_config(argv)
    for word in argv if config else []:
        node, path = config, word.partition('=')[0].removeprefix('--').split('.')
        if len(path) == 3 and path[0] == 'config' and path[1] in (set(WITH_DEFAULTS) & set(config)):
            continue  # an option that the config leaves at its default; `build` knows which there are
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
