"""A pixel-space pipeline without conditioning that works with any scheduler.

The stock ones do not: DDIMPipeline turns every scheduler into DDIM, and DDPMPipeline scales neither
the network's input nor x_T, silently wrong for Euler-type schedulers. With DDIM and DDPM this one
gives their images bit for bit. Apart from `sampling` because it needs diffusers at import.
"""

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator

__all__ = ["UnconditionalPipeline"]


class UnconditionalPipeline(DiffusionPipeline):
    """Denoise pixels with a UNet2DModel, called as unet(x_t, t), and any scheduler for it."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, batch_size: int = 1, generator: Generator | list[Generator] | None = None,
        num_inference_steps: int = 50, eta: float = 0.0, output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Sample images; eta: DDIM's noise share in [0, 1], which others ignore.

        output_type: "pil", "np" (B, H, W, C float32 in [0, 1]) or "pt" (B, C, H, W).
        """
        config = self.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, config.in_channels, height, width)
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        x = x * self.scheduler.init_noise_sigma

        known = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator, "eta": eta}
        options = {name: value for name, value in options.items() if name in known}
        variance = getattr(self.scheduler.config, "variance_type", None)
        learned = variance in ("learned", "learned_range")
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.unet(self.scheduler.scale_model_input(x, t), t).sample
            # Without the learned variance channels where the scheduler has no use for them.
            output = output if learned else output[:, : shape[1]]
            x = self.scheduler.step(output, t, x, **options).prev_sample

        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
