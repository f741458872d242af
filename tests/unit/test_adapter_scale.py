"""Where adapters of others give their alpha and rank, and adapters that are more than A and B: right, or refused."""

import json

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from attune.diffusion.lora_files import read_lora

RANK = 4


@pytest.fixture
def base(new_policy):
    return new_policy(adapter=False)


@pytest.fixture
def tensors(new_policy):
    """An adapter of rank 4 under peft's names, a fresh copy each time."""
    policy = new_policy(moved=0.2, rank=RANK)
    return {name: value.clone() for name, value in get_peft_model_state_dict(policy.denoiser).items()}


def unet(name):
    return f"unet.{name}"


def of_peft(name):
    return f"base_model.model.{name}"


def kohya(name):
    module, _, side = name.partition(".lora_")
    return f"lora_unet_{module.replace('.', '_')}.lora_{ {'A': 'down', 'B': 'up'}[side[0]] }.weight"


@pytest.fixture
def read(base, tensors, tmp_path):
    """Writes the adapter under other names, with a header, more tensors and a configuration beside it, and reads it."""

    def read(name=unet, header=None, more=None, config=None, file="some.safetensors"):
        save_file({name(key): value for key, value in tensors.items()} | (more or {}), tmp_path / file, header)
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return read_lora(tmp_path / file, base.denoiser)

    return read


@pytest.fixture
def scale(read, tensors):
    """How many times larger B is as read than as written: one number, for all modules alike."""

    def scale(*args, **options):
        found = read(*args, **options)
        ratios = {float((found[key] / value).median()) for key, value in tensors.items() if "lora_B" in key}
        assert max(ratios) - min(ratios) < 1e-6
        assert all(torch.equal(found[key], value) for key, value in tensors.items() if "lora_A" in key)
        return ratios.pop()

    return scale


# ---------------------------------------------------------------- where alpha is

HEADERS = [
    {"lora_alpha": "16", "r": "4"},
    {"unet.lora_alpha": "16", "unet.r": "4"},
    {"alpha": "16.0", "rank": "4"},
    {"network_alpha": "16"},
    {"lora_adapter_metadata": '{"unet.lora_alpha": 16, "unet.r": 4}'},
    {"lora_adapter_metadata": '{"lora_alpha": "16"}'},
    {"peft_config": '{"lora_alpha": 16, "r": 4, "init_lora_weights": "gaussian", "peft_type": "LORA"}'},
    {"lora_alpha": "16", "lora_adapter_metadata": '{"unet.lora_alpha": 16, "text_encoder.lora_alpha": 8}'},
]


@pytest.mark.parametrize("header", HEADERS)
def test_alpha_is_read_wherever_the_header_has_it(scale, header):
    assert scale(header=header) == pytest.approx(4)


NAMES = [
    {"ss_network_args": '{"network_alpha": 2}'},
    {"lora_config": '{"rank": 4, "alpha": 2}'},
    {"network": '{"linear": 4, "linear_alpha": 2, "conv": 4, "conv_alpha": 2}'},
    {"linear_alpha": "2"},
    {"LORA_ALPHA": "2"},
    {"lora.alpha": "2"},
    {"networkAlpha": "2"},
    {"config": ' \n{"lora_alpha": 2}'},
    {"training": '{"network": {"lora_alpha": 2}}'},
    {"jobs": '[{"network": "{\\"alpha\\": 2}"}]'},
    {"alpha": "2", "lora_scale": "1.0", "ss_adaptive_noise_scale": "0.5", "ss_mode_scale": "1.29"},
    {"alpha": "2", "ss_tag_frequency": '{"art": {"alpha": 7, "scale": 3}}', "te_alpha": "8"},
]


@pytest.mark.parametrize("header", NAMES)
def test_alpha_is_read_under_any_trainers_name(scale, header):
    assert scale(header=header) == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_alphas_that_are_whole_numbers_are_read(scale, tensors, dtype):
    modules = {kohya(key).partition(".")[0] for key in tensors}
    assert scale(more={"lora_alpha": torch.tensor(2, dtype=dtype)}) == pytest.approx(0.5)
    assert scale(kohya, more={f"{m}.alpha": torch.tensor(2, dtype=dtype) for m in modules}) == pytest.approx(0.5)


