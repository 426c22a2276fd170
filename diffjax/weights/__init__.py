"""Published weights, in and out: tables of names and layouts, and one engine that reads them in both directions."""

from diffjax.weights.architecture import Architecture as Architecture
from diffjax.weights.architecture import WeightsError as WeightsError
from diffjax.weights.engine import export_tensors as export_tensors
from diffjax.weights.engine import import_tensors as import_tensors
from diffjax.weights.registry import ARCHITECTURES as ARCHITECTURES
from diffjax.weights.store import load as load
