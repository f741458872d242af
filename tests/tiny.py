"""Small real parts for tests: diffusers and transformers classes with random weights, and data for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from attune.build import device
from attune.data.store import PreparedData
from attune.diffusion.noise import Draws
from attune.diffusion.policy import Policy
from attune.distributed import Shard
from attune.fsdp import cut_like
from attune.training.loop import epoch_batches, train

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
ENDS = {"bos_token_id": len(TOKENS) - 2, "eos_token_id": len(TOKENS) - 1}
TEXT = {
    "vocab_size": len(TOKENS),
    "max_position_embeddings": 16,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# settings of the training loop, for methods whose paper's are not wanted
PLAIN = {"accumulation": 1, "warmup": 0, "weight_decay": 1e-2, "schedule": "constant", "gradient_checkpointing": False}
PROMPTS = ["a cat", "a dog", "two owls", "a red ox", "bees", "no hen", "ten rats", "a cow"]


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Written to a folder and read from it."""
    vocab = {token: i for i, token in enumerate(TOKENS)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def second_tokenizer() -> CLIPTokenizer:
    """Of pipelines with two CLIPs: it pads with "!", its id 0, so that all others are one higher."""
    vocab = {token: i for i, token in enumerate(["!", *TOKENS])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16, pad_token="!")


def second_text(**sizes: int) -> dict[str, Any]:
    """The configuration of the text encoder that `second_tokenizer` is for."""
    return TEXT | {"vocab_size": len(TOKENS) + 1} | {name: token + 1 for name, token in ENDS.items()} | sizes


def loud(module: nn.Module) -> nn.Module:
    """Random weights wide enough that everything matters."""
    for weight in module.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return module


WIDTHS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}


def autoencoder(**settings: Any) -> AutoencoderKL:
    """Of 16 pixels, two to a latent."""
    return AutoencoderKL(
        sample_size=16,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **WIDTHS,
        **settings,
    )


def write_pipeline(folder: Path, prediction_type: str = "epsilon") -> str:
    """A Stable Diffusion folder in diffusers' layout."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **WIDTHS,
    )
    vae = autoencoder()
    parts = {"unet": loud(unet), "vae": loud(vae), "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT, **ENDS))}
    parts["tokenizer"] = tokenizer(folder / "tokenizer")
    parts["scheduler"] = DDIMScheduler(**SCHEDULE, prediction_type=prediction_type)
    nobody = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **nobody).save_pretrained(folder)
    return str(folder)


def write_xl_pipeline(folder: Path, zeros_for_empty_prompt: bool = True) -> str:
    """A Stable Diffusion XL folder in diffusers' layout."""
    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        **WIDTHS,
    )
    first = TEXT | ENDS | {"num_hidden_layers": 2}
    second = second_text(hidden_size=24, projection_dim=8, num_hidden_layers=2)
    StableDiffusionXLPipeline(
        unet=loud(unet),
        vae=loud(autoencoder()),
        text_encoder=loud(CLIPTextModel(CLIPTextConfig(**first))),
        text_encoder_2=loud(CLIPTextModelWithProjection(CLIPTextConfig(**second))),
        tokenizer=tokenizer(folder / "tokenizer"),
        tokenizer_2=second_tokenizer(),
        scheduler=DDIMScheduler(**SCHEDULE),
        force_zeros_for_empty_prompt=zeros_for_empty_prompt,
        add_watermarker=False,
    ).save_pretrained(folder)
    return str(folder)


def write_clip(folder: Path) -> str:
    """A CLIP in transformers' layout."""
    torch.manual_seed(1)
    tower = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act")}
    vision = {**tower, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=TEXT | ENDS, vision_config=vision, projection_dim=8)
    loud(CLIPModel(config)).save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


def prepared(backbone: Any) -> PreparedData:
    """What the prepare stage leaves: three pairs of random images for each prompt."""
    n = 3 * len(PROMPTS)
    images = torch.rand(2 * n, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    pairs = pd.DataFrame(
        {
            "prompt": [prompt for prompt in PROMPTS for _ in range(3)],
            "image_0": range(0, 2 * n, 2),
            "image_1": range(1, 2 * n, 2),
            "label_0": [float(i % 3 > 0) for i in range(n)],
            "prompt_row": [i // 3 for i in range(n)],
            "weight": 1 / 3,
            **{f"pickscore_{side}": images[side::2].mean((1, 2, 3)).tolist() for side in (0, 1)},
        }
    )
    cond, latents = backbone.encode_prompts(PROMPTS).to("cpu"), backbone.encode_images(images).cpu()
    return PreparedData(PROMPTS, cond, pairs, latents, backbone.device)


def move(policy: Policy, by: float) -> None:
    """Lets the policy differ from its reference: normal noise of that size on every adapter weight."""
    generator = torch.Generator().manual_seed(3)
    for weight in policy.parameters():
        weight.data += cut_like(by * torch.randn(weight.shape, generator=generator).to(weight.device), weight)


def brightness(images: Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
    """A preference model that is confident: bright images are good, the more so the later."""
    return 100 * images.mean((1, 2, 3)) * (1 + (1000 - t.to(images.device)) / 1000)


def batches(data: PreparedData, method: Any, seed: int = 0) -> Callable:
    """Batches as the align stage draws them."""
    n, draw = data.rows_for(method.consumes)
    return epoch_batches(n, method.config.batch_size, seed, draw)


def draws(n: int, seed: int = 0) -> Draws:
    """Those of batch 0 of n rows, where one process trains."""
    return Draws.of_batch(seed, 0, n, Shard())


def minibatches(method: Any, batch: Any, seed: int = 0) -> list[Any]:
    """What a method makes of batch 0, where one process trains."""
    return [part.rows for part in method.minibatches(batch, draws(len(batch.prompts), seed))]


def run(method: Any, data: PreparedData, seed: int = 0, **options: Any) -> list[dict[str, float]]:
    """Trains a method's policy as the align stage does."""
    drawn = options.pop("batches", None) or batches(data, method, seed)
    history, _ = train(method, method.policy, drawn, seed=seed, **options)
    return history


def weights(policy: Policy) -> dict[str, Tensor]:
    """A copy of all of a policy's tensors, adapter and base."""
    return {name: value.clone() for name, value in policy.denoiser.state_dict().items()}


def adapter(policy: Policy) -> list[Tensor]:
    """A copy of the adapter's tensors."""
    return [weight.detach().clone() for weight in policy.parameters()]


def assert_same(found: Any, expected: Any) -> None:
    """Tensors and numbers, also in lists and dictionaries: to the bit on the CPU, to 1e-5 on a GPU.

    There the same sum may be computed by another algorithm, and the gradient of bicubic interpolation always is.
    """
    tolerance = 1e-5 if device().type == "cuda" else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the frozen weights of a module: tells whether any of them moved."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        if not weight.requires_grad:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
