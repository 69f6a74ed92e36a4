"""What diffusers models look like, how to load and to run them."""

__all__: list[str] = []
