"""Adapters of the family `vit`: ToMe and its kin, EViT, Top-K, DynamicViT."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_adapters.case import Adapter, Case, Output
from tests.golden_adapters.weights import depth, fill, mlp_ratio
from tokred.evidence import Seen, provide
from tokred.maps import Assign, Keep, compose
from tokred.methods.evit import EViT
from tokred.methods.tome import KEYS, ToMe
from tokred.methods.topk import TopK
from tokred.models.vit import ViT, ViTConfig
from tokred.nn import Attention, Block, Here, KeepPredictor, run_block
from tokred.plan import Plan, Reduction, Site
from tokred.report import Call
from tokred.schedule import ramp, warm_keep_rate
from tokred.select import keep_static, match_cells, match_kth, match_random
from tokred.tokens import Tokens, make_tokens

NORM_EPS = 1e-5  # of every block and predictor in this family; whole models have 1e-6


def block_of(case: Case, prefix: str = "") -> Block:
    width = case.params[f"{prefix}norm1.weight"].shape[0]
    heads, ratio = case.settings["num_heads"], mlp_ratio(case.params, prefix)
    return fill(
        lambda: Block(
            width,
            heads,
            mlp_ratio=ratio,
            qkv_bias=f"{prefix}attn.qkv.bias" in case.params,
            norm_eps=NORM_EPS,
            rngs=nnx.Rngs(0),
        ),
        case.params,
        prefix,
    )


def predictor_of(params: Any, norm_eps: float = NORM_EPS) -> KeepPredictor:
    width = params["pred.in_conv.0.weight"].shape[0]
    make = lambda: KeepPredictor(width, norm_eps=norm_eps, rngs=nnx.Rngs(0))  # noqa: E731
    return fill(make, params, "pred.")


def attention_of(params: Any, heads: int, prefix: str = "") -> Attention:
    return fill(
        lambda: Attention(
            params[f"{prefix}proj.bias"].shape[0],
            heads,
            qkv_bias=f"{prefix}qkv.bias" in params,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        ),
        params,
        prefix,
    )


def vit_config_of(case: Case, heads: int, **changes: Any) -> ViTConfig:
    """The shape of a timm VisionTransformer, read from its weights and the images."""
    params, image = case.params, case.inputs["image"]
    width, channels, *patch = params["patch_embed.proj.weight"].shape
    return ViTConfig(
        image_size=image.shape[2:],
        patch=tuple(patch),
        channels=channels,
        width=width,
        depth=depth(params),
        heads=heads,
        mlp_ratio=mlp_ratio(params, "blocks.0."),
        classes=params["head.bias"].shape[0],
        **changes,
    )


def images_of(case: Case) -> jax.Array:
    return jnp.moveaxis(case.inputs["image"], 1, -1)


def merged(reduction: Reduction, tokens: Tokens, metric: jax.Array) -> tuple[Tokens, Any]:
    """The reduction's tokens and its map, which is the identity where nothing happens."""
    moved, map_, _, _ = reduction(tokens, {KEYS.name: metric})
    if map_ is None:
        map_ = keep_static(range(tokens.n), tokens.n, tokens.batch).as_assign()
    return moved, map_


def tome_bsm(case: Case) -> dict[str, Any]:
    x, metric = case.inputs["x"], case.inputs["metric"]
    size = case.inputs["size"][..., 0] if "size" in case.inputs else None
    prefix = case.settings["class_token"] + case.settings["distill_token"]
    reduction = ToMe(case.settings["r"])
    tokens = make_tokens(x, size=size, prefix=prefix)
    plain, map_ = merged(reduction, tokens.replace(size=None), metric)
    weighted, _ = merged(reduction, tokens, metric)
    _, second = merged(ToMe(case.settings.get("r_second", 0)), weighted, weighted.x)
    return {
        **{name: map_.apply(x, how) for name, how in (("mean", "mean"), ("sum", "sum"))},
        "amax": map_.apply(x, "max"),
        "wavg": weighted.x,
        "size": weighted.sizes()[..., None],
        "wavg_nosize": plain.x,
        "size_nosize": plain.sizes()[..., None],
        "source": map_.dense(),
        "source_second": compose(map_, second).dense(),
        "unmerge": map_.restore(weighted.x),
    }


def tome_kth(case: Case) -> dict[str, Any]:
    x, every = case.inputs["x"], case.settings["k"]
    map_ = match_kth(case.inputs["metric"], every)
    mean = map_.apply(x, "mean")
    whole = x.shape[1] // every * every
    restored = map_.restore(mean)[:, :whole]
    return {"mean": mean, "sum": map_.apply(x, "sum"), "unmerge": restored}


def tome_random(case: Case) -> dict[str, Any]:
    x, draws = case.inputs["x"], case.inputs["uniform"][..., 0]
    if case.settings["r"] <= 0:
        return dict.fromkeys(("mean", "sum", "unmerge"), x)
    map_ = match_random(case.inputs["metric"], case.settings["r"], draws)
    mean = map_.apply(x, "mean")
    return {"mean": mean, "sum": map_.apply(x, "sum"), "unmerge": map_.restore(mean)}


def tome_attn(case: Case) -> dict[str, Any]:
    x, size = case.inputs["x"], case.inputs.get("size")
    size = None if size is None else size[..., 0]
    attn = attention_of(case.params, case.settings["num_heads"])
    tokens = make_tokens(x, size=size, proportional=True)
    q, k, v = attn.project(x)
    metric = provide(KEYS, Seen(q, k, v, x, tokens))
    return {"x": attn.attend(q, k, v, tokens), "metric": metric}


