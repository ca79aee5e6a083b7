"""Photographs and prose that are on a machine already: nothing is downloaded."""

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PHOTOGRAPHS = ("china", "flower", "astronaut", "chelsea", "coffee", "rocket")
SKLEARN = PHOTOGRAPHS[:2]
# Of ImageNet, which most vision models were trained with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Modules of the standard library with much English in their docstrings.
MODULES = (
    "statistics", "argparse", "random", "inspect", "threading", "tarfile", "socketserver",
    "pathlib", "typing", "optparse", "fractions", "textwrap", "smtplib", "subprocess", "shutil",
)  # fmt: skip


def photographs(size: int, count: int = 6) -> dict[str, np.ndarray]:
    """The first `count` of `PHOTOGRAPHS`, which come with scikit-learn and scikit-image: their
    central squares [size size 3] in [0, 1], by name.

    Raises:
      ValueError: more than there are. ImportError: one of the two is not installed.
    """
    if not 1 <= count <= len(PHOTOGRAPHS):
        raise ValueError(
            f"photographs: count={count} must lie in [1, {len(PHOTOGRAPHS)}]; change it."
        )
    try:
        from skimage.transform import resize  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(_missing("scikit-image")) from error
    squares = {name: _square(_photograph(name)) for name in PHOTOGRAPHS[:count]}
    return {
        name: np.asarray(resize(image, (size, size), anti_aliasing=True), np.float32)
        for name, image in squares.items()
    }


def _photograph(name: str) -> np.ndarray:
    """Bytes [Y X 3]."""
    if name not in SKLEARN:
        from skimage import data  # pyright: ignore[reportMissingImports]

        return getattr(data, name)()
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError(_missing("scikit-learn")) from error
    return load_sample_image(f"{name}.jpg")


def _missing(library: str) -> str:
    return f'photographs come with {library}; run `pip install "tokred[train,pretrained]"`.'


def _square(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    top, left = ((n - side) // 2 for n in image.shape[:2])
    return image[top : top + side, left : left + side]


def normalised(images: np.ndarray) -> np.ndarray:
    """As ImageNet models take them."""
    mean, deviation = (np.asarray(x, np.float32) for x in (MEAN, DEVIATION))
    return (images - mean) / deviation


def prose(module: str) -> str:
    """All docstrings of a module of the standard library, in order, two lines apart.

    Raises ValueError for a module without source there.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in (root / f"{module}.py", root / module / "__init__.py") if p.is_file()]
    if not found:
        raise ValueError(f"prose: {module!r} is no module with source in {root}; name another.")
    return "\n\n".join(_docstrings(found[0].read_text(encoding="utf-8")))


def _docstrings(source: str) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text:
            yield inspect.cleandoc(text)


def paragraphs(least: int) -> list[str]:
    """Paragraphs of docstrings, each in one line of at least so many letters, without code and
    tables; no two are alike."""
    texts = (text for module in MODULES for text in prose(module).split("\n\n"))
    lines = (" ".join(text.split()) for text in texts)
    english = (line for line in lines if not any(mark in line for mark in (">>>", "==", "--")))
    return list(dict.fromkeys(line for line in english if len(line) >= least))
