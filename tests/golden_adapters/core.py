"""Adapters of the family `core`: DiffRate and DynamicViT's gates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_adapters.case import Adapter, Case, Output, sorted_rows
from tests.golden_adapters.vit import attention_of, images_of, predictor_of, vit_config_of
from tests.golden_adapters.weights import fill
from tokred.gates import Rate
from tokred.methods.diffrate import DiffRate, schedule_macs
from tokred.models.vit import ViT, ViTConfig
from tokred.nn import Here, run_block
from tokred.plan import Plan, Site
from tokred.report import Call
from tokred.select import merge_to_nearest
from tokred.tokens import make_tokens
from tokred.train.losses import cross_entropy, smooth_targets


def diffrate_rate(case: Case) -> dict[str, Any]:
    s, logits = case.settings, jnp.asarray(case.inputs["logits"])
    rate = Rate(s["patches"], s["granularity"], int(s["cls"]))
    alive = None if s["mask_token_number"] < 0 else s["mask_token_number"]
    cotangent = jnp.asarray(case.inputs["mask_cotangent"])
    mask, to_logits = jax.vjp(lambda logits: rate.mask(logits, alive), logits)
    kept, grad_kept = jax.value_and_grad(rate.kept)(logits)
    return {
        "candidates": rate.candidates,
        "kept": kept,
        "kept_int": rate.freeze(logits),
        "token_prob": rate.survival(logits),
        "mask": mask,
        "grad_kept": grad_kept,
        "grad_mask": to_logits(cotangent)[0],
    }


def diffrate_merge(case: Case) -> dict[str, Any]:
    x, kept = case.inputs["x"], case.settings["kept"]
    map_, similar = merge_to_nearest(x, kept, prefix=int(case.settings["cls"]))
    mean = map_.apply(x, "mean")
    return {
        "mean": mean,
        "sum": map_.apply(case.inputs["size"], "sum"),
        "amax": map_.apply(case.inputs["source"], "max"),
        "mean_train": jnp.concatenate([mean, x[:, kept:]], axis=1),
        "node_max": similar[:, kept:],
    }


def diffrate_deit(case: Case) -> dict[str, Any]:
    config = vit_config_of(case, case.settings["heads"], norm_eps=case.settings["ln_eps"])
    plan = diffrate_plan(case, config)
    return {**_deployed(case, config, plan), **_training(case, config, plan.with_twin("soft"))}


def diffrate_plan(case: Case, config: ViTConfig) -> Plan:
    """Rates in every layer; one with a single candidate has steps as long as the image."""
    s, patches = case.settings, config.layout.tokens - config.layout.prefix

    def step(layer: int) -> DiffRate:
        single = case.params[f"arch_block{layer}_prune"].shape == (1,)
        granularity = patches if single else s["granularity"]
        return DiffRate(s["prune_kept"][layer], s["merge_kept"][layer], patches, granularity)

    return Plan(tuple((Site("mid", i), step(i)) for i in range(config.depth)), name="diffrate")


def _deployed(case: Case, config: ViTConfig, plan: Plan) -> dict[str, Any]:
    model = fill(lambda: ViT(config, rngs=nnx.Rngs(0)), case.params)
    logits, report = model(images_of(case), plan=plan)
    tokens, outputs = model.tokens(images_of(case)), {}
    for layer in range(config.depth):
        tokens = run_block(Here(dict(enumerate(model.blocks)), layer, plan, Call()), tokens).tokens
        outputs[f"block{layer}"] = tokens.x
    flops = macs(config, case.settings["prune_kept"], case.settings["merge_kept"])
    size = report.tokens.sizes()[..., None]
    return {**outputs, "logits": logits, "final_size": size, "flops": flops}


def _training(case: Case, config: ViTConfig, plan: Plan) -> dict[str, Any]:
    layers, images = range(config.depth), images_of(case)
    model = fill(lambda: ViT(config, plan=plan, rngs=nnx.Rngs(0)), case.params)
    graph, rates, rest = nnx.split(model, nnx.PathContains("reductions"), ...)

    def run(rates: Any) -> tuple[Any, Any]:
        logits, report = nnx.merge(graph, rates, rest)(images, plan=plan, call=Call(train=True))
        aux = [report.aux[f"mid_{i}"] for i in layers]
        prune, merge = ([a[f"{name}_kept"] for a in aux] for name in ("prune", "merge"))
        targets = smooth_targets(case.inputs["labels"], logits.shape[-1])
        loss = cross_entropy(logits, targets)
        flops = macs(config, prune, merge)
        return jnp.stack([loss, flops]), (logits, report.tokens, jnp.stack(prune), jnp.stack(merge))

    (loss, flops), to_rates, (logits, tokens, prune, merge) = jax.vjp(run, rates, has_aux=True)
    outputs = {
        "train_logits": logits,
        "train_loss_cls": loss,
        "train_flops": flops,
        "train_mask": tokens.policy,
        # Masked tokens tie in the sort: nothing is said of their sizes.
        "train_size": jnp.where(tokens.policy > 0.5, tokens.sizes(), 0.0)[..., None],
        "train_prune_kept": prune,
        "train_merge_kept": merge,
    }
    for name, pick in (("gradcls", [1.0, 0.0]), ("gradflops", [0.0, 1.0])):
        (grads,) = to_rates(jnp.asarray(pick))
        for i in layers:
            for which in ("prune", "merge"):
                grad = grads["reductions"][f"mid_{i}"][which][...]
                outputs[f"{name}_block{i}_{which}"] = grad
    return outputs


def macs(config: ViTConfig, prune: Any, merge: Any) -> jax.Array:
    layout = config.layout
    return schedule_macs(
        prune,
        merge,
        width=config.width,
        patches=layout.tokens - layout.prefix,
        patch=config.patch[0],
        classes=config.classes,
        channels=config.channels,
    )


def diffrate_schedule(case: Case) -> dict[str, Any]:
    s, patches = case.settings, case.settings["grid"] ** 2
    fixed = {
        "width": s["dim"],
        "patches": patches,
        "patch": s["patch"],
        "classes": s["classes"],
    }
    prune, merge = case.inputs["prune_kept"], case.inputs["merge_kept"]
    full = [patches + 1] * prune.shape[1]
    return {
        "flops": jax.vmap(lambda a, b: schedule_macs([*a], [*b], **fixed))(prune, merge),
        "dense_flops": schedule_macs(full, full, **fixed),
    }


def dynamicvit(case: Case) -> dict[str, Any]:
    s, x, policy = case.settings, case.inputs["x"], case.inputs["policy"]
    attn = attention_of(case.params, s["heads"], "attn.")

    def attend(policy: jax.Array) -> jax.Array:
        tokens = make_tokens(x, policy=policy[..., 0], policy_eps=s["eps"])
        return attn.attend(*attn.project(x), tokens)

    y, to_policy = jax.vjp(attend, policy)
    score = predictor_of(case.params, s["ln_eps"])(x[:, 1:], policy[:, 1:, 0])
    return {"attn": y, "grad_policy": to_policy(case.inputs["cotangent"])[0], "score": score}


def rows_as_set(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `got` in the order of `want`: the official code also sorts where nothing leaves."""
    if want.shape != got.shape:
        return want, got
    gaps = np.abs(want[:, :, None] - got[:, None]).max(-1)
    nearest = gaps.argmin(-1)
    if any(len(set(row)) < len(row) for row in nearest):
        return want, np.full_like(got, np.inf)
    return want, np.take_along_axis(got, nearest[..., None], axis=1)


GRAD = Output(1e-3, 1e-5)
CORE = {
    "diffrate__rate": Adapter(diffrate_rate, {"grad*": GRAD}, jit=False),
    "diffrate__merge": Adapter(diffrate_merge),
    "diffrate__deit": Adapter(
        diffrate_deit,
        {
            "gradcls*": GRAD,
            "gradflops*": Output(1e-4, 1e-5),
            "block*": Output(prepare=rows_as_set),
            "final_size": Output(prepare=sorted_rows),
            "train_size": Output(prepare=lambda want, got: (np.where(got == 0, 0, want), got)),
            "*flops": Output(1e-6, 0),
            "train_mask": Output(0, 0),
        },
    ),
    "diffrate__schedule": Adapter(diffrate_schedule, {"*": Output(1e-6, 0)}),
    "dynamicvit": Adapter(dynamicvit, {"grad*": GRAD}),
}
