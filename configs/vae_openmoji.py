"""A small autoencoder of OpenMoji."""

from jdiff.config import default


def get_config():
    config = default("autoencoder")
    config.total_steps = 1_000
    config.batch_size = 16
    config.log_every = 25
    config.sample_every = 250
    config.checkpoint_every = 500
    config.data.update(image_size=64, split="train")
    config.vae.update(block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8)
    config.loss.update(kl_weight=1e-6)
    config.gan.update(start=800, width=32)
    config.optim.update(lr=1e-3, schedule="cosine", warmup_steps=50, b1=0.5, b2=0.9)
    config.ema.update(decay=0.99, warmup=True)
    return config
