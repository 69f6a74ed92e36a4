"""Write packed models as diffusers folders and load them again."""

__all__: list[str] = []
