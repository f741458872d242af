"""The commands on a FLUX: prompts as a T5 reads them are stored, guidance is recorded, images are drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import stages
import tiny_flow_models
from attune.data.store import PreparedData

SHORT = {"batches": 2, "batch_size": 4, "lr": 1e-3, "lora": {"rank": 2}, "caption_dropout": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project on a tiny FLUX: a training of given images that says nothing of guidance, and one told 3.5."""
    model = {"backbone": "flux", "path": tiny_flow_models.write_flux_pipeline(tmp_path_factory.mktemp("flux"))}
    model |= {"resolution": 16, "max_sequence_length": 20, "dtype": "bfloat16"}
    blocks = {"methods__dpo": SHORT, "methods__sft": SHORT | {"embedded_guidance": 3.5}}
    runs = {"base": {"after": "data"}, **{name: {"method": name, "after": "data"} for name in ("dpo", "sft")}}
    folder = stages.write(tmp_path_factory.mktemp("made"), runs, model=model, preference=..., **blocks)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
        for run in runs:
            stages.call("align", run=run)
            stages.call("generate", run=run)
    return folder


def test_prompts_are_stored_as_the_t5_gives_them(made):
    """20 tokens of 32 numbers in half precision, padding included; batches have the latents in float32."""
    data = PreparedData.read(made / "data/short/prepared", "train")
    batch = data.pair_batch([0, 1])
    assert batch.cond.tensors["prompt_embeds"].shape == (2, 20, 32)
    assert batch.cond.tensors["prompt_embeds"].dtype == torch.bfloat16
    assert batch.chosen.shape == (2, 4, 8, 8)
    assert batch.chosen.dtype == torch.float32


def test_the_guidance_that_losses_were_told_is_recorded(made):
    for run, guidance in (("dpo", 1.0), ("sft", 3.5)):
        known = json.loads((made / f"models/short/{run}/run.json").read_text())
        assert known["settings"]["embedded_guidance"] == guidance
        assert known["base"]["max_sequence_length"] == 20
        assert known["times"]["shift"] == pytest.approx(np.exp(0.5 + 0.65 * (16 - 256) / 3840), rel=1e-3)


def test_images_are_drawn_with_each_adapter(made):
    shown = {}
    for run in ("base", "dpo", "sft"):
        files = sorted((made / f"data/short/generated/{run}").rglob("*.png"))
        shown[run] = np.stack([np.asarray(Image.open(file)) for file in files])
    assert shown["base"].shape[1:] == (16, 16, 3)
    assert not np.array_equal(shown["dpo"], shown["base"])
    assert not np.array_equal(shown["sft"], shown["dpo"])
