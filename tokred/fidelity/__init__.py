"""What real models lose and save under reductions.

    rows, about = compare_pretrained("saliency_vit_s14", ["tome"], [0.5])

`compare_heatmaps`, `compare_caches` and `compare_sentences` take any model of their kind.
"""

from tokred.fidelity.command import BUDGETS, TASKS, compare_pretrained
from tokred.fidelity.language import Needles, compare_caches, perplexity, plant, recall
from tokred.fidelity.sentences import compare_sentences
from tokred.fidelity.table import format_fidelity
from tokred.fidelity.vision import compare_heatmaps

__all__ = [
    "BUDGETS",
    "TASKS",
    "Needles",
    "compare_caches",
    "compare_heatmaps",
    "compare_pretrained",
    "compare_sentences",
    "format_fidelity",
    "perplexity",
    "plant",
    "recall",
]
