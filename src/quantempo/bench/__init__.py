"""Time a denoiser and its kernels on a GPU; the front door is `quantempo.bench.cuda`.

What is timed, how it is checked before, and what a fair rival is, are decided here. Nothing here
prints or knows a run folder, and every function that times takes the timer as an argument.
"""

__all__: list[str] = []
