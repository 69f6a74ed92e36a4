"""Write packed models as diffusers folders and load them again (layer L4)."""

__all__: list[str] = []
