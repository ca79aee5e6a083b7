"""All families, and what a directory of weights holds of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from tokred.interop.decoders import GEMMA, GPT2, LLAMA
from tokred.interop.family import Family, find_family
from tokred.interop.llava import LLAVA
from tokred.interop.names import Found, find_rules
from tokred.interop.safetensors import open_file, place_params, read_settings, stored_files
from tokred.interop.saliency import SALIENCY
from tokred.interop.t5 import T5
from tokred.interop.text import BERT, CLIP, SIGLIP
from tokred.interop.vision import CLIP_VISION, DINOV2, SIGLIP_VISION, VIT

FAMILIES: tuple[Family, ...] = (
    VIT, DINOV2, CLIP_VISION, SIGLIP_VISION, CLIP, SIGLIP, BERT, LLAMA, GEMMA, GPT2, T5, LLAVA,
    SALIENCY,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A directory of safetensors and config.json. name: of its family, None for what config.json
    says. Its properties raise what `read_settings`, `find_family` and `stored_files` raise."""

    directory: Path
    name: str | None = None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        return read_settings(self.directory)

    @cached_property
    def family(self) -> Family:
        return find_family(FAMILIES, self.settings, self.name)

    @cached_property
    def files(self) -> Mapping[str, Path]:
        return stored_files(self.directory)

    @cached_property
    def config(self) -> Any:
        """Of the model. Raises ValueError for settings that are not supported."""
        return self.family.configure(self.settings, self.files)

    def found(self, config: Any) -> Sequence[Found]:
        """What its names hold for a model of this config. Raises ValueError for unknown ones."""
        return find_rules(self.files, self.family.rules(self.settings, self.files, config))

    def read(self, config: Any, wanted: Mapping[str, Any]) -> dict[str, Array]:
        """Every parameter of `wanted`, shapes with a type and perhaps a sharding, by its path.

        Raises:
          ValueError: a model of another kind, and what `place_params` raises.
        """
        if type(config) is not type(self.config):
            raise ValueError(
                f"{self.directory} holds weights for a {type(self.config).__name__}, not for a "
                f"{type(config).__name__}; give the directory of such a model."
            )
        return place_params(str(self.directory), self.found(config), self.tensor, wanted)

    @property
    def shards(self) -> dict[str, set[str]]:
        """The names in every file."""
        files = {path.name for path in self.files.values()}
        return {file: {n for n, p in self.files.items() if p.name == file} for file in files}

    def metadata(self, file: str) -> Mapping[str, str] | None:
        """What a file says of itself."""
        with open_file(self.directory / file) as opened:
            return opened.metadata()

    def tensor(self, name: str) -> np.ndarray:
        """One stored array."""
        with open_file(self.files[name]) as file:
            return file.get_tensor(name)
