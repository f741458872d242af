"""The aesthetic predictor against the authors' code: case 14, and the published head where it is at hand."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from golden.reading import HERE, tensors
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from attune.clip.model import image_features
from attune.rewards import aesthetic

pytestmark = pytest.mark.parity

GRADIENT = 1e-4
SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
HEAD = os.environ.get("ATTUNE_AESTHETIC_HEAD")


@pytest.fixture(scope="module")
def aesthetic_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aesthetic")
    shutil.copyfile(HERE / "tiny_aesthetic.json", folder / "config.json")
    text = {k: v for k, v in CLIPModel(CLIPConfig.from_pretrained(folder)).state_dict().items() if "text" in k}
    save_file(text | tensors("tiny_aesthetic"), folder / "model.safetensors", metadata={"format": "pt"})
    save_file(affine_head(), folder / "head.safetensors")
    torch.save(affine_head(), folder / "head.pth")
    return {"path": str(folder), "head": str(folder / "head.pth")}


def affine_head() -> dict[str, torch.Tensor]:
    """The published head collapsed into its first layer, under the published names."""
    case = tensors("14_aesthetic")
    head = {f"layers.{n}.{kind}": torch.ones(1, 1) if kind == "weight" else torch.zeros(1)
            for n in (2, 4, 6, 7) for kind in ("weight", "bias")}  # fmt: skip
    slope = case["grad_embedding"].double()
    offset = (case["scores_f64"] - case["unit_embeddings"].double() @ slope).mean()
    return head | {"layers.0.weight": slope.float()[None], "layers.0.bias": offset.float()[None]}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_head(table, aesthetic_paths, suffix):
    case = tensors("14_aesthetic")
    head = aesthetic.load_head(aesthetic_paths["head"].replace(".pth", suffix))
    embeddings = case["unit_embeddings"].requires_grad_()
    scores = head(embeddings)
    scores.sum().backward()
    table.close("14", "scores of unit vectors", scores, case["scores"])
    table.close("14", "gradient, embeddings", embeddings.grad[0], case["grad_embedding"])


def test_aesthetic_features_and_score(table, aesthetic_paths):
    case = tensors("14_aesthetic")
    scorer = aesthetic.load(aesthetic.Config(**aesthetic_paths))
    pixels = case["direct.pixel_values_4x4"].repeat_interleave(56, 2).repeat_interleave(56, 3)
    features = image_features(scorer.model, pixels, unit=False)
    table.close("14", "image features", features, case["direct.clip_image_features"])
    table.close("14", "scores", scorer.head(image_features(scorer.model, pixels)), case["direct.reward"])


def test_aesthetic_as_alignprop_optimises_it(table, aesthetic_paths):
    case = tensors("14_aesthetic")
    scorer = aesthetic.load(aesthetic.Config(**aesthetic_paths, preprocess="square"))
    images = case["small48_sym.images"].requires_grad_()
    reward = scorer((images / 2 + 0.5).clamp(0, 1), [""])
    loss = (reward - 10).abs()
    (0.5 * loss.mean()).backward()  # the stored gradient is of the mean over two images
    table.close("14 AlignProp", "scores", reward, case["small48_sym.reward"])
    table.close("14 AlignProp", "loss", loss, case["small48_sym.loss"])
    gradient = case["small48_sym.grad_images_of_mean_loss"]
    table.close("14 AlignProp", "gradient, images", images.grad, gradient, rel=GRADIENT)


@pytest.mark.weights
@pytest.mark.skipif(not HEAD, reason="ATTUNE_AESTHETIC_HEAD does not name sac+logos+ava1-l14-linearMSE.pth")
def test_the_published_head(table, tmp_path):
    case, head = tensors("14_aesthetic"), aesthetic.load_head(HEAD, sha256=SHA256)
    table.close("14 published head", "scores", head(case["unit_embeddings"]), case["scores"])
    scores = head.double()(case["unit_embeddings"].double())
    table.close("14 published head", "scores, float64", scores, case["scores_f64"])
    (tmp_path / "other.pth").write_bytes(Path(HEAD).read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"not {SHA256}; it was not loaded"):
        aesthetic.load_head(str(tmp_path / "other.pth"), sha256=SHA256)
