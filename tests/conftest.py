"""Settings of every test, and the small model most of them run on."""

import os

# before the libraries below are imported: they read these once
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "ATTUNE_TRACKING": "off",
    "ATTUNE_DEVICE": "cpu",  # `ATTUNE_DEVICE=cuda pytest tests/contract` on a machine with a GPU
}.items():
    os.environ.setdefault(_name, _value)

import copy  # noqa: E402
import shutil  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

import tiny  # noqa: E402
from attune.backbones.sd import StableDiffusion  # noqa: E402
from attune.backbones.sd import load as load_sd  # noqa: E402
from attune.backbones.sdxl import StableDiffusionXL  # noqa: E402
from attune.backbones.sdxl import load as load_sdxl  # noqa: E402
from attune.build import device  # noqa: E402
from attune.config.settings import Model  # noqa: E402
from attune.diffusion.policy import Policy  # noqa: E402


def pytest_collection_finish():
    """One thread: two on busy cores are up to 200 times slower. Set last, so that no test module's import undoes it."""
    torch.set_num_threads(1)
    if device().type == "cuda":  # tests compare bits of two runs
        torch.backends.cudnn.deterministic = True


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A random Stable Diffusion pipeline on disk: latents (4, 8, 8), images of 16 pixels, 52,000 weights."""
    return tiny.write_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def _shared_backbone(tiny_folder) -> StableDiffusion:
    return load_sd(Model(backbone="sd", path=tiny_folder), device())


@pytest.fixture(scope="session")
def tiny_xl_folder(tmp_path_factory) -> str:
    """A random Stable Diffusion XL pipeline on disk, of the same sizes."""
    return tiny.write_xl_pipeline(tmp_path_factory.mktemp("tiny_xl"))


@pytest.fixture(scope="session")
def _shared_xl_backbone(tiny_xl_folder) -> StableDiffusionXL:
    return load_sdxl(Model(backbone="sdxl", path=tiny_xl_folder), device())


@pytest.fixture
def new_policy(_shared_backbone):
    """Makes policies on networks of their own, all equal; `new_policy(adapter=False)` for the bare base."""
    return maker(_shared_backbone)


@pytest.fixture
def new_xl_policy(_shared_xl_backbone):
    """The same on the tiny SDXL."""
    return maker(_shared_xl_backbone)


def maker(shared):
    def new(adapter: bool = True, moved: float = 0.0, **lora) -> Policy:
        backbone = copy.copy(shared)
        backbone.denoiser = copy.deepcopy(shared.denoiser)
        policy = Policy(backbone, backbone.encode_prompts([""]))
        if adapter:
            policy.add_adapter(**({"rank": 2, "seed": 0} | lora))
            tiny.move(policy, moved)
        return policy

    return new


@pytest.fixture
def policy(new_policy) -> Policy:
    return new_policy()


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """Puts a folder where a download would have left it: `on_the_hub(folder)` is its (id, commit)."""
    cache, commit = tmp_path / "hub", "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def put(folder, name: str = "owner/name") -> tuple[str, str]:
        shutil.copytree(folder, cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit)
        return name, commit

    return put


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> str:
    """A random CLIP for 16 px images."""
    return tiny.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def data(_shared_backbone):
    """Eight prompts with three labelled pairs, none a tie, each."""
    return tiny.prepared(_shared_backbone)
