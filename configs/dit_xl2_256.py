"""DiT-XL/2 at 256 x 256 (Peebles & Xie 2022), 675 M parameters, planned with the user's weights.

    mpqdiff convert --source=DiT-XL-2-256x256.pt --out=dit_xl2_256.safetensors
    mpqdiff convert --source=VAE_FOLDER --out=sd_vae.safetensors
    mpqdiff run --config=configs/dit_xl2_256.py --workdir=runs/dit_xl2_256

Compared by paired error and decoded images; for FID name Inception's weights and a reference in
`config.evaluate`. `:smoke` runs a shrunken random model and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "dit_xl2_256"
    config.weights = "dit_xl2_256.safetensors"
    config.model.kwargs = dict(
        image_size=32,
        channels=4,
        patch=2,
        width=1152,
        depth=28,
        num_heads=16,
        num_classes=1000,
        learn_variance=True,
    )
    config.autoencoder.weights = "sd_vae.safetensors"
    config.diffusion.update(num_steps=50, guidance_scale=1.5, clip=False)
    config.calibration.update(samples=32, timesteps=10, memory_gb=8.0)
    config.sample.update(num_images=256, batch=32)
    config.evaluate.features = ""
    small = dict(image_size=8, width=32, depth=2, num_heads=2, num_classes=5)
    return smoke(config, **small) if arg == "smoke" else config