def test_an_alpha_of_kohya_with_several_values_is_named(read, tensors):
    name = f"{kohya(next(iter(tensors))).partition('.')[0]}.alpha"
    with pytest.raises(ValueError, match=rf"some\.safetensors: {name} has 4 values, an alpha has one"):
        read(kohya, more={name: torch.ones(4)})


def test_kohyas_header_counts_where_no_tensor_does(scale):
    header = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "16"}
    assert scale(kohya, header) == pytest.approx(4)


@pytest.mark.parametrize("header", [{"format": "pt"}, {"ss_network_alpha": "None"}, {"lora_adapter_metadata": "{}"}])
def test_without_any_alpha_it_is_the_rank(scale, header):
    assert scale(header=header) == 1


@pytest.mark.parametrize("name", ["unet.{}.alpha", "{}.alpha", "unet.{}.lora.alpha", "unet.{}.lora_alpha"])
def test_alpha_as_a_tensor_of_each_module(scale, tensors, name):
    modules = {key.partition(".lora_")[0] for key in tensors}
    assert scale(more={name.format(module): torch.tensor(16.0) for module in modules}) == pytest.approx(4)


def test_alpha_as_one_tensor_of_all_modules(scale):
    assert scale(more={"lora_alpha": torch.tensor([2.0])}) == pytest.approx(0.5)


def test_patterns_of_peft_are_followed(read, tensors):
    """`to_k` at alpha 8 and the rest at 16, as peft itself scales them."""
    config = {"r": RANK, "lora_alpha": 16, "alpha_pattern": {"to_k": 8}, "rank_pattern": {"to_v": RANK}}
    found = read(of_peft, config=config, file="adapter_model.safetensors")
    for key, value in tensors.items():
        times = 1 if "lora_A" in key else 2 if ".to_k." in key else 4
        assert torch.equal(found[key], value * times)


def test_a_peft_file_under_another_name_needs_its_configuration_too(read, scale):
    with pytest.raises(
        FileNotFoundError, match=r"mine\.safetensors: its alpha is unknown without adapter_config\.json"
    ):
        read(of_peft, file="mine.safetensors")
    assert scale(of_peft, config={"r": RANK, "lora_alpha": 8}, file="mine.safetensors") == pytest.approx(2)
    assert scale(of_peft, {"lora_alpha": "8"}, file="mine.safetensors") == pytest.approx(2)


# ---------------------------------------------------------------- what contradicts itself

