"""Flux: the published counts, ids and angles of positions, what is refused. Its blocks: test_net_joint_blocks.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nets import Flux, as_model, count_parameters
from diffjax.nets.flux import token_ids
from diffjax.nets.rotary import turned, turns
from diffjax.training.flops import count_flops

TINY = dict(hidden_size=16, depth=1, single_depth=1, num_heads=2, rope_sizes=(2, 2, 4))  # noqa: C408
TINY |= dict(text_size=6, pooled_size=3, num_classes=5, out_channels=3)  # noqa: C408


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


# The published numbers ------------------------------------------------------------------------------------------------


def products_by_hand(d, depth, single_depth, tokens, image, vectors, inputs=4 * 16, text_size=4096):
    """Multiply-adds of one forward pass: a linear layer costs its weights once for each token it sees."""
    double = 12 * d**2 * tokens + 2 * tokens**2 * d + 12 * d**2
    single = 12 * d**2 * tokens + 2 * tokens**2 * d + 3 * d**2
    ends = 2 * image * inputs * d + (tokens - image) * text_size * d + 2 * d**2
    return depth * double + single_depth * single + sum(size * d + d**2 for size in vectors) + ends


@pytest.mark.parametrize(
    ('guidance', 'text', 'exact', 'billions', 'tera'),
    [('embedded', 512, 11_901_408_320, 11.90, 37.2), ('none', 256, 11_891_178_560, 11.89, 34.7)],
    ids=['dev', 'schnell'],
)
def test_published_counts(guidance, text, exact, billions, tera):
    fields = dict(hidden_size=3072, depth=19, single_depth=38, num_heads=24, out_channels=16)  # noqa: C408
    model = as_model(Flux(**fields, guidance=guidance))
    cond = {'text': abstract(1, text, 4096), 'pooled': abstract(1, 768)}
    cond |= {'guidance': abstract(1)} if guidance == 'embedded' else {}
    inputs = abstract(1, 128, 128, 16), abstract(1), cond
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert count_parameters(params) == exact
    assert round(exact / 1e9, 2) == billions

    flops = count_flops(jax.make_jaxpr(model.apply)(params, *inputs))
    vectors = (256, 768, 256) if guidance == 'embedded' else (256, 768)
    assert flops == 2 * products_by_hand(3072, 19, 38, 4096 + text, 4096, vectors)
    assert round(flops / 2e12, 1) == tera


# Positions ------------------------------------------------------------------------------------------------------------


def test_ids_are_zero_for_text_and_row_and_column_for_patches():
    assert token_ids(2, 2, 3).tolist() == [
        *([0, 0, 0], [0, 0, 0]),
        *([0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]),
    ]


def test_products_of_turned_heads_depend_on_differences_of_positions_alone():
    """As points of the plane: Re(q conj(k) exp(i (p_q - p_k) w)), summed over pairs and axes."""
    sizes, rng = (2, 4, 6), np.random.default_rng(0)
    places = rng.integers(0, 20, (2, 3)).astype(np.float64)
    q, k = rng.standard_normal((2, 12)).astype(np.float32)
    cos, sin = turns(places, sizes)
    both = turned(jnp.stack([q, k])[None, :, None], (cos, sin))[0, :, 0]

    expected, start = 0.0, 0
    for axis, size in enumerate(sizes):
        for j in range(size // 2):
            w = 10_000.0 ** (-2 * j / size)
            a, b = (complex(*vector[start + 2 * j :][:2]) for vector in (q, k))
            expected += (a * b.conjugate() * np.exp(1j * (places[0, axis] - places[1, axis]) * w)).real
        start += size
    np.testing.assert_allclose(jnp.dot(*both), expected, rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(both**2, -1), [q @ q, k @ k], rtol=1e-5)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'hidden_size': 18}, 'hidden_size=18 must be 16: num_heads=2 heads of 8 features, the sum of rope_sizes'),
        ({'single_depth': 0}, 'depth=1 and single_depth=0 must be at least 1'),
        ({'rope_sizes': (4, 4)}, r'rope_sizes are three even numbers, as in \(16, 56, 56\); got \(4, 4\)'),
        ({'rope_sizes': (1, 3, 4)}, r'rope_sizes are three even numbers, as in \(16, 56, 56\); got \(1, 3, 4\)'),
        ({'guidance': 'yes'}, "guidance='yes' is not known; choose one of 'none', 'embedded'"),
        ({'remat': 'some'}, "remat='some' is not known; choose one of 'none', 'full', 'dots'"),
        ({'scan_layers': 'no'}, "scan_layers='no' is not known; choose one of True, False, 'auto'"),
        ({'attention': 'flash'}, "attention='flash' is not known; choose one of 'auto'"),
        ({'compute_dtype': 'bf16'}, "compute_dtype='bf16' is not known; .*'float32', 'bfloat16', 'float16'"),
    ],
)
def test_wrong_fields_are_refused_when_the_network_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        Flux(**(TINY | changes))


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((1, 4, 5, 3), 'Flux takes x of even height and width, got 4x5'),
        ((4, 4, 3), r'Flux takes x of shape \[B, H, W, C\], got \(4, 4, 3\)'),
    ],
)
def test_wrong_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(as_model(Flux(**TINY)).init, jax.random.key(0), abstract(*shape), abstract(1), jnp.zeros(1, int))
