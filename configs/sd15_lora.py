"""LoRA of Stable Diffusion v1.5 (arXiv:2106.09685) on pictures with captions, or DreamBooth of one subject.

BASE is the model: a folder in diffusers' layout, a single file of CompVis' (then --config.text.tokenizer too), a run of jdiff's
or the hub's OWNER/NAME. DATA holds pictures with metadata.jsonl or .txt files, or parquet files of a Hugging Face data set.

    python launch.py --config configs/sd15_lora.py --config.init_from=BASE --config.data.path=DATA --workdir runs/style
    python tools/sample.py BASE --prompt "a fox" --lora runs/style:0.8
    python tools/lora.py convert runs/style style.safetensors --to kohya

A handful of pictures of one subject, with one prompt for all, and pictures that the model itself made of its class (DreamBooth,
arXiv:2208.12242), to keep what it knows:

    python tools/sample.py BASE --prompt "a photo of a dog" --num 200 --png-dir dogs
    python launch.py --config configs/sd15_lora.py --config.init_from=BASE --config.data.path=MY_DOG \\
        --config.captions.prompt="a photo of sks dog" --config.prior.path=dogs --config.prior.prompt="a photo of a dog" \\
        --config.buckets.use=false --workdir runs/my_dog

Rank 8 on the UNet's attention, learning rate 1e-4, as in diffusers' example (train_text_to_image_lora.py); docs/lora.md lists its
options beside ours. Expected: the style or subject after 500 to 2,000 steps; nothing has been measured at this size yet.
"""

from jdiff.config import default


def get_config():
    config = default("text_to_image")
    config.total_steps = 2_000
    config.batch_size = 4
    config.precision = "bf16"
    config.log_every = 20
    config.sample_every = config.checkpoint_every = 250
    config.data.update(name="captions", image_size=512, flip=False, workers=4)
    config.buckets.use = True
    config.unet.remat = "attention"
    config.lora.update(rank=8, targets=("attn",))
    config.diffusion.update(snr_gamma=5.0, caption_dropout=0.0)
    config.optim.update(lr=1e-4, weight_decay=1e-2, warmup_steps=50, clip_norm=1.0)
    config.ema.update(decay=0.99, warmup=True)
    config.sample.update(steps=30, guidance=7.5)
    return config
