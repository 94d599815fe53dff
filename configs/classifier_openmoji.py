"""A small classifier of OpenMoji's ten classes, by whose features scores are taken where Inception's weights are not at hand.

    python launch.py --config configs/classifier_openmoji.py --workdir runs/classifier
    python tools/evaluate.py runs/a --reference openmoji --image-size 32 --network runs/classifier

Cross-entropy with smoothed labels (arXiv:1512.00567). Such scores compare only with those of the same network.
"""

from jdiff.config import default


def get_config():
    config = default("classifier")
    config.total_steps = 600
    config.batch_size = 64
    config.log_every = 50
    config.sample_every = config.checkpoint_every = 200
    config.data.update(image_size=32, split="train")
    config.optim.update(lr=2e-3, schedule="cosine", warmup_steps=50, weight_decay=1e-2, clip_norm=1.0)
    config.ema.update(decay=0.99, warmup=True)
    return config
