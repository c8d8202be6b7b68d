"""Trains the embedded Fashion-MNIST DiT: 1.06 M parameters, about 40 minutes on 2 idle cores.

    mpqdiff train --config=configs/fashion_dit.py:0 --workdir=runs/fashion_dit_0 \\
        --config.data.dir=PATH_TO_ARCHIVES

The argument is the seed; the package ships seed 0 (`fashion_dit`, 12 epochs) and seed 1
(`fashion_dit_seed1`, 6 epochs: a second model for questions of stability, not a better one).
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = "0"):
    """`arg`: the seed, or "smoke"."""
    config = base()
    config.name = "fashion_dit"
    config.train.update(
        epochs=12,
        learning_rate=1.5e-3,
        warmup_steps=300,
        checkpoint_every=234,
        log_every=39,
    )
    if arg == "smoke":
        return smoke(config)
    config.seed = int(arg)
    if config.seed == 1:
        config.train.epochs = 6
    return config
