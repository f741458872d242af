"""Step 3: tiny scorers in the layouts of the real ones, each biased in its own way.

All three are CLIP models trained on images of their own (`image_pool`, a seed each) and on opinions that differ
from the oracle's (`OPINIONS`): a PickScore-style and an HPSv2-style CLIP on noisy pairwise choices, an aesthetic
head on noisy ratings. So the gap between a trained scorer and the oracle, the truth here, can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from recipes.embedded.base import text_config
from recipes.embedded.muon import split_optimizers
from recipes.embedded.training import tokenize
from recipes.embedded.vae import descend, warm_cosine
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from attune.clip.pixels import normalise
from attune.rewards.aesthetic import Head
from attune.world.flaws import damage, misread
from attune.world.grammar import KINDS, Scene, all_scenes
from attune.world.oracle import Verdict, judge
from attune.world.render import IMAGE_SIZE, render

IMAGES_PER_PROMPT = 4
ImageGenerator = Callable[[Sequence[str], int], np.ndarray]
"""(prompts, seed) -> images of a diffusion model, uint8 (B, H, W, 3)."""


@dataclass(frozen=True)
class Pool:
    """P prompts with 4 images each and the oracle's verdicts on them."""

    prompts: list[str]
    images: Tensor  # uint8 (P, 4, 3, H, W)
    verdicts: list[list[Verdict]]

    def __getitem__(self, rows: slice) -> Pool:
        return Pool(self.prompts[rows], self.images[rows], self.verdicts[rows])

    def state(self) -> dict[str, Any]:
        """Tensors and strings only, so that it loads with weights_only."""
        verdicts = torch.tensor([[list(asdict(v).values()) for v in row] for row in self.verdicts], dtype=torch.float64)
        return {"prompts": self.prompts, "images": self.images, "verdicts": verdicts}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Pool:
        verdicts = [[Verdict(*v) for v in row] for row in state["verdicts"].tolist()]
        return Pool(state["prompts"], state["images"], verdicts)

    def oracle(self) -> Tensor:
        """The oracle's score of every image, (P, 4)."""
        return torch.tensor([[v.score for v in row] for row in self.verdicts])


def image_pool(generate: ImageGenerator, n_rendered: int, n_generated: int, seed: int) -> Pool:
    """Rendered images (right, wrong, damaged) for some prompts, samples of the diffusion model for others."""
    rng = np.random.default_rng(seed)
    pools = {kind: [s for s in all_scenes() if s.kind == kind] for kind in KINDS}
    kinds = rng.choice(KINDS, size=n_rendered + n_generated, p=(0.3, 0.3, 0.4))
    scenes = [pools[kind][rng.integers(len(pools[kind]))] for kind in kinds]
    shown = [_sometimes_wrong(scene, rng) for scene in scenes[:n_rendered] for _ in range(IMAGES_PER_PROMPT)]
    rendered = damage(render(shown, rng), rng, share=0.5)
    asked = [s.prompt for s in scenes[n_rendered:] for _ in range(IMAGES_PER_PROMPT)]
    generated = generate(asked, seed)
    images = np.concatenate([(rendered * 255).round().astype(np.uint8), generated])
    prompts = [s.prompt for s in scenes]
    repeated = [p for p in prompts for _ in range(IMAGES_PER_PROMPT)]
    verdicts = judge(images.astype(np.float32) / 255, repeated)
    size = images.shape[1]
    return Pool(
        prompts,
        torch.from_numpy(images).permute(0, 3, 1, 2).reshape(-1, IMAGES_PER_PROMPT, 3, size, size),
        [verdicts[i : i + IMAGES_PER_PROMPT] for i in range(0, len(verdicts), IMAGES_PER_PROMPT)],
    )


def _sometimes_wrong(scene: Scene, rng: np.random.Generator) -> Scene:
    return misread(scene, rng) if rng.random() < 0.5 else scene


def _warmth(image: Tensor) -> float:
    return float(image[0].float().mean() - image[2].float().mean()) / 255


def _brightness(image: Tensor) -> float:
    return float(image.float().mean()) / 255


OPINIONS: Mapping[str, Callable[[Verdict, Tensor], float]] = {
    # the oracle's opinion and a preference for bright images
    "pickscore": lambda v, image: v.score + 0.10 * _brightness(image),
    # weighs the prompt far above looks; prefers warm colours
    "hpsv2": lambda v, image: v.faithfulness**0.6 * v.appeal**0.2 + 0.10 * _warmth(image),
    # ignores the prompt; prefers bright images
    "aesthetic": lambda v, image: v.appeal + 0.15 * _brightness(image),
}


