"""jdiff: latent diffusion in JAX."""

from jdiff.models import create, list_models
from jdiff.version import __version__

__all__ = ["__version__", "create", "list_models"]
