"""Studies on top of the public API: not installed, and nothing in the package imports them."""

__all__: list[str] = []
