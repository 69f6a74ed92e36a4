"""Time a denoiser in all its forms, and kernels one by one; the front door is `bench.run.bench`.

What is timed, how it is checked before, and what a fair rival is, are decided here. Nothing here
prints, and every function that times takes the timer as an argument.
"""

__all__: list[str] = []
