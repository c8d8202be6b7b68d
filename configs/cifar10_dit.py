"""A class-conditional DiT on CIFAR-10, 7.2 M parameters: trained here, then planned.

    mpqdiff train --config=configs/cifar10_dit.py --workdir=runs/cifar10_dit \\
        --config.data.dir=PATH_TO_ARCHIVES
    mpqdiff run --config=configs/cifar10_dit.py --workdir=runs/cifar10_plan \\
        --config.weights=runs/cifar10_dit/weights.safetensors

Less than an hour on one accelerator. `:smoke` runs a shrunken random model and publishes no
metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "cifar10_dit"
    config.weights = "runs/cifar10_dit/weights.safetensors"
    config.data.name = "cifar10"
    config.model.kwargs = dict(
        image_size=32, channels=3, patch=2, width=256, depth=6, num_heads=4, num_classes=10
    )
    config.diffusion.num_steps = 50
    config.sample.update(num_images=1000, batch=50)
    config.evaluate.features = ""
    config.train.update(
        epochs=200, learning_rate=6e-4, warmup_steps=2000, ema_decay=0.9995, dtype="bfloat16"
    )
    return smoke(config, image_size=8, width=16, depth=2, num_heads=2) if arg == "smoke" else config
