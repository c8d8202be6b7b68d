"""Latent diffusion on LSUN-Churches (Rombach et al. 2022, LDM-8), with the user's weights.

    mpqdiff convert --source=model.ckpt --out=ldm_church.safetensors
    mpqdiff convert --source=VAE_FOLDER --out=ldm_church_vae.safetensors
    mpqdiff run --config=configs/ldm_church.py --workdir=runs/ldm_church

`:smoke` runs a shrunken random model and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "ldm_church"
    config.weights = "ldm_church.safetensors"
    config.model.name = "unet"
    config.model.kwargs = dict(
        image_size=32,
        channels=4,
        widths=(192, 384, 384, 768, 768),
        attention_levels=(0, 1, 2, 3),
        num_heads=8,
        scale_shift=True,
        resample_in_blocks=True,
        attention_scale="both",
    )
    config.autoencoder.weights = "ldm_church_vae.safetensors"
    config.diffusion.update(
        schedule="scaled_linear", betas=(0.0015, 0.0155), num_steps=50, clip=False
    )
    config.plan.pins = (("conv_in|conv_out", 8), ("time/.*", 8))
    config.calibration.update(samples=32, timesteps=10, memory_gb=8.0)
    config.sample.update(num_images=256, batch=32)
    config.evaluate.features = ""
    small = dict(
        image_size=8,
        widths=(8, 8),
        blocks_per_level=1,
        attention_levels=(0,),
        num_heads=2,
        groups=4,
    )
    return smoke(config, **small) if arg == "smoke" else config
