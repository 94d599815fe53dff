"""A small Stable Diffusion of OpenMoji, from nothing: its own words, text encoder and UNet, in latents of our own autoencoder.

    python launch.py --config configs/vae_openmoji.py --workdir runs/vae
    python tools/cache_latents.py openmoji runs/latents --vae runs/vae --image-size 64
    python launch.py --config configs/sd_openmoji.py --workdir runs/sd
    python tools/sample.py runs/sd --prompt "red apple"

A quarter of an hour on two CPU cores: latent diffusion (arXiv:2112.10752) of 12 million parameters that learns the 135 drawings of
food by their names, seeing each 284 times. Other categories, or all with --config.data.only=none, take as many times longer as they
have drawings more. What comes of it is in docs/stable_diffusion.md.

It predicts v on a schedule that ends in pure noise (arXiv:2305.08891), unweighted: on a white ground, what a drawing is of is
decided there, by the text alone, where eps says nothing and Min-SNR gives next to no weight.
"""

from jdiff.config import default


def get_config():
    config = default("text_to_image")
    config.total_steps = 1_200
    config.batch_size = 32
    config.log_every = 50
    config.sample_every = config.checkpoint_every = 300
    config.data.update(name="latents", path="runs/latents", flip=False, only="Food & Drink")
    config.vae.path = "runs/vae"
    config.unet.update(
        block_out_channels=(64, 128, 192), attention=(False, True, True), heads=(4, 4, 4), layers_per_block=1
    )
    config.text.update(train=True, vocab_size=1_500, width=128, hidden=512, layers=3, heads=4, max_length=24)
    config.diffusion.update(prediction_type="v", zero_terminal_snr=True, caption_dropout=0.1)
    config.optim.update(lr=1e-3, schedule="cosine", warmup_steps=100, clip_norm=1.0)
    config.ema.update(decay=0.999, warmup=True)
    config.sample.update(steps=50, guidance=3.0)
    words = "red apple, green apple, banana, grapes, watermelon, lemon, strawberry, slice of pizza, hamburger, carrot"
    words += ", doughnut, bread, cheese wedge, ice cream, beer mug, broccoli"
    config.sample.prompts = tuple(words.split(", "))
    return config
