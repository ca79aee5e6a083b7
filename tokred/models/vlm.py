"""Vision-language models: a ViT, a connector, a decoder; reductions may act in all three."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.cache import KVCache
from tokred.fold import fold, unfold
from tokred.models.decoder import Decoder, DecoderConfig
from tokred.models.ids import check_ids
from tokred.models.splice import Spliced, check_prompt, splice
from tokred.models.vit import ViT, ViTConfig, check_images
from tokred.nn.chain import Chain, chain_macs
from tokred.ops import gather
from tokred.plan import Layout, Plan
from tokred.report import Call, Report, join_reports, make_report, reduce_model
from tokred.tokens import Tokens, last_of

DENSE = Plan()
IMAGE = 259  # behind the bytes


def _part(kind: type, **changes: Any) -> Any:
    """A field that is a config itself; 'section': what a recipe's section of it starts from."""
    return field(default_factory=lambda: kind(**changes), metadata={"section": (kind, changes)})


@dataclass(frozen=True)
class VLMConfig:
    """Everything that shapes a vision-language model; all fields are static.

    vision: its head is not used (classes=0). feature_layer: how many of its layers run, None for
    all with the final norm (LLaVA: all but one). projector: a `Chain` from the width of the
    connector's tokens to the decoder's, '' for none. images: of an example. image_id: the
    placeholder among the ids. image_step: of positions, see `v2pe_positions`. newline: whether
    there is a learned token for the ends of an image's rows, see `anyres`. image_positions: of an
    image's tokens in the decoder, 'count' one after another · 'place' where they are in the whole
    image, see `splice`.
    """

    vision: ViTConfig = _part(ViTConfig, classes=0)  # noqa: RUF009
    decoder: DecoderConfig = _part(DecoderConfig, vocab=IMAGE + 1)  # noqa: RUF009
    feature_layer: int | None = None
    projector: str = "linear gelu linear"
    images: int = 1
    image_id: int = IMAGE
    image_step: float = 1.0
    newline: bool = False
    image_positions: str = "count"

    def __post_init__(self) -> None:
        if not 0 <= self.image_id < self.decoder.vocab:
            raise ValueError(
                f"VLMConfig: image_id={self.image_id} lies outside the decoder's vocabulary of "
                f"{self.decoder.vocab}; raise decoder.vocab or change image_id."
            )
        if self.image_positions not in ("count", "place"):
            raise ValueError(
                f"VLMConfig: image_positions={self.image_positions!r} must be 'count' or 'place'."
            )
        if self.image_positions == "place" and self.image_step != 1:
            raise ValueError(
                f"VLMConfig: image_step={self.image_step} counts, which image_positions='place' "
                "does not; leave one of them as it is."
            )
        if self.images < 1:
            raise ValueError(f"VLMConfig: images={self.images} must be at least 1; raise images.")
        if not self.decoder.rotary:
            raise ValueError(
                "VLMConfig: decoder.rotary=False learns a place for every id, of which an image "
                "takes several; use a decoder with rotary positions."
            )
        depth = self.vision.depth
        if self.feature_layer is not None and not 1 <= self.feature_layer <= depth:
            raise ValueError(
                f"VLMConfig: feature_layer={self.feature_layer} must lie in [1, {depth}], the "
                "vision model's layers; change it."
            )

    @property
    def context(self) -> int:
        return self.decoder.context

    @property
    def layout(self) -> Layout:
        """Of the vision model, in which connectors lie too."""
        layers = self.vision.depth if self.feature_layer is None else self.feature_layer
        return dataclasses.replace(self.vision.layout, depth=layers, part="vision")

    def image_tokens(self, plan: Plan = DENSE) -> int:
        """K, the tokens of one image that reach the decoder."""
        seen, layout = plan.of("vision"), self.layout.alone
        n = seen.counts(layout)[-1].out
        for _, reduction in seen.at("output"):
            n = reduction.slots(n, layout.prefix, seen.twin)
        n -= layout.prefix
        for _, reduction in plan.of("connector").at("output"):
            n = reduction.slots(n, 0, plan.twin)
        return n

    def places(self, plan: Plan = DENSE, images: int | None = None) -> int:
        """For how many images the decoder holds places: connectors may join several views of one.
        Raises ValueError where so many cannot be joined."""
        images = self.images if images is None else images
        joined = math.prod(reduction.joins for _, reduction in plan.of("connector").at("output"))
        if images % joined:
            raise ValueError(
                f"Plan {plan.name!r} joins {joined} views of every image, which {images} images do "
                "not divide into; give all views of each, and set images to their number."
            )
        return images // joined

    def decoder_layout(self, tokens: int | None = None, plan: Plan = DENSE) -> Layout:
        """Of the decoder, for prompts of so many ids (by default as many as it takes) under what
        the plan does before it."""
        tokens, k = self.context if tokens is None else tokens, self.image_tokens(plan)
        places = self.places(plan)
        layout = self.decoder.layout_of(tokens + places * (k - 1))
        return dataclasses.replace(layout, images=(places, k), part="decoder")

    def parts(self, plan: Plan, tokens: int | None) -> dict[str, tuple[Any, int | None, int]]:
        """What each part costs, see `cost.macs`; tokens: ids of a prompt."""
        seen = dataclasses.replace(self.vision, depth=self.layout.depth, classes=0)
        n = self.context if tokens is None else tokens
        mixed = self.decoder_layout(n, plan).tokens
        return {"vision": (seen, None, self.images), "decoder": (self.decoder, mixed, 1)}

    def joint_macs(self, plan: Plan, tokens: int | None) -> int:
        """Of the projector, of what follows it, of the question where a connector reads it, and of
        the logits of the ids."""
        n = self.context if tokens is None else tokens
        d, width = self.decoder.width, plan.of("vision").out_width(self.vision.width)
        k = self.image_tokens(plan.of("vision").within("vision"))
        images = self.images
        seen = images * k * chain_macs(self.projector, width, d)
        behind = dataclasses.replace(self.layout, width=d, prefix=0, heads=self.decoder.heads)
        for _, reduction in plan.of("connector").at("output"):
            images //= reduction.joins
            seen += images * reduction.macs(k, behind)
            k = reduction.slots(k, 0, plan.twin)
        question = self._question_macs(n) if reads(plan, "text") else 0
        return seen + question + n * d * self.decoder.vocab

    def _question_macs(self, n: int) -> int:
        return self.decoder.depth * self.decoder.layer_macs(n, n, n, n)


