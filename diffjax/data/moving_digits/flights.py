"""What a clip shows: one or two digits, each on a straight flight that the walls reflect. And how that is drawn.

With p the centre along one axis, in fractions of the picture's side, and k the number of the frame,

    p(k) = a + |s(k) - 2 L round(s(k) / 2L)|,    s(k) = p(0) - a + k v(0),    L = b - a                              (1)
    v(k) = v(0) at the even multiples of L that s has passed, -v(0) at the odd ones                                 (2)

where a and b are the walls' distances from the edge at which the digit's square touches it. The digits fly through each
other, and where they overlap the brighter ink is seen.

A digit D of 8 x 8 is enlarged by cubic convolution (Keys 1981, doi:10.1109/TASSP.1981.1163711, equation 4) at any
place, between pixels too: with w(p)[i, j] the kernel's weight of ink row j in pixel row i,

    frame = w(p_y) D w(p_x)^T                                                                                       (3)

A flight is a pure function of its split and index (`data/streams.py`).
"""

from typing import NamedTuple

import numpy as np

from diffjax.data.clips import MAX_ACTORS, NUM_FRAMES
from diffjax.data.streams import Stream

SIDE = 32  # pixels
DIGIT = 12.8  # the side of a digit's square, in pixels
INK_SIDE = 8  # of a digit as it was scanned
MAX_INK = 16
SPEEDS = (0.02, 0.07)  # of the side in each frame
SPLIT_KEYS = {'train': 0xD161, 'test': 0xD162}


class Flight(NamedTuple):
    """Of one digit. Places and velocities are (y, x), y down, in fractions of the side, and of it in each frame."""

    digit: int  # its place among the digits of the split
    start: tuple[float, float]
    velocity: tuple[float, float]


def flights(split: str, index: int, num_digits: int) -> tuple[Flight, ...]:
    """Clip `index` of a split that has so many digits to choose from."""
    stream = Stream(SPLIT_KEYS[split], index)
    return tuple(_flight(stream, num_digits) for _ in range(stream.choice(range(1, MAX_ACTORS + 1))))


def _flight(stream: Stream, num_digits: int) -> Flight:
    low, high = walls()
    digit = stream.choice(range(num_digits))
    start = stream.uniform(low, high), stream.uniform(low, high)
    speed, angle = stream.uniform(*SPEEDS), stream.uniform(0, 2 * np.pi)
    return Flight(digit, start, (speed * np.sin(angle), speed * np.cos(angle)))


def walls() -> tuple[float, float]:
    """(a, b) of (1)."""
    low = DIGIT / 2 / SIDE
    return low, 1 - low


def path(flight: Flight, num_frames: int = NUM_FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """(places, velocities) by (1) and (2), each [num_frames, 2]."""
    low, high = walls()
    span, velocity = high - low, np.asarray(flight.velocity)
    straight = np.asarray(flight.start) - low + np.arange(num_frames)[:, None] * velocity
    places = low + np.abs(straight - 2 * span * np.round(straight / (2 * span)))
    return places, np.where(np.floor(straight / span) % 2 == 0, velocity, -velocity)


def draw(digits: np.ndarray, paths: list[np.ndarray]) -> np.ndarray:
    """Digits of ink [N, 8, 8] on their paths [T, 2]: uint8 [T, 32, 32, 1]."""
    layers = [
        np.einsum('tij,jk,tlk->til', weights(places[:, 0]), digit, weights(places[:, 1]), optimize=True)
        for digit, places in zip(digits, paths)
    ]
    ink = np.clip(np.maximum.reduce(layers), 0, MAX_INK)
    return np.rint(ink * (255 / MAX_INK)).astype(np.uint8)[..., None]


def weights(centres: np.ndarray) -> np.ndarray:
    """w of (3) for a digit whose centre is there: [T] -> [T, 32, 8]."""
    pixels, inks = np.arange(SIDE) + 0.5, np.arange(INK_SIDE) + 0.5
    at = (pixels - centres[:, None] * SIDE) * (INK_SIDE / DIGIT) + INK_SIDE / 2
    return _keys(np.abs(at[..., None] - inks))


def _keys(d: np.ndarray) -> np.ndarray:
    near, far = (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0))
