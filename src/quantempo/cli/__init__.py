"""The command line: one file a verb; parse, call one library function, print (layer L6)."""

from quantempo.cli.app import app, main

__all__ = ["app", "main"]
