"""A Stable Diffusion of random weights in a second, in diffusers' folder, written by diffusers."""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jdiff.tokens import Tokenizer

WORDS = "a the red green blue fox apple apples tree old two under over house small big with and of grass sky sun moon"


def captions():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS.split(), 6)) for _ in range(400)]


def make_folder(path: Path, in_channels: int = 4, levels: int = 2) -> Path:
    """A pipeline's folder as diffusers writes it, all of it small and random, with some contrast. levels: the UNet's."""
    torch.manual_seed(0)
    Tokenizer.train(captions(), 1000).save(path / "vocabulary")
    vocab = json.loads((path / "vocabulary" / "vocab.json").read_text())
    merges = (path / "vocabulary" / "merges.txt").read_text().splitlines()[1:]
    tokenizer = CLIPTokenizer(vocab, [tuple(m.split()) for m in merges], model_max_length=77)
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        down_block_types=down[:levels],
        up_block_types=up[-levels:],
        block_out_channels=(32, 64)[:levels],
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    # models just initialised make grey pictures, and hardly hear the text
    for name, value in [*vae.named_parameters(), *unet.named_parameters()]:
        if name.startswith(("decoder.conv_in", "decoder.conv_out")):
            value.data *= 2
        if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight")):
            value.data *= 5
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
    )
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kind = diffusers.StableDiffusionPipeline if in_channels == 4 else diffusers.StableDiffusionInpaintPipeline
    folder = path / "folder"
    kind(vae, text, tokenizer, unet, scheduler, **extra).save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    # as Stable Diffusion's own file has it, though its PNDM does not read it; clipped, these random weights are chaos
    file.write_text(json.dumps({**json.loads(file.read_text()), "clip_sample": False}))
    return folder
