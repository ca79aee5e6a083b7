"""One small function per case group: it converts weights and calls tokred's public functions."""

from collections.abc import Mapping

from tests.golden_adapters.case import Adapter
from tests.golden_adapters.core import CORE
from tests.golden_adapters.vit import VIT

FAMILIES: Mapping[str, Mapping[str, Adapter]] = {"core": CORE, "vit": VIT}
