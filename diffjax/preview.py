"""What a run will need, before it: memory, FLOPs and messages of each device, and how long a step takes at best.

  python -m diffjax.preview --config=configs/dit_b.py --mesh=data:8,fsdp:4
  python -m diffjax.preview --config=configs/dit_b.py:model=XL/2 --mesh=fsdp:8 --config.network.remat=full --device=H100
  python -m diffjax.preview --workdir=runs/dit --mesh=fsdp:8 --device=H200            held against what the run measured
      --measured_steps_per_second=X                                                   or against this number

The training step is compiled, on this machine, for as many fake CPU devices as the mesh has; it is not run, and the
dataset need not be there. --mesh takes the place of the section `mesh` of the config; without it, an axis that would
take all devices there are has one. --device=cpu is the machine at hand, measured for a second.

What is exact and what is not: the sizes of arguments are; FLOPs, and bytes of collectives, are those of the program
split over the mesh, which the compiler for another device may still merge or reorder. Temporaries are those that the
compiler for CPUs makes: it computes bfloat16 in float32 and fuses otherwise, and where attention is fused (on GPUs and
TPUs) its scores are never in memory. Times are a roofline of datasheets, without the latency of each message.
"""

import inspect
import json
import math
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from diffjax.command import FLAGS, fail, parse

flags.DEFINE_string('mesh', '', 'preview: the mesh, AXIS:SIZE,..., such as data:8,fsdp:4. Default: that of the config.')
flags.DEFINE_string('device', '', 'preview: devices to estimate for, such as v5e,H100, or cpu. Default: all but cpu.')
flags.DEFINE_string('json', '', 'preview: a file for all figures.')
flags.DEFINE_float('measured_steps_per_second', None, 'preview: of a run on --device, with which to compare.', 0)
LARGEST = 5  # collectives that are listed one by one
FAKE = '--xla_force_host_platform_device_count'


def main(argv: list[str]) -> None:
    del argv
    absl_logging.set_verbosity(absl_logging.WARNING)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # of the compiler's warnings the figures tell; read by jaxlib
    if FLAGS.config is None:
        fail('--config is needed, such as --config=configs/dit_b.py, or the --workdir of a run')
    try:
        config = FLAGS.config.to_dict()
        rules = take_rules(config.get('mesh'))
        config['mesh'] = read_mesh(FLAGS.mesh) if FLAGS.mesh else fixed_mesh(config.get('mesh'))
        count = number_of(config['mesh'])
        if rules:
            config['mesh'] |= rules
        start_devices(count)
        devices = find_devices(FLAGS.device, count)
        rate = measured_rate(FLAGS.measured_steps_per_second, FLAGS.workdir, devices)
        experiment = build_for(config, FLAGS.workdir, looped=any(device.name != 'cpu' for device in devices))
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    from diffjax.training.estimates import count_cost

    print(f'compiling for {count} fake CPU devices ({FAKE}={count}); nothing is run', flush=True)
    began = time.monotonic()
    cost = count_cost(experiment.trainer(), experiment.batch_spec)
    print(f'compiled in {time.monotonic() - began:.1f} s\n')
    report = summary(config, experiment, cost, devices, rate)
    print('\n'.join(lines(report)))
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps(report, indent=2) + '\n')


def read_mesh(text: str) -> dict[str, int]:
    """'data:8,fsdp:4' as the section `mesh`. Raises ValueError for axes that are none."""
    sizes = {}
    for part in text.split(','):
        name, _, size = part.strip().partition(':')
        if name not in axes():
            raise ValueError(f'--mesh={text}: unknown axis {name!r}; the axes are {", ".join(axes())}')
        if name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f'--mesh={text}: each axis has one size from 1 on, such as data:8,fsdp:4')
        sizes[name] = int(size)
    return dict.fromkeys(axes(), 1) | sizes


def axes() -> tuple[str, ...]:
    from diffjax.training.sharding import make_mesh

    return tuple(inspect.signature(make_mesh).parameters)


