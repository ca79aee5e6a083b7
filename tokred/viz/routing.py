"""Pictures of routing: which tokens of a text entered which layer."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from tokred.viz.style import INK, new_figure, save

Routed = Mapping[str, Bool[np.ndarray, "B N"]]
SHADE = "background: rgba(31, 119, 180, {share:.2f})"
PAGE = """<!doctype html><meta charset="utf-8"><title>Routing</title>
<style>body {{ font: 15px/1.7 monospace; max-width: 70em; margin: 2em auto; }}
pre {{ white-space: pre-wrap; }} span {{ border-radius: 2px; }}</style>
<p>Each token's shade is the share of the routed layers that it entered ({layers}): white none,
dark all. Hover for the layers.</p>
{texts}
"""


def layer_of(site: str) -> int:
    """The layer in a site's name, the first of several. Raises ValueError where it has none."""
    match = re.fullmatch(r"\D*_(\d+)(_\d+)?", site)
    if match is None:
        raise ValueError(f"routing: {site!r} names no layer; give sites such as 'around_3'.")
    return int(match[1])


def label_of(site: str) -> str:
    """'3' of 'around_mlp_3', '1-2' of 'around_1_2'."""
    return re.sub(r"^\D*_", "", site).replace("_", "-")


def write_routing(texts: Sequence[Sequence[str]], routed: Routed, workdir: Path) -> list[Path]:
    """routing.html, the texts shaded by how deep each token went, and routing.png, layers by place.

    texts: the pieces of every example. routed: which tokens entered, by site; {} writes nothing.
    """
    if not routed:
        return []
    page, picture = workdir / "routing.html", workdir / "routing.png"
    page.write_text(routing_html(texts, routed))
    plot_routing(texts[0], {site: np.asarray(a)[0] for site, a in routed.items()}, picture)
    return [page, picture]


def routing_html(texts: Sequence[Sequence[str]], routed: Routed) -> str:
    """One page with every text, each token shaded by the share of layers that it entered."""
    sites = sorted(routed, key=layer_of)
    depth = np.stack([np.asarray(routed[site]) for site in sites], -1)  # [B N L]
    layers = [label_of(site) for site in sites]
    shown = "\n<hr>\n".join(
        f"<pre>{_shaded(pieces, rows, layers)}</pre>"
        for pieces, rows in zip(texts, depth, strict=False)
    )
    return PAGE.format(layers=", ".join(layers), texts=shown)


def _shaded(pieces: Sequence[str], rows: np.ndarray, layers: Sequence[str]) -> str:
    spans = []
    for piece, row in zip(pieces, rows, strict=True):
        told = ", ".join(layer for layer, went in zip(layers, row, strict=True) if went)
        style = SHADE.format(share=row.mean())
        spans.append(f'<span style="{style}" title="layers {told}">{html.escape(piece)}</span>')
    return "".join(spans)


def routing_text(pieces: Sequence[str], routed: Mapping[str, np.ndarray], width: int = 100) -> str:
    """The same for a terminal: the text, and below each line a digit per token: of the routed
    layers, how many tenths it entered ('.' none, '#' all)."""
    share = np.stack([np.asarray(a) for a in routed.values()], -1).mean(-1)
    marks = "".join("." if s == 0 else "#" if s == 1 else str(int(10 * s)) for s in share)
    text = "".join(p if len(p) == 1 and p.isprintable() else "·" for p in pieces)
    lines = [f"{text[i : i + width]}\n{marks[i : i + width]}" for i in range(0, len(text), width)]
    return "\n".join(lines)


def plot_routing(
    pieces: Sequence[str], routed: Mapping[str, Bool[np.ndarray, " N"]], path: Path
) -> Path:
    """Layers by place in the text, black where the token entered; with marginal shares."""
    sites = sorted(routed, key=layer_of)
    table = np.stack([np.asarray(routed[site]) for site in sites]).astype(float)
    figure = new_figure(12, 2 + 0.25 * len(sites))
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    top.bar(np.arange(table.shape[1]), table.mean(0), width=1.0, color=INK)
    top.set_ylabel("share of layers")
    main.imshow(table, aspect="auto", cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
    main.set_yticks(range(len(sites)), [label_of(site) for site in sites])
    main.set_ylabel("layer")
    if len(pieces) <= 80:
        main.set_xticks(range(len(pieces)), [p if p.isprintable() else "·" for p in pieces])
    main.set_xlabel("place in the text")
    save(figure, path)
    return path
