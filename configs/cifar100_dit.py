"""A class-conditional DiT on CIFAR-100: trained here on the user's data, then planned.

    mpqdiff train --config=configs/cifar100_dit.py --workdir=runs/cifar100_dit
    mpqdiff run --config=configs/cifar100_dit.py --workdir=runs/cifar100_plan \\
        --config.weights=runs/cifar100_dit/weights.safetensors

`:smoke` runs a shrunken random model and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "cifar100_dit"
    config.weights = "runs/cifar100_dit/weights.safetensors"
    config.data.name = "cifar100"
    config.model.kwargs = dict(
        image_size=32, channels=3, patch=2, width=256, depth=6, num_heads=4, num_classes=100
    )
    config.diffusion.num_steps = 50
    config.sample.update(num_images=1000, batch=50)
    config.evaluate.features = ""
    config.train.update(
        epochs=200, learning_rate=6e-4, warmup_steps=2000, ema_decay=0.9995, dtype="bfloat16"
    )
    return smoke(config, image_size=8, width=16, depth=2, num_heads=2) if arg == "smoke" else config
