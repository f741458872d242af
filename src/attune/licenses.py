"""Licences of base models: of published ones as their cards name them, of local ones as the card beside them says."""

from __future__ import annotations

import re
from pathlib import Path

from attune.hub import parse

LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "Tongyi-MAI/Z-Image": "apache-2.0",
}
NOT_OF_THE_HUB = {  # names of licences that the Hub has no word for -> where they are
    "stabilityai-ai-community": "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md",
    "flux-1-dev-non-commercial-license": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
}


def base_license(base: str) -> str | None:
    """The licence of a base model: of a published one, or what the card beside a local one says; None: not known."""
    source = parse(base)
    if source.commit is not None:
        return LICENSES.get(source.place)
    for folder in (Path(source.place), Path(source.place).parent):
        file = folder / "README.md"
        if file.is_file() and (found := re.match(r"---\n(?:.*\n)*?license: *(\S+)", file.read_text("utf-8")[:4000])):
            return found[1].strip("'\"")
    return None
