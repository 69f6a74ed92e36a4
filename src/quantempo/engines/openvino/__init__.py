"""The OpenVINO engine: the whole denoiser as one graph."""

__all__: list[str] = []
