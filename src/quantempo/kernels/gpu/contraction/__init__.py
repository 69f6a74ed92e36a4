"""Int8 convolution and product on GPUs."""

__all__: list[str] = []
