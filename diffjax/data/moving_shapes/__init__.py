"""The TFDS dataset `moving_shapes`, embedded: captioned clips of one or two solids, each with a motion of its own."""
