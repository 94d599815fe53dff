"""A small autoencoder of OpenMoji at 64x64, f4 with 4 channels (arXiv:2112.10752), made in minutes on two CPU cores.

    python launch.py --config configs/vae_openmoji.py --workdir runs/vae

Trained on nine tenths of the emoji; psnr and ssim are of the others. Expected: 27.2 dB and 0.956, after 13 minutes. A
`kl_weight` of 1e-6, as for large autoencoders, gave 27.5 dB, but latents of 10 nats a number, which a small UNet did not learn to
make; 0.2 leaves them 1.9, for 0.3 dB (1 is the variational bound itself, since the likelihood's scale is learnt).

It does without LPIPS, whose weights do not come with jdiff: on drawings of flat colours and hard edges L1 alone is sharp. The
PatchGAN joins for the last fifth, which it leaves as good by both numbers. Adam's betas are (0.9, 0.99), with which short runs
come further than with the paper's (0.5, 0.9). The checkpoint's `scaling_factor`, 0.99, is what its latents are multiplied by
for a diffusion model.
"""

from jdiff.config import default


def get_config():
    config = default("autoencoder")
    config.total_steps = 3_000
    config.batch_size = 8
    config.log_every = 50
    config.sample_every = config.checkpoint_every = 600
    config.data.update(image_size=64, split="train")
    config.vae.update(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8)
    config.loss.kl_weight = 0.2
    config.gan.update(start=2_400, width=16)
    config.optim.update(lr=1.5e-3, schedule="cosine", warmup_steps=100, b1=0.9, b2=0.99)
    config.ema.update(decay=0.99, warmup=True)
    return config
