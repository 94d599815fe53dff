"""A small DiT in OpenMoji pixels, made to show a result on a laptop: about five minutes on two CPU cores.

    python launch.py --config configs/quickstart.py

Flow matching (SiT, arXiv:2401.08740) on 16x16 pictures of ten classes. Expected: faces, flags, animals and food that can be
told apart, with colours and outlines, in the run's samples/.
"""

from jdiff.config import default


def get_config():
    config = default()
    config.total_steps = 800
    config.batch_size = 64
    config.log_every = 25
    config.sample_every = 200
    config.checkpoint_every = 200
    config.data.image_size = 16
    config.data.flip = False  # text and flags read one way round
    config.model.update(name="DiT-S/2", width=128, depth=6, heads=4, learn_sigma=False)
    config.diffusion.update(kind="flow", time_sampling="logit_normal")
    config.optim.update(lr=2e-3, schedule="cosine", warmup_steps=100, clip_norm=1.0)
    config.ema.update(decay=0.999, warmup=True)
    config.sample.update(sampler="euler", steps=50, guidance=2.0, count=40)
    return config
