"""BLT's entropy patching (Pagnoni et al. 2024, arXiv 2412.09871; facebookresearch/blt, CC BY-NC
4.0) as a fixed comparison: bytes are pooled into patches where the next byte is hard to foresee.

The rules are those of the released patcher. Unlike the paper: patches are pooled and copied back
where it has cross-attention, bytes have no hashed n-gram embeddings, and the entropies, of a small
byte model of one's own, come with the tokens. Patches beyond a static capacity are dropped, and
counted; padding may be on either side, and no patch spans two documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred import boundary
from tokred.combine import Combine
from tokred.maps import Assign
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.select import keep_top_k, merge_into
from tokred.tokens import Tokens, move

RULES = ("global", "monotonic", "both", "top_k", "space")
POOLS = ("max", "mean")
THRESHOLD = 1.335442066192627  # nats, as released


def entropies(logits: Float[Array, "*B N V"]) -> Float[Array, "*B N"]:
    """Of the next byte after each, in nats."""
    log_chance = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -(jnp.exp(log_chance) * log_chance).sum(-1)


def ends_by_entropy(
    entropy: Float[Array, "*B N"],
    previous: Int[Array, "*B N"],
    place: Int[Array, "*B N"],
    *,
    rule: str = "global",
    threshold: float = THRESHOLD,
    threshold_add: float = 0.0,
) -> Bool[Array, "*B N"]:
    """Which bytes end a patch, so that the next one begins another; known once a byte is read.

    entropy H of the byte that follows; previous: the slot before, place: from the sequence's first
    byte, see `boundary`. The first byte is always a patch alone. rule: 'global' H > threshold ·
    'monotonic' H grew by more than threshold · 'both' H > threshold and grew by more than
    threshold_add. The latter two end a patch with the second byte too, and 'both' never with the
    third, as released.
    """
    rise = entropy - boundary.at_previous(entropy, previous)
    if rule == "global":
        ends = entropy > threshold
    elif rule == "monotonic":
        ends = (rise > threshold) | (place == 1)
    else:
        jump = (rise > threshold_add) & (entropy > threshold)
        ends = (jump & (place != 2)) | (place == 1)
    return ends | (place == 0)


def ends_by_rank(
    entropy: Float[Array, "*B N"],
    place: Int[Array, "*B N"],
    patch: int,
    valid: Bool[Array, "*B N"] | None = None,
) -> Bool[Array, "*B N"]:
    """The same for n // patch patches of n bytes: two of them begin with the first two bytes, the
    others after the highest entropies. Not causal: it compares all of a row. Static: patch."""
    n = entropy.shape[-1]
    more = lambda m: max(m // patch - 2, 0)  # noqa: E731
    forced = place == 0
    if not more(n):
        return forced
    late = ~forced if valid is None else ~forced & valid
    limit = routing.per_row(more, n, valid)
    chosen = keep_top_k(entropy, more(n), valid=late, order="position", limit=limit)
    return forced | routing.selected(chosen)


def ends_by_space(
    byte: Int[Array, "*B N"], previous: Int[Array, "*B N"], place: Int[Array, "*B N"]
) -> Bool[Array, "*B N"]:
    """The same for words: after a byte that is no letter, digit or continuation of a character and
    follows one that is, and after every special one, which is negative."""
    between = lambda low, high: (ord(low) <= byte) & (byte <= ord(high))  # noqa: E731
    word = between("0", "9") | between("A", "Z") | between("a", "z") | between("\x80", "\xbf")
    inside = boundary.at_previous(word, previous)
    return (~word & inside) | (byte < 0) | (place == 0)


@dataclass(frozen=True)
class BLT(Reduction):
    """Bytes of a patch become one token for the layers of the span; then each byte becomes what it
    was plus the last patch that has ended by then, its own if it ends there. So no byte learns of
    a later one: a patch's token is in nobody's reach before its last byte.

    capacity: slots as a share of a row's bytes, rounded up; bytes of patches that find none are in
    no patch, and those patches are counted as aux 'overflow'. rule: see `ends_by_entropy`, which
    reads extra['entropy']; 'top_k', `ends_by_rank`, is not causal; 'space', `ends_by_space`, reads
    extra['byte']. pool: 'max' | 'mean'. positions: of patches, 'keep' their first byte's or
    'renumber' 0, 1, ....
    soft: as many slots as bytes; the twins agree exactly. Static: the slots. Nothing is learned.
    Gradient: to the bytes and patches; none through the rules. A cache holds no unfinished patch:
    decode by full passes.
    """

    capacity: float
    rule: str = "global"
    threshold: float = THRESHOLD
    threshold_add: float = 0.0
    patch: int = 4
    pool: str = "max"
    positions: str = "keep"
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def __post_init__(self) -> None:
        routing.check_share("blt", "keep", self.capacity)
        routing.check_positions("blt", self.positions)
        for field, known in (("rule", RULES), ("pool", POOLS)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"blt: {field}={getattr(self, field)!r} must be one of {known}; change it."
                )
        if self.patch < 1:
            raise ValueError(f"blt: patch={self.patch} must be at least one byte; raise patch.")

    def counts(self, n: int, prefix: int) -> int:
        return routing.room_of(n, self.capacity)

    def idle(self, n: int, prefix: int) -> bool:
        return False

    def __call__(
        self,
        tokens: Tokens,
        evidence: Mapping[str, Array],
        state: Any = None,
        *,
        module: Any = None,
        key: Any = None,
        train: bool = False,
        twin: str = "packed",
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        valid, n = tokens.valid, tokens.n
        previous = boundary.previous_slots((*tokens.batch, n), valid)
        first = boundary.find_first(tokens, previous)
        ends = self._ends(tokens, previous, boundary.places(first, valid))
        starts = first | boundary.at_previous(ends, previous)
        starts = starts if valid is None else starts & valid
        k, patch = self.slots(n, 0, twin), boundary.segments(starts)
        limit = routing.per_row(lambda m: self.counts(m, 0), n, valid)
        room = self.counts(n, 0) if limit is None else limit[..., None]
        inside = patch < room if valid is None else (patch < room) & valid
        index = boundary.keep_starts(starts, k).index
        map_ = merge_into(jnp.where(inside, patch, k), k, index, inside)
        reduced = move(tokens, map_, how=self.pool, position="keep")
        if self.positions == "renumber":
            reduced = routing.renumber(reduced)
        aux: dict[str, Any] = routing.describe(starts & inside, valid)
        aux["overflow"] = (starts & (patch >= room)).sum(-1)
        # The last patch that ended, if it is of the same document.
        reads = jnp.minimum(patch - 1 + ends, room - 1)
        own = reads >= jax.lax.cummax(jnp.where(first, patch, 0), axis=patch.ndim - 1)
        restore = Assign(jnp.where(own, reads, k), k)
        aux["combine"] = Combine(fill=tokens.x, restore=restore)
        return reduced, map_, state, aux

    def _ends(self, tokens: Tokens, previous: Array, place: Array) -> Bool[Array, "*B N"]:
        if self.rule == "space":
            byte = jnp.asarray(routing.require_extra("blt", tokens, "byte"))
            return ends_by_space(byte, previous, place)
        entropy = jnp.asarray(routing.require_extra("blt", tokens, "entropy"), jnp.float32)
        if self.rule == "top_k":
            return ends_by_rank(entropy, place, self.patch, tokens.valid)
        how = {"threshold": self.threshold, "threshold_add": self.threshold_add}
        return ends_by_entropy(entropy, previous, place, rule=self.rule, **how)


@register(
    "blt",
    family="chunk",
    site="around",
    needs=("entropy",),
    count="data-dependent",
    twins="exact",
    paper="BLT 2024",
    golden=("gen/blt__entropy_patching",),
)
def blt(
    layout: Layout,
    *,
    keep: float = 0.5,
    span: Sequence[int] | None = None,
    rule: str = "global",
    threshold: float = THRESHOLD,
    threshold_add: float = 0.0,
    patch: int = 4,
    pool: str = "max",
    positions: str = "keep",
) -> Plan:
    """Text is cut where the next byte is hard to foresee, and the inner layers run on patches.

    keep: slots for patches as a share of the bytes. span: (first, last) layer that runs on patches,
    default all but the first and the last quarter. Other options: see `BLT`.

    Raises:
      ValueError: a model that reads no sequence.
    """
    routing.check_sequence("blt", layout)
    first, last = routing.inner_span(layout) if span is None else span
    reduction = BLT(keep, rule, threshold, threshold_add, patch, pool, positions)
    return Plan(((Site("around", first, last), reduction),), name="blt")
