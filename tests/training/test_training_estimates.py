"""What a step costs, against what can be counted by hand; and the roofline on round numbers."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.build import build
from diffjax.training import devices
from diffjax.training.collectives import Collective, find, totals
from diffjax.training.devices import DEVICES, Device, find_device
from diffjax.training.estimates import (
    Cost,
    Memory,
    bytes_on_device,
    compile_partitioned,
    count_cost,
    efficiency,
    product_flops,
    product_traffic,
    roofline,
)
from diffjax.training.hlo import count_runs, parse
from diffjax.training.sharding import make_mesh, state_shardings

PRODUCTS = """HloModule m

%body (c: (s32[], f32[3,16,4], bf16[8,16])) -> (s32[], f32[3,16,4], bf16[8,16]) {
  %c = (s32[], f32[3,16,4], bf16[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %w = f32[3,16,4] get-tuple-element(%c), index=1
  %x = bf16[8,16] get-tuple-element(%c), index=2
  %zero = s32[] constant(0)
  %layer = f32[1,16,4] dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,16,4}
  %flat = f32[16,4] reshape(%layer)
  %y = f32[8,4] dot(%x, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %put = f32[3,16,4] dynamic-update-slice(%w, %layer, %i, %zero, %zero)
  ROOT %out = (s32[], f32[3,16,4], bf16[8,16]) tuple(%i, %put, %x)
}

%less (c: (s32[], f32[3,16,4], bf16[8,16])) -> pred[] {
  %c.1 = (s32[], f32[3,16,4], bf16[8,16]) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (a: bf16[2,8,8,3], k: bf16[3,3,3,16]) -> bf16[2,4,4,16] {
  %a = bf16[2,8,8,3] parameter(0)
  %k = bf16[3,3,3,16] parameter(1)
  %t = (s32[], f32[3,16,4], bf16[8,16]) custom-call(), custom_call_target="start"
  %w = (s32[], f32[3,16,4], bf16[8,16]) while(%t), condition=%less, body=%body, c={"known_trip_count":{"n":"3"}}
  %wide = bf16[2,16,16,3] convolution(%a, %k.1), window={size=3x3 lhs_dilate=2x2}, dim_labels=b01f_01io->b01f
  %k.1 = bf16[3,3,3,3] slice(%k), slice={[0:3], [0:3], [0:3], [0:3]}
  ROOT %y = bf16[2,4,4,16] convolution(%a, %k), window={size=3x3 stride=2x2}, dim_labels=b01f_01io->b01f
}
"""


def test_products_of_a_text():
    program = parse(PRODUCTS)
    runs = count_runs(program)
    convolution = 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)
    transposed = 2 * (2 * 8 * 8 * 3) * (3 * 3 * 3)  # each input value meets the kernel once; the zeros are free
    assert product_flops(program, runs) == {'f32': 3 * 2 * 8 * 16 * 4, 'bf16': convolution + transposed}
    layer, inside = 16 * 4 * 4, 8 * 16 * 2 + 16 * 4 * 4 + 8 * 4 * 4
    convolutions = 2 * (2 * 8 * 8 * 3) * 2 + (27 * 16 + 27 * 3 + 2 * 4 * 4 * 16 + 2 * 16 * 16 * 3) * 2
    assert product_traffic(program, runs) == 3 * (2 * layer + inside) + convolutions


def test_a_compiled_program():
    """Gradients of a scanned network on eight devices: each weight is reduced once, in the dtype that it has."""
    depth, width, batch, mesh = 3, 64, 16, make_mesh(2, 4)

    def loss(w, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0].astype(jnp.float32).sum()

    w, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((depth, width, width), (batch, width)))
    split, everywhere = NamedSharding(mesh, P(('data', 'fsdp'))), NamedSharding(mesh, P())
    step = jax.jit(jax.grad(loss), in_shardings=(everywhere, split), out_shardings=everywhere)
    for _ in range(2):  # a second time it is compiled again, not taken from a cache without a text
        compiled, text = compile_partitioned(step.lower(w, x), 8)
    program = parse(text)
    runs = count_runs(program)
    size = depth * width * width * 2
    (found,) = totals(find(program, runs, 8)).items()
    assert found[0] == 'all-reduce' and found[1].size == size and found[1].sent == 2 * 7 / 8 * size
    assert runs.unknown == [] and {c.group_size for c in find(program, runs, 8)} == {8}
    assert product_flops(program, runs) == {'bf16': 3 * depth * 2 * (batch // 8) * width * width}
    assert compiled.memory_analysis().argument_size_in_bytes == size + batch // 8 * width * 2
    assert jax.config.jax_enable_compilation_cache


@pytest.fixture(scope='module')
def cost(get_config):
    """The digits' smallest network, its layers scanned, on eight devices that share the batch alone."""
    config = get_config('digits', 'smoke').to_dict()
    config['network'] |= {'scan_layers': True, 'depth': 3}
    config['mesh'] = {'data': 8, 'fsdp': 1}
    experiment = build(config)
    return experiment, count_cost(experiment.trainer(), experiment.batch_spec)


def test_of_a_training_step(cost):
    """What the compiler says it is given is the sum of the parts; and no device does more than its share."""
    experiment, cost = cost
    parameters = 4 * cost.num_parameters
    memory = cost.memory
    assert memory.arguments == {
        'parameters': parameters,
        'optimiser state': 2 * parameters + 8,  # two moments and two counters
        'averages': parameters,
        'task state, step and key': 4 + 8,
        'frozen': 0,
        'batch': 2 * (8 * 8 + 4),
    }
    assert sum(memory.arguments.values()) == memory.argument
    state = memory.argument - memory.arguments['batch']
    assert memory.aliased == state - memory.arguments['task state, step and key'] or memory.aliased == state
    assert state <= memory.output < state + 4096 and memory.temporaries > 0
    assert memory.needed == memory.argument + memory.output - memory.aliased + memory.temporaries
    assert sum(cost.flops.values()) * 8 == cost.model_flops and set(cost.flops) == {'f32'}
    assert cost.xla_flops < cost.model_flops / 8  # a loop once
    assert cost.unknown_loops == []


def test_gradients_are_reduced_once(cost):
    """In float32; beside them a few numbers that are logged, and the positions, which have no gradient."""
    experiment, cost = cost
    reduced = totals(cost.collectives)['all-reduce'].size
    shapes = experiment.trainer().init(experiment.batch_spec)[1]
    fixed = math.prod(shapes.params['pos_embed'].shape)
    assert 4 * (cost.num_parameters - fixed) <= reduced < 4 * (cost.num_parameters + 100)
    assert cost.traffic > 2 * cost.memory.arguments['optimiser state']


@pytest.mark.parametrize('data, fsdp', [(2, 4), (8, 1)])
def test_bytes_on_a_device_are_those_of_its_shards(data, fsdp, config):
    config['mesh'] = {'data': data, 'fsdp': fsdp}
    experiment = build(config)
    _, shapes, shardings = experiment.trainer().init(experiment.batch_spec)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes.params)
    placed = jax.tree.leaves(jax.device_put(zeros, shardings.params))
    by_hand = sum(a.addressable_shards[0].data.nbytes for a in placed)
    assert bytes_on_device(shapes.params, shardings.params) == by_hand
    whole = sum(a.nbytes for a in placed)
    assert by_hand == whole if fsdp == 1 else by_hand < 0.35 * whole


def test_bytes_by_hand():
    mesh = make_mesh(2, 4)
    tree = {'kernel': jax.ShapeDtypeStruct((64, 32), jnp.bfloat16), 'bias': jax.ShapeDtypeStruct((30,), jnp.float32)}
    assert bytes_on_device(tree, state_shardings(mesh, tree)) == 64 * 32 * 2 // 4 + 30 * 4


ROUND = Device(
    name='round', flops_16=1000.0, flops_32=500.0, memory=2000, bandwidth=100.0, link=10.0, domain=2, network=1.0
)


def by_hand(**changes):
    near = Collective('all-gather', 'f32[5]{0}', 20, ((0, 1), (2, 3)), 2, 'near')
    far = Collective('all-reduce', 'f32[1]{0}', 4, ((0, 2), (1, 3)), 1, 'far')
    memory = Memory({'parameters': 900}, argument=1000, output=950, aliased=900, temporaries=500)
    cost = Cost(4, 10, 8000, {'bf16': 1500, 'f32': 1000}, 1.0, 400, 1.0, [near, far], memory, [])
    return cost._replace(**changes)


def test_the_roofline_by_hand():
    roof = roofline(by_hand(), ROUND)
    assert roof.compute == 1500 / 1000 + 1000 / 500
    assert roof.memory == 4.0
    assert roof.collectives == 2 * (20 / 2) / 10 + 4 / 1
    assert (roof.at_least, roof.at_most, roof.bound) == (6.0, 13.5, 'collectives')
    assert roof.fits and roof.share == 1550 / 2000
    near = by_hand(collectives=by_hand().collectives[:1])
    assert roofline(near, ROUND).bound == 'memory' and roofline(near, ROUND).at_least == 4.0
    assert roofline(near, replace(ROUND, bandwidth=1000.0)).bound == 'compute'
    assert roofline(by_hand(), replace(ROUND, domain=4)).collectives == 2 * 1 + 4 / 10


def test_does_not_fit():
    assert roofline(by_hand(), replace(ROUND, memory=1550)).fits
    assert not roofline(by_hand(), replace(ROUND, memory=1549)).fits


def test_held_against_a_measured_run():
    """The estimate is 6 s a step; the model's own 8000 FLOPs are 2000 a device of the 2500 that it does."""
    found = efficiency(by_hand(), ROUND, 0.1)
    assert found['of_the_roofline'] == pytest.approx(0.6)
    assert found['of_the_peak'] == pytest.approx(0.1 * 3.5 * 2000 / 2500)


def test_devices_by_name():
    assert find_device('h100', 8) is find_device('H100', 8) is DEVICES['H100'] and find_device('v5e', 8).name == 'v5e'
    assert list(DEVICES) == ['v4', 'v5e', 'v5p', 'v6e', 'A100', 'H100', 'H200']
    with pytest.raises(ValueError, match='--device=v7: unknown device; there are v4, v5e, .*, H200, cpu'):
        find_device('v7', 8)


@pytest.mark.parametrize(
    'name, flops_for_a_byte', [('v5e', 240.5), ('v5p', 166.0), ('v6e', 560.4), ('H100', 295.2), ('H200', 206.0)]
)
def test_datasheets_agree_with_published_intensities(name, flops_for_a_byte):
    """FLOPs for each byte of memory at which compute takes as long as memory, as these chips are known for."""
    device = DEVICES[name]
    assert device.flops('bf16') / device.bandwidth == pytest.approx(flops_for_a_byte, rel=0.005)
    assert device.flops('f32') <= device.flops('bf16') and device.network < device.link < device.bandwidth


def test_the_machine_at_hand(monkeypatch):
    """On a clock that ticks half a second at each look: a product of 64 x 64 matrices, and a copy of 1000 values."""
    monkeypatch.setattr(devices, 'MATMUL', 64)
    monkeypatch.setattr(devices, 'COPY', 1000)
    ticks = iter(range(1000))
    monkeypatch.setattr(devices.time, 'perf_counter', lambda: next(ticks) / 2)
    device = find_device('CPU', 4)
    assert device.flops_32 == device.flops('bf16') == 2 * 64**3 / 0.5 / 4
    assert device.bandwidth == 2 * 4000 / 0.5 / 4 and device.domain == 4
