"""Adapters of nested tokens: FlexTok, One-D-Piece around a TiTok, tables of positions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tests.golden_adapters.case import Adapter, Case, Output
from tests.golden_adapters.weights import fill
from tokred.nested import keep_first, lengths_of, registers_of, replace_tail, sample_length
from tokred.nn import Block, Here, run_block
from tokred.nn.grids import grid_matrix, resize_matrix, sincos_2d
from tokred.plan import Plan
from tokred.report import Call
from tokred.tokens import make_tokens, move

EPS = 1e-5
OURS = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.out.",
    "c_fc.": "fc1.",
    "c_proj.": "fc2.",
}


def unclipped(lengths: Any, rule: str, maximum: int) -> Array:
    """The official code rounds up beyond a maximum that is no power of two; ours stays there."""
    above = 1 << (maximum - 1).bit_length()
    return jnp.where(lengths == maximum, above, lengths) if rule == "uniform_pow2" else lengths


def counts(rule: str, maximum: int, draws: int, values: np.ndarray) -> Array:
    """How often each of the values is drawn."""
    drawn = sample_length(jax.random.key(0), maximum, rule, shape=(draws,))
    return (unclipped(drawn, rule, maximum)[None] == values[:, None]).sum(-1)


def histogram(rule: str, case: Case) -> dict[str, Any]:
    n, draws, values = case.settings["N"], case.settings["draws"], case.outputs["values"]
    known = unclipped(lengths_of(n, rule), rule, n)
    return {
        "values": jnp.where(jnp.isin(values, known), values, -1),
        "counts": counts(rule, n, draws, values),
    }


def same_distribution(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two histograms of as many draws: 0 against how far chi square lies beyond six deviations."""
    total = want + got
    bins = np.count_nonzero(total) - 1
    chi = np.sum((want - got) ** 2 / np.where(total == 0, 1, total))
    return np.zeros(()), np.maximum(chi - bins - 6 * np.sqrt(2 * bins), 0.0)


def flextok(case: Case) -> dict[str, Any]:
    s, mask_token = case.settings, case.params["dropout_mask_token"]
    length, n = case.inputs["keep_k"], s["uniform_pow2_N"]
    kept = {
        f"tokens{i}": replace_tail(case.inputs[f"tokens{i}"], length[i], mask_token)
        for i in range(len(length))
    }
    values = np.arange(len(case.outputs["uniform_pow2_counts"]))
    return {**kept, "uniform_pow2_counts": counts("uniform_pow2", n, s["draws"], values)}


def nested_dropout(case: Case) -> dict[str, Any]:
    mask_token = case.params["dropout_mask_token"]
    return {"x": replace_tail(case.inputs["x"], case.inputs["keep_k"], mask_token)}


def registers(how: str, case: Case) -> dict[str, Any]:
    table = jnp.asarray(case.params["registers"])
    sizes = case.settings["sizes"]
    return {f"registers_size{k}": registers_of(table, k, how)[None] for k in sizes}


