"""The Python code with which a reader of the card draws images from the exported folder, without ddpm_dist."""

from __future__ import annotations

from ddpm_dist.loading import LoadedRun

MODULE = "reference_unet"
"""The module that a folder with the reference network carries: a copy of `models/unet.py`, which needs only torch."""

_PIPELINE = """\
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained(".")  # the folder of this card
images = pipeline(batch_size=4, num_inference_steps={num_timesteps}).images
"""

_DDIM = """\
from diffusers import DDIMPipeline, DDIMScheduler

pipeline = DDIMPipeline.from_pretrained(".")
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=True)
images = pipeline(batch_size=4, num_inference_steps={steps}, use_clipped_model_output=True).images
"""

_LOAD_UNET2D = """\
import torch
from diffusers import DDPMScheduler, UNet2DModel

scheduler = DDPMScheduler.from_pretrained(".", subfolder="scheduler")  # the folder of this card
unet = UNet2DModel.from_pretrained(".", subfolder="unet").eval()
"""

_LOAD_UNET = f"""\
import json

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from {MODULE} import UNet  # {MODULE}.py, beside this card

scheduler = DDPMScheduler.from_pretrained(".", subfolder="scheduler")  # the folder of this card
unet = UNet(**json.load(open("unet/config.json"))).eval()
unet.load_state_dict(load_file("unet/diffusion_pytorch_model.safetensors"))
"""

_LOOP = """
x = torch.randn(4, {shape})
scheduler.set_timesteps({num_timesteps})
for t in scheduler.timesteps:
    with torch.no_grad():
        output = {call}
    x = scheduler.step(output, t, x).prev_sample
images = (x / 2 + 0.5).clamp(0, 1)  # float32 [4, {shape}]
"""


def drawing_code(run: LoadedRun) -> dict[str, str]:
    """{what it does: Python code}, to be executed in the exported folder. In each, `images` is the result."""
    num_timesteps = run.process.num_timesteps
    shape = ", ".join(map(str, run.image_shape))
    if run.config.model.name == "unet2d":
        steps = next(steps for steps in (50, 40, 25, 20, 10, 5, 2, 1) if num_timesteps % steps == 0)
        return {
            f"Ancestral sampling (DDPM), {num_timesteps} steps": _PIPELINE.format(num_timesteps=num_timesteps),
            f"DDIM, {steps} steps": _DDIM.format(steps=steps),
        }
    loop = _LOOP.format(shape=shape, num_timesteps=num_timesteps, call="unet(x, t.expand(len(x)))")
    return {f"Ancestral sampling (DDPM), {num_timesteps} steps": _LOAD_UNET + loop}