def reads(plan: Plan, name: str) -> bool:
    """Whether anything asks for what is given under this name."""
    asks = (ask for _, reduction in plan.steps for ask in reduction.asks)
    return any(ask.kind == "given" and ask.rows == name for ask in asks)


class VLM(nnx.Module):
    """(ids [B N], images [B I Y X C]) -> (logits [B N vocab], Report), under any Plan.

    Reductions of the parts 'vision' (its site 'output' is in front of the projector), 'connector'
    (one site, 'output', behind it, where tokens are [B I K D]) and 'decoder'; see `Plan.within`.
    """

    def __init__(self, config: VLMConfig, *, plan: Plan = DENSE, rngs: nnx.Rngs):
        self.config, c = config, config
        vision = dataclasses.replace(c.vision, classes=0)
        self.vision = ViT(vision, plan=plan.of("vision"), rngs=rngs)
        width = plan.of("vision").out_width(vision.width)
        hidden = c.decoder.width
        self.projector = Chain(c.projector, width, hidden if c.projector else width, rngs=rngs)
        if self.projector.out != hidden:
            raise ValueError(
                f"VLM: projector={c.projector!r} leaves {self.projector.out} channels for a "
                f"decoder of width {hidden}; set projector, or the connector's out_width."
            )
        self.decoder = Decoder(c.decoder, plan=plan.of("decoder"), rngs=rngs)
        init = nnx.initializers.normal(hidden**-0.5)
        line = (hidden,), c.decoder.param_dtype
        self.newline = nnx.Param(init(rngs.params(), *line)) if c.newline else None
        layout = dataclasses.replace(config.layout.alone, width=hidden, prefix=0)
        self.reductions = nnx.Dict(plan.of("connector").build(layout, rngs))

    def __call__(
        self,
        ids: Int[Array, "B N"],
        images: Float[Array, "B I Y X C"],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Bool[Array, "B N"] | None = None,
        image_valid: Bool[Array, "B I"] | None = None,
        question: Bool[Array, "B N"] | None = None,
        patch_valid: Bool[Array, "B I P"] | None = None,
    ) -> tuple[Float[Array, "B N vocab"], Report]:
        """Logits behind every id; behind a placeholder, those behind its image. Where a reduction
        has dropped a token for good they are 0.

        valid: which ids are real. image_valid: which images are; absent ones have no placeholder.
        Where a connector joins views of an image (`Reduction.joins`), I counts views, and
        image_valid is of images.
        patch_valid: which patches of each image are, for images of several sizes in one batch.
        question: what connectors may read of the text; it must not hold answers. Static: plan.

        Raises:
          ValueError: a prompt with other placeholders than images, a connector that reads the text
            without `question`, and what `Decoder` and `ViT` raise.
        """
        spliced, reports = self.read(
            ids, images, plan=plan, call=call, valid=valid, image_valid=image_valid,
            question=question, patch_valid=patch_valid,
        )  # fmt: skip
        inside = None if call is None else call.of("decoder")
        tokens, report, _ = self.decoder.decode(
            spliced.tokens, plan=plan.of("decoder"), call=inside
        )
        whole = join_reports({**reports, "decoder": report}, "decoder")
        return self.decoder.logits_at(tokens, spliced.place), whole

    def read(
        self,
        ids: Int[Array, "B N"],
        images: Float[Array, "B I Y X C"],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Any = None,
        image_valid: Any = None,
        question: Any = None,
        patch_valid: Any = None,
    ) -> tuple[Spliced, dict[str, Report]]:
        """What the decoder reads: text and images in place."""
        check_ids(ids, self.config.decoder, plan.of("decoder"))
        places = self.config.places(plan, images.shape[1])
        check_prompt(ids, self.config.image_id, image_valid, valid, places)
        given = self._given(ids, question, plan)
        seen, reports = self.see(images, patch_valid=patch_valid, plan=plan, call=call, given=given)
        text = self.decoder.tokens(ids, None, jnp.zeros(ids.shape)).x
        holds = ids == self.config.image_id
        grid = self.config.vision.grid if self.config.image_positions == "place" else None
        if grid is not None and places != images.shape[1]:
            raise ValueError("VLM: image_positions='place' is not for joined views; use 'count'.")
        step = self.config.image_step
        spliced = splice(text, holds, seen, valid=valid, step=step, grid=grid)
        return spliced, reports

    def see(
        self,
        images: Float[Array, "B I Y X C"],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        given: dict[str, Any] | None = None,
        patch_valid: Bool[Array, "B I P"] | None = None,
    ) -> tuple[Tokens, dict[str, Report]]:
        """The tokens [B I K D] of every image, as wide as the decoder's, and what the plan did."""
        b, i = images.shape[:2]
        flat = images.reshape(b * i, *images.shape[2:])
        check_images(flat, self.vision.config)
        call, given = call or Call(), given or {}
        each = {k: jax.tree.map(lambda a: jnp.repeat(a, i, axis=0), v) for k, v in given.items()}
        inside = dataclasses.replace(call.of("vision"), given={**call.given, **each})
        tokens, report = self.vision.encode(
            self.vision.tokens(flat, None if patch_valid is None else unfold(patch_valid, axis=0)),
            plan=plan.of("vision"),
            call=inside,
            layers=self.config.feature_layer,
        )
        tokens = _per_image(tokens, b)
        tokens = tokens.replace(x=self.projector(tokens.x))
        after = call.of("connector")
        modules = {**self.reductions, **after.modules}
        given = {**call.given, **given, **self._newline(b)}
        after = dataclasses.replace(after, modules=modules, given=given)
        tokens, records = reduce_model(plan.of("connector"), "output", tokens, after)
        return tokens, {"vision": report, "connector": make_report(tokens, records, (), ())}

    def _newline(self, batch: int) -> dict[str, Array]:
        if self.newline is None:
            return {}
        line = self.newline[...]
        return {"newline": jnp.broadcast_to(line, (batch, *line.shape))}

    def _given(self, ids: Array, question: Any, plan: Plan) -> dict[str, Any]:
        """What connectors ask for of the text: 'text' [B D], the question's last hidden state as
        the decoder alone reads it, without a gradient; 'words', the Tokens of its embeddings."""
        wanted = {name for name in ("text", "words") if reads(plan, name)}
        if not wanted:
            return {}
        if question is None:
            raise ValueError(
                f"VLM: plan {plan.name!r} reads the text; pass question=, true at the instruction "
                "and false at answers."
            )
        place = jnp.cumsum(question, -1) - 1
        words = self.decoder.tokens(ids, question, place)
        made: dict[str, Any] = {"words": words} if "words" in wanted else {}
        if "text" in wanted:
            made["text"] = self._last_state(words)
        return made

    def _last_state(self, words: Tokens) -> Float[Array, "B D"]:
        tokens, _, _ = self.decoder.decode(words)
        return jax.lax.stop_gradient(gather(tokens.x, words.last_slot(), axis=1)[:, 0])


