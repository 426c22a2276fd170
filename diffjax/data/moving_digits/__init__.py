"""The TFDS dataset `moving_digits`, embedded: one or two real digits that fly about and bounce off the walls."""
