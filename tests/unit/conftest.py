"""What several unit tests start from.

A tiny CLIP and the step-aware model that starts from it; policies on SD and on SDXL; rows written as prepared data; a
project whose stages have run; a summary of scores.
"""

import csv
import shutil

import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import preparing
import scores
import stages
from attune.data.ingest.rules import Rules
from attune.data.quarantine import Quarantine
from attune.evaluation.hacking import Sign
from attune.evaluation.protocol import Protocol
from attune.evaluation.summarise import summarise
from attune.evaluation.summary import Summary
from attune.spm.model import from_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP for 16 px images whose tokenizer spells letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokens), "max_position_embeddings": 24, "hidden_act": "gelu"}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    vision = {**tower, "image_size": 16, "patch_size": 8, "hidden_act": "gelu"}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=8))
    for weight in model.parameters():  # wide enough that everything matters
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def spm(clip_folder):
    return from_clip(clip_folder)


@pytest.fixture
def images():
    return torch.rand(3, 3, 20, 28, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1


@pytest.fixture(params=["sd", "sdxl"])
def new(request, new_policy, new_xl_policy):
    """Makes policies on the tiny SD, then on the tiny SDXL."""
    return {"sd": new_policy, "sdxl": new_xl_policy}[request.param]


@pytest.fixture
def pipeline(new, new_policy, tiny_folder, tiny_xl_folder):
    """diffusers' own pipeline of the same base."""
    kind, folder = (
        (StableDiffusionPipeline, tiny_folder) if new is new_policy else (StableDiffusionXLPipeline, tiny_xl_folder)
    )
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def backbone(new_policy):
    return new_policy(adapter=False).backbone


@pytest.fixture
def write(tmp_path, backbone):
    """Writes rows to tmp_path/prepared; returns the counts and the quarantine's rows by number."""

    def run(rows, scorers=None, **rules):
        rules = Rules(**({"max_bad_share": 1.0} | rules))
        with Quarantine(tmp_path / "quarantine.csv", "test") as quarantine:
            counts = preparing.prepare(tmp_path / "prepared", rows, backbone, scorers, quarantine, rules)
        with (tmp_path / "quarantine.csv").open(newline="") as file:
            return counts, {row["row"]: row for row in csv.DictReader(file)}

    return run


@pytest.fixture
def here(made):
    """The project of a test file's fixture `made`, to look at."""
    with stages.inside(made):
        yield made


@pytest.fixture
def mine(made, tmp_path):
    """A copy of it that a test may change."""
    folder = tmp_path / "project"
    shutil.copytree(made, folder, symlinks=True)
    with stages.inside(folder):
        yield folder


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    prompts = [*scores.HOSTILE, *(f"prompt {i}" for i in range(25))]
    return {
        "spo": scores.table(prompts, 0.35, seed=1),
        "base": scores.table(prompts),
        "same": scores.table(prompts),
        "<b>evil|name": scores.table(prompts, -0.3, seed=2),
    }


@pytest.fixture(scope="module")
def protocol(tables) -> Protocol:
    return scores.protocol_for(sorted(set(tables["base"]["prompt"])))


@pytest.fixture(scope="module")
def summary(tables, protocol) -> Summary:
    signs = {"spo": {"vendi": Sign(4.0, 3.5, (-0.8, -0.2)), "cmmd": Sign(0.0, 0.7, (-0.1, 1.5))}}
    return summarise(tables, protocol, trained_on={"spo": ["oracle"]}, signs=signs)
