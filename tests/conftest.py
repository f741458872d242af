"""Settings of every test, and the small model most of them run on."""

import os

for _name, _value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ATTUNE_TRACKING": "off"}.items():
    os.environ.setdefault(_name, _value)

import copy

import pytest
import tiny
import torch

from attune.backbones.sd import StableDiffusion
from attune.backbones.sd import load as load_sd
from attune.diffusion.policy import Policy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A random Stable Diffusion pipeline on disk: latents (4, 8, 8), images of 16 pixels, 43,000 weights."""
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def _shared_backbone(tiny_folder) -> StableDiffusion:
    return load_sd(tiny_folder, None, torch.float32, torch.device("cpu"))


@pytest.fixture
def new_policy(_shared_backbone):
    """Makes policies on networks of their own, all equal; `new_policy(adapter=False)` for the bare base."""

    def new(adapter: bool = True, moved: float = 0.0, **lora) -> Policy:
        backbone = copy.copy(_shared_backbone)
        backbone.denoiser = copy.deepcopy(_shared_backbone.denoiser)
        policy = Policy(backbone, backbone.encode_prompts([""]))
        if adapter:
            policy.add_adapter(**({"rank": 2, "seed": 0} | lora))
            tiny.move(policy, moved)
        return policy

    return new


@pytest.fixture
def policy(new_policy) -> Policy:
    return new_policy()


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> str:
    """A random CLIP for 16 px images."""
    return tiny.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def data(_shared_backbone):
    """Eight prompts with three labelled pairs, none a tie, each."""
    return tiny.prepared(_shared_backbone)
