"""quantempo: time-step-aware post-training quantization for diffusion models, run in integers."""

__all__: list[str] = []
