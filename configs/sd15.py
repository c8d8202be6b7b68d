"""Stable Diffusion 1.5 (Rombach et al. 2022) with the user's weights and cached prompts.

    mpqdiff convert --source=SD_FOLDER/unet --out=sd15.safetensors
    mpqdiff convert --source=SD_FOLDER/vae --out=sd_vae.safetensors
    mpqdiff run --config=configs/sd15.py --workdir=runs/sd15

Text enters as the CLIP encoder's last hidden states: an .npz with `embeddings` [prompts, 77, 768]
and `null` [77, 768] of the empty prompt. `:smoke` runs a shrunken random model on random
embeddings and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "sd15"
    config.weights = "sd15.safetensors"
    config.model.name = "unet"
    config.model.kwargs = dict(
        image_size=64,
        channels=4,
        widths=(320, 640, 1280, 1280),
        attention_levels=(0, 1, 2),
        num_heads=8,
        condition="context",
        context_width=768,
    )
    config.autoencoder.weights = "sd_vae.safetensors"
    config.text = "prompts.npz"
    config.diffusion.update(schedule="scaled_linear", num_steps=50, guidance_scale=7.5, clip=False)
    config.plan.pins = (("conv_in|conv_out", 8), ("time/.*", 8))
    config.calibration.update(samples=16, timesteps=10, memory_gb=8.0)
    config.sample.update(num_images=64, batch=8)
    config.evaluate.features = ""
    if arg == "smoke":
        config.text = ""
        small = dict(
            image_size=8,
            widths=(8, 8),
            blocks_per_level=1,
            attention_levels=(0,),
            num_heads=2,
            groups=4,
            context_width=6,
        )
        return smoke(config, **small)
    return config
