"""Time a denoiser in all its forms; the front door is `bench.run.bench`.

Nothing here prints, and every function that times takes the timer as an argument.
"""

__all__: list[str] = []
