"""Configs of models that wrap another: its layers are theirs."""

from typing import Any

from tokred.plan import Layout


class HasInner:
    """What plans and costs ask of a model's layers, answered by the config `inner`."""

    @property
    def inner(self) -> Any:
        raise NotImplementedError

    @property
    def depth(self) -> int:
        return self.inner.depth

    @property
    def layout(self) -> Layout:
        return self.inner.layout

    def layout_of(self, tokens: int) -> Layout:
        """The layout for so many tokens."""
        return self.inner.layout_of(tokens)

    @property
    def projection_macs(self) -> tuple[int, int, int]:
        """Of one token's query, key and value."""
        return self.inner.projection_macs

    @property
    def pair_macs(self) -> int:
        """Of one query's logits or values with one key, all heads."""
        return self.inner.pair_macs

    def layer_macs(self, projected: Any, queries: Any, keys: Any, mlp: Any) -> Any:
        """Of one layer, at these token counts."""
        return self.inner.layer_macs(projected, queries, keys, mlp)
