"""Cases of connectors that are configurations of one resampler."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_adapters.case import Adapter, Case, Output
from tests.golden_adapters.weights import fill
from tokred.methods import make_plan
from tokred.methods.doccompressor import doc_shape
from tokred.methods.resample import Resample
from tokred.nn.regions import group_crops
from tokred.nn.resampler import Resampler, causal
from tokred.nn.resampler_shape import ResamplerShape
from tokred.plan import Layout

Names = Mapping[str, str]
NORM = {"ln_q": "query.layers.0", "ln_kv": "entry.layers.0", "ln_post": "out.layers.0"}


def layout_of(side: int | tuple[int, int], width: int, heads: int = 1) -> Layout:
    grid = (side, side) if isinstance(side, int) else side
    return Layout(24, grid[0] * grid[1], 0, grid, False, width, heads)


def resampler_of(plan: Any) -> Resample:
    return plan.at("output")[-1][1]


def renamed(params: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Under our names: '__' is '.', torch's joint projections are split, tables are raw."""
    ours = {}
    for name, value in params.items():
        name = name.replace("__", ".")
        for official, mine in names.items():
            name, found = re.subn(rf"^{official}(?=\.|$)", mine, name)
            if found:
                break
        if ".in_proj_" in name:
            stem, leaf = name.split(".in_proj_")
            for part, rows in zip(("query", "key", "value"), jnp.split(value, 3), strict=True):
                ours[f"{stem}.{part}.{leaf}"] = rows
        else:
            ours[name.replace(".out_proj.", ".out.")] = value
    return ours


def load(shape: ResamplerShape, width: int, params: Mapping[str, Any], **how: Any) -> Resampler:
    return fill(lambda: Resampler(shape, width, rngs=nnx.Rngs(0), **how), params)


def run(plan: Any, x: Any, names: Names, case: Case, side: Any, **how: Any) -> Any:
    """The resampler of a plan on the case's tokens."""
    shape, keys = resampler_of(plan).shape, how.get("keys")
    if "kv_proj__weight" in case.params:
        shape = shape.replace(entry="bare norm")
    width = None if keys is None else keys.shape[-1]
    model = load(shape, x.shape[-1], renamed(case.params, names), keys=width)
    return model(x, grid=(side, side) if isinstance(side, int) else side, **how)


def _sequential(name: str, ours: str, linears: tuple[int, ...]) -> dict[str, str]:
    """torch's Sequential numbers activations too."""
    return {rf"{name}\.{i}": f"{ours}.layers.{n}" for n, i in enumerate(linears)}


def tokenpacker(case: Case) -> dict[str, Any]:
    s, x, multi = case.settings, case.inputs["x"], case.inputs["x_multi"]
    side = s["raw_grid"]
    names = {"q_proj_1": "query.layers.0", "ln_q_1": "query.layers.1", "clip_attn": "blocks.0"}
    for part, ours in (("k", "key"), ("v", "value")):
        names |= _sequential(f"{part}_proj_1", ours, (0, 2)) | {f"ln_{part}_1": f"{ours}.layers.2"}
    names |= _sequential("mlp", "out", (0, 2))
    plan = make_plan(
        "tokenpacker", layout_of(side, case.params["q_proj_1__weight"].shape[0]),
        window=s["scale_factor"],
        heads=s["num_heads"], out=case.outputs["y"].shape[-1],
    )  # fmt: skip
    return {"y": run(plan, x, names, case, side, keys=multi).y}


def quecc(case: Case) -> dict[str, Any]:
    s, x, multi = case.settings, case.inputs["x"], case.inputs["x_multi"]
    side = round(x.shape[1] ** 0.5)
    text = case.inputs["text"][:, 0]
    names = {"q_downsample": "pool", "clip_attn": "blocks.0"}
    for part, ours in (("q_proj", "source"), ("k_proj", "key"), ("v_proj", "value")):
        names |= _sequential(part, ours, (0, 2, 3))
    names |= _sequential("text_projection", "text", (0, 1))
    plan = make_plan(
        "quecc", layout_of(side, x.shape[-1]), heads=s["num_heads"], text_width=text.shape[-1],
        window=side // ((side - s["kernel"]) // s["stride"] + 1), conv=(s["kernel"], s["stride"]),
    )  # fmt: skip
    return {"y": run(plan, x, names, case, side, keys=multi, text=text).y}


LEARNED = {**NORM, "attn": "blocks.0", "pos_embed": "position", "query": "table"}


def learned_names(case: Case) -> dict[str, str]:
    """Keys of another width go through a projection before their norm."""
    if "kv_proj__weight" not in case.params:
        return LEARNED
    return {**LEARNED, "ln_kv": "entry.layers.1", "kv_proj": "entry.layers.0"}


