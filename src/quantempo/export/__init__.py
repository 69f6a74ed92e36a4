"""Graphs of packed networks that other runtimes run, with the same integers and scales."""

__all__: list[str] = []
