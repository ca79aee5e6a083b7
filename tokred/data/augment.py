"""Image augmentations: pure functions on numpy images [H, W, C], Pillow for the pixels.

Every random draw comes from the Generator that is passed in; inputs are never written to. Images
are uint8 with 1 or 3 channels, or float of any range where a function says so. `augment` chains
what an Augmentation asks for, `view` is its counterpart for evaluation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image, ImageEnhance, ImageOps

Crop = Literal["padded", "resized", "centre"]
Span = tuple[float, float]

TRIES = 10  # draws of a random box before giving up
MAX_MAGNITUDE = 10.0
MAX_SHEAR, MAX_SHIFT, MAX_DEGREES, MAX_CHANGE = 0.3, 0.45, 30.0, 0.9
MAX_BITS_LOST = 4
GREY = 128


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image; all of it static.

    crop: 'padded' (pad by `pad` stored pixels, crop back), 'resized' (a random box of `scale` of
    the area and `ratio` width / height) or 'centre' (nothing random). flip, erase: probabilities.
    operations, magnitude, chance, spread: of rand_augment; 0 operations is none.
    Raises ValueError for values out of range.
    """

    crop: Crop = "padded"
    pad: int = 4
    scale: Span = (0.08, 1.0)
    ratio: Span = (3 / 4, 4 / 3)
    flip: float = 0.5
    operations: int = 0
    magnitude: float = 9.0
    chance: float = 1.0
    spread: float = 0.0
    erase: float = 0.0

    def __post_init__(self):
        _expect(self.crop in get_args(Crop), "crop", f"one of {get_args(Crop)}", self.crop)
        _expect(self.pad >= 0, "pad", "at least 0", self.pad)
        _expect(self.operations >= 0, "operations", "at least 0", self.operations)
        _expect_magnitude(self.magnitude)
        _expect(self.spread >= 0, "spread", "at least 0", self.spread)
        for name in ("flip", "chance", "erase"):
            _expect_probability(name, getattr(self, name))
        for name in ("scale", "ratio"):
            _expect_span(name, getattr(self, name))


def augment(
    image: UInt8[np.ndarray, "H W C"],
    rng: np.random.Generator,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    how: Augmentation,
) -> Float32[np.ndarray, "size size C"]:
    """A training view: crop, flip, rand_augment, normalise, erase (with noise), in this order."""
    image = _random_crop(image, rng, size, how)
    image = random_flip(image, rng, probability=how.flip)
    image = rand_augment(
        image,
        rng,
        operations=how.operations,
        magnitude=how.magnitude,
        chance=how.chance,
        spread=how.spread,
    )
    return random_erase(normalise(image, mean, std), rng, probability=how.erase)


def _random_crop(
    image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator, size: int, how: Augmentation
) -> UInt8[np.ndarray, "size size C"]:
    if how.crop == "resized":
        return random_resized_crop(image, rng, size, scale=how.scale, ratio=how.ratio)
    if how.crop == "padded":
        image = pad_and_crop(image, rng, how.pad)
    return resize_and_centre_crop(image, size, ratio=1.0)


def view(
    image: Shaped[np.ndarray, "H W C"],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    ratio: float,
) -> Float32[np.ndarray, "size size C"]:
    """The evaluation view: resize and centre crop at `ratio`, then normalise."""
    return normalise(resize_and_centre_crop(image, size, ratio=ratio), mean, std)


def random_flip(
    image: Shaped[np.ndarray, "H W C"], rng: np.random.Generator, *, probability: float = 0.5
) -> Shaped[np.ndarray, "H W C"]:
    """The image or, with the given probability, its left-right mirror; any dtype."""
    _expect_probability("probability", probability)
    return image[:, ::-1] if rng.random() < probability else image


def pad_and_crop(
    image: Shaped[np.ndarray, "H W C"], rng: np.random.Generator, pad: int = 4
) -> Shaped[np.ndarray, "H W C"]:
    """Add `pad` zero pixels on every side and cut the old size out at random; any dtype."""
    _expect(pad >= 0, "pad", "at least 0", pad)
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), image.dtype)
    padded[pad : pad + height, pad : pad + width] = image
    top, left = rng.integers(2 * pad + 1, size=2)
    return padded[top : top + height, left : left + width]