def take_rules(section: Any) -> dict[str, Any]:
    """The key `rules` of the section `mesh`, taken out of it: they hold on whatever mesh."""
    return {'rules': section.pop('rules')} if isinstance(section, dict) and 'rules' in section else {}


def fixed_mesh(section: Any) -> Any:
    """The config's own, with one device where it says all there are. What is no section is left to `build`."""
    if not isinstance(section, dict):
        return section
    return {name: 1 if size == -1 else size for name, size in ({'data': -1} | section).items()}


def number_of(section: Any) -> int:
    sizes = section.values() if isinstance(section, dict) else ()
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f'mesh: sizes are whole numbers from 1 on; got {section}')
    return math.prod(sizes)


def start_devices(count: int) -> None:
    """So many fake devices, before JAX looks for any. Raises ValueError where it has looked already."""
    others = [flag for flag in os.environ.get('XLA_FLAGS', '').split() if not flag.startswith(FAKE)]
    os.environ['XLA_FLAGS'] = ' '.join([*others, f'{FAKE}={count}'])
    os.environ['JAX_PLATFORMS'] = 'cpu'
    import jax

    jax.config.update('jax_platforms', 'cpu')
    if (there := jax.device_count()) != count:
        raise ValueError(
            f'the mesh has {count} devices, and JAX runs here already, with {there}: their number is set before it '
            'starts, by python -m diffjax.preview'
        )


def find_devices(names: str, count: int) -> list:
    """Those of the flag --device, all that have a datasheet where it names none. Raises ValueError for unknown ones."""
    from diffjax.training.devices import DEVICES, find_device

    return [find_device(name.strip(), count) for name in names.split(',') if name.strip()] or list(DEVICES.values())


def measured_rate(given: float | None, workdir: str | None, devices: list) -> float | None:
    """Steps per second on the one device that is named: as given, or the median of a run's log; None without them.

    Raises ValueError where a rate is given and devices are several.
    """
    if given is not None and (len(devices) != 1 or not given > 0):
        raise ValueError(
            f'--measured_steps_per_second={given:g}: a rate above 0 of the one device that --device names; '
            f'here {", ".join(device.name for device in devices)}'
        )
    log = Path(workdir or '') / 'metrics.csv'
    if given is not None or not workdir or len(devices) != 1 or not log.exists():
        return given
    from diffjax.training.metrics import read_rows

    rates = [row.get('steps_per_second') for row in read_rows(log)]
    try:
        rates = [float(rate) for rate in rates if rate]
    except ValueError as error:
        raise ValueError(f'{log} is damaged: its steps_per_second are no numbers') from error
    if not rates:
        raise ValueError(f'{log} has no rows with steps_per_second')
    return statistics.median(rates[1:] or rates)  # the first row has waited for the first batches


def build_for(config: dict[str, Any], workdir: str | None, *, looped: bool):
    """The experiment of a config, a dataset of latents or a first stage that is not there replaced by its shapes.

    looped: with the loop over layers that 'auto' is on GPUs and TPUs; on fake devices it would be written out.
    """
    from diffjax.kinds import DENOISING, kind_of
    from diffjax.stages import open_latents

    kind = kind_of(config)
    if kind is not DENOISING:
        return kind.build(config)
    if looped:
        config['network'] = with_loop(config.get('network'))
    with tempfile.TemporaryDirectory() as empty:
        return kind.build(config, for_sampling=True, latents=open_latents(config, workdir or empty))


def with_loop(network: Any) -> Any:
    """The section `network` with scan_layers=True where it is 'auto'."""
    from diffjax import nets
    from diffjax.components import find, parse_component

    name, options = parse_component(network, 'network')
    chosen = inspect.signature(find(nets, name, 'network')).parameters.get('scan_layers')
    if chosen is None or options.get('scan_layers', chosen.default) != 'auto':
        return network
    return {'name': name, **options, 'scan_layers': True}


# The report -----------------------------------------------------------------------------------------------------------


