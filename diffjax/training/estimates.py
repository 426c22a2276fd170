"""What a training step costs each device, before it has run anywhere: from the program that the compiler makes of it.

The *partitioned* program, in which the compiler has split all arrays over the devices and put the collectives in, does
not depend on the kind of device: its products and collectives, with their shapes and dtypes, are those of a TPU or GPU
too, and its text is what is counted. What comes after it, fusing and placing in memory, is this machine's own: of that
the sizes of arguments and results hold elsewhere, and temporaries are an estimate.

A step takes at least the longest, and if nothing overlaps the sum, of (Williams et al. 2009, "Roofline")

    compute      sum over dtypes  FLOPs / peak FLOP/s                                 (1)
    memory       bytes read and written / bandwidth                                   (2)
    collectives  sum over links   bytes sent / bandwidth of the links or the network  (3)

where bytes in (2) are the least there are: all that products read and write, layers that a scan takes or keeps, and the
arguments and results of the step once. Element-wise work is taken to be fused into them, as in `flops`.
"""

import contextlib
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diffjax.core.types import PyTree
from diffjax.training.collectives import Collective, find
from diffjax.training.devices import Device
from diffjax.training.flops import count_flops
from diffjax.training.hlo import Instruction, Program, Runs, arrays, count_runs, num_bytes, parse
from diffjax.training.loop import Trainer
from diffjax.training.sharding import batch_sharding, replicated

QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}  # it will not run
SLICES = {'dynamic-slice': None, 'dynamic-update-slice': 1}  # the operand that moves; None: the result


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: dict[str, int]  # by what they are; exact
    argument: int  # what the compiler says they are in all
    output: int
    aliased: int  # of the outputs, written where donated arguments were
    temporaries: int  # of this machine's compiler

    @property
    def needed(self) -> int:
        return self.argument + self.output - self.aliased + self.temporaries


class Cost(NamedTuple):
    """Of one step, on one device where nothing else is said."""

    num_devices: int
    num_parameters: int  # of all devices
    model_flops: int  # of all devices, counted from the program before it is split
    flops: dict[str, int]  # by the dtype of what is multiplied, as it is split
    xla_flops: float  # the compiler's own count, which takes each loop once
    traffic: int  # Eq. 2
    xla_traffic: float
    collectives: list[Collective]
    memory: Memory
    unknown_loops: list[str]  # that count once for want of their number of turns


class Roofline(NamedTuple):
    """Seconds of a step."""

    compute: float
    memory: float
    collectives: float
    fits: bool
    share: float  # of the memory there is

    @property
    def at_least(self) -> float:
        return max(self[:3])

    @property
    def at_most(self) -> float:
        """Where nothing overlaps; still at the peak of everything."""
        return sum(self[:3])

    @property
    def bound(self) -> str:
        return max(('compute', 'memory', 'collectives'), key=lambda name: getattr(self, name))


def roofline(cost: Cost, device: Device) -> Roofline:
    """Eqs. 1 to 3."""
    across = [c.crosses(device.domain) for c in cost.collectives]
    sent = [c.count * c.sent / (device.network if far else device.link) for c, far in zip(cost.collectives, across)]
    return Roofline(
        compute=sum(flops / device.flops(dtype) for dtype, flops in cost.flops.items()),
        memory=cost.traffic / device.bandwidth,
        collectives=sum(sent),
        fits=cost.memory.needed <= device.memory,
        share=cost.memory.needed / device.memory,
    )


def efficiency(cost: Cost, device: Device, steps_per_second: float) -> dict[str, float]:
    """What a measured run reaches: of the roofline's step rate, and of the peak (MFU, by the model's own FLOPs)."""
    dtypes, share = cost.flops, cost.model_flops / cost.num_devices / max(sum(cost.flops.values()), 1)
    ideal = share * sum(flops / device.flops(dtype) for dtype, flops in dtypes.items())
    return {
        'steps_per_second': steps_per_second,
        'of_the_roofline': steps_per_second * roofline(cost, device).at_least,
        'of_the_peak': steps_per_second * ideal,
    }