def random_resized_crop(
    image: Shaped[np.ndarray, "H W C"],
    rng: np.random.Generator,
    size: int,
    *,
    scale: Span = (0.08, 1.0),
    ratio: Span = (3 / 4, 4 / 3),
) -> Shaped[np.ndarray, "size size C"]:
    """Cut a random box and resize it to size x size; uint8 or float.

    scale: share of the area, uniform. ratio: width / height, log-uniform. If no box fits after
    TRIES draws, the largest central one with a permitted ratio is taken.
    """
    box = _random_box(rng, image.shape, scale, ratio) or _central_box(image.shape, ratio)
    top, left, height, width = box
    return resize(image[top : top + height, left : left + width], size, size)


def _random_box(
    rng: np.random.Generator, shape: Sequence[int], scale: Span, ratio: Span
) -> tuple[int, int, int, int] | None:
    """top, left, height, width; None if TRIES draws did not fit into the image."""
    _expect_span("scale", scale)
    _expect_span("ratio", ratio)
    for _ in range(TRIES):
        area = shape[0] * shape[1] * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        height, width = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 0 < height <= shape[0] and 0 < width <= shape[1]:
            top = int(rng.integers(shape[0] - height + 1))
            left = int(rng.integers(shape[1] - width + 1))
            return top, left, height, width
    return None


def _central_box(shape: Sequence[int], ratio: Span) -> tuple[int, int, int, int]:
    aspect = min(max(shape[1] / shape[0], ratio[0]), ratio[1])
    height = max(1, min(shape[0], round(shape[1] / aspect)))
    width = max(1, min(shape[1], round(shape[0] * aspect)))
    return (shape[0] - height) // 2, (shape[1] - width) // 2, height, width


def resize_and_centre_crop(
    image: Shaped[np.ndarray, "H W C"], size: int, *, ratio: float = 0.875
) -> Shaped[np.ndarray, "size size C"]:
    """Resize the short side to size / ratio, then cut out the centre; uint8 or float.

    0.875 is the convention of ImageNet (256 for 224); 1.0 keeps the whole short side.
    """
    _expect(0 < ratio <= 1, "ratio", "in (0, 1]", ratio)
    height, width, _ = image.shape
    side, short = int(size / ratio), min(height, width)
    image = resize(image, side * height // short, side * width // short)
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return image[top : top + size, left : left + size]


def resize(
    image: Shaped[np.ndarray, "H W C"], height: int, width: int
) -> Shaped[np.ndarray, "height width C"]:
    """Bicubic with antialiasing; uint8 with 1 or 3 channels, or float (float32 comes back)."""
    _expect(min(height, width) >= 1, "height and width", "at least 1", (height, width))
    if image.shape[:2] == (height, width):
        return image
    if image.dtype == np.uint8:
        return _pixels(_picture(image).resize((width, height), Image.Resampling.BICUBIC))
    planes = [Image.fromarray(plane) for plane in np.moveaxis(image, -1, 0).astype(np.float32)]
    resized = [plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], -1)


def _picture(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise TypeError(
            "image must be uint8 [H, W, C] with 1 or 3 channels, "
            f"got {image.dtype} {image.shape}: convert image."
        )
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def _pixels(picture: Image.Image) -> UInt8[np.ndarray, "H W C"]:
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def rand_augment(
    image: UInt8[np.ndarray, "H W C"],
    rng: np.random.Generator,
    *,
    operations: int = 2,
    magnitude: float = 9.0,
    chance: float = 1.0,
    spread: float = 0.0,
) -> UInt8[np.ndarray, "H W C"]:
    """Apply `operations` random operations (with repetition) of OPERATIONS, one after another.

    magnitude: 0 to 10, linear to the strongest form; the sign is random. 0 returns the image as it
    is, although auto_contrast and equalize know no magnitude. chance: that a drawn operation is
    applied. spread: standard deviation of each operation's magnitude, which stays within 0 to 10.
    """
    _expect(operations >= 0, "operations", "at least 0", operations)
    _expect_magnitude(magnitude)
    _expect_probability("chance", chance)
    _expect(spread >= 0, "spread", "at least 0", spread)
    if not operations or not magnitude:
        return image
    names = list(OPERATIONS)
    for drawn in rng.integers(len(names), size=operations):
        if rng.random() < chance:
            size = np.clip(rng.normal(magnitude, spread), 0, MAX_MAGNITUDE) / MAX_MAGNITUDE
            image = distort(image, names[drawn], float(rng.choice((-1.0, 1.0)) * size))
    return image


def distort(
    image: UInt8[np.ndarray, "H W C"], name: str, strength: float
) -> UInt8[np.ndarray, "H W C"]:
    """One operation of OPERATIONS at a strength in [-1, 1]; at 0 those that know it do nothing.

    What comes in from outside the image is grey. Raises ValueError for an unknown name.
    """
    _expect(name in OPERATIONS, "name", f"one of {sorted(OPERATIONS)}", name)
    return _pixels(OPERATIONS[name](_picture(image), strength))


def _warp(picture: Image.Image, matrix: Sequence[float]) -> Image.Image:
    """matrix: a, b, c, d, e, f with source x = a x + b y + c and source y = d x + e y + f."""
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BILINEAR,
        fillcolor=_grey(picture),
    )