def summary(config: dict[str, Any], experiment, cost, devices: list, rate: float | None) -> dict[str, Any]:
    """All figures, as JSON has them. Bytes and FLOPs of one device, seconds of one step."""
    from diffjax.components import parse_component
    from diffjax.training.collectives import alike, totals
    from diffjax.training.estimates import efficiency, roofline

    memory = cost.memory
    return {
        'estimate': True,
        'mesh': dict(experiment.mesh.shape),
        'num_devices': cost.num_devices,
        'batch_size': experiment.training.batch_size,
        'network': parse_component(config['network'], 'network')[0],
        'num_parameters': cost.num_parameters,
        'flops': {
            'model': cost.model_flops,
            'per_device': sum(cost.flops.values()),
            'by_dtype': cost.flops,
            'xla_cost_analysis': cost.xla_flops,
        },
        'memory': {
            'arguments': memory.arguments,
            'argument': memory.argument,
            'output': memory.output,
            'aliased': memory.aliased,
            'temporaries': memory.temporaries,
            'needed': memory.needed,
        },
        'traffic': {'least': cost.traffic, 'xla_bytes_accessed': cost.xla_traffic},
        'collectives': {kind: total._asdict() for kind, total in totals(cost.collectives).items()},
        'largest_collectives': [
            {
                'kind': c.kind,
                'type': c.type,
                'devices': c.group_size,
                'count': c.count,
                'sent': c.sent * c.count,
                'where': c.where,
            }
            for c in alike(cost.collectives)[:LARGEST]
        ],
        'loops_counted_once': cost.unknown_loops,
        'devices': {device.name: _estimate(roofline(cost, device), device) for device in devices},
        'measured': None if rate is None else {'device': devices[0].name} | efficiency(cost, devices[0], rate),
    }


