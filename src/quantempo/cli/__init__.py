"""The command line: parse, call one library function, print."""

from quantempo.cli.app import app, main

__all__ = ["app", "main"]
