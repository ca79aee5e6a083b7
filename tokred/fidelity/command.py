"""What `python eval.py --pretrained=NAME` does: real weights on real inputs, methods beside the
dense model."""

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokred.cost.bench import device_name
from tokred.fidelity import data
from tokred.fidelity.language import DEPTHS, compare_caches, plant
from tokred.fidelity.plot import plot_fidelity
from tokred.fidelity.sentences import compare_sentences
from tokred.fidelity.vision import THRESHOLD, compare_heatmaps
from tokred.interop import load, pretrained

Row = dict[str, Any]
BUDGETS = (0.75, 0.5, 0.25)
TIME = ("ms", "ms_low", "ms_high", "ms_ratio")
COUNTS = {"saliency_vit_s14": 6, "smollm2_135m_instruct": 3, "minilm_l6": 64}


class Task(NamedTuple):
    """compare(path, count, methods, budgets, lengths, rounds) -> rows, about. columns: of the
    table; panels: what is drawn, over `cost`."""

    compare: Callable[..., tuple[list[Row], dict[str, Any]]]
    columns: tuple[str, ...]
    panels: tuple[str, ...]
    cost: str


def compare_pretrained(
    name: str,
    methods: Sequence[str],
    budgets: Sequence[float] = BUDGETS,
    *,
    count: int | None = None,
    lengths: Sequence[int] = (512,),
    rounds: int = 3,
    workdir: str | Path | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """(rows, about): of `compare_heatmaps`, `compare_caches` or `compare_sentences` with the
    weights `pretrained(name)`, and how they came about.

    methods: names, or 'all'. count: of photographs, texts or sentences, default `COUNTS`. lengths:
    of prompts of the language model, of which texts have the longest. workdir: gets fidelity.json
    and fidelity.png.

    Raises:
      ValueError: an unknown name, or methods and budgets that do not fit. ConnectionError: the
        weights cannot be fetched. ImportError: what reads them is not installed.
    """
    path = pretrained(name)
    task = TASKS[name]
    how = {"lengths": lengths, "rounds": rounds}
    rows, told = task.compare(path, count or COUNTS[name], methods, budgets, **how)
    about = {"pretrained": name, **told, "machine": device_name(), "rounds": rounds}
    about["python"] = platform.python_version()
    if workdir is not None:
        _write(rows, about, Path(workdir))
    return rows, about


def _write(rows: Sequence[Row], about: dict[str, Any], workdir: Path) -> None:
    """fidelity.json and fidelity.png."""
    task = TASKS[about["pretrained"]]
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "rows": list(rows)}, indent=1)
    (workdir / "fidelity.json").write_text(text + "\n")
    plot_fidelity(rows, task.panels, task.cost, workdir / "fidelity.png")


def see_photographs(
    path: Path, count: int, methods: Sequence[str], budgets: Sequence[float], **how: Any
) -> tuple[list[Row], dict[str, Any]]:
    """Of the saliency model."""
    model = load(path).model
    images = data.photographs(model.config.image_size[0], count)
    batch = data.normalised(np.stack(list(images.values())))
    rows = compare_heatmaps(model, batch, methods, budgets, rounds=how["rounds"])
    return rows, {
        "inputs": list(images),
        "threshold": THRESHOLD,
        "budgets": "of the encoder's MACs",
    }


def read_docstrings(
    path: Path,
    count: int,
    methods: Sequence[str],
    budgets: Sequence[float],
    *,
    lengths: Sequence[int],
    rounds: int,
    steps: int = 64,
) -> tuple[list[Row], dict[str, Any]]:
    """Of the language model."""
    prompt = max(lengths)
    loaded = load(path, context=prompt + steps)
    source: Any = loaded.origin  # a GGUF file, which has its tokenizer inside
    tokenizer = source.tokenizer()
    encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
    filler, *modules = data.MODULES
    texts, used = cut(encode, modules, count, prompt + steps)
    needles = [plant(encode, encode(data.prose(filler)), n) for n in sorted(set(lengths))]
    rows = compare_caches(
        loaded.model, texts, needles, methods, budgets, steps=steps, rounds=rounds
    )
    about = {"inputs": used, "needles in": filler, "depths": DEPTHS, "prompt": prompt}
    return rows, {**about, "steps": steps, "budgets": "of a prompt's cache entries"}


def cut(
    encode: Callable[[str], Sequence[int]], modules: Sequence[str], count: int, length: int
) -> tuple[np.ndarray, list[str]]:
    """The beginnings [count length] of the docstrings of the first modules that have so many
    tokens; their names. Raises ValueError where there are too few."""
    found = {name: ids for name in modules if len(ids := encode(data.prose(name))) >= length}
    if len(found) < count:
        raise ValueError(
            f"cut: {len(found)} texts have {length} tokens, {count} are asked for; ask for fewer, "
            "or for shorter ones."
        )
    used = list(found)[:count]
    return np.asarray([found[name][:length] for name in used]), used


def embed_paragraphs(
    path: Path, count: int, methods: Sequence[str], budgets: Sequence[float], **how: Any
) -> tuple[list[Row], dict[str, Any]]:
    """Of the sentence encoder."""
    model = load(path, pool="mean", tanh=False).model
    ids = paragraphs_of(path, count)
    rows = compare_sentences(model, ids, methods, budgets, rounds=how["rounds"])
    told = {"inputs": f"{count} paragraphs of docstrings", "tokens": ids.shape[1]}
    return rows, {**told, "budgets": "of MACs"}


def paragraphs_of(path: Path, count: int, tokens: int = 32) -> np.ndarray:
    """`count` paragraphs, evenly drawn from all, cut to so many tokens. Raises ImportError without
    tokenizers, ValueError for more than there are."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            'sentences need the library tokenizers; run `pip install "tokred[pretrained]"`.'
        ) from error
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    tokenizer.no_padding()
    rows = [tokenizer.encode(text).ids for text in data.paragraphs(4 * tokens)]
    whole = [row for row in rows if len(row) == tokens]
    if len(whole) < count:
        raise ValueError(
            f"paragraphs_of: there are {len(whole)} paragraphs of {tokens} tokens, {count} are "
            "asked for; ask for fewer."
        )
    chosen = np.linspace(0, len(whole) - 1, count).round().astype(int)
    return np.asarray(whole)[chosen]


TASKS = {
    "saliency_vit_s14": Task(
        see_photographs,
        ("correlation", "iou", "cosine", "encoder_ratio", "macs_ratio", *TIME),
        ("correlation", "iou", "cosine"),
        "macs_ratio",
    ),
    "smollm2_135m_instruct": Task(
        read_docstrings,
        ("perplexity", "perplexity_ratio", "agrees", "needle", "cache_bytes", "cache_ratio", *TIME),
        ("perplexity_ratio", "agrees", "needle"),
        "cache_ratio",
    ),
    "minilm_l6": Task(
        embed_paragraphs, ("spearman", "cosine", "macs_ratio", *TIME), ("spearman", "cosine"),
        "macs_ratio",
    ),
}  # fmt: skip
