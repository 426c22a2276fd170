"""What devices tell each other in a program: collectives by kind, with their bytes, read from its text.

`size` is that of the whole array on which a group of g devices works: what each of them gives to an all-reduce or a
reduce-scatter, what each of them has after an all-gather. What a device sends, with a ring or anything as good,

    all-reduce          2 (g - 1) / g size      (1)
    all-gather, reduce-scatter, all-to-all
                          (g - 1) / g size      (2)
    collective-permute                size      (3)

is the least there is (Patarasu & Yuan 2009, "Bandwidth optimal all-reduce algorithms", for (1)). An all-reduce of which
only a slice is used is a reduce-scatter followed by nothing, and the compilers for TPUs and GPUs make it one: it counts
as what they make of it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffjax.training.hlo import Instruction, Program, Runs, num_bytes

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


class Collective(NamedTuple):
    kind: str
    type: str  # of the result
    size: int  # bytes of the whole array
    groups: tuple[tuple[int, ...], ...]  # of devices that talk with each other; of a permutation (from, to)
    count: int  # how often it runs in a step
    where: str  # the operation it serves

    @property
    def group_size(self) -> int:
        return max(map(len, self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time it runs, Eqs. 1 to 3."""
        g = self.group_size
        return self.size * {'all-reduce': 2 * (g - 1) / g, 'collective-permute': 1.0}.get(self.kind, (g - 1) / g)

    def crosses(self, domain: int) -> bool:
        """Whether devices of one group are further apart than `domain` neighbours, which are joined by fast links."""
        return any(len({device // domain for device in group}) > 1 for group in self.groups)


class Total(NamedTuple):
    count: int = 0
    size: int = 0
    sent: float = 0.0


def find(program: Program, runs: Runs, num_devices: int) -> list[Collective]:
    """Every collective of a program, those of one device alone left out; those that bring the most come first."""
    found = []
    for name, computation in program.computations.items():
        if not runs.counts[name]:
            continue
        users = defaultdict(list)
        for instruction in computation.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix('-start')
            if kind in KINDS:
                found.append(_collective(instruction, kind, computation, users, runs.counts[name], num_devices))
    return sorted((c for c in found if c.group_size > 1), key=lambda c: -c.sent * c.count)


def _collective(
    instruction: Instruction,
    kind: str,
    computation: dict[str, Instruction],
    users: dict[str, list[Instruction]],
    count: int,
    num_devices: int,
) -> Collective:
    groups = read_groups(instruction.attributes, num_devices)
    size = sum(num_bytes(computation[name].type) for name in instruction.operands)
    if kind == 'all-gather':
        size *= len(groups[0])
    uses = users[instruction.name]
    if kind == 'all-reduce' and uses and all(use.opcode == 'dynamic-slice' for use in uses):
        kind = 'reduce-scatter'
    return Collective(kind, instruction.type, size, groups, count, instruction.where)


def totals(collectives: Sequence[Collective]) -> dict[str, Total]:
    """By kind, over a whole step."""
    table = {}
    for c in collectives:
        old = table.get(c.kind, Total())
        table[c.kind] = Total(old.count + c.count, old.size + c.count * c.size, old.sent + c.count * c.sent)
    return {kind: table[kind] for kind in KINDS if kind in table}


def alike(collectives: Sequence[Collective]) -> list[Collective]:
    """Those of one kind, type and size of group as one that runs as often as all of them, the largest first."""
    table = {}
    for c in collectives:
        key = c.kind, c.type, c.group_size
        first = table.get(key, c._replace(count=0))
        table[key] = first._replace(count=first.count + c.count)
    return sorted(table.values(), key=lambda c: -c.sent * c.count)


def read_groups(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices, from any of the ways to write them.

    source_target_pairs={{0,1},{1,0}}
    replica_groups={{0,1},{2,3}}                        all in one group where it is {}
    replica_groups=[2,4]<=[8]                           rows of arange(8).reshape(2, 4)
    replica_groups=[4,2]<=[2,4]T(1,0)                   rows of arange(8).reshape(2, 4).T.reshape(4, 2)
    replica_groups=mesh['a'=2,'b'=4] {'b'}              over axes of a mesh of arange(8).reshape(2, 4)
    replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}       of arange(8).reshape(2, 4).T
    """
    if pairs := re.search(r'source_target_pairs=\{(\{[\d,{}]*\})\}', attributes):
        return _listed(pairs[1])
    if listed := re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', attributes):
        return _listed(listed[1]) or (tuple(range(num_devices)),)
    if rows := re.search(r'replica_groups=\[([\d,]+)\](<=\S+?\](?:T\([\d,]+\))?)(?:,|$|\s)', attributes):
        return _rows(_numbered(rows[2].removeprefix('<=')).reshape(_numbers(rows[1])))
    if mesh := re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}', attributes):
        return _over_axes(*mesh.groups())
    return (tuple(range(num_devices)),)


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(_numbers(group)) for group in re.findall(r'\{([\d,]*)\}', text))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(',') if n]


def _rows(devices: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in devices.tolist())


def _numbered(text: str) -> np.ndarray:
    """'[2,4]T(1,0)' -> arange(8).reshape(2, 4).transpose(1, 0)."""
    shape, _, order = text.partition('T')
    devices = np.arange(math.prod(_numbers(shape.strip('[]')))).reshape(_numbers(shape.strip('[]')))
    return devices.transpose(_numbers(order.strip('()'))) if order else devices


def _over_axes(mesh: str, order: str | None, chosen: str) -> tuple[tuple[int, ...], ...]:
    """Over the axes of a mesh; an axis may be a part of one, 'a':(2)4, the 4 that have 2 before them."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {name: [(1, size)] for name, size in sizes.items()}  # (what comes before, how many)
    wanted = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        before, size = int(before or 1), int(size or sizes[name])
        parts[name] = [(1, before), (before, size), (before * size, sizes[name] // (before * size))]
        wanted.append((name, before, size))
    names = [(name, *part) for name in sizes for part in parts[name]]
    devices = _numbered(order).reshape(-1) if order else np.arange(math.prod(sizes.values()))
    devices = devices.reshape([size for _, _, size in names])
    axes = [names.index(axis) for axis in wanted]
    others = [i for i in range(len(names)) if i not in axes]
    members = math.prod(size for _, _, size in wanted)
    return _rows(devices.transpose(others + axes).reshape(-1, members))
