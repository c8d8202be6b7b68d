"""PixArt-Sigma at 512 x 512 (Chen et al. 2024), planned with the user's weights and prompts.

    mpqdiff convert --source=PIXART_FOLDER/transformer --out=pixart_sigma.safetensors
    mpqdiff convert --source=PIXART_FOLDER/vae --out=sdxl_vae.safetensors
    mpqdiff run --config=configs/pixart_sigma.py --workdir=runs/pixart_sigma

Text enters as embeddings computed once with the model's T5 encoder: an .npz with `embeddings`
[prompts, 300, 4096], `mask` [prompts, 300], and `null`, `null_mask` of the empty prompt. `:smoke`
runs a shrunken random model on random embeddings and publishes no metric.
"""

from mpqdiff.config import base, smoke


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    config = base()
    config.name = "pixart_sigma"
    config.weights = "pixart_sigma.safetensors"
    config.model.name = "pixart"
    config.model.kwargs = dict(
        image_size=64,
        channels=4,
        patch=2,
        width=1152,
        depth=28,
        num_heads=16,
        text_width=4096,
    )
    config.autoencoder.weights = "sdxl_vae.safetensors"
    config.text = "prompts.npz"
    config.diffusion.update(sampler="dpm_solver", num_steps=20, guidance_scale=4.5, clip=False)
    config.timesteps.name = "log_snr"
    config.calibration.update(samples=16, timesteps=10, memory_gb=8.0)
    config.sample.update(num_images=64, batch=8)
    config.evaluate.features = ""
    if arg == "smoke":
        config.text = ""
        return smoke(config, image_size=8, width=32, depth=2, num_heads=2, text_width=12)
    return config
