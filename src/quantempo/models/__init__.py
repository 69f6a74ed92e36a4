"""What diffusers models look like, how to load and to run them (layer L1)."""

__all__: list[str] = []