def _estimate(roof, device) -> dict[str, Any]:
    return {
        'fits': roof.fits,
        'share_of_memory': roof.share,
        'compute': roof.compute,
        'memory': roof.memory,
        'collectives': roof.collectives,
        'at_least': roof.at_least,
        'at_most': roof.at_most,
        'bound': roof.bound,
        'flops_per_second': device.flops_16,
        'bytes_per_second': device.bandwidth,
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    mesh = ' x '.join(f'{name} {size}' for name, size in report['mesh'].items())
    return [
        f'AN ESTIMATE of a step of {report["network"]}, batch {report["batch_size"]}, on {mesh}: '
        f'{report["num_devices"]} device{"s" if report["num_devices"] > 1 else ""}',
        '',
        f'parameters        {report["num_parameters"]:,}',
        *_flops_lines(report),
        '',
        *_memory_lines(report['memory']),
        '',
        *_collective_lines(report),
        '',
        *_device_lines(report),
        *_measured_lines(report['measured']),
    ]


def _flops_lines(report: dict[str, Any]) -> list[str]:
    flops, even = report['flops'], report['flops']['model'] / report['num_devices']
    parts = ', '.join(f'{dtype} {part / max(flops["per_device"], 1):.1%}' for dtype, part in flops['by_dtype'].items())
    extra = flops['per_device'] / max(even, 1) - 1
    return [
        f'FLOPs of a step   {flops["model"]:.4g} of the model; {even:.4g} a device, evenly shared',
        f'                  {flops["per_device"]:.4g} a device as they are split ({parts})'
        + (f': {extra:.1%} are done more than once' if extra > 0.005 else ''),
        f"                  {flops['xla_cost_analysis']:.4g} by the compiler's own analysis, which takes a loop once",
    ]


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    donated = f'{size_of(memory["aliased"])} of them in the place of donated arguments'
    rows = [
        *[(name, size, '') for name, size in memory['arguments'].items() if size],
        ('results', memory['output'], donated),
        ('temporaries', memory['temporaries'], 'AN ESTIMATE: of the compiler for CPUs'),
        ('needed', memory['needed'], 'arguments + results - donated + temporaries'),
    ]
    table = [f'  {name:<26}{size_of(size):>10}  {note}'.rstrip() for name, size, note in rows]
    return ['memory of a device (arguments and results are exact)', *table]


def _collective_lines(report: dict[str, Any]) -> list[str]:
    if not report['collectives']:
        return ['collectives: none']
    table = [f'  {"":<20}{"count":>8}{"arrays":>12}{"sent":>12}'] + [
        f'  {kind:<20}{total["count"]:>8}{size_of(total["size"]):>12}{size_of(total["sent"]):>12}'
        for kind, total in report['collectives'].items()
    ]
    largest = [
        f'  {size_of(c["sent"]):>10}  {c["count"]} x {c["kind"]} of {c["type"].partition("{")[0]} over {c["devices"]} '
        f'devices: {short(c["where"])}{", ..." if c["count"] > 1 else ""}'
        for c in report['largest_collectives']
    ]
    unknown = [f'  a loop of unknown length counts once: {short(where)}' for where in report['loops_counted_once']]
    head = 'collectives of a step on a device: as it was split, before any are merged; in a loop as often as it turns'
    return [head, *table, '  those that send most', *largest, *unknown]


def _device_lines(report: dict[str, Any]) -> list[str]:
    rows = [('', 'fits', 'compute', 'memory', 'collectives', 'step', 'bound by')]
    for name, roof in report['devices'].items():
        fits = f'{"yes" if roof["fits"] else "NO"}, {roof["share_of_memory"]:.0%}'
        step = f'{time_of(roof["at_least"])} to {time_of(roof["at_most"])}'
        rows.append((name, fits, *(time_of(roof[key]) for key in rows[0][2:5]), step, roof['bound']))
    bounds = sorted({roof['bound'] for roof in report['devices'].values()})
    return [
        'AN ESTIMATE from datasheets (cpu: measured now): at their peaks, all three at once, or one after the other',
        *['  {:<6}{:>11}{:>10}{:>10}{:>12}{:>22}   {}'.format(*row) for row in rows],
        *[why(report, bound) for bound in bounds],
    ]


def why(report: dict[str, Any], bound: str) -> str:
    """In one line."""
    flops, traffic = report['flops']['per_device'], report['traffic']['least']
    if bound == 'compute':
        return f'  compute: {flops:.3g} FLOPs of products, {flops / max(traffic, 1):.0f} for each byte of memory'
    if bound == 'memory':
        return (
            f'  memory: {size_of(traffic)} read and written for {flops:.3g} FLOPs, {flops / max(traffic, 1):.0f} for '
            'each byte: larger batches a device, or fewer devices, would raise it'
        )
    total, top = sum(each['sent'] for each in report['collectives'].values()), report['largest_collectives'][0]
    return (
        f'  collectives: each device sends {size_of(total)}, {top["sent"] / total:.0%} of it in {top["count"]} x '
        f'{top["kind"]} over {top["devices"]} devices: {short(top["where"])}'
    )


def _measured_lines(measured: dict[str, Any] | None) -> list[str]:
    if measured is None:
        return []
    return [
        '',
        f'MEASURED on {measured["device"]}: {measured["steps_per_second"]:.4g} steps/s, '
        f"{measured['of_the_roofline']:.1%} of the estimate's rate, {measured['of_the_peak']:.1%} of the peak (MFU)",
    ]


def size_of(count: float) -> str:
    for unit, factor in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if count >= factor:
            return f'{count / factor:.3g} {unit}'
    return f'{count:.0f} B'


def time_of(seconds: float) -> str:
    for unit, factor in (('s', 1.0), ('ms', 1e-3)):
        if seconds >= factor:
            return f'{seconds / factor:.3g} {unit}'
    return f'{seconds / 1e-6:.3g} us'


def short(where: str) -> str:
    """The end of an operation's path, which says what it belongs to."""
    return '/'.join(re.sub(r'closed_call/', '', where).split('/')[-4:]) or 'not named'


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
