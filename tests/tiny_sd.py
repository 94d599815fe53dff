"""A Stable Diffusion and a CLIP of random weights in a second, in diffusers' and transformers' folders, written by them."""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from jdiff.tokens import Tokenizer

WORDS = "a the red green blue fox apple apples tree old two under over house small big with and of grass sky sun moon"


def captions():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS.split(), 6)) for _ in range(400)]


def make_tokenizer(path: Path) -> CLIPTokenizer:
    """transformers' tokenizer with a vocabulary of these captions, which is written to `path` too."""
    Tokenizer.train(captions(), 1000).save(path)
    vocab = json.loads((path / "vocab.json").read_text())
    merges = (path / "merges.txt").read_text().splitlines()[1:]
    return CLIPTokenizer(vocab, [tuple(m.split()) for m in merges], model_max_length=77)


def make_clip(path: Path) -> CLIPTokenizer:
    """A CLIP's folder for pictures of 32 pixels, with its tokenizer and its processor's config; returns the tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(path)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text, vision = {**sizes, **ends, "vocab_size": len(tokenizer)}, {**sizes, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return tokenizer


def make_folder(path: Path, in_channels: int = 4, levels: int = 2) -> Path:
    """A pipeline's folder as diffusers writes it, all of it small and random, with some contrast. levels: the UNet's."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(path / "vocabulary")
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
            vocab_size=len(tokenizer),
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
