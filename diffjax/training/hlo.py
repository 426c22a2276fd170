"""Reading the text of a compiler's program (HLO): its instructions, and how often each of them runs.

A program is a list of computations, a computation a list of instructions

    %name = TYPE opcode(%operand, ...), attribute=value, ...

and shapes are those of one device. A computation runs as often as it is called, the body of a loop as often as the loop
turns. The text says this outright (`known_trip_count`, in optimised programs), or by a counter that starts at a
constant, grows by one and is compared with another constant, as that of every `jax.lax.scan` does. A loop of which
neither is known counts as one turn, and is named in `Runs.unknown`; of a conditional each branch counts as if taken.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

_HEADER = re.compile(r'(ENTRY )?%?([\w.<>\-]+) \(.*\) -> .*\{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.<>\-]+) = (.*)')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|true_computation|false_computation)=%?([\w.<>\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
CALLING = ('call', 'fusion', 'conditional', 'async-start')  # others with to_apply= name what they do to two scalars


class Instruction(NamedTuple):
    name: str
    type: str  # 'f32[8,256]{1,0}', or of tuples '(f32[8]{0}, s32[])'
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str
    is_root: bool

    @property
    def where(self) -> str:
        """The operation of the source that it came from: 'jvp(DiT)/while/body/...'; '' where the text does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ''


class Program(NamedTuple):
    entry: str
    computations: dict[str, dict[str, Instruction]]  # by their names


class Runs(NamedTuple):
    """How often each computation runs in one run of the program."""

    counts: Counter
    unknown: list[str]  # loops whose number of turns the text does not tell


def parse(text: str) -> Program:
    """Raises ValueError for text without an entry computation."""
    computations, entry, inside = {}, '', None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif inside is not None and (found := _INSTRUCTION.match(line)):
            inside[found[2]] = _instruction(found[2], found[3], is_root=bool(found[1]))
        elif line.startswith('}'):
            inside = None
    if not entry:
        raise ValueError(f'this is no text of a program: there is no line that begins with ENTRY; got {text[:60]!r}')
    return Program(entry, computations)


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    end = _closing(text) if text.startswith('(') else text.index(' ') - 1
    opcode, _, rest = text[end + 1 :].strip().partition('(')
    inner = rest[: _closing('(' + rest) - 1]
    return Instruction(
        name=name,
        type=text[: end + 1],
        opcode=opcode,
        operands=tuple(re.findall(r'%([\w.<>\-]+)', inner)),
        literal=inner,
        attributes=rest[len(inner) + 1 :],
        is_root=is_root,
    )


def _closing(text: str) -> int:
    """Where the parenthesis closes that `text` begins with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == '(') - (letter == ')')
        if depth == 0:
            return i
    return len(text)


def arrays(type: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each array of a type."""
    return [(dtype, tuple(int(n) for n in shape.split(',') if n)) for dtype, shape in _ARRAY.findall(type)]


def bits(dtype: str) -> int:
    """Of one value: 16 for 'bf16', 8 for 'f8e4m3fn', 'pred'; 0 for 'token', which holds nothing."""
    number = re.search(r'\d+', dtype)
    return int(number[0]) if number else 8 * (dtype == 'pred')


def num_bytes(type: str) -> int:
    return sum(-(-math.prod(shape) * bits(dtype) // 8) for dtype, shape in arrays(type))


def count_runs(program: Program) -> Runs:
    counts, unknown = Counter(), []

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for instruction in program.computations.get(name, {}).values():
            if instruction.opcode == 'while':
                turns = trip_count(program, name, instruction)
                if turns is None:
                    unknown.append(instruction.where or instruction.name)
                    turns = 1
                visit(_named(instruction, 'body'), times * turns)
            elif instruction.opcode in CALLING:
                for called in _called(instruction):
                    visit(called, times)

    visit(program.entry, 1)
    return Runs(counts, unknown)


def _called(instruction: Instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.attributes)
    among = [name.strip().removeprefix('%') for name in branches[1].split(',')] if branches else []
    return among + _CALLED.findall(instruction.attributes)


def _named(instruction: Instruction, attribute: str) -> str:
    return re.search(rf'{attribute}=%?([\w.<>\-]+)', instruction.attributes)[1]


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """How often a while loop of a computation turns; None where the text does not tell."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (program.computations[_named(loop, part)] for part in ('condition', 'body'))
    test = next(i for i in condition.values() if i.is_root)
    if test.opcode != 'compare' or 'direction=LT' not in test.attributes:
        return None
    counter, end = (condition[name] for name in test.operands)
    place = re.search(r'index=(\d+)', counter.attributes) if counter.opcode == 'get-tuple-element' else None
    start = program.computations[computation].get(loop.operands[0])
    after = next(i for i in body.values() if i.is_root)
    if place is None or end.opcode != 'constant' or start is None or {start.opcode, after.opcode} != {'tuple'}:
        return None
    first = program.computations[computation][start.operands[int(place[1])]]
    if first.opcode != 'constant' or not _grows_by_one(body, after.operands[int(place[1])], place[1]):
        return None
    return max(int(end.literal) - int(first.literal), 0)


def _grows_by_one(body: dict[str, Instruction], name: str, place: str) -> bool:
    """Whether `name` is the element `place` of what the body is given, plus one."""
    grown = body[name]
    if grown.opcode != 'add':
        return False
    counter, one = sorted((body[operand] for operand in grown.operands), key=lambda i: i.opcode == 'constant')
    told = re.search(r'index=(\d+)', counter.attributes) if counter.opcode == 'get-tuple-element' else None
    return told is not None and told[1] == place and (one.opcode, one.literal) == ('constant', '1')
