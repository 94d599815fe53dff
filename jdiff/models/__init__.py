"""The models by name."""

from typing import Any

from jdiff.tree import nearest


def list_models() -> list[str]:
    """The names that `create` takes."""
    from jdiff.models import dit

    return list(dit.CONFIGS)


def create(name: str, **overrides: Any) -> Any:
    """The module called `name`, any of its fields overridden: `create("DiT-S/2", num_classes=10, depth=6)`.

    ValueError names an unknown model or field and the nearest that exists.
    """
    from jdiff.models import dit

    if name not in dit.CONFIGS:
        raise ValueError(f"unknown model {name!r}{nearest(name, dit.CONFIGS)}; the models are {list_models()}")
    fields = [f for f in dit.DiT.__dataclass_fields__ if f not in ("parent", "name")]
    for key in overrides:
        if key not in fields:
            raise ValueError(f"{name} has no setting {key!r}{nearest(key, fields)}; its settings are {fields}")
    return dit.DiT(**{**dit.CONFIGS[name], **overrides})
