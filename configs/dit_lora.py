"""LoRA (arXiv:2106.09685) of a DiT on one class of its data: by default of configs/quickstart.py's run, on OpenMoji's flags.

    python launch.py --config configs/quickstart.py --workdir runs/quickstart
    python launch.py --config configs/dit_lora.py --config.init_from=runs/quickstart --workdir runs/flags
    python tools/sample.py runs/flags --labels Flags,Flags,Flags

The model is that of the base, which model.* has to describe: for DiT-XL/2 `--config.model.name=DiT-XL/2`, its latents by
`--config.data.name=latents --config.data.path=CACHE`. Minutes on two CPU cores.
"""

from jdiff.config import default


def get_config():
    config = default()
    config.total_steps = 300
    config.batch_size = 32
    config.log_every = 25
    config.sample_every = config.checkpoint_every = 100
    config.data.update(image_size=16, flip=False, only="Flags")
    config.model.update(name="DiT-S/2", width=128, depth=6, heads=4, learn_sigma=False)
    config.lora.update(rank=8, targets=("attn+mlp",))
    config.diffusion.update(kind="flow", time_sampling="logit_normal")
    config.optim.update(lr=1e-3, warmup_steps=20, clip_norm=1.0)
    config.ema.update(decay=0.99, warmup=True)
    config.sample.update(sampler="euler", steps=50, guidance=2.0, count=40)
    return config
