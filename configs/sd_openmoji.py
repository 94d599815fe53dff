"""A small Stable Diffusion of OpenMoji, from nothing: its own words, text encoder and UNet, in latents of our own autoencoder.

    python launch.py --config configs/vae_openmoji.py --workdir runs/vae
    python tools/cache_latents.py openmoji runs/latents --vae runs/vae --image-size 64
    python launch.py --config configs/sd_openmoji.py --workdir runs/sd
    python tools/sample.py runs/sd --prompt "red apple"

Half an hour on two CPU cores: latent diffusion (arXiv:2112.10752) of 9.9 million parameters that learns 1,903 drawings by their
names, as "grinning face", "japan flag", "dog face", "slice of pizza". So far it learns outlines and
rough shapes in that time, not yet colours: see docs/stable_diffusion.md.

It predicts v on a schedule that ends in pure noise (arXiv:2305.08891), unweighted: on a white ground, what a drawing is of is
decided there, by the text alone, where eps says nothing and Min-SNR gives next to no weight.
"""

from jdiff.config import default


def get_config():
    config = default("text_to_image")
    config.total_steps = 3_000
    config.batch_size = 32
    config.log_every = 50
    config.sample_every = config.checkpoint_every = 500
    config.data.update(name="latents", path="runs/latents", flip=False)  # flags and letters read one way round
    config.vae.path = "runs/vae"
    config.unet.update(
        block_out_channels=(32, 96, 192), attention=(False, True, True), heads=(4, 4, 4), layers_per_block=1
    )
    config.text.update(train=True, vocab_size=1_500, width=128, hidden=512, layers=3, heads=4, max_length=24)
    config.diffusion.update(prediction_type="v", zero_terminal_snr=True, caption_dropout=0.1)
    config.optim.update(lr=1e-3, schedule="cosine", warmup_steps=100, clip_norm=1.0)
    config.ema.update(decay=0.999, warmup=True)
    config.sample.update(steps=50, guidance=3.0)
    words = "red apple, grinning face, japan flag, dog face, blue heart, slice of pizza, sun with face, rocket, snowman, guitar"
    words += ", fire engine, sunflower, cat face, airplane, house building, black cat"
    config.sample.prompts = tuple(words.split(", "))
    return config
