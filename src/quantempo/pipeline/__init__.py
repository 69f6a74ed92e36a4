"""The main line and its run folder."""

__all__: list[str] = []
