"""Floating-point operations of a program, counted from its jaxpr.

Multiplications and additions of matrix products and convolutions, 2 m n k each; a scan's body counts as often as it
runs (a compiler's own analysis counts it once), of a `cond` the dearest branch. Element-wise work is left out, as in
the papers' tables.
"""

import math

import jax.extend.core as jex


def count_flops(jaxpr: jex.Jaxpr | jex.ClosedJaxpr) -> int:
    """FLOPs of one evaluation: of `jax.make_jaxpr(f)(*args)`, or of `jax.jit(f).trace(*args).jaxpr`."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    if name == 'conv_general_dilated':
        kernel, numbers = equation.invars[1].aval.shape, params['dimension_numbers']
        outputs = math.prod(equation.outvars[0].aval.shape)
        strides = math.prod(params['lhs_dilation'])  # a transposed convolution multiplies by the zeros in between
        return 2 * outputs * math.prod(kernel) // kernel[numbers.rhs_spec[0]] // strides
    counts = [count_flops(inner) for inner in _inner(params)]
    if name == 'cond':
        return max(counts, default=0)
    return sum(counts) * (params['length'] if name == 'scan' else 1)


def _inner(params: dict):
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, jex.Jaxpr | jex.ClosedJaxpr):
                yield item
