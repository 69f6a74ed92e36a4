"""Trace a pipeline, collect statistics, choose scales."""

__all__: list[str] = []
