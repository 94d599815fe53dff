"""Fine-tunes Stable Diffusion v1.5 (arXiv:2112.10752) on pictures with captions.

BASE is the model's folder in diffusers' layout (unet/, vae/, text_encoder/, tokenizer/, scheduler/); DATA holds pictures with
metadata.jsonl or .txt files, or parquet files of a Hugging Face data set.

    python launch.py --config configs/sd15.py --config.init_from=BASE --config.data.path=DATA --workdir runs/sd15

or, quicker, with the latents of square pictures and the text encoder's output made once:

    python tools/cache_latents.py captions:DATA CACHE --vae BASE/vae --text BASE --image-size 512
    python launch.py --config configs/sd15.py --config.init_from=BASE --config.data.name=latents --config.data.path=CACHE \\
        --config.buckets.use=false --workdir runs/sd15

860 million parameters are trained. By count, a device holds 13.6 GiB: those in fp32, Adam's two moments and the average, 3.2 GiB
each, and the frozen models' 0.8; in a step also the gradients, twice with accumulation (6.4), and the activations of 4 pictures,
recomputed block by block but for attention's (remat). So 24 GiB are about the least, and --config.mesh.fsdp=N spreads all but the
activations over N devices. --config.text.train=true trains the text encoder too.

Min-SNR-5 (arXiv:2303.09556); learning rate and average as in diffusers' example (train_text_to_image.py). Expected: pictures
follow the data's style or subject after a few thousand steps; nothing has been measured at this size yet.
"""

from jdiff.config import default


def get_config():
    config = default("text_to_image")
    config.total_steps = 15_000
    config.batch_size = 32
    config.accumulate = 8
    config.precision = "bf16"
    config.log_every = 50
    config.sample_every = config.checkpoint_every = 1_000
    config.data.update(
        name="captions", image_size=512, flip=False, workers=8
    )  # a mirrored picture may belie its caption
    config.buckets.use = True
    config.unet.remat = "attention"
    config.diffusion.update(snr_gamma=5.0, caption_dropout=0.1)
    config.optim.update(lr=1e-5, weight_decay=1e-2, warmup_steps=500, clip_norm=1.0)
    config.ema.decay = 0.9999
    config.sample.update(steps=50, guidance=7.5)
    return config
