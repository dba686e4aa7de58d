"""The Python code with which a reader of the card draws images from the exported folder, without ddpm_dist."""

from __future__ import annotations

from ddpm_dist.diffusion.variance import VARIANCES
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

_GUIDED_LOOP = """
labels = torch.tensor([0, 0, {last}, {last}])  # the class of each image, 0 to {last}
guidance = 1.0  # 0: any class; 1: the class as it was trained; above 1: the class more clearly
no_class = torch.full_like(labels, {null})  # the label on which the network was trained for no class in particular
x = torch.randn(len(labels), {shape})
scheduler.set_timesteps({num_timesteps})
for t in scheduler.timesteps:
    with torch.no_grad():
        with_class, without = {call}.chunk(2)
    output = without + guidance * (with_class - without)
    x = scheduler.step(output, t, x).prev_sample
images = (x / 2 + 0.5).clamp(0, 1)  # float32 [4, {shape}]
"""

_OF_CLASS = """    output[:, {channels}:] = with_class[:, {channels}:]  # the variance, which is not guided
"""


def drawing_code(run: LoadedRun) -> dict[str, str]:
    """{what it does: Python code}, to be executed in the exported folder. In each, `images` is the result.

    The pipelines of diffusers give no labels to a network, so for one that wants labels it is a loop.
    """
    num_timesteps = run.process.num_timesteps
    ancestral = f"Ancestral sampling (DDPM), {num_timesteps} steps"
    if run.config.model.name == "unet2d" and not run.num_classes:
        found = {ancestral: _PIPELINE.format(num_timesteps=num_timesteps)}
        if not learns_variance(run):  # the DDIM scheduler of diffusers does not know that half of the output is none
            steps = next(steps for steps in (50, 40, 25, 20, 10, 5, 4, 3, 2, 1) if num_timesteps % steps == 0)
            found[f"DDIM, {steps} steps"] = _DDIM.format(steps=steps)
        return found
    return {ancestral: _loop(run)}


def learns_variance(run: LoadedRun) -> bool:
    """Whether the network has twice the channels of the images, the second half of which is the variance."""
    return VARIANCES[run.config.diffusion.variance].num_parts == 2


def _loop(run: LoadedRun) -> str:
    """The loop over all timesteps, with labels and guidance if the network has labels."""
    of_diffusers, labels = run.config.model.name == "unet2d", run.num_classes > 0
    x = "torch.cat([x, x])" if labels else "x"
    both = "torch.cat([labels, no_class])"
    if of_diffusers:
        call = f"unet({x}, t{f', class_labels={both}' if labels else ''}).sample"
    elif labels:
        call = f"unet({x}, t.expand(2 * len(x)), {both})"
    else:
        call = "unet(x, t.expand(len(x)))"
    loop = (_GUIDED_LOOP if labels else _LOOP).format(
        shape=", ".join(map(str, run.image_shape)),
        num_timesteps=run.process.num_timesteps,
        call=call,
        null=run.num_classes,
        last=run.num_classes - 1,
    )
    if labels and learns_variance(run):
        step = "    x = scheduler.step"
        loop = loop.replace(step, _OF_CLASS.format(channels=run.image_shape[0]) + step)
    return (_LOAD_UNET2D if of_diffusers else _LOAD_UNET) + loop
