"""What a published architecture is to us: whose class, which network of ours, and the table between them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffjax.weights.rules import Leaf

INPUT = 'input'  # the key of options that is no keyword of the network


class WeightsError(ValueError):
    """Published weights that cannot be read or written; the message says what was found and what would be right."""


class Architecture(NamedTuple):
    """One row of the covered architectures.

    `options` are our network's keyword arguments, all of them plain data, and `input`: a dict of what the network is
    given and does not know by itself, for `inputs` and `to_config` (such as {'shape': [32, 32, 4]}, height, width and
    channels of x).

    class_name          `_class_name` in their config.json, or the first of its `architectures`
    network             the name of a module in `nets`
    to_options(config)  their config.json -> options; raises WeightsError for a setting that is not covered
    to_config(options)  options -> their config.json, whole, such that their library rebuilds the network
    table(options)      the rows; options with `scan_layers=False`
    inputs(options)     (x, t, cond), or whatever the network takes, as `jax.ShapeDtypeStruct`s of batch 1, enough to
                        initialise the network
    constants(options)  their tensors that follow from the configuration and are no parameters of ours (a fixed table
                        of positions, say): name -> array. Export writes them; import compares those that are there
    """

    class_name: str
    network: str
    to_options: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    table: Callable[[Mapping[str, Any]], list[Leaf]]
    inputs: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    constants: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda options: {}
