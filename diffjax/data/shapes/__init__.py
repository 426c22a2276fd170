"""The TFDS dataset `shapes`, embedded: captioned scenes of a few solids, drawn by a program."""
