"""The DDPM U-Net on CIFAR-10 (Ho et al. 2020), 35.7 M parameters: trained here, then planned.

    mpqdiff train --config=configs/cifar10_unet.py --workdir=runs/cifar10_unet \\
        --config.data.dir=PATH_TO_ARCHIVES
    mpqdiff run --config=configs/cifar10_unet.py --workdir=runs/cifar10_plan \\
        --config.weights=runs/cifar10_unet/weights.safetensors

Hours on one accelerator. `:small` has half the width and is conditioned on the class (7.7 M
parameters, 15 MB); `:smoke` runs a shrunken random model and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "", "small" or "smoke"."""
    config = base()
    config.name = "cifar10_unet"
    config.weights = "runs/cifar10_unet/weights.safetensors"
    config.data.name = "cifar10"
    config.model.name = "unet"
    config.model.kwargs = dict(
        image_size=32,
        channels=3,
        widths=(128, 256, 256, 256),
        attention_levels=(1,),
        down_padding="end",
        cos_first=False,
        frequency_shift=1,
        norm_eps=1e-6,
    )
    config.diffusion.num_steps = 50
    config.plan.pins = (("conv_in|conv_out", 8), ("time/.*", 8))
    config.sample.update(num_images=1000, batch=50)
    config.evaluate.features = ""
    config.train.update(
        epochs=400, learning_rate=2e-4, warmup_steps=5000, ema_decay=0.9999, dtype="bfloat16"
    )
    if arg == "small":
        config.model.kwargs.update(
            widths=(64, 128, 128, 128), condition="label", num_classes=10, num_heads=2
        )
        config.train.update(epochs=60, learning_rate=1e-3, warmup_steps=1000, ema_decay=0.999)
    small = dict(image_size=8, widths=(8, 8), blocks_per_level=1, attention_levels=(1,), groups=4)
    return smoke(config, **small) if arg == "smoke" else config