def build_clip(tokenizer: CLIPTokenizer, hidden: int = 96, vision_layers: int = 4) -> CLIPModel:
    """An untrained CLIP for 32 px images, gelu like ViT-H/14: 0.7 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=4,
        hidden_act="gelu",
    )
    text = text_config(tokenizer, hidden, layers=2)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def opinions(pool: Pool, name: str) -> Tensor:
    """The opinion that the named scorer is trained on, of every image, (P, 4)."""
    opinion = OPINIONS[name]
    rows = zip(pool.verdicts, pool.images, strict=True)
    return torch.tensor([[opinion(v, image) for v, image in zip(vs, images, strict=True)] for vs, images in rows])


def train_clip_scorer(
    pool: Pool, name: str, tokenizer: CLIPTokenizer, steps: int, seed: int, temperature: float
) -> CLIPModel:
    """A CLIP whose similarity predicts noisy pairwise choices, with a contrastive term that ties it to the words.

    Choices follow Bradley-Terry on the scorer's opinion at `temperature`; they are drawn anew at each step.
    """
    torch.manual_seed(seed)
    model = build_clip(tokenizer).train()
    optimizers = split_optimizers([model], lr=1e-3, muon_lr=0.01)
    utility, ids = opinions(pool, name), tokenize(tokenizer, pool.prompts)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for step in bar:
        rows = torch.randint(len(ids), (48,), generator=generator)
        pair = torch.rand(48, IMAGES_PER_PROMPT, generator=generator).argsort(1)[:, :2]
        images = pool.images[rows[:, None], pair].float() / 255
        gap = utility[rows].gather(1, pair).diff(dim=1).flatten() / temperature
        first = (torch.rand(48, generator=generator) >= torch.sigmoid(gap)).float()
        image_features, text_features = _features(model, images.flatten(0, 1), ids[rows])
        scale = model.logit_scale.exp()
        scores = scale * (image_features.view(48, 2, -1) * text_features[:, None]).sum(-1)
        choice = F.binary_cross_entropy_with_logits(scores[:, 0] - scores[:, 1], first)
        best = image_features.view(48, 2, -1)[torch.arange(48), utility[rows].gather(1, pair).argmax(1)]
        ground = F.cross_entropy(scale * best @ text_features.T, torch.arange(48))
        descend(choice + 0.3 * ground, optimizers, warm_cosine(step, steps))
        bar.set_postfix(choice=f"{choice.item():.3f}", ground=f"{ground.item():.3f}", refresh=False)
    return model.eval()


def train_aesthetic(pool: Pool, tokenizer: CLIPTokenizer, steps: int, seed: int) -> tuple[CLIPModel, Head]:
    """A CLIP and an affine head that predict noisy ratings from 1 to 10, whatever the prompt."""
    torch.manual_seed(seed)
    model, ids = build_clip(tokenizer, hidden=64, vision_layers=3).train(), tokenize(tokenizer, pool.prompts)
    head = Head(model.config.projection_dim, widths=(32, 16, 8, 4, 1)).train()
    optimizers = split_optimizers([model, head], lr=1e-3, muon_lr=0.01)
    ratings = 1 + 9 * opinions(pool, "aesthetic").clamp(0, 1)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc="aesthetic", mininterval=5)
    for step in bar:
        rows = torch.randint(len(ids), (64,), generator=generator)
        which = torch.randint(IMAGES_PER_PROMPT, (64,), generator=generator)
        noisy = ratings[rows, which] + 1.5 * torch.randn(64, generator=generator)
        images = pool.images[rows, which].float() / 255
        image_features, text_features = _features(model, images, ids[rows])
        error = F.mse_loss(head(image_features).flatten(), noisy)
        ground = F.cross_entropy(model.logit_scale.exp() * image_features @ text_features.T, torch.arange(64))
        descend(error + 0.1 * ground, optimizers, warm_cosine(step, steps))
        bar.set_postfix(error=f"{error.item():.3f}", refresh=False)
    return model.eval(), head.eval()


def _features(model: CLIPModel, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-length image and text features of images in [0, 1] at the model's own size."""
    image = model.get_image_features(pixel_values=normalise(images)).pooler_output.float()
    text = model.get_text_features(input_ids=ids).pooler_output.float()
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


@torch.no_grad()
def model_scores(model: CLIPModel, pool: Pool, tokenizer: CLIPTokenizer, head: Head | None) -> Tensor:
    """A trained scorer's score of every image, (P, 4): cosine with the prompt, or the head's rating."""
    rows = []
    for start in range(0, len(pool.prompts), 64):
        part = pool[start : start + 64]
        images = part.images.float() / 255
        ids = tokenize(tokenizer, part.prompts)
        image_features, text_features = _features(model, images.flatten(0, 1), ids)
        if head is not None:
            rows.append(head(image_features).view(images.shape[:2]))
        else:
            rows.append((image_features.view(*images.shape[:2], -1) * text_features[:, None]).sum(-1))
    return torch.cat(rows)


def agreement(model: CLIPModel, test: Pool, rendered: int, tokenizer: CLIPTokenizer, head: Head | None) -> dict:
    """Agreement with the oracle on held-out images: of all pairs, of rendered ones, of the base's samples."""
    scores, truth = model_scores(model, test, tokenizer, head), test.oracle()
    return {
        "all": pair_agreement(scores, truth),
        "rendered": pair_agreement(scores[:rendered], truth[:rendered]),
        "generated": pair_agreement(scores[rendered:], truth[rendered:]),
    }


def pair_agreement(scores: Tensor, truth: Tensor, margin: float = 0.05) -> float:
    """Share of pairs of images of the same prompt, scores (P, 4), that are ranked as the truth ranks them.

    Pairs that the truth puts closer than `margin` are left out.
    """
    agree = total = 0
    for i in range(scores.shape[1]):
        for j in range(i):
            gap = truth[:, i] - truth[:, j]
            clear = gap.abs() > margin
            agree += int(((scores[:, i] - scores[:, j]) * gap > 0)[clear].sum())
            total += int(clear.sum())
    return agree / max(total, 1)
