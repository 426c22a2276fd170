"""Programs read from their text: what runs how often, what devices tell each other, in bytes counted by hand."""

import pytest

from diffjax.training.collectives import Total, alike, find, read_groups, totals
from diffjax.training.hlo import arrays, count_runs, num_bytes, parse, trip_count

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %carry = (s32[], bf16[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %h = bf16[4,8] get-tuple-element(%carry), index=1
  %wide = bf16[16,8] all-gather(%h), replica_groups=[1,4]<=[4], metadata={op_name="jit(step)/gather"}
  %product = bf16[16,16] dot(%wide, %wide), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %short = bf16[4,8] fusion(%product), kind=kLoop, calls=%fused
  ROOT %out = (s32[], /*index=1*/bf16[4,8]) tuple(%next, %short)
}

%condition (carry: (s32[], bf16[4,8])) -> pred[] {
  %carry.1 = (s32[], bf16[4,8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

%fused (p: bf16[16,16]) -> bf16[4,8] {
  %p = bf16[16,16]{1,0} parameter(0)
  %zero.1 = s32[] constant(0)
  %moved = bf16[16,16]{1,0} collective-permute(%p), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %cut = bf16[4,8] dynamic-slice(%moved, %zero.1, %zero.1), dynamic_slice_sizes={4,8}
}

%endless (carry: (s32[], bf16[4,8])) -> pred[] {
  %carry.2 = (s32[], bf16[4,8]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (p0: f32[4,8], p1: bf16[4,8]) -> f32[4,8] {
  %p0 = f32[4,8] parameter(0), metadata={op_name="x (of the batch)"}
  %p1 = bf16[4,8] parameter(1)
  %start = s32[] constant(CONSTANT)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[4,8]) tuple(%start, %p1)
  %loop = (s32[], bf16[4,8]) while(%init), condition=%TEST, body=%body, metadata={op_name="jit(step)/while"}KNOWN
  %reduced = f32[4,8] all-reduce(%p0), channel_id=3, replica_groups={{0,1},{2,3}}, to_apply=%add
  %whole = f32[4,8] all-reduce(%reduced), channel_id=4, replica_groups={}, to_apply=%add
  %part = f32[1,8] dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={1,8}
  %pieces = (f32[2,8], f32[2,8]) all-to-all(%part.a, %part.b), replica_groups={{0,2},{1,3}}
  %part.a = f32[2,8] slice(%reduced), slice={[0:2], [0:8]}
  %part.b = f32[2,8] slice(%reduced), slice={[2:4], [0:8]}
  %begun = (f32[1,8], f32[4,8]) all-gather-start(%part), replica_groups=[1,4]<=[4], dimensions={0}
  %alone = f32[4,8] all-reduce(%p0), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  ROOT %done = f32[4,8] all-gather-done(%begun)
}
"""


def written(constant='0', condition='condition', known=''):
    return TEXT.replace('CONSTANT', constant).replace('TEST', condition).replace('KNOWN', known)


KNOWN = ', backend_config={"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize(
    'options, turns',
    [
        ({}, 7),
        ({'constant': '3'}, 4),
        ({'constant': '9'}, 0),
        ({'known': KNOWN, 'condition': 'endless'}, 5),
        ({'condition': 'endless'}, None),
    ],
)
def test_how_often_a_loop_turns(options, turns):
    program = parse(written(**options))
    loop = program.computations['main']['loop']
    assert trip_count(program, 'main', loop) == turns
    runs, times = count_runs(program), 1 if turns is None else turns
    assert runs.unknown == (['jit(step)/while'] if turns is None else [])
    assert {name: runs.counts[name] for name in ('main', 'body', 'fused', 'add')} == {
        'main': 1,
        'body': times,
        'fused': times,
        'add': 0,
    }


@pytest.mark.parametrize('change', [('%one = s32[] constant(1)', '%one = s32[] constant(2)'), ('LT', 'LE')])
def test_a_loop_that_counts_otherwise_is_not_guessed_at(change):
    text = written()
    assert change[0] in text
    assert count_runs(parse(text.replace(*change))).unknown == ['jit(step)/while']


CALLS = """HloModule m

%yes (a: f32[]) -> f32[] {
  ROOT %a = f32[] parameter(0)
}

%no (a: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  ROOT %b.1 = f32[] call(%a.1), to_apply=%yes
}

ENTRY %main (p: pred[], x: f32[]) -> f32[] {
  %p = pred[] parameter(0)
  %x = f32[] parameter(1)
  %twice = f32[] call(%x), to_apply=%no
  ROOT %y = f32[] conditional(%p, %x, %twice), BRANCHES
}
"""


@pytest.mark.parametrize(
    'branches', ['branch_computations={%yes, %no}', 'true_computation=%yes, false_computation=%no']
)
def test_of_a_conditional_each_branch_counts(branches):
    assert count_runs(parse(CALLS.replace('BRANCHES', branches))).counts == {'main': 1, 'no': 2, 'yes': 3}


def test_collectives_by_hand():
    program = parse(written())
    found = find(program, count_runs(program), 4)
    seen = {(c.kind, c.size, c.group_size, c.count, c.sent) for c in found}
    assert seen == {
        ('all-gather', 16 * 8 * 2, 4, 7, 3 / 4 * 256),  # in the loop
        ('collective-permute', 16 * 16 * 2, 2, 7, 512),  # in a fusion in the loop
        ('all-reduce', 4 * 8 * 4, 2, 1, 2 * 1 / 2 * 128),
        ('reduce-scatter', 4 * 8 * 4, 4, 1, 3 / 4 * 128),  # an all-reduce of which only a slice is used
        ('all-to-all', 2 * 2 * 8 * 4, 2, 1, 1 / 2 * 128),
        ('all-gather', 4 * 8 * 4, 4, 1, 3 / 4 * 128),  # begun and waited for; the one of one device is none
    }
    assert [c.sent * c.count for c in found] == sorted((c.sent * c.count for c in found), reverse=True)
    assert found[0].kind == 'collective-permute' and found[0].type == 'bf16[16,16]{1,0}'
    assert next(c for c in found if c.count == 7 and c.kind == 'all-gather').where == 'jit(step)/gather'
    assert totals(found) == {
        'all-reduce': Total(1, 128, 128),
        'all-gather': Total(8, 7 * 256 + 128, 7 * 192 + 96),
        'reduce-scatter': Total(1, 128, 96),
        'all-to-all': Total(1, 128, 64),
        'collective-permute': Total(7, 7 * 512, 7 * 512),
    }


def test_those_alike_are_one():
    program = parse(written())
    found = find(program, count_runs(program), 4)
    again = found[0]._replace(count=2, where='another layer')
    together = alike([*found, again])
    assert len(together) == len(found) and together[0] == found[0]._replace(count=9)


def test_types():
    assert arrays('(f32[2,3]{1,0}, /*index=1*/pred[4]{0}, s32[])') == [('f32', (2, 3)), ('pred', (4,)), ('s32', ())]
    assert num_bytes('(f32[2,3]{1,0}, pred[4]{0}, s32[])') == 24 + 4 + 4
    assert [num_bytes(f'{dtype}[6]') for dtype in ('bf16', 'f8e4m3fn', 's4', 'c64', 'f64', 'u8')] == [
        12,
        6,
        3,
        48,
        48,
        6,
    ]
    assert num_bytes('token[]') == 0
    with pytest.raises(ValueError, match='no text of a program'):
        parse('module @jit_step {')


@pytest.mark.parametrize(
    'attributes, groups',
    [
        ('channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add', [(0, 1), (2, 3)]),
        ('replica_groups={}, to_apply=%add', [tuple(range(8))]),
        ('to_apply=%add', [tuple(range(8))]),
        ('replica_groups=[2,4]<=[8], dimensions={1}', [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ('replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}', [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [tuple(range(8))]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b','a'}", [(0, 4, 1, 5, 2, 6, 3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}",
            [(0, 1, 2, 3), (4, 5, 6, 7)],
        ),
        ('channel_id=4, source_target_pairs={{1,3},{5,7}}, metadata={}', [(1, 3), (5, 7)]),
    ],
)
def test_groups(attributes, groups):
    assert list(read_groups(attributes, 8)) == groups


def test_who_is_far():
    program = parse(written())
    found = find(program, count_runs(program), 4)
    far = {c.kind for c in found if c.crosses(2)}
    assert far == {'collective-permute', 'all-gather', 'reduce-scatter', 'all-to-all'}  # all but {0,1},{2,3}
    assert not any(c.crosses(4) for c in found)
