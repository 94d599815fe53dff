"""DiT-S/2 on 32x32 OpenMoji pixels; by overrides, the paper's DiT-S/2 on ImageNet latents.

    python launch.py --config configs/dit_s2.py --workdir runs/a --config.total_steps=20 --config.batch_size=8

The paper's recipe (arXiv:2212.09748; FID-50K 68.4 after 400K steps without guidance), on a cache that
`python tools/cache_latents.py IMAGENET/train CACHE --vae VAE --image-size 256` has made:

    python launch.py --config configs/dit_s2.py --config.data.name=latents --config.data.path=CACHE \
        --config.batch_size=256 --config.total_steps=400000 --config.ema.decay=0.9999 --config.ema.warmup=false \
        --config.precision=bf16
"""

from jdiff.config import default


def get_config():
    config = default()
    config.model.name = "DiT-S/2"
    config.total_steps = 20_000
    config.batch_size = 64
    config.sample_every = config.checkpoint_every = 1_000
    config.ema.update(decay=0.9999, warmup=True)
    return config
