"""One small function per case group: it converts weights and calls tokred's public functions."""

from collections.abc import Mapping

from tests.golden_adapters.boundaries import BOUNDARIES
from tests.golden_adapters.caching import CACHING
from tests.golden_adapters.case import Adapter
from tests.golden_adapters.clusters import CLUSTERS
from tests.golden_adapters.compressors import COMPRESSORS
from tests.golden_adapters.connectors import CONNECTORS
from tests.golden_adapters.core import CORE
from tests.golden_adapters.deletion import DELETION
from tests.golden_adapters.depth_text import DEPTH_TEXT
from tests.golden_adapters.depth_vision import DEPTH_VISION
from tests.golden_adapters.fusion import FUSION
from tests.golden_adapters.gates import GATES
from tests.golden_adapters.halting import HALTING
from tests.golden_adapters.kv import KV
from tests.golden_adapters.kv_storage import KV_STORAGE
from tests.golden_adapters.kv_traces import KV_TRACES
from tests.golden_adapters.nested import NESTED
from tests.golden_adapters.resamplers import RESAMPLERS
from tests.golden_adapters.slicing import SLICING
from tests.golden_adapters.spans import SPANS
from tests.golden_adapters.vit import MERGED_BACK, VIT
from tests.golden_adapters.widths import WIDTHS

FAMILIES: Mapping[str, Mapping[str, Adapter]] = {
    "core": {
        **CORE,
        **DELETION,
        **DEPTH_TEXT,
        **DEPTH_VISION,
        **SPANS,
        **WIDTHS,
        **GATES,
        **BOUNDARIES["core"],
        **COMPRESSORS["core"],
        **CONNECTORS["core"],
        **NESTED["core"],
        **RESAMPLERS["core"],
    },
    "connectors": {
        **COMPRESSORS["connectors"],
        **CONNECTORS["connectors"],
        **NESTED["connectors"],
        **RESAMPLERS["connectors"],
        **SLICING["connectors"],
    },
    "gen": {**BOUNDARIES["gen"], **NESTED["gen"], **MERGED_BACK},
    "kv": {**KV, **KV_STORAGE, **KV_TRACES},
    "vit": {**VIT, **CACHING, **CLUSTERS, **FUSION, **HALTING},
}
