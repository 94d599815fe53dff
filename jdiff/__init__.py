"""jdiff: latent diffusion in JAX."""

from typing import TYPE_CHECKING, Any

from jdiff.version import __version__

if TYPE_CHECKING:
    from jdiff.loading import load, pipeline
    from jdiff.models import create, list_models

__all__ = ["__version__", "create", "list_models", "load", "pipeline"]


def __getattr__(name: str) -> Any:
    # on demand, so that `import jdiff` costs nothing
    if name in ("load", "pipeline"):
        from jdiff import loading

        return getattr(loading, name)
    if name in ("create", "list_models"):
        from jdiff import models

        return getattr(models, name)
    raise AttributeError(f"module 'jdiff' has no attribute {name!r}")
