"""Any DiT of the paper with its training recipe; the other DiT configs are this one with a name filled in.

DiT (Peebles and Xie, arXiv:2212.09748): AdamW 1e-4 without decay or warm-up, batch 256, EMA 0.9999, label dropout 0.1,
learned variance. FID-50K after 400K steps on ImageNet 256 without guidance: S/8 153.6, S/4 100.4, S/2 68.4, B/8 122.7,
B/4 68.4, B/2 43.5, L/2 23.3, XL/2 19.5.

    python launch.py --config configs/dit.py --config.model.name=DiT-B/4
"""

from jdiff.config import default


def get_config(name: str = "DiT-S/2"):
    config = default()
    config.model.name = name
    config.data.image_size = 32
    return config
