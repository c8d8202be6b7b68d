"""Class-conditional latent diffusion on ImageNet (Rombach et al. 2022, LDM-4, VQ, cin256-v2).

    mpqdiff convert --source=model.ckpt --out=ldm_imagenet.safetensors
    mpqdiff convert --source=VQ_FOLDER --out=ldm_imagenet_vq.safetensors
    mpqdiff run --config=configs/ldm_imagenet.py --workdir=runs/ldm_imagenet

`:smoke` runs a shrunken random model and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "ldm_imagenet"
    config.weights = "ldm_imagenet.safetensors"
    config.model.name = "unet"
    config.model.kwargs = dict(
        image_size=64,
        channels=3,
        widths=(192, 384, 576, 960),
        attention_levels=(1, 2, 3),
        num_heads=1,
        condition="label_context",
        context_width=512,
        num_classes=1000,
    )
    config.autoencoder.weights = "ldm_imagenet_vq.safetensors"
    config.diffusion.update(
        schedule="scaled_linear",
        betas=(0.0015, 0.0195),
        num_steps=50,
        guidance_scale=1.5,
        clip=False,
    )
    config.plan.pins = (("conv_in|conv_out", 8), ("time/.*", 8))
    config.calibration.update(samples=32, timesteps=10, memory_gb=8.0)
    config.sample.update(num_images=256, batch=16)
    config.evaluate.features = ""
    small = dict(
        image_size=8,
        widths=(8, 8),
        blocks_per_level=1,
        attention_levels=(1,),
        groups=4,
        context_width=6,
        num_classes=5,
    )
    return smoke(config, **small) if arg == "smoke" else config
