"""Trace a pipeline, collect statistics, choose scales (layer L3)."""

__all__: list[str] = []
