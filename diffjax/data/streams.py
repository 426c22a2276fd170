"""Random numbers of one example of an embedded dataset: the same for ever, whichever other examples are made."""

from collections.abc import Sequence

import numpy as np


class Stream:
    """Uniform numbers of example `index` under a key: the raw words of Philox, which no release of NumPy changes."""

    def __init__(self, key: int, index: int):
        self._bits = np.random.Philox(key=key, counter=[0, 0, 0, index])

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def choice(self, options: Sequence):
        return options[int(self.uniform() * len(options))]
