"""Families of models: what their config.json and their stored names mean here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokred.interop.names import Rule
from tokred.plan import nearest

Settings = Mapping[str, Any]
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "silu": "silu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Family:
    """types: `model_type` of config.json. model: the module, made of a config. configure(settings,
    stored names): that config. rules(settings, stored names, config): its table of names."""

    name: str
    types: tuple[str, ...]
    model: Callable[..., Any]
    configure: Callable[[Settings, Iterable[str]], Any]
    rules: Callable[[Settings, Iterable[str], Any], Sequence[Rule]]


def find_family(families: Sequence[Family], settings: Settings, name: str | None) -> Family:
    """The family of a config.json, or the one of that name.

    Raises:
      ValueError: none of that name or type, or the two disagree.
    """
    kind = settings.get("model_type")
    fits = [family for family in families if kind in family.types]
    if name is not None:
        known = {family.name: family for family in families}
        if name not in known:
            raise ValueError(
                f"family={name!r} must be one of {sorted(known)}{nearest(name, known)}"
            )
        if kind is not None and known[name] not in fits:
            raise ValueError(
                f"family={name!r} does not fit config.json, whose model_type is {kind!r}; leave "
                "family out."
            )
        return known[name]
    if not fits:
        types = sorted(t for family in families for t in family.types)
        raise ValueError(
            f"config.json: model_type={kind!r} is unknown; it must be one of {types}"
            f"{nearest(str(kind), types)}"
        )
    return fits[0]


def require(settings: Settings, **wanted: Any) -> None:
    """Raises ValueError for a field that says what this library does not compute; a field that is
    not there or null says nothing. wanted: the value, or a tuple of values, by field."""
    for field, values in wanted.items():
        values = values if isinstance(values, tuple) else (values,)
        if settings.get(field) is not None and settings[field] not in values:
            raise ValueError(
                f"config.json: {field}={settings[field]!r} of model_type="
                f"{settings.get('model_type')!r} is not supported, only {list(values)}; load "
                "another model."
            )


def activation(settings: Settings, field: str = "hidden_act") -> str:
    """The activation's name here. Raises ValueError for one that is not supported."""
    require(settings, **{field: tuple(ACTIVATIONS)})
    return ACTIVATIONS[settings[field]]


def renamed(settings: Settings, fields: Mapping[str, str]) -> dict[str, Any]:
    """Our fields from theirs, where they are there and not null."""
    return {
        ours: settings[theirs]
        for ours, theirs in fields.items()
        if settings.get(theirs) is not None
    }


def label_count(settings: Settings) -> int:
    """How many classes a classifier has."""
    return len(settings.get("id2label") or range(settings.get("num_labels", 2)))
