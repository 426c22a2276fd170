"""Images from their bytes, at the size that training wants."""

import io

import numpy as np

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


def decode(encoded: bytes, shape: tuple[int, int, int], *, cropped: bool = False) -> np.ndarray:
    """PNG or JPEG bytes -> uint8 `[H, W, C]`. By Pillow always: TFDS's decoder changes with what is installed.

    cropped: the middle square, resized to `shape`; otherwise the image must have this size. Raises OSError, ValueError
    or SyntaxError, as Pillow does, for bytes that are no such image.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(encoded)).convert(MODES[shape[-1]])
    except Image.DecompressionBombError as error:  # a size that no image of a dataset has
        raise ValueError(str(error)) from error
    if cropped:
        image = _middle_square(image, shape[0])
    return np.asarray(image).reshape(shape)


def encode(image: np.ndarray) -> bytes:
    """uint8 `[H, W, C]` -> PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format='PNG')
    return buffer.getvalue()


def _middle_square(image, side: int):
    """As for guided diffusion (Dhariwal & Nichol 2021): halved by boxes while twice too large, bicubic, cropped."""
    from PIL import Image

    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
