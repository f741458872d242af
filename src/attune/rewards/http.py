"""A service that scores images: batches are sent to an address, and a number comes back for each image.

POST with JSON `{"images": [PNG in base64, ...], "prompts": [...], "version": "..."}`; the answer is JSON
`{"scores": [0.7, ...]}`. Whatever runs there, a language model that sees or a queue of people, `version` says which;
what was scored under it is kept and not asked again, until `version` is changed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from attune.clip.pixels import check_images
from attune.config.schema import ConfigError, Float
from attune.config.settings import ScorerConfig
from attune.rewards._numbers import checked_scores, eight_bit
from attune.text import has_secret, printable, shown

FIRST_WAIT = 1.0  # seconds before the second try; each wait is twice the one before, up to
LONGEST_WAIT = 60.0
PASSES = (408, 425, 429)  # answers that may be another the next time, as may all from 500 on
LARGEST_ANSWER = 1_000_000  # bytes


class Config(ScorerConfig):
    """Where the service is, which one it is, and how patient we are."""

    UNSCORED: ClassVar[frozenset[str]] = frozenset({"url", "batch_size", "timeout", "retries", "token_env"})

    url: str = Field(description="address that images are sent to, http:// or https://; not part of the identity")
    version: str = Field(
        min_length=1, max_length=100, description="of what scores there: change it when its scores change"
    )
    batch_size: int = Field(16, ge=1, description="images in a request; changes no score")
    timeout: Float = Field(60.0, gt=0, description="seconds to wait for a connection, or for more of an answer")
    retries: int = Field(5, ge=0, le=20, description="further tries, after 1, 2, 4, ... seconds, at most 60 each")
    token_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_]\w*$",
        description="environment variable with a token, which is sent as `Authorization: Bearer`; null = none is sent",
    )
    license: str = Field("the service's", description="licence of the scores")

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)  # raises ValueError itself, as does an impossible port
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or not url.isprintable():
            raise ValueError("no address; http://host:port/path is wanted")
        if " " in url or not url.isascii():
            raise ValueError("blanks and letters beyond ASCII must be escaped")
        if parts.username is not None or has_secret(url):
            raise ValueError(
                "settings are no place for a token: name the environment variable that has it in token_env"
            )
        return url


class _NoRedirects(HTTPRedirectHandler):
    """A redirect is an error: the token would be sent to another host, and the images be lost on the way."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


class Service:
    """The address, and how it is asked."""

    def __init__(self, config: Config) -> None:
        self.config, self._token = config, token_of(config)
        self._opener = build_opener(_NoRedirects)

    def is_there(self) -> None:
        """Raises ConfigError if nothing answers at the address; any answer will do, as no image is shown."""
        self._send(Request(self.config.url, method="HEAD"), refusals_count=False)

    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images, uint8 (B, H, W, 3). Raises ConfigError if there is no answer, or not a right one."""
        config = self.config
        body = {"images": [png(image) for image in images], "prompts": list(prompts), "version": config.version}
        request = Request(config.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer = self._send(request)
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            raise self._error(f"has not answered with JSON, but {self._quoted(answer)}") from None
        if not isinstance(found, Mapping) or "scores" not in found:
            raise self._error(f'has not answered {{"scores": [...]}}, but {self._quoted(answer)}')
        if (version := found.get("version", config.version)) != config.version:
            raise self._error(f"is version {shown(version)}, and `version` says {shown(config.version)}; correct that")
        return checked_scores(found["scores"], len(images), f"url {config.url}: the service's scores")

    def _send(self, request: Request, refusals_count: bool = True) -> bytes:
        """The answer; asked for again, after growing waits, if there is none or it may be another the next time."""
        if self._token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        tries = self.config.retries + 1
        for left in reversed(range(tries)):
            try:
                with self._opener.open(request, timeout=self.config.timeout) as response:
                    answer: bytes = response.read(LARGEST_ANSWER + 1)
                if len(answer) > LARGEST_ANSWER:
                    raise self._error(f"has answered with more than {LARGEST_ANSWER:,} bytes")
                return answer
            except HTTPError as error:
                if not refusals_count:
                    return b""
                said = f"{error.code} {error.reason}: {self._quoted(error.read(LARGEST_ANSWER))}"
                if (place := error.headers.get("Location")) and error.code < 400:
                    raise self._error(f"redirects to {self._quoted(place.encode())}; write that address") from None
                if error.code < 500 and error.code not in PASSES:
                    raise self._error(f"has refused: {self._hidden(said)}") from None
            except (OSError, HTTPException) as error:
                said = str(getattr(error, "reason", error)) or type(error).__name__
            if left:
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1 - left)))
        raise self._error(f"does not answer ({self._hidden(said)}; tries: {tries}); start it, or correct `url`")

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"url {self.config.url} (a scorer of kind http, in `scorers`): the service {what}")

    def _quoted(self, answer: bytes) -> str:
        return shown(self._hidden(answer.decode(errors="replace")))

    def _hidden(self, text: str) -> str:
        """The text, printable, without the token: a service may repeat what it was sent."""
        return printable(text if self._token is None else text.replace(self._token, "***"))


def token_of(config: Config) -> str | None:
    """The token in the environment. Raises ConfigError, without it, if it is not there or cannot be sent."""
    if config.token_env is None:
        return None
    token = os.environ.get(config.token_env, "").strip()
    if not token or not token.isascii() or not token.isprintable():
        fault = "is not ASCII on one line" if token else "is not set"
        raise ConfigError(f"token_env: the environment variable {config.token_env} {fault}; put the token there")
    return token


def png(image: np.ndarray) -> str:
    """An image, uint8 (H, W, 3), as a PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


class Scorer:
    """What a service says of images; a `Reward`."""

    differentiable = False

    def __init__(self, service: Service, config: Config) -> None:
        self.license = config.license
        self.expected_range = config.range_of_mean({})
        self._service, self._at_once = service, config.batch_size

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), on the images' device, of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: they are no such images, or the service has not given a finite number for each.
        """
        check_images(images, prompts)
        pixels, parts = eight_bit(images), range(0, len(images), self._at_once)
        found = [self._service.scores(pixels[i : i + self._at_once], prompts[i : i + self._at_once]) for i in parts]
        return torch.cat(found).to(images.device)


def load(config: Config, device: torch.device | str = "cpu") -> Scorer:
    """The scorer. Raises ConfigError if nothing answers at its address, or its token is not there."""
    service = Service(config)
    service.is_there()
    return Scorer(service, config)