def _per_image(tokens: Tokens, batch: int) -> Tokens:
    """[B I ...] of [B*I ...], without the prefix; what keys weigh goes with them."""
    p = tokens.prefix
    split = lambda a: None if a is None else fold(a[:, p:], batch, axis=0)  # noqa: E731
    place = None if tokens.position is None else tokens.positions()
    return Tokens(
        split(tokens.x), valid=split(tokens.valid), position=split(place), bias=split(tokens.bias),
        policy=split(tokens.policy), policy_eps=tokens.policy_eps,
    )  # fmt: skip


@dataclass(frozen=True)
class Prompted:
    """A model with the images of its prompts: what `generate` continues. Placeholders are never
    generated."""

    model: VLM
    images: Any
    plan: Plan = DENSE
    image_valid: Any = None
    question: Any = None

    @property
    def more(self) -> int:
        """How many tokens more than ids a prompt has."""
        config = self.model.config
        places = config.places(self.plan, self.images.shape[1])
        return places * (config.image_tokens(self.plan) - 1)

    @property
    def config(self) -> DecoderConfig:
        decoder = self.model.config.decoder
        return dataclasses.replace(decoder, context=decoder.context - self.more)

    def make_cache(
        self, batch: int, length: int, *, plan: Plan = DENSE, prompt: int | None = None
    ) -> KVCache:
        inner, prompt = self.plan.of("decoder"), length if prompt is None else prompt
        how = {"plan": inner, "prompt": prompt + self.more}
        return self.model.decoder.make_cache(batch, length + self.more, **how)

    def extend(
        self,
        ids: Int[Array, "B N"],
        cache: KVCache,
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Any = None,
        extra: Any = None,
        fresh: bool = False,
        last: bool = False,
    ) -> tuple[Array, KVCache, Report]:
        """The prompt with its images where the cache is `fresh`, else text alone."""
        decoder, twin = self.model.decoder, plan.twin
        inner = self.plan.of("decoder").with_twin(twin)
        extra = dict(extra or {})
        if not fresh:
            extra |= {"vision": jnp.zeros(ids.shape, bool), "frame": jnp.full(ids.shape, -1)}
            logits, cache, report = decoder.extend(
                ids, cache, plan=inner, call=call, valid=valid, extra=extra, last=last
            )
            return self._text(logits), cache, report
        question = self._question(ids, valid)
        spliced, _ = self.model.read(
            ids, self.images, plan=self.plan, call=call, valid=valid,
            image_valid=self.image_valid, question=question,
        )  # fmt: skip
        tokens = spliced.tokens
        tokens, report, filled = decoder.decode(
            tokens, plan=inner, call=call, cache=cache, fresh=True
        )
        layers = cache.layers if filled is None else filled.layers
        cache = cache.advance(layers, spliced.after)
        whole = dataclasses.replace(report, tokens=tokens.replace(source=None))
        place = spliced.place
        if last:
            place = gather(place, last_of(valid), axis=1) if valid is not None else place[:, -1:]
        return self._text(decoder.logits_at(tokens, place)), cache, whole

    def _text(self, logits: Array) -> Array:
        return logits.at[..., self.model.config.image_id].set(-jnp.inf)

    def _question(self, ids: Array, valid: Any) -> Array:
        if self.question is not None:
            return self.question
        text = ids != self.model.config.image_id
        return text if valid is None else text & valid
