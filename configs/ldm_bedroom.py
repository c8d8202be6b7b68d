"""Latent diffusion on LSUN-Bedrooms (Rombach et al. 2022, LDM-4, VQ), with the user's weights.

    mpqdiff convert --source=model.ckpt --out=ldm_bedroom.safetensors
    mpqdiff convert --source=VQ_FOLDER --out=ldm_bedroom_vq.safetensors
    mpqdiff run --config=configs/ldm_bedroom.py --workdir=runs/ldm_bedroom

`:smoke` runs a shrunken random model and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "ldm_bedroom"
    config.weights = "ldm_bedroom.safetensors"
    config.model.name = "unet"
    config.model.kwargs = dict(
        image_size=64,
        channels=3,
        widths=(224, 448, 672, 896),
        attention_levels=(1, 2, 3),
        num_heads=(7, 14, 21, 28),
        attention_scale="both",
    )
    config.autoencoder.weights = "ldm_bedroom_vq.safetensors"
    config.diffusion.update(
        schedule="scaled_linear", betas=(0.0015, 0.0195), num_steps=50, clip=False
    )
    config.plan.pins = (("conv_in|conv_out", 8), ("time/.*", 8))
    config.calibration.update(samples=32, timesteps=10, memory_gb=8.0)
    config.sample.update(num_images=256, batch=32)
    config.evaluate.features = ""
    small = dict(
        image_size=8,
        widths=(8, 8),
        blocks_per_level=1,
        attention_levels=(1,),
        num_heads=(1, 2),
        groups=4,
    )
    return smoke(config, **small) if arg == "smoke" else config