CONTRADICTIONS = [
    ({"lora_alpha": "16", "ss_network_alpha": "8"}, None, "is 8 in ss_network_alpha and 16 in lora_alpha"),
    ({"alpha": "8", "lora_adapter_metadata": '{"lora_alpha": 16}'}, None, "is 8 in alpha and 16 in lora_adapter_metad"),
    ({"lora_alpha": "16"}, {"lora_alpha": torch.tensor(8.0)}, "lora_alpha says alpha 16, its tensors 8"),
    ({"lora_adapter_metadata": '{"lora_alpha": 16}'}, {"alpha": torch.tensor(8.0)}, "is 8 in the tensor of .* and 16"),
    ({"ss_network_dim": "8"}, None, "ss_network_dim says rank 8, the tensors of .* have rank 4"),
    ({"lora_adapter_metadata": '{"lora_alpha": 16, "r": 8}'}, None, "lora_adapter_metadata says rank 8"),
    ({"lora_alpha": "nan"}, None, "lora_alpha is 'nan', not a number"),
    ({"lora_alpha": "a lot"}, None, "lora_alpha is 'a lot', not a number"),
    ({"lora_adapter_metadata": '{"lora_alpha": true}'}, None, "lora_alpha is True, not a number"),
    ({"lora_adapter_metadata": '{"lora_alpha": Infinity}'}, None, "lora_alpha is inf, not a number"),
    ({"lora_adapter_metadata": '{"r": 4}'}, None, "lora_adapter_metadata gives no lora_alpha"),
    ({"lora_adapter_metadata": "[1]"}, None, "lora_adapter_metadata of its header is a list"),
    ({"lora_adapter_metadata": "{not json"}, None, "lora_adapter_metadata of its header is not JSON"),
    ({"lora_adapter_metadata": '{"lora_alpha": 4, "alpha_pattern": [1]}'}, None, "alpha_pattern is a list"),
    ({"lora_adapter_metadata": '{"lora_alpha": 4, "rank_pattern": {"(": 4}}'}, None, "is no pattern"),
    ({"lora_adapter_metadata": '{"lora_alpha": 4, "rank_pattern": {"to_k": 8}}'}, None, "says rank 8"),
    ({"lora_alpha": "1e30"}, None, r"lora_alpha is 1e\+30; an alpha is above 0"),
    ({"lora_alpha": "-2"}, None, "lora_alpha is -2; an alpha is above 0"),
    ({"lora_adapter_metadata": '{"lora_alpha": 0}'}, None, "lora_alpha is 0; an alpha is above 0"),
    ({"lora_adapter_metadata": '{"lora_alpha": 4, "alpha_pattern": {"to_k": -1}}'}, None, "to_k is -1; an alpha"),
    (None, {"lora_alpha": torch.tensor(-2)}, "the alpha of .* is -2; an alpha is above 0"),
    ({"ss_network_args": '{"network_alpha": 2}', "alpha": "4"}, None, "is 2 in ss_network_args.network_alpha and 4"),
    ({"config": '{"lora_alpha": 2, "alpha": 4}'}, None, "is 2 in config and 4 in config.alpha"),
    ({"network": "{'lora_alpha': 2}"}, None, "network of its header is not JSON"),
    ({"mixup_alpha": "2"}, None, "mixup_alpha of its header looks like an alpha and is not understood"),
    ({"network": '{"lora_alphas": {"to_k": 2}}'}, None, "network.lora_alphas of its header looks like an alpha"),
    ({"conv_alpha": "2"}, None, "conv_alpha is the alpha of convolutions alone"),
    *(
        ({key: "0.5"}, None, f"{key} '0.5' of its header is not understood")
        for key in ("scale", "scaling", "LoRA_scale")
    ),
    ({"network": '{"scaling_factor": 0.5}'}, None, "network.scaling_factor 0.5 of its header is not understood"),
    (None, {"lora_alpha": torch.tensor(torch.nan)}, "lora_alpha holds values that are not finite"),
    (None, {"alpha": torch.ones(3)}, "alpha has 3 values, an alpha has one"),
    (None, {"nowhere.alpha": torch.ones(1)}, "an alpha for nowhere, which has no weights"),
]


@pytest.mark.parametrize(("header", "more", "says"), CONTRADICTIONS)
def test_places_that_disagree_or_say_nothing_sensible_are_refused(read, header, more, says):
    with pytest.raises(ValueError, match=rf"some\.safetensors.*{says}"):
        read(header=header, more=more)


def test_convolutions_of_kohya_may_have_another_alpha_than_its_header_says(read, tensors):
    modules = sorted({kohya(key).partition(".")[0] for key in tensors})
    alphas = {f"{module}.alpha": torch.tensor(16.0 if i else 2.0) for i, module in enumerate(modules)}
    found = read(kohya, {"ss_network_alpha": "16", "ss_network_dim": "Dynamic"}, alphas)
    for key, value in tensors.items():
        alpha = float(alphas[f"{kohya(key).partition('.')[0]}.alpha"])
        assert torch.equal(found[key], value * (alpha / RANK if "lora_B" in key else 1))


# ---------------------------------------------------------------- more than A and B

MORE = {
    "use_rslora": True,
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["conv_in"],
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "target_parameters": ["weight"],
    "arrow_config": {"top_k": 2},
}


@pytest.mark.parametrize("key", MORE)
@pytest.mark.parametrize("place", ["beside", "header", "plain"])
def test_an_adapter_that_is_more_than_a_and_b_is_refused(read, key, place):
    config = {"r": RANK, "lora_alpha": RANK, key: MORE[key]}
    in_header = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
    written = {
        "beside": {"name": of_peft, "config": config},
        "header": {"header": in_header},
        "plain": {"header": {"lora_alpha": "4", key: str(MORE[key])}},
    }
    says = rf"(some\.safetensors|adapter_config\.json): a LoRA with {key} is not supported"
    with pytest.raises(ValueError, match=says):
        read(**written[place])


