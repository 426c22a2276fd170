"""TFDS datasets as array_record -> Grain -> arrays on the mesh; the embedded datasets live here.

source = open_source('digits', 'train')
batches = make_iterator(source, batch_size=128, seed=0)
batch = prepare(to_global(next(batches), sharding), key, flip=False)      # x0 in [-1, 1], label
"""

from diffjax.data.encoded import EncodingSettings, write_encoded
from diffjax.data.pipeline import Prefetched, make_iterator, read_all, to_global
from diffjax.data.preparation import DatasetNotPrepared, UnknownDataset, prepare_dataset
from diffjax.data.sources import CorruptExample, Source, blank_source, list_splits, open_source
from diffjax.data.transforms import BYTE_WIDTH, FrameChoice, dequantize, from_uint8, prepare, to_uint8

__all__ = [
    'BYTE_WIDTH',
    'CorruptExample',
    'DatasetNotPrepared',
    'EncodingSettings',
    'FrameChoice',
    'Prefetched',
    'Source',
    'UnknownDataset',
    'blank_source',
    'dequantize',
    'from_uint8',
    'list_splits',
    'make_iterator',
    'open_source',
    'prepare',
    'prepare_dataset',
    'read_all',
    'to_global',
    'to_uint8',
    'write_encoded',
]
