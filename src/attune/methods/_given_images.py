"""What methods that learn from given images decide alike: SFT, DPO, KTO, MaPO and SPIN."""

from __future__ import annotations

from pydantic import Field

from attune.config.schema import Float
from attune.config.settings import MethodConfig


class GivenImagesConfig(MethodConfig):
    """Settings that the methods of this family share.

    A model that was distilled from a guided one, such as FLUX.1-dev, is told its guidance as a number. Told 1, it is
    the model of the data, which an error on images of the data belongs to; so what it was taught about higher numbers
    is changed least. Methods that sample in training tell it their own `guidance_scale` instead.
    """

    embedded_guidance: Float = Field(
        1.0, ge=0, description="what a model that is told its guidance (FLUX) is told in the loss; of others it is 1"
    )
