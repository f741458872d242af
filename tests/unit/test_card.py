"""The model card: front matter that YAML reads, facts of the training, and nothing that text from outside can do."""

import pytest
from ruamel.yaml import YAML

from attune.config.plugins import changed_settings
from attune.licenses import base_license
from attune.methods.dpo import Config
from attune.sharing.card import Evidence, card, yaml_text

HOSTILE = "<script>alert(1)</script> [x](http://evil) `rm`\n---\nlicense: mit | ```"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5@" + "a" * 40


def made(**changes):
    settings = Config(lora={"rank": 4, "targets": "attention"}, beta=100.0).model_dump(mode="json")
    base = {"backbone": "sd", "path": BASE, "dtype": "float32"}
    known = {"run": "dpo", "profile": "sd15", "method": "dpo", "settings": settings, "base": base, "from": None}
    return known | {"starts_from": None, "trained_on": ["pickscore"], "seed": 7} | changes


def front(text):
    assert text.startswith("---\n")
    return YAML(typ="safe").load(text.split("---\n")[1])


def test_the_front_is_what_the_hub_reads():
    found = front(card(made(), {"source": "pickapic", "path": "owner/pairs@" + "b" * 40}))
    assert found["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (found["base_model_relation"], found["library_name"]) == ("adapter", "diffusers")
    assert found["license"] == "creativeml-openrail-m"
    assert found["datasets"] == ["owner/pairs"]
    assert {"lora", "dpo", "arxiv:2311.12908"} <= set(found["tags"])


def test_the_body_tells_how_it_was_made_and_how_to_load_it():
    text = card(made(), {"source": "pickapic", "path": "owner/pairs@" + "b" * 40})
    for words in (
        "LoRA of rank 4 and alpha 4 on attention",
        "<https://arxiv.org/abs/2311.12908>",
        "| beta | 100.0 | 2000.0 |",
        "**trained on the opinion of**: pickscore",
        'revision="' + "a" * 40,
        "pipeline.load_lora_weights(folder, weight_name=",
        "reports/sd15/summary.json",
        "look it up before you publish",
    ):
        assert words in text
    assert "2048" not in "".join(
        f"{key} {value}" for key, value, _ in changed_settings("methods", made()["method"], made()["settings"])
    )


def test_the_same_training_has_the_same_card():
    assert card(made(), {"source": "world"}) == card(made(), {"source": "world"})


def test_a_model_of_all_weights_is_loaded_as_a_denoiser():
    text = card(made(settings=made()["settings"] | {"lora": None}), {"source": "world"})
    assert 'UNet2DConditionModel.from_pretrained(folder, subfolder="unet")' in text
    assert "lora" not in front(text)["tags"]
    assert "load_lora_weights" not in text


@pytest.mark.parametrize("where", ["base", "path", "trained_on", "start"])
def test_text_from_outside_stays_text(where):
    changes = {
        "base": {"base": made()["base"] | {"path": HOSTILE}},
        "path": {},
        "trained_on": {"trained_on": [HOSTILE]},
        "start": {"starts_from": HOSTILE},
    }[where]
    data = {"source": "table", "path": HOSTILE if where == "path" else "data/x"}
    text = card(made(**changes), data, Evidence(None, HOSTILE, None, {"steps": 20, "eta": 0, "guidance_scale": 7.5}))
    outside_code = text.split("```python")[0] + text.split("```\n", 1)[-1].rsplit("```\n", 1)[-1]
    assert "<script>" not in outside_code
    assert "[x](" not in outside_code
    assert text.count("```") == 2
    assert front(text)["library_name"] == "diffusers"
    assert "mit" not in front(text).values()


@pytest.mark.parametrize("text", ["no", "null", "1.5", "a: b", "- x", "#x", "'", 'a"b\\', "lora"])
def test_yaml_reads_text_back_as_it_was(text):
    assert YAML(typ="safe").load(f"- {yaml_text(text)}") == [text]


def test_the_license_of_a_base_is_its_own_cards(tmp_path):
    assert base_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\ntags:\n- x\nlicense: apache-2.0\n---\n# A base\n")
    assert base_license(str(tmp_path)) == "apache-2.0"
    assert base_license("owner/unknown@" + "c" * 40) is None
