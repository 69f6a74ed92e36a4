"""Attention in 8 bits (`kernels.ops.attention8`): its error on inputs, which modules may run it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantempo.core.instance import keep
from quantempo.errors import log
from quantempo.kernels.ops import attention
from quantempo.models.fusion import attending
from quantempo.models.layers import hooked

__all__ = ["attentions", "eight_bit", "mark_attention", "marked_attention", "measured_attention"]

# Tokens from which the kernel is faster than torch's attention (at 2048 it takes 1.09 the time), by
# the values of a head; of 40 it is 1.02 to 1.04 times as fast only, less than it is worth.
LEAST = dict.fromkeys(range(64, 129, 8), 4096)
_MARK = "_quantempo_attention"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(eq=False)
class _Known:
    """The largest error of an attention in 8 bits, on at most `tokens` (0: unknown).

    chosen: may it run so; ran: did the last call; longer: those with calls over twice as long.
    """

    error: float
    tokens: int
    chosen: bool
    longer: list["_Known"]
    ran: bool = False

    def note(self, ran: bool, tokens: int) -> None:
        """Note a call; of the first that is so long say it, of the network's first aloud."""
        self.ran = ran
        if ran and 0 < 2 * self.tokens < tokens and self not in self.longer:
            self.longer.append(self)
            say = log.debug if self.longer[1:] else log.warning
            how = "attention in 8 bits on %d tokens, measured on %d: quantize with such a call (%d)"
            say(how, tokens, self.tokens, len(self.longer))


def mark_attention(denoiser: nn.Module, errors: Mapping[str, Any], most: float) -> None:
    """Note in modules what 8 bits cost them: [error, tokens], or of older files the error alone."""
    longer: list[_Known] = []
    for name, known in errors.items():
        error, tokens = known if isinstance(known, list) else (known, 0)
        found = _Known(error, int(tokens), error <= most, longer)
        keep(denoiser.get_submodule(name), _MARK, found)


def marked_attention(denoiser: nn.Module) -> dict[str, _Known]:
    """Return what is known of each measured module."""
    return {n: getattr(m, _MARK) for n, m in denoiser.named_modules() if hasattr(m, _MARK)}


def eight_bit(module: Any, q: Tensor, k: Tensor) -> bool:
    """Return whether a module runs an attention in 8 bits."""
    # Not above: this module is imported while diffusers itself is.
    from quantempo.models.fusion_joint import by_default

    if (known := getattr(module, _MARK, None)) is None:
        return False
    chosen = known.chosen and _is_long(q, k) and by_default(module)
    chosen = chosen and _supported(q.device, q.shape[3], q.dtype)
    if not torch.compiler.is_compiling():
        known.note(chosen, q.shape[1])
    return chosen


def _is_long(q: Tensor, k: Tensor) -> bool:
    return q.shape == k.shape and q.shape[1] >= LEAST.get(q.shape[3], q.shape[1] + 1)


@torch.compiler.assume_constant_result
def _supported(device: torch.device, dim: int, dtype: torch.dtype) -> bool:
    return attention.supported(device, dim, dtype)


@contextmanager
def attentions(denoiser: nn.Module, see: Callable[..., Tensor]) -> Iterator[None]:
    """Let y = see(name, q, k, v, y), all (B, T, heads, dim), at the long attentions of modules."""
    running: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            y = func(*args, **(kwargs or {}))
            if func is F.scaled_dot_product_attention and running:
                given = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
                q, k, v = (given.pop(name).transpose(-3, -2) for name in _ARGUMENTS[:3])
                # A mask, dropout, a causal one, another scale, shared keys.
                odd = any(isinstance(value, Tensor) or value for value in given.values())
                if not odd and q.ndim == 4 and _is_long(q, k):
                    y = see(running[-1], q, k, v, y.transpose(1, 2)).transpose(1, 2)
            return y

    modules = attending(denoiser)
    enter = hooked(modules, lambda name, *_: running.append(name), before=True)
    with enter, hooked(modules, lambda *_: running.pop()), Mode():
        yield


@contextmanager
def measured_attention(denoiser: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Yield [max over images of |y8 - y| / |y|, most tokens] by module with long attention."""
    errors: dict[str, list[float]] = {}

    def see(name: str, *every: Tensor) -> Tensor:
        for q, k, v, y in zip(*(x.split(1) for x in every), strict=True):
            far = (attention.exact(q, k, v).float() - y).norm() / y.float().norm()
            # 0 / 0: no value is anything but 0.
            far = far.nan_to_num(torch.inf if y.any() else 0.0)
            error, tokens = errors.get(name, (0.0, 0))
            errors[name] = [max(error, float(far)), max(tokens, len(q[0]))]
        return every[3]

    with attentions(denoiser, see):
        yield errors
