"""Run the command line as `python -m quantempo`."""

from quantempo.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
