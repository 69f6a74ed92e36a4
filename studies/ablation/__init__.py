"""The ablation from the paper's recipe to the shipped ones: `python -m studies.ablation`."""

__all__: list[str] = []