@pytest.mark.parametrize("start", ["pissa", "PiSSA_niter_16", "olora", "loftq", "corda", "lora_ga", "tomorrows"])
@pytest.mark.parametrize("place", ["beside", "header"])
def test_an_adapter_whose_start_changed_the_base_is_refused(read, start, place):
    config = {"r": RANK, "lora_alpha": RANK, "init_lora_weights": start}
    in_header = {"header": {"lora_adapter_metadata": json.dumps(config)}}
    with pytest.raises(ValueError, match=rf"init_lora_weights '{start.lower()}' changed the base model's own weights"):
        read(**{"name": of_peft, "config": config} if place == "beside" else in_header)


UNUSUAL = [
    ({"config": '{"r": 4, "init_lora_weights": "pissa"}'}, "init_lora_weights 'pissa' changed the base model"),
    ({"ss_network_args": '{"rs_lora": "True"}'}, "a LoRA with rs_lora is not supported"),
    ({"ss_network_args": '{"dora_wd": "True"}'}, "a LoRA with dora_wd is not supported"),
    ({"config": '{"r": 4, "peft_type": "LOHA"}'}, "an adapter of peft_type 'LOHA' is not supported"),
    ({"config": '{"loftq_config": {"loftq_bits": 4}}'}, "loftq_config without init_lora_weights"),
    ({"config": '{"lora_alpha": 4, "corda_config": {"corda_method": "kpm"}}'}, "corda_config without init_lora_wei"),
]


@pytest.mark.parametrize(("header", "says"), UNUSUAL)
def test_a_header_tells_an_unusual_adapter_wherever_it_says_so(read, header, says):
    with pytest.raises(ValueError, match=rf"some\.safetensors: {says}"):
        read(header=header)


def test_a_configuration_of_another_start_is_refused_beside_the_file_too(read):
    with pytest.raises(ValueError, match=r"adapter_config\.json: loftq_config without init_lora_weights"):
        read(of_peft, config={"r": RANK, "lora_alpha": RANK, "loftq_config": {"loftq_bits": 4}})


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_start_that_left_the_base_alone_is_read(scale, start):
    config = {"r": RANK, "lora_alpha": 8, "init_lora_weights": start, "use_dora": False, "modules_to_save": None}
    assert scale(of_peft, config=config | {"bias": "none", "peft_type": "LORA", "fan_in_fan_out": True}) == 2


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA", 7])
def test_another_kind_of_peft_is_refused(read, kind):
    with pytest.raises(ValueError, match=rf"adapter_config\.json: an adapter of peft_type '?{kind}'? is not supported"):
        read(of_peft, config={"r": RANK, "lora_alpha": RANK, "peft_type": kind})


KINDS = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lora_mid.weight": "LoCon in three factors",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_blocks": "OFT",
    "boft_R": "OFT",
    "ia3_l": "IA3",
    "on_input": "IA3",
    "a1.weight": "GLoRA",
    "diff": "differences of whole weights",
    "diff_b": "differences of whole weights",
    "w_norm": "differences of whole weights",
    "vera_lambda_b": "another method of peft",
}


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("name", [unet, kohya], ids=["diffusers", "kohya"])
def test_adapters_of_other_kinds_are_named(read, tensors, name, part):
    module = name(next(iter(tensors))).partition(".lora_A" if name is unet else ".lora_down")[0]
    says = rf"some\.safetensors: {module}\.{part} is of {KINDS[part]}, which is not supported"
    with pytest.raises(ValueError, match=says):
        read(name, more={f"{module}.{part}": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "holds no LoRA; its first tensor is 'none'"),
        ({"model.diffusion_model.out.weight": torch.ones(2)}, "a whole model must be a folder in diffusers' layout"),
        ({"lora_what_is_this.lora_x.weight": torch.ones(2, 2)}, "not understood|fits nothing"),
    ],
)
def test_a_file_that_holds_something_else_is_named(base, tmp_path, content, says):
    save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"x\.safetensors.*({says})"):
        read_lora(tmp_path / "x.safetensors", base.denoiser)


def test_whole_numbers_are_no_weights(read, tensors):
    key = next(iter(tensors))
    tensors[key] = tensors[key].to(torch.int8)
    with pytest.raises(ValueError, match=r"is of torch\.int8; only floating-point weights are read"):
        read()


def test_a_rank_of_zero_divides_nothing(read, tensors):
    for key, value in tensors.items():
        tensors[key] = value[:0].clone() if "lora_A" in key else value[:, :0].clone()
    with pytest.raises(ValueError, match="its A and B are"):
        read()
