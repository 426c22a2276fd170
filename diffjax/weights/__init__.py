"""Published weights, in and out: tables of names and layouts, and one engine that reads them in both directions."""

from diffjax.weights import dit
from diffjax.weights.architecture import Architecture as Architecture
from diffjax.weights.architecture import WeightsError as WeightsError
from diffjax.weights.engine import export_tensors as export_tensors
from diffjax.weights.engine import import_tensors as import_tensors

ARCHITECTURES = {  # by the class name in a config.json
    architecture.class_name: architecture
    for architecture in (
        dit.ARCHITECTURE,
        dit.ORIGINAL,
    )
}
