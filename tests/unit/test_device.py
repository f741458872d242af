"""Which device is chosen. That Apple's works can only be tried on such a machine."""

import pytest
import torch

from attune.build import device
from attune.planning.problems import machine


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_gpu_is_used_where_there_is_one(monkeypatch, cuda, mps, chosen):
    for name in ("LOCAL_RANK", "ATTUNE_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device() == torch.device(chosen)


def test_apples_gpu_counts_as_one_with_the_machines_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    here = machine()
    assert (here.gpus, here.gpu_bytes) == (1, here.ram_bytes)


def test_attention_is_not_cudnns():
    """Its backward pass fails on FLUX's shapes (H100, torch 2.11), and no CPU can show that."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
