"""The version of the library, written into every checkpoint and manifest (layer L0)."""

__all__ = ["__version__"]

__version__ = "0.1.0"
