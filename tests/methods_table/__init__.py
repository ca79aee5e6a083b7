"""The one table of methods: a row per registered method, from which every property is tested.

A new method gets a row here and inherits all of `tests/conformance`. Of model 'vit', 'odd' has 3 x
5 patches and a class token (16 tokens), 'even' 4 x 4 patches, a class token and two registers, and
so has 'vit_mean', which looks at the mean of its patches; 'vit_grid' and 'vit_square' are the same
with 4 x 6 and 3 x 3 patches in 'odd'. Of 'decoder' and 'experts', which has a mixture of them,
'odd' has 15 tokens, 'even' 16 and windows of 6. 'pairs' is an encoder-decoder with sources of 15
and 16 tokens, 'even' with sinks. All have 4 layers. 'cache' is 'decoder', going on from prompts.
"""

from tests.methods_table.caches import CACHES
from tests.methods_table.clusters import CLUSTERS
from tests.methods_table.connectors import CONNECTORS
from tests.methods_table.row import NO_TWIN, Extra, Options, Row
from tests.methods_table.text import TEXT, phases
from tests.methods_table.vision import VISION

ROWS = (*VISION, *CLUSTERS, *CONNECTORS, *TEXT, *CACHES)
# What needs a text or several images beside its tokens, or another method before it, and where it
# is tested instead.
ELSEWHERE = {
    "quecc": "models/test_vlm.py",
    "anyres": "methods/test_anyres.py",
    "restore": "methods/test_restore.py",
    "doccompressor": "methods/test_doccompressor.py",
    "slime_router": "methods/test_slime_router.py",
}

__all__ = ["ELSEWHERE", "NO_TWIN", "ROWS", "Extra", "Options", "Row", "phases"]
