"""DDPM on CelebA-HQ at 256 x 256 (Ho et al. 2020), 114 M parameters, with the user's weights.

    mpqdiff convert --source=DDPM_FOLDER --out=celebahq_unet.safetensors
    mpqdiff run --config=configs/celebahq_unet.py --workdir=runs/celebahq_unet

`:smoke` runs a shrunken random model and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "celebahq_unet"
    config.weights = "celebahq_unet.safetensors"
    config.model.name = "unet"
    config.model.kwargs = dict(
        image_size=256,
        channels=3,
        widths=(128, 128, 256, 256, 512, 512),
        attention_levels=(4,),
        down_padding="end",
        cos_first=False,
        frequency_shift=1,
        norm_eps=1e-6,
    )
    config.diffusion.update(num_steps=50)
    config.plan.pins = (("conv_in|conv_out", 8), ("time/.*", 8))
    config.calibration.update(samples=16, timesteps=10, memory_gb=8.0)
    config.sample.update(num_images=64, batch=8)
    config.evaluate.features = ""
    small = dict(image_size=8, widths=(8, 8), blocks_per_level=1, attention_levels=(1,), groups=4)
    return smoke(config, **small) if arg == "smoke" else config
