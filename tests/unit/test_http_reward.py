"""The scorer `http` against a real server: what is sent, what is asked again, and what is told when it fails."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import score_server
from attune.config.schema import ConfigError, check
from attune.rewards import http

IMAGES = torch.rand(5, 3, 6, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "bb", "ccc", "dddd", "an \u00e9l\u00e8ve \U0001f642"]
TOKEN = "s3cr3t-of-a-kind"


@pytest.fixture
def server():
    with score_server.serving() as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.05)


def build(server, **changes):
    return http.load(http.Config(**({"url": server.address, "version": "7", "batch_size": 2, "retries": 2} | changes)))


def expected():
    reds = (IMAGES[:, 0] * 255).round().mean((1, 2)) / 255
    return reds + torch.tensor([len(p) for p in PROMPTS]) / 1000


def told(scorer):
    """The one line that the scorer fails with."""
    with pytest.raises(ConfigError) as error:
        scorer(IMAGES[:2], PROMPTS[:2])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_images_are_sent_as_they_are_in_batches(server):
    scores = build(server)(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, expected())
    assert [request["prompts"] for request in server.requests] == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    assert {request["version"] for request in server.requests} == {"7"}
    sent = [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))) for r in server.requests for x in r["images"]]
    assert np.array_equal(np.stack(sent), (IMAGES * 255).round().byte().permute(0, 2, 3, 1).numpy())


def test_what_may_be_otherwise_the_next_time_is_asked_again_after_growing_waits(server):
    server.says = [(503, "busy"), (429, "slowly")]
    scores = build(server, batch_size=5)(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, expected())
    first, second, third = server.said_at
    assert second - first >= 0.05
    assert third - second >= 0.1


def test_a_lost_connection_is_asked_again(server):
    def drops(request):
        raise ConnectionAbortedError  # the thread ends, and with it the connection

    server.says, server.handle_error = [drops], lambda *args: None
    torch.testing.assert_close(build(server)(IMAGES, PROMPTS), expected())


def test_no_answer_in_time_is_asked_again(server):
    def sleeps(request):
        import time

        time.sleep(1)
        return score_server.redness(request)

    server.says, server.handle_error = [sleeps], lambda *args: None
    torch.testing.assert_close(build(server, timeout=0.3)(IMAGES, PROMPTS), expected())
    assert len(server.requests) == 4


def test_a_service_that_is_away_is_one_line_before_any_image_is_shown(server):
    url = server.address
    server.shutdown()
    server.server_close()
    with pytest.raises(ConfigError) as error:
        http.load(http.Config(url=url, version="7", retries=1))
    assert str(error.value).startswith(
        f"url {url} (a scorer of kind http, in `scorers`): the service does not answer ("
    )
    assert "refused; tries: 2); start it, or correct `url`" in str(error.value)


def test_one_that_goes_away_later_is_one_line_too(server):
    scorer = build(server)
    server.shutdown()
    server.server_close()
    assert "does not answer" in told(scorer)


def test_patience_ends(server):
    scorer = build(server, retries=1)
    server.says = [(500, "a"), (502, "b"), (503, "never asked")]
    assert "502 Bad Gateway: '\"b\"'; tries: 2" in told(scorer)
    assert len(server.says) == 1


def test_a_refusal_is_told_and_not_repeated(server):
    scorer = build(server)
    server.says = [(422, "images must be square\x1b[2J")]
    assert "has refused: 422 Unprocessable" in (said := told(scorer))
    assert "images must be square" in said
    assert "\x1b" not in said
    assert len(server.requests) == 1


def test_a_redirect_is_not_followed(server):
    """The token would go to whoever is there, and the images would not."""
    scorer = build(server)
    server.location, server.says = "http://127.0.0.1:9/other", [(302, "")]
    assert "redirects to 'http://127.0.0.1:9/other'" in told(scorer)
    assert len(server.requests) == 1


WRONG = [
    (b"<html>", "has not answered with JSON, but '<html>'"),
    (b"[" * 100_000, "has not answered with JSON"),
    ([1, 2], 'has not answered {"scores": [...]}, but'),
    ({"score": [1, 2]}, 'has not answered {"scores": [...]}, but'),
    ({"scores": [1.0]}, "2 numbers are wanted for 2 images, not float64 of shape (1,)"),
    ({"scores": 1.0}, "2 numbers are wanted"),
    ({"scores": [[1.0], [2.0]]}, "2 numbers are wanted"),
    ({"scores": [[1.0], 2.0]}, "2 numbers are wanted"),
    ({"scores": ["1", "2"]}, "2 numbers are wanted"),
    ({"scores": [1.0, None]}, "2 numbers are wanted"),
    ({"scores": [True, False]}, "2 numbers are wanted"),
    (b'{"scores": [1.0, NaN]}', "score 1 of 2 is not finite"),
    (b'{"scores": [1e39, 0]}', "score 0 of 2 is not finite"),
    ({"scores": [1, 2], "version": "8"}, "is version '8', and `version` says '7'"),
    (b" " * 1_000_001, "has answered with more than 1,000,000 bytes"),
]


@pytest.mark.parametrize(("answer", "said"), WRONG, ids=range(len(WRONG)))
def test_an_answer_must_be_a_finite_number_for_each_image(server, answer, said):
    scorer = build(server)
    server.says = [(200, answer)]
    assert said in (line := told(scorer))
    assert server.address in line
    assert len(line) < 800
    assert len(server.requests) == 1


def test_an_answer_may_say_its_version(server):
    server.says = [(200, {"scores": [1, 2], "version": "7"})]
    assert build(server)(IMAGES[:2], PROMPTS[:2]).tolist() == [1, 2]


# ---------------------------------------------------------------- the token


def test_a_token_is_sent_and_never_told(server, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", f"{TOKEN}\n")
    scorer = build(server, token_env="MY_TOKEN")
    server.says = [lambda request: (403, f"Bearer {TOKEN} may not do that")]
    assert "Bearer *** may not do that" in (said := told(scorer))
    assert server.headers[0]["Authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in said
    assert TOKEN not in str(scorer._service.config)


@pytest.mark.parametrize("value", ["", "a\nb", "\u00e9"])
def test_a_token_that_cannot_be_sent_is_told_by_its_variable(server, monkeypatch, value):
    monkeypatch.setenv("MY_TOKEN", value)
    with pytest.raises(ConfigError, match=r"^token_env: the environment variable MY_TOKEN is not"):
        build(server, token_env="MY_TOKEN")
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ConfigError, match="MY_TOKEN is not set"):
        build(server, token_env="MY_TOKEN")


def test_no_token_is_sent_unless_asked_for(server, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    build(server)(IMAGES, PROMPTS)
    assert "Authorization" not in server.headers[0]


# ---------------------------------------------------------------- settings

ADDRESSES = [
    ("", "no address"),
    ("localhost:8085", "no address"),
    ("ftp://host/x", "no address"),
    ("http://", "no address"),
    ("http://host:99999", "ort"),
    ("http://host/a b", "blanks"),
    ("http://host/\n", "address"),
    ("http://user:word@host/", "token_env"),
    ("https://host/score?api_key=abc", "token_env"),
]


@pytest.mark.parametrize(("url", "said"), ADDRESSES)
def test_an_address_that_cannot_be_asked_is_refused_with_the_settings(url, said):
    with pytest.raises(ConfigError, match=said) as error:
        check(http.Config, {"url": url, "version": "1"}, "scorers.mine")
    assert str(error.value).startswith("scorers.mine.url: ")
    assert "word" not in str(error.value)
    assert "abc" not in str(error.value)


def test_its_version_alone_is_what_it_is():
    """A service may move, and be waited for longer; another version is another scorer."""
    first = http.Config(url="http://a", version="1", expected_range=[0, 1])
    moved = http.Config(url="http://b", version="1", batch_size=3, timeout=9, retries=1, token_env="X")
    assert first.settings() == moved.settings() == {"version": "1"}
    assert http.Config(url="http://a", version="2").settings() == {"version": "2"}