def count_cost(trainer: Trainer, example: Mapping[str, jax.ShapeDtypeStruct]) -> Cost:
    """Compiles the step of a trainer for its mesh, and counts. example: a batch of one, without its values."""
    size, mesh = trainer.settings.batch_size, trainer.mesh
    raw = {name: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for name, a in example.items()}
    frozen = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), trainer.frozen)
    _, shapes, shardings = trainer.init(raw)
    traced = trainer.step(shardings).trace(shapes, frozen, raw)
    compiled, text = compile_partitioned(traced.lower(), mesh.size)
    program = parse(text)
    runs, found, told = count_runs(program), compiled.memory_analysis(), compiled.cost_analysis()
    memory = Memory(
        arguments={
            'parameters': bytes_on_device(shapes.params, shardings.params),
            'optimiser state': bytes_on_device(shapes.opt_state, shardings.opt_state),
            'averages': bytes_on_device(shapes.ema, shardings.ema),
            'task state, step and key': bytes_on_device(
                (shapes.task_state, shapes.step, shapes.key), (shardings.task_state, shardings.step, shardings.key)
            ),
            'frozen': bytes_on_device(frozen, jax.tree.map(lambda _: replicated(mesh), frozen)),
            'batch': bytes_on_device(raw, jax.tree.map(lambda _: batch_sharding(mesh), raw)),
        },
        argument=found.argument_size_in_bytes,
        output=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
    )
    return Cost(
        num_devices=mesh.size,
        num_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)),
        model_flops=count_flops(traced.jaxpr),
        flops=product_flops(program, runs),
        xla_flops=told.get('flops', math.nan),
        traffic=product_traffic(program, runs) + memory.argument + memory.output,
        xla_traffic=told.get('bytes accessed', math.nan),
        collectives=find(program, runs, mesh.size),
        memory=memory,
        unknown_loops=runs.unknown,
    )


def bytes_on_device(shapes: PyTree, shardings: PyTree) -> int:
    """Of one shard of each array: the largest, where they differ."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(a.shape)) * a.dtype.itemsize for a, sharding in pairs)


def compile_partitioned(lowered: jax.stages.Lowered, num_devices: int) -> tuple[jax.stages.Compiled, str]:
    """(the program, the text of it after it was split over the devices and before anything else was done to it).

    The compiler writes this text into a folder, when it is asked to; a program from a cache would not be compiled.
    """
    wanted = 'after_spmd-partitioning' if num_devices > 1 else 'before_optimizations'
    with tempfile.TemporaryDirectory() as folder, no_cache():
        options = {'xla_dump_to': folder, 'xla_dump_hlo_pass_re': 'spmd-partitioning', 'xla_dump_hlo_as_text': True}
        compiled = lowered.compile(compiler_options=options | QUICK)
        texts = sorted(Path(folder).glob(f'*{wanted}*.txt'))
        if not texts:
            raise RuntimeError(f'this version of jax, {jax.__version__}, has written no text of its program {wanted}')
        return compiled, texts[0].read_text()


@contextlib.contextmanager
def no_cache():
    """What is compiled inside is compiled: no program comes from a cache, or goes there."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # it remembers whether it is in use
    try:
        yield
    finally:
        jax.config.update('jax_enable_compilation_cache', before)
        compilation_cache.reset_cache()


def product_flops(program: Program, runs: Runs) -> dict[str, int]:
    """FLOPs of matrix products and convolutions, by the wider dtype of what is multiplied."""
    total = Counter()
    for instruction, inside, times in _products(program, runs):
        factors = [arrays(inside[name].type)[0] for name in instruction.operands[:2]]
        dtype = max((dtype for dtype, _ in factors), key=lambda dtype: int(re.search(r'\d+', dtype)[0]))
        total[dtype] += times * _flops(instruction, *(shape for _, shape in factors))
    return dict(total.most_common())


def _flops(instruction: Instruction, lhs: Sequence[int], rhs: Sequence[int]) -> int:
    outputs = math.prod(arrays(instruction.type)[0][1])
    if instruction.opcode == 'dot':
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
        return 2 * outputs * math.prod(lhs[int(i)] for i in contracted[1].split(',') if i)
    kernel = re.search(r'dim_labels=\w+_(\w+)->', instruction.attributes)[1]
    dilated = re.search(r'lhs_dilate=([\dx]+)', instruction.attributes)
    zeros = math.prod(map(int, dilated[1].split('x'))) if dilated else 1  # a transposed convolution skips them
    return 2 * outputs * math.prod(rhs) // rhs[kernel.index('o')] // zeros


def product_traffic(program: Program, runs: Runs) -> int:
    """Bytes of what products read and write, and of the slices that loops take and put."""
    total = 0
    for instruction, inside, times in _products(program, runs, also=SLICES):
        if instruction.opcode in SLICES:
            moved = SLICES[instruction.opcode]
            total += times * num_bytes(instruction.type if moved is None else inside[instruction.operands[moved]].type)
        else:
            operands = sum(num_bytes(inside[name].type) for name in instruction.operands[:2])
            total += times * (operands + num_bytes(instruction.type))
    return total


def _products(program: Program, runs: Runs, also: Any = ()):
    """(instruction, its computation, how often it runs)."""
    for name, computation in program.computations.items():
        for instruction in computation.values():
            if runs.counts[name] and instruction.opcode in ('dot', 'convolution', *also):
                yield instruction, computation, runs.counts[name]
