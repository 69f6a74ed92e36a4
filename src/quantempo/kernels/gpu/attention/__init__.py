"""8-bit attention on GPUs of Hopper."""

__all__: list[str] = []