def _grey(picture: Image.Image) -> int | tuple[int, ...]:
    return GREY if picture.mode == "L" else (GREY,) * 3


def _shear_x(picture: Image.Image, strength: float) -> Image.Image:
    slope = MAX_SHEAR * strength
    return _warp(picture, (1, slope, -slope * picture.height / 2, 0, 1, 0))


def _shear_y(picture: Image.Image, strength: float) -> Image.Image:
    slope = MAX_SHEAR * strength
    return _warp(picture, (1, 0, 0, slope, 1, -slope * picture.width / 2))


def _translate_x(picture: Image.Image, strength: float) -> Image.Image:
    return _warp(picture, (1, 0, MAX_SHIFT * strength * picture.width, 0, 1, 0))


def _translate_y(picture: Image.Image, strength: float) -> Image.Image:
    return _warp(picture, (1, 0, 0, 0, 1, MAX_SHIFT * strength * picture.height))


def _rotate(picture: Image.Image, strength: float) -> Image.Image:
    degrees = MAX_DEGREES * strength
    return picture.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=_grey(picture))


def _posterize(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(picture, 8 - round(MAX_BITS_LOST * abs(strength)))


def _solarize(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(picture, 256 - round(256 * abs(strength)))


def _enhance(kind: Callable) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, strength: kind(picture).enhance(1 + MAX_CHANGE * strength)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda picture, strength: picture,
    "auto_contrast": lambda picture, strength: ImageOps.autocontrast(picture),
    "equalize": lambda picture, strength: ImageOps.equalize(picture),
    "rotate": _rotate,
    "solarize": _solarize,
    "posterize": _posterize,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


def random_erase(
    image: Float32[np.ndarray, "H W C"],
    rng: np.random.Generator,
    *,
    probability: float = 0.25,
    scale: Span = (0.02, 1 / 3),
    ratio: Span = (0.3, 1 / 0.3),
) -> Float32[np.ndarray, "H W C"]:
    """With the given probability, fill a random box of a normalised image with normal noise.

    scale: share of the area, uniform. ratio: width / height, log-uniform.
    """
    _expect_probability("probability", probability)
    if rng.random() >= probability:
        return image
    box = _random_box(rng, image.shape, scale, ratio)
    if box is None:
        return image
    top, left, height, width = box
    erased = image.copy()
    noise = rng.standard_normal((height, width, image.shape[-1]), np.float32)
    erased[top : top + height, left : left + width] = noise
    return erased


def normalise(
    image: Shaped[np.ndarray, "H W C"], mean: Sequence[float], std: Sequence[float]
) -> Float32[np.ndarray, "H W C"]:
    """(x - mean) / std per channel, x in [0, 1]: uint8 is divided by 255, float taken as it is.

    Raises ValueError if mean or std is not one number per channel.
    """
    if not len(mean) == len(std) == image.shape[-1]:
        raise ValueError(
            f"mean and std must have one number for each of the {image.shape[-1]} channels, "
            f"got {len(mean)} and {len(std)}: change mean and std."
        )
    unit = 255 if image.dtype == np.uint8 else 1
    gain, offset = 1 / (unit * np.asarray(std)), np.asarray(mean) / np.asarray(std)
    return image.astype(np.float32, copy=False) * np.float32(gain) - np.float32(offset)


def _expect(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {got!r}: change {name}.")


def _expect_probability(name: str, value: float) -> None:
    _expect(0 <= value <= 1, name, "a probability in [0, 1]", value)


def _expect_magnitude(value: float) -> None:
    _expect(0 <= value <= MAX_MAGNITUDE, "magnitude", f"in [0, {MAX_MAGNITUDE:g}]", value)


def _expect_span(name: str, value: Span) -> None:
    ordered = len(value) == 2 and 0 < value[0] <= value[1]
    _expect(ordered, name, "two ordered positive numbers", value)
