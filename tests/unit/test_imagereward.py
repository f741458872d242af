"""ImageReward against BLIP's formulas, written out here from the papers: no released weights are needed."""

import math

import pytest
import torch
import torch.nn.functional as F

from attune.clip.pixels import clip_pixels, rounded_crop
from attune.rewards import imagereward
from tiny_scorers import HEAD_WIDTH, imagereward_tensors, write_imagereward

PROMPTS = ["a small red circle on a white background", "a large blue square", "", " ".join(["red"] * 60)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_imagereward(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def scorer(paths):
    return imagereward.load(imagereward.Config(**paths, preprocess="tensor"))


@pytest.fixture
def pictures():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- the formulas


class Reference:
    """ViT (Dosovitskiy et al. 2020) and BERT with cross-attention (Li et al. 2022, BLIP) on released tensors."""

    def __init__(self, tensors):
        self.tensors = tensors

    def linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name, x, eps):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    @staticmethod
    def attend(query, key, value, mask=None):
        """(B, L, D) each; heads of HEAD_WIDTH; mask (B, L of keys), 1 where there is a token."""
        query, key, value = (x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(HEAD_WIDTH)
        if mask is not None:
            scores = scores + (1 - mask[:, None, None].float()) * -10000.0  # as in the released code
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def image(self, pixels):
        v = "blip.visual_encoder"
        patches = F.conv2d(pixels, self.tensors[f"{v}.patch_embed.proj.weight"], stride=8)
        patches = patches.flatten(2).transpose(1, 2) + self.tensors[f"{v}.patch_embed.proj.bias"]
        x = torch.cat([self.tensors[f"{v}.cls_token"].expand(len(pixels), 1, -1), patches], dim=1)
        x = x + self.tensors[f"{v}.pos_embed"]
        for n in range(2):
            block = f"{v}.blocks.{n}"
            fused = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            x = x + self.linear(f"{block}.attn.proj", self.attend(*fused.chunk(3, dim=-1)))
            inner = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", inner)
        return self.norm(f"{v}.norm", x, 1e-6)

    def attention(self, name, x, source, mask=None):
        keys = (self.linear(f"{name}.self.{part}", source) for part in ("key", "value"))
        attended = self.attend(self.linear(f"{name}.self.query", x), *keys, mask)
        return self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", attended) + x, 1e-12)

    def score(self, pixels, ids, mask):
        image, t = self.image(pixels), "blip.text_encoder"
        words = self.tensors[f"{t}.embeddings.word_embeddings.weight"][ids]
        places = self.tensors[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{t}.embeddings.LayerNorm", words + places, 1e-12)
        for n in range(2):
            layer = f"{t}.encoder.layer.{n}"
            x = self.attention(f"{layer}.attention", x, x, mask)
            x = self.attention(f"{layer}.crossattention", x, image)
            inner = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = self.norm(f"{layer}.output.LayerNorm", self.linear(f"{layer}.output.dense", inner) + x, 1e-12)
        h = x[:, 0]
        for n in (0, 2, 4, 6, 7):
            h = self.linear(f"mlp.layers.{n}", h)
        return (h[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_scores_are_blips(scorer, pictures):
    tokens = scorer.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pixels = clip_pixels(pictures, 32)
    double = Reference({name: value.double() for name, value in imagereward_tensors().items() if "_ids" not in name})
    expected = double.score(pixels.double(), tokens.input_ids, tokens.attention_mask)
    difference = (scorer(pictures, PROMPTS) - expected).abs().max()
    print(f"largest difference {difference:.1e} at scores of {expected.abs().max():.2f}")
    assert expected.std() > 0.05
    assert difference < 1e-5


def test_gradients_are_blips(scorer, pictures):
    tokens = scorer.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    double = Reference({name: value.double() for name, value in imagereward_tensors().items() if "_ids" not in name})
    ours, theirs = pictures.clone().requires_grad_(), pictures.double().requires_grad_()
    scorer(ours, PROMPTS).sum().backward()
    double.score(clip_pixels(theirs, 32), tokens.input_ids, tokens.attention_mask).sum().backward()
    assert (ours.grad - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max()


# ---------------------------------------------------------------- what goes in


def test_prompts_are_35_tokens_with_two_more_words_in_the_vocabulary(scorer):
    tokenizer = scorer.tokenizer
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35).input_ids
    assert {len(row) for row in ids} == {35}
    assert all(row[0] == tokenizer.cls_token_id for row in ids)
    assert ids[3][-1] == tokenizer.sep_token_id  # truncation keeps the end
    assert ids[0][1:9] == tokenizer.convert_tokens_to_ids(PROMPTS[0].split())
    assert tokenizer(PROMPTS[0].upper()).input_ids == tokenizer(PROMPTS[0]).input_ids
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer("[ENC]").input_ids[1] == len(tokenizer) - 1


def test_the_crop_is_torchvisions():
    """Three rows too many: CLIP's code drops 1 at the top and 2 at the bottom, torchvision's rounds 1.5 to 2."""
    rows = torch.arange(7.0)[None, None, :, None].expand(1, 1, 7, 4)
    assert rounded_crop(rows, 4)[0, 0, :, 0].tolist() == [2, 3, 4, 5]
    assert rounded_crop(rows[:, :, :5], 4)[0, 0, :, 0].tolist() == [0, 1, 2, 3]  # 0.5 is rounded to even


def test_pillow_and_tensor_preprocessing_agree_about_scores(paths, scorer, pictures):
    published = imagereward.load(imagereward.Config(**paths))
    exact = (pictures * 255).round() / 255
    torch.testing.assert_close(published(exact, PROMPTS), scorer(exact, PROMPTS), rtol=1e-5, atol=1e-5)
    assert not published.differentiable
    assert scorer.differentiable


# ---------------------------------------------------------------- what is read


def test_true_shapes_are_read_off_the_tensors():
    """The released model's, without its gigabytes: BLIP ViT-L/16 and BERT-base."""
    shapes = {
        "vision.embeddings.position_embedding": (1, 197, 1024),
        "vision.embeddings.patch_embedding.weight": (1024, 3, 16, 16),
        "text.embeddings.word_embeddings.weight": (30524, 768),
        "text.embeddings.position_embeddings.weight": (512, 768),
        **{f"vision.encoder.layers.{n}.mlp.fc1.weight": (4096, 1024) for n in range(24)},
        **{f"text.encoder.layer.{n}.intermediate.dense.weight": (3072, 768) for n in range(12)},
        **{f"head.layers.{n}.weight": (w, 1) for n, w in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1), strict=True)},
    }
    layout = imagereward.layout_of({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    with torch.device("meta"):
        model = imagereward.Model(**layout)
    unused = (1024 + 1) * 256 + (768 + 1) * 256  # BLIP's two projections are in the file as well
    assert sum(parameter.numel() for parameter in model.parameters()) == 446_665_953 - unused
    assert model.vision.config.image_size == 224
    assert (model.vision.config.num_attention_heads, model.text.config.num_attention_heads) == (16, 12)


@pytest.mark.parametrize("change", ["lost", "strange", "empty"])
def test_wrong_tensors_are_named(tmp_path, change):
    paths, tensors = write_imagereward(tmp_path), imagereward_tensors()
    if change == "lost":
        del tensors["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    tensors = {"blip.stranger": torch.zeros(1)} if change == "empty" else tensors
    tensors |= {"blip.stranger": torch.zeros(1)} if change == "strange" else {}
    torch.save(tensors, paths["path"])
    message = {
        "lost": r"missing \['text.encoder.layer.1.crossattention.self.key.bias'\], unexpected \[\]",
        "strange": r"missing \[\], unexpected \['blip.stranger'\]",
        "empty": r"no ImageReward weights: .*blip\.stranger",
    }
    with pytest.raises(ValueError, match=message[change]):
        imagereward.load(imagereward.Config(**paths))


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    paths = write_imagereward(tmp_path)
    with (tmp_path / "bert" / "vocab.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(ValueError, match=r"a tokenizer of \d+ tokens for a model of \d+"):
        imagereward.load(imagereward.Config(**paths))