def tome_vit(case: Case) -> dict[str, Any]:
    config = vit_config_of(case, case.settings["num_heads"])
    model = fill(lambda: ViT(config, rngs=nnx.Rngs(0)), case.params)
    steps = enumerate(ramp(config.depth, case.settings["r"]))
    proportional = bool(case.settings["prop_attn"])
    plan = Plan(tuple((Site("mid", i), ToMe(r, proportional)) for i, r in steps), name="tome")
    logits, report = model(images_of(case), plan=plan)
    tokens = report.tokens
    source = jnp.swapaxes(jax.nn.one_hot(tokens.sources(), tokens.n), 1, 2)
    return {"logits": logits, "size": tokens.sizes()[..., None], "source": source}


def tomesd(case: Case) -> dict[str, Any]:
    cell = case.settings["sy"], case.settings["sx"]
    grid = case.settings["h"], case.settings["w"]
    r = min(case.settings["r"], case.inputs["metric"].shape[1])
    map_ = match_cells(case.inputs["metric"], r, grid, cell)
    merged = map_.apply(case.inputs["values"], "mean")
    return {"merged": merged, "unmerged": map_.restore(merged)}


def as_rows(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with tokens in the order of their channels, to compare sets of them."""
    rank = lambda x: np.lexsort(x.T[::-1])  # noqa: E731
    in_order = lambda a: np.stack([x[rank(x)] for x in a])  # noqa: E731
    return in_order(want), in_order(got)


def tome_parse_r(case: Case) -> dict[str, Any]:
    """Row i of the settings gives the i-th output; an inflection of nan stands for the list in
    the output's name."""
    rows = (case.settings[name] for name in ("layers", "r", "inflect"))
    outputs = {}
    for name, layers, r, inflect in zip(case.outputs, *rows, strict=True):
        steps = (r, inflect)
        if inflect != inflect:
            steps = [int(n) for n in name.partition("from_list_")[2].split("_")]
        outputs[name] = ramp(layers, steps)
    return outputs


def evit_reduction(case: Case, n: int) -> EViT | TopK:
    """EViT; without a fused token it is Top-K."""
    s = case.settings
    evit = EViT(s["keep_rate"], bool(s["fuse"]), None if s["tokens"] < 0 else s["tokens"])
    return evit if evit.fuse else TopK(evit.kept(n, 1))


def evit_block(case: Case) -> dict[str, Any]:
    x = case.inputs["x"]
    reduction = evit_reduction(case, x.shape[1])
    plan = Plan(((Site("mid", 0), reduction),), name="evit")
    here = Here({0: block_of(case)}, 0, plan, Call())
    tokens, records, *_ = run_block(here, make_tokens(x, prefix=1))
    outputs = {"x": tokens.x, "n_tokens": tokens.n - 1}
    map_ = records[0].map
    if isinstance(map_, Keep | Assign):
        fused = isinstance(reduction, EViT)
        outputs["idx"] = map_.index[:, 1 : tokens.n - fused] - 1
    return outputs


def evit_keep_rate(case: Case) -> dict[str, Any]:
    rates = []
    for row in case.settings["rows_iters_epoch_warm_total_ipe_base_max"]:
        iteration, epoch, warm, total, per_epoch = map(int, row[:5])
        rates.append(
            warm_keep_rate(
                iteration,
                epoch,
                warm=warm,
                total=total,
                per_epoch=per_epoch,
                base=row[5],
                top=row[6],
            )
        )
    return {"keep": rates}


def dynamicvit(case: Case) -> dict[str, Any]:
    policy, x = case.inputs["policy"][..., 0], case.inputs["block_x"]
    front = jnp.ones((x.shape[0], x.shape[1] - policy.shape[1]))
    tokens = make_tokens(x, policy=jnp.concatenate([front, policy], axis=1), prefix=front.shape[1])
    here = Here({0: block_of(case, "block.")}, 0, Plan(), Call())
    chances = predictor_of(case.params)(case.inputs["x"], policy)
    return {"logprob": chances, "block_x": run_block(here, tokens).tokens.x}


CLOSE = {"*": Output(1e-5, 1e-5)}
VIT = {
    "tome_bsm": Adapter(tome_bsm, {"source*": Output(0, 0), **CLOSE}),
    "tome_kth": Adapter(tome_kth, CLOSE),
    "tome_random": Adapter(tome_random, CLOSE),
    "tome_attn": Adapter(tome_attn, CLOSE),
    "tome_vit": Adapter(
        tome_vit, {"size": Output(0, 0), "source": Output(0, 0), "*": Output(1e-4, 1e-4)}
    ),
    "tome_parse_r": Adapter(tome_parse_r, {"*": Output(0, 0)}, jit=False),
    "evit_block": Adapter(
        evit_block, CLOSE, group=lambda case: None if case.settings["fuse"] else "vit/topk"
    ),
    "evit_keep_rate": Adapter(evit_keep_rate, {"*": Output(1e-6, 1e-6)}, jit=False),
    "dynamicvit": Adapter(dynamicvit, CLOSE),
}
MERGED_BACK = {
    "tomesd": Adapter(tomesd, {"merged": Output(1e-6, 1e-6, as_rows), "*": Output(1e-6, 1e-6)})
}
