"""LoRA (arXiv:2106.09685) of configs/sd_openmoji.py's small Stable Diffusion on another category of OpenMoji.

    python launch.py --config configs/sd_lora_openmoji.py --config.init_from=runs/sd --config.data.path=runs/latents \\
        --workdir runs/sd_lora
    python tools/sample.py runs/sd --prompt "red apple" --lora runs/sd_lora

The base has seen nothing but food. Minutes on two CPU cores; grids of the same prompts, before and after, are in docs/lora.md.
"""

from jdiff.config import default


def get_config():
    config = default("text_to_image")
    config.total_steps = 400
    config.batch_size = 32
    config.log_every = 20
    config.sample_every = config.checkpoint_every = 100
    config.data.update(name="latents", path="runs/latents", flip=False, only="Flags")
    config.text.train = True
    config.lora.update(rank=8, targets=("all",))
    config.diffusion.caption_dropout = 0.1
    config.optim.update(lr=2e-3, warmup_steps=20, clip_norm=1.0)
    config.ema.update(decay=0.99, warmup=True)
    config.sample.update(steps=50, guidance=3.0)
    words = "japan flag, france flag, germany flag, italy flag, ukraine flag, switzerland flag, sweden flag, bangladesh flag"
    words += ", red apple, banana, slice of pizza, hamburger, carrot, doughnut, ice cream, beer mug"
    config.sample.prompts = tuple(words.split(", "))
    return config