class Tower(nnx.Module):
    """One half of TiTok: blocks between two norms."""

    def __init__(self, width: int, heads: int, depth: int, *, rngs: nnx.Rngs):
        block = {"norm_eps": EPS, "rngs": rngs}
        self.ln_pre = nnx.LayerNorm(width, epsilon=EPS, rngs=rngs)
        self.transformer = nnx.List(Block(width, heads, **block) for _ in range(depth))
        self.ln_post = nnx.LayerNorm(width, epsilon=EPS, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        tokens, blocks = make_tokens(self.ln_pre(x)), dict(enumerate(self.transformer))
        for i in blocks:
            tokens = run_block(Here(blocks, i, Plan(), Call()), tokens).tokens
        return self.ln_post(tokens.x)


class TiTok:
    """The tokenizer that One-D-Piece truncates, on weights under their official names."""

    def __init__(self, case: Case):
        self.settings = case.settings
        self.params = {name: jnp.asarray(value) for name, value in case.params.items()}
        self.encoder, self.decoder = self._tower("encoder."), self._tower("decoder.")
        codes = self.params["quantize.embedding.weight"]
        self.codes = codes / jnp.linalg.norm(codes, axis=-1, keepdims=True)

    def _tower(self, prefix: str) -> Tower:
        s, weights = self.settings, {}
        for name, value in self.params.items():
            for official, ours in OURS.items():
                name = name.replace(official, ours)
            weights[name] = value
        make = lambda: Tower(s["width"], s["heads"], s["layers"], rngs=nnx.Rngs(0))  # noqa: E731
        return fill(make, weights, prefix)

    def linear(self, name: str, x: Array) -> Array:
        """Also a convolution whose kernel is its stride, of flat patches."""
        weight = self.params[f"{name}.weight"]
        bias = self.params[f"{name}.bias"].reshape((1,) * (x.ndim - 1) + (-1,))
        return x @ weight.reshape(len(weight), -1).T + bias

    def placed(self, side: str, body: Array, latents: Array) -> Array:
        """The class token and the body, then latents; each with its positions."""
        part = lambda name: self.params[f"{side}.{name}"]  # noqa: E731
        first = jnp.broadcast_to(part("class_embedding")[None], (len(body), 1, body.shape[-1]))
        grid = jnp.concatenate([first, body], 1) + part("positional_embedding")[None]
        place = part("latent_token_positional_embedding")[None, : latents.shape[1]]
        return jnp.concatenate([grid, latents + place], 1)

    def encode(self, image: Array) -> tuple[Array, Array]:
        """(codes [B K d], ids [B K]); the official code mixes tokens and channels before the last
        projection."""
        s, (b, c, h, w) = self.settings, image.shape
        p, k = s["patch"], s["num_latent"]
        patches = image.reshape(b, c, h // p, p, w // p, p).transpose(0, 2, 4, 1, 3, 5)
        body = self.linear("encoder.patch_embed", patches.reshape(b, -1, c * p * p))
        latents = jnp.broadcast_to(self.params["latent_tokens"][None], (b, k, s["width"]))
        y = self.encoder(self.placed("encoder", body, latents))[:, -k:]
        y = self.linear("encoder.conv_out", y.reshape(b, s["width"], k).swapaxes(1, 2))
        y = y / jnp.linalg.norm(y, axis=-1, keepdims=True)
        ids = jnp.argmax(y @ self.codes.T, axis=-1)
        return self.codes[ids], ids

    def decode(self, z: Array, k: int) -> Array:
        """Logits [B C g g] of the first `k` codes."""
        tokens = make_tokens(self.linear("decoder.decoder_embed", z))
        tokens = move(tokens, keep_first(tokens.n, k, tokens.batch))
        cells = len(self.params["decoder.positional_embedding"]) - 1
        body = jnp.broadcast_to(
            self.params["decoder.mask_token"], (len(z), cells, self.settings["width"])
        )
        y = self.decoder(self.placed("decoder", body, tokens.x))[:, 1 : 1 + cells]
        y = self.linear("decoder.ffn.2", jnp.tanh(self.linear("decoder.ffn.0", y)))
        side = round(cells**0.5)
        return y.swapaxes(1, 2).reshape(len(z), -1, side, side)


def onedpiece(case: Case) -> dict[str, Any]:
    model, drop = TiTok(case), int(case.inputs["drop_length"][0])

    @jax.jit
    def run(image: Array) -> dict[str, Array]:
        z, ids = model.encode(image)
        tail = keep_first(z.shape[1], drop, z.shape[:1]).apply(z)
        out = {"z_quantized": official(z), "tail_dropped": official(tail), "indices": ids[:, None]}
        for k in case.settings["lengths"]:
            out[f"decoded_len{k}"] = model.decode(z, k)
            out[f"decoded_tokens_len{k}"] = model.decode(model.codes[ids], k)
        return out

    return run(jnp.asarray(case.inputs["image"]))


def official(z: Array) -> Array:
    return z.swapaxes(1, 2)[:, :, None]


def resized(table: Array, grid: int, target: tuple[int, int]) -> Array:
    """Torch's bicubic interpolation of a square grid."""
    matrix = grid_matrix(resize_matrix(grid, target[0]), resize_matrix(grid, target[1]))
    return jnp.matmul(matrix, table)


def sincos(case: Case) -> dict[str, Any]:
    s = case.settings
    table = sincos_2d(s["dim"], (s["grid"], s["grid"]))
    return {"table": table, "resized": resized(table, s["grid"], (s["tgt_h"], s["tgt_w"]))}


def mqt_positions(case: Case) -> dict[str, Any]:
    s = case.settings
    table = sincos_2d(s["dim"], (s["grid"], s["grid"]))
    return {"sincos": table, "resized": resized(table, s["grid"], tuple(s["tgt"]))}


EXACT, DRAWN = Output(0.0, 0.0), Output(0.0, 0.0, same_distribution)


def drawn(rule: str) -> Adapter:
    return Adapter(
        partial(histogram, rule), {"counts": DRAWN}, group=lambda case: "gen/nested_dropout"
    )


def pooled(how: str) -> Adapter:
    return Adapter(
        partial(registers, how), {"*": Output(1e-6, 1e-6)}, group=lambda case: "gen/registers"
    )


NESTED = {
    "core": {
        "flextok__nested": Adapter(flextok, {"uniform_pow2_counts": DRAWN, "*": EXACT}),
        "mqt__posembed": Adapter(mqt_positions),
    },
    "gen": {
        "nested_dropout": Adapter(nested_dropout, {"*": EXACT}),
        "nested_dropout__sampling_hist_uniform": drawn("uniform"),
        "nested_dropout__sampling_hist_pow2": drawn("pow2"),
        "nested_dropout__sampling_hist_uniform_pow2": drawn("uniform_pow2"),
        "registers__nested": pooled("nested"),
        "registers__avgpool": pooled("average"),
        "onedpiece__decode_lengths": Adapter(onedpiece, jit=False),
    },
    "connectors": {"sincos2d": Adapter(sincos)},
}
