"""Trains the embedded Fashion-MNIST U-Net: 1.1 M parameters, about half an hour on 2 idle cores.

    mpqdiff train --config=configs/fashion_unet.py --workdir=runs/fashion_unet \\
        --config.data.dir=PATH_TO_ARCHIVES

The widths grow steeply because 60 M multiply-accumulates an image are what 2 cores train in an
hour: 1 M parameters fit in that only at 7 x 7 and in the time embedding.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = "0"):
    """`arg`: the seed, or "smoke"."""
    config = base()
    config.name = "fashion_unet"
    config.weights = "fashion_unet"
    config.model.name = "unet"
    config.model.kwargs = dict(
        image_size=28,
        channels=1,
        widths=(16, 20, 64),
        blocks_per_level=1,
        attention_levels=(2,),
        num_heads=2,
        groups=4,
        embed_width=384,
        condition="label",
        num_classes=10,
        scale_shift=True,
    )
    config.plan.pins = (("conv_in|conv_out", 8), ("time/.*", 8))
    config.train.update(
        epochs=4,
        learning_rate=2e-3,
        warmup_steps=300,
        checkpoint_every=234,
        log_every=39,
    )
    if arg == "smoke":
        return smoke(config, image_size=8, widths=(8, 8), attention_levels=(1,))
    config.seed = int(arg)
    return config
