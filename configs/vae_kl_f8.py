"""AutoencoderKL f8 with 4 channels: Stable Diffusion's first stage, by latent-diffusion's recipe (arXiv:2112.10752).

CompVis/latent-diffusion, configs/autoencoder/autoencoder_kl_32x32x4.yaml: 256x256 crops, L1 + LPIPS, KL 1e-6, PatchGAN from
step 50,001, Adam (0.5, 0.9) at 4.5e-6 for each record of a step: scale optim.lr with batch_size. Expected: rFID 0.90 and PSNR
24.19 on ImageNet's validation set (the paper's table of autoencoders; its published ones were trained on OpenImages).

LPIPS needs weights that do not come with jdiff: one folder with safetensors of torchvision's VGG16 (`features.N.weight`) and of
lpips' five linear layers (`linK.model.1.weight`); a PyTorch file is made one by
`safetensors.torch.save_file(torch.load(FILE), NEW)`. Without lpips.path the run has no perceptual loss: it warns, and pictures
come out softer; `--config.loss.edge_weight=1` sharpens edges a little in its stead.

    python launch.py --config configs/vae_kl_f8.py --workdir runs/vae --config.data.path=IMAGENET/train \
        --config.heldout.path=IMAGENET/val --config.lpips.path=LPIPS
"""

from jdiff.config import default


def get_config():
    config = default("autoencoder")
    config.total_steps = 500_000
    config.batch_size = 24
    config.accumulate = 2
    config.log_every = 100
    config.sample_every = config.checkpoint_every = 10_000
    config.data.update(name="imagefolder", image_size=256, workers=8)
    config.optim.update(lr=4.5e-6 * 24, b1=0.5, b2=0.9)
    config.ema.decay = 0.999
    return config