def llavamini_query(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["x"]
    side, width = round(x.shape[1] ** 0.5), case.params["query"].shape[-1]
    plan = make_plan(
        "llava_mini", layout_of(side, width), side=s["grid_size"], heads=s["num_heads"]
    )
    ran = run(plan, x, learned_names(case), case, side)
    return {"y": ran.y, "attn": ran.weights.mean(1)}


def uhd_resampler(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["x"]
    grid = (s["tgt_h"], s["tgt_w"])
    x = x[:, : grid[0] * grid[1]]
    names = {**learned_names(case), "proj": "out.layers.1.kernel"}
    width = case.params["query"].shape[-1]
    plan = make_plan(
        "llava_uhd", layout_of(grid, x.shape[-1]), side=s["grid_size"], heads=s["num_heads"],
        width=width,
    )  # fmt: skip
    return {"y": run(plan, x, names, case, grid).y}


def slime_resampler(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["x"]
    side, width = round(x.shape[1] ** 0.5), case.params["query"].shape[-1]
    names = {**learned_names(case), "proj": "out.layers.1"}
    out = case.outputs["y"].shape[-1] if "proj__weight" in case.params else None
    plan = make_plan(
        "slime", layout_of(side, width), side=s["grid_size"], heads=s["num_heads"],
        out=out,
    )  # fmt: skip
    return {"y": run(plan, x, names, case, side).y}


def mqt_resampler(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["x"]
    side = round(x.shape[1] ** 0.5)
    names = {
        "ln_q": "query.layers.0", "ln_k": "key.layers.0", "ln_v": "value.layers.0",
        "attn": "blocks.0", "pos_embed": "position", "query": "table",
        "proj": "out.layers.0.kernel",
    }  # fmt: skip
    out, found = case.params["proj"].shape[-1], {}
    for name in case.outputs:
        if not name.startswith("m"):
            continue
        plan = make_plan(
            "mqt", layout_of(side, x.shape[-1], s["heads"]), side=s["grid"], length=int(name[1:]),
            out=out,
        )  # fmt: skip
        reduction = resampler_of(plan)
        model = load(reduction.shape, x.shape[-1], renamed(case.params, names))
        found[name] = model(x, grid=(side, side), length=reduction.length).y
        found["key_pos"] = model.resized((side, side))
    return found


def perceiver(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["x"]
    names = {"latents": "table", "layer_norm": "out.layers.0"}
    for i in range(s["depth"]):
        block = rf"blocks\.{i}\.0"
        names |= {
            rf"{block}\.context_layer_norm": f"blocks.{i}.norm_keys",
            rf"{block}\.latents_layer_norm": f"blocks.{i}.norm",
            rf"{block}\.output_proj": f"blocks.{i}.attention.out",
            rf"blocks\.{i}\.1\.ln": f"blocks.{i}.feed.layers.0",
            rf"blocks\.{i}\.1\.fc": f"blocks.{i}.feed.layers.1",
            rf"blocks\.{i}\.1\.c_proj": f"blocks.{i}.feed.layers.2",
        }
        for part, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            names[rf"{block}\.{part}_proj"] = f"blocks.{i}.attention.{ours}"
            names[rf"{block}\.{part}_layer_norm"] = f"blocks.{i}.attention.{ours}_norm"
    plan = make_plan(
        "perceiver", layout_of((1, x.shape[1]), x.shape[-1]), count=s["latents"], depth=s["depth"],
        heads=s["heads"], head_dim=s["head_dim"], qk_norm=bool(s["qk_layer_norms"]),
    )  # fmt: skip
    return {"y": run(plan, x, names, case, (1, x.shape[1])).y}


def qformer(case: Case) -> dict[str, Any]:
    s, x, query = case.settings, case.inputs["x"], case.inputs["query"]
    names = {"layernorm": "query.layers.0"}
    for i in range(s["layers"]):
        layer, ours = rf"encoder\.layer\.{i}", f"blocks.{i}"
        for part, mine, norm in (
            ("attention", "own", "norm_own"), ("crossattention", "attention", "norm")
        ):  # fmt: skip
            stem = rf"{layer}\.{part}"
            for role in ("query", "key", "value"):
                names[rf"{stem}\.attention\.{role}"] = f"{ours}.{mine}.{role}"
            names[rf"{stem}\.output\.dense"] = f"{ours}.{mine}.out"
            names[rf"{stem}\.output\.LayerNorm"] = f"{ours}.{norm}"
        names[rf"{layer}\.intermediate_query\.dense"] = f"{ours}.feed.layers.0"
        names[rf"{layer}\.output_query\.dense"] = f"{ours}.feed.layers.1"
        names[rf"{layer}\.output_query\.LayerNorm"] = f"{ours}.norm_feed"
    n, width = x.shape[1], query.shape[-1]
    plan = make_plan(
        "qformer", layout_of((1, n), x.shape[-1], s["heads"]), count=query.shape[1],
        depth=s["layers"], every=s["cross_freq"], width=width,
    )  # fmt: skip
    hidden = case.params["encoder__layer__0__intermediate_query__dense__weight"].shape[0]
    shape = resampler_of(plan).shape.replace(hidden=hidden)
    params = {**renamed(case.params, names), "table": query[0]}
    model = load(shape, x.shape[-1], params)
    return {"y": model(x, grid=(1, n), valid=case.inputs["x_mask"] > 0).y}


def oryx(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["x"]
    names = {"vlm_query_projector": "blocks.0.query", "vlm_key_projector": "blocks.0.key"}
    grid = (s["h"], s["w"])
    plan = make_plan("oryx", layout_of(grid, x.shape[-1]), data=_KINDS[s["factor"]], inner=s["mid"])
    f = s["factor"]
    return {
        "y": run(plan, x, names, case, grid).y,
        "size": jnp.asarray([grid[0] // f, grid[1] // f]),
    }


_KINDS = {1: "image", 2: "video", 4: "video_long"}


def oryx_compressor(case: Case) -> dict[str, Any]:
    x, (h, w) = jnp.asarray(case.inputs["x"]), (int(n) for n in case.inputs["hw"])
    names = {"vlm_query_projector": "blocks.0.query", "vlm_key_projector": "blocks.0.key"}
    make = partial(make_plan, "oryx", layout_of((h, w), x.shape[-1]))
    kinds = [k for k in _KINDS.values() if k in case.outputs]
    return {k: run(make(data=k), x, names, case, (h, w)).y for k in kinds}


def vtg_slots(case: Case) -> dict[str, Any]:
    x, slots = case.inputs["x"], case.params["slots"]
    n = x.shape[1]
    plan = make_plan("vtg_slots", layout_of((1, n), x.shape[-1]), count=slots.shape[1])
    model = load(resampler_of(plan).shape, x.shape[-1], {"table": slots.T})
    return {"y": model(x, grid=(1, n)).y}


def seed_causal_mask(case: Case) -> dict[str, Any]:
    """The official mask adds -10000 to hidden queries; here which queries each sees. Of 32 queries:
    what follows them sees all."""
    given = case.inputs["attention_mask"]
    n = given.shape[-1]
    among = jnp.ones((n, n), bool).at[:32, :32].set(causal(min(n, 32)))
    seen = among[None, None] & (given > 0)[:, None, None, :]
    return {"mask": jnp.where(seen, 0.0, -10000.0)}


def doccompressor(case: Case) -> dict[str, Any]:
    s, x = case.settings, jnp.asarray(case.inputs["x"])[:, :-1]
    d, columns = x.shape[-1], s["col_tokens"]
    where = np.asarray(case.inputs["patch_positions"])
    starts = np.flatnonzero((where == 0).all(-1)) - 1
    names = {"compressor_fc": "out.layers.0"}
    for i in range(s["layers"]):
        stem, ours = rf"compressor_crossatt\.layers\.{i}", f"blocks.{i}"
        names |= {rf"{stem}\.norm1": f"{ours}.norm", rf"{stem}\.normk": f"{ours}.norm_keys"}
        names[rf"{stem}\.attention"] = f"{ours}.attention"
        names[rf"{stem}\.output\.out_proj"] = f"{ours}.attention.out"
        names[rf"{stem}\.output\.norm2"] = f"{ours}.norm2"
        names[rf"{stem}\.output\.mlp\.ffn_ln"] = f"{ours}.feed.norm"
        names[rf"{stem}\.output\.mlp"] = f"{ours}.feed"
    shape = doc_shape(d, s["num_heads"], s["layers"])
    params = renamed(case.params, names)
    model, eos = load(shape, d, params), params["compressor_eos"]
    grid = (x.shape[1] // columns, columns)
    rows, found = [], {}
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else len(where)
        r, c = where[start + 1 : stop].max(0) + 1
        crops = x[start + 1 : stop].reshape(int(r), int(c), *grid, d)
        keys = group_crops(crops)
        y = model(x[start], grid=grid, queries=x[start], keys=keys).y
        rows.append(jnp.concatenate([y, eos[0]]))
        found[f"keys_img{number}"] = keys
    return {"y": jnp.stack(rows), **found}


RESAMPLERS = {
    "core": {
        "mqt__resampler": Adapter(mqt_resampler),
        "oryx__compressor": Adapter(oryx_compressor, jit=False),
    },
    "connectors": {
        "tokenpacker": Adapter(tokenpacker),
        "quecc": Adapter(quecc),
        "llavamini_query": Adapter(llavamini_query),
        "uhd_resampler": Adapter(uhd_resampler, {"*": Output(1e-4, 2e-5)}),
        "slime_resampler": Adapter(slime_resampler),
        "perceiver": Adapter(perceiver, {"*": Output(1e-4, 2e-5)}),
        "qformer": Adapter(qformer, {"*": Output(1e-4, 2e-5)}),
        "oryx": Adapter(oryx),
        "vtg_slots": Adapter(vtg_slots),
        "seed_causal_mask": Adapter(seed_causal_mask),
        "doccompressor": Adapter(doccompressor, {"*": Output(1e-4, 2e-5)}, jit=False),
    },
}
