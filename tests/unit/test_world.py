"""The embedded world: its prompts, the pictures of them, flaws, and the data source made of these."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from attune.data.rows import Pair, Prompt, Quota
from attune.data.sources.world import Config, draw_prompts, label_pairs, read
from attune.world import flaws, oracle
from attune.world.grammar import BACKGROUNDS, COLOURS, KINDS, SHAPES, Scene, all_scenes, parse, vocabulary
from attune.world.render import IMAGE_SIZE, RADII, render, shape_distance
from scenes import N, generate, prompts, rng, some

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "validation", "test")

# --- grammar ----------------------------------------------------------------------------------------------


def test_there_are_22500_prompts_and_each_is_read_back():
    scenes = all_scenes()
    assert len({scene.prompt for scene in scenes}) == len(scenes) == 22_500
    assert {kind: sum(s.kind == kind for s in scenes) for kind in KINDS} == {
        "one": 6 * 6 * 3 * 5,
        "count": 6 * 6 * 2 * 5,
        "relation": 6 * 6 * 5 * 6 * 4 * 5,
    }
    wrong = [scene.prompt for scene in scenes if parse(scene.prompt) != scene]
    assert not wrong


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        (
            "a large red circle on a white background",
            Scene("one", ("red",), ("circle",), "white", size="large"),
        ),
        ("three green crosses on a pink background", Scene("count", ("green",), ("cross",), "pink", count=3)),
        (
            "a blue ring left of an orange square on a gray background",
            Scene("relation", ("blue", "orange"), ("ring", "square"), "gray", count=2, relation="left of"),
        ),
    ],
)
def test_prompts_read_as_people_would_write_them(prompt, scene):
    assert scene.prompt == prompt
    assert parse(prompt) == scene
    assert parse(f"  {prompt.upper()} ") == scene


@pytest.mark.parametrize(
    "foreign",
    [
        "",
        "a photo of a cat",
        "a large red circle",
        "a large red circle on a white background.",
        "a huge red circle on a white background",
        "a large teal circle on a white background",
        "four red circles on a white background",
        "two red circle on a white background",
        "a large red circle on a white background, trending on artstation",
    ],
)
def test_foreign_prompts_are_refused(foreign):
    with pytest.raises(ValueError, match="not a prompt of the embedded world"):
        parse(foreign)


def test_the_vocabulary_is_exactly_the_words_of_the_prompts():
    words = {word for scene in all_scenes() for word in scene.prompt.split()}
    assert words == set(vocabulary())
    assert vocabulary() == sorted(set(vocabulary()))


def test_the_shipped_tokenizer_reads_every_prompt_whole():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/embedded/base/tokenizer")
    pieces = {word: tokens for word in vocabulary() if len(tokens := tokenizer.tokenize(word)) > 1}
    assert not pieces
    lengths = map(len, tokenizer([scene.prompt for scene in all_scenes()]).input_ids)
    assert max(lengths) <= tokenizer.model_max_length


def objects(scene: Scene) -> set[tuple[str, str]]:
    return set(zip(scene.colours, scene.shapes, strict=True))


def test_splits_hold_out_combinations():
    """d = (shape - colour) mod 6: 0 is only in test prompts, 1 never in training, the rest everywhere."""
    d = {(c, s): (SHAPES.index(s) - list(COLOURS).index(c)) % 6 for c in COLOURS for s in SHAPES}
    seen = {split: [objects(s) for s in all_scenes() if s.split == split] for split in SPLITS}
    assert sum(map(len, seen.values())) == len(all_scenes()), "every prompt is in exactly one split"
    trained = set().union(*seen["train"])
    assert {d[o] for o in trained} == {2, 3, 4, 5}
    assert {d[o] for o in set().union(*seen["validation"])} == {1, 2, 3, 4, 5}
    for split in ("validation", "test"):
        assert all(held_out - trained for held_out in seen[split]), "something of every prompt is new"
    for objects_of_prompt in seen["test"]:
        assert 0 in {d[o] for o in objects_of_prompt}
    for combination in (("red", "circle"), ("green", "square"), ("purple", "ring")):
        assert d[combination] == 0, "the docstring's examples"


def test_every_kind_is_in_every_split():
    counts = {(s.kind, s.split) for s in all_scenes()}
    assert counts == {(kind, split) for kind in KINDS for split in SPLITS}


# --- renderer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rendering_depends_on_the_seed_alone(kind):
    scenes = some(kind)
    first = generate(scenes, seed=1)
    assert np.array_equal(first, generate(scenes, seed=1))
    assert (first != generate(scenes, seed=2)).any(axis=(1, 2, 3)).mean() > 0.95
    assert first.dtype == np.float32
    assert first.shape == (N, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize("size", sorted(RADII.values()))
def test_all_shapes_have_the_area_of_the_circle(size):
    grid = (np.arange(IMAGE_SIZE * 20) + 0.5) / 20 - IMAGE_SIZE / 2
    for number, name in enumerate(SHAPES):
        area = (shape_distance(number, grid[None, :], grid[:, None], np.float64(size)) < 0).mean() * IMAGE_SIZE**2
        assert area == pytest.approx(np.pi * size**2, rel=0.02), name


def coverage(scene: Scene, image: np.ndarray) -> np.ndarray:
    """How much of each pixel (H, W) is object, from the colours of a scene with one object colour."""
    ground, ink = np.array(BACKGROUNDS[scene.background]), np.array(COLOURS[scene.colours[0]])
    return (image - ground) @ (ink - ground) / ((ink - ground) ** 2).sum()


def test_edges_are_anti_aliased():
    scenes = [s for s in some("one", 300) if s.shapes[0] in ("circle", "ring", "triangle")]
    for scene, image in zip(scenes, generate(scenes), strict=True):
        cover = coverage(scene, image)
        assert cover.min() == pytest.approx(0, abs=1e-5)
        assert cover.max() == pytest.approx(1, abs=1e-5)
        between = ((cover > 0.02) & (cover < 0.98)).sum()
        assert between > 2 * RADII[scene.size], "a border as long as the perimeter wears mixed colours"
        radius = np.sqrt(cover.sum() / np.pi) / RADII[scene.size]
        assert 0.93 < radius < 1.07, "half-covered pixels count half, so the area is right to a few percent"


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_picture_is_the_same_picture(kind):
    """Rendered at 64 px and averaged over 2 x 2 pixels, a scene looks as it does at 32 px."""
    scenes = some(kind)
    large = render(scenes, rng(), size=2 * IMAGE_SIZE)
    halved = large.reshape(N, IMAGE_SIZE, 2, IMAGE_SIZE, 2, 3).mean((2, 4))
    assert np.abs(halved - generate(scenes)).mean() < 0.01
    assert oracle.scores(large, prompts(scenes)).mean() > 0.85


# --- flaws ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_damaged_images_is_as_asked(share):
    n = 1000
    images = np.repeat(generate(some("one", 10)), n // 10, axis=0)
    before = images.copy()
    out = flaws.damage(images, rng(), share)
    assert np.array_equal(images, before), "the input stays as it was"
    damaged = (out != images).any(axis=(1, 2, 3))
    assert damaged.mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / n))
    assert out.dtype == np.float32
    assert 0 <= out.min() <= out.max() <= 1


def test_unknown_damage_is_refused():
    with pytest.raises(ValueError, match="unknown damage 'rain'; one of blur, noise, lighting, washed"):
        flaws.damage_one(generate(some("one", 1))[0], "rain", 1.0, rng())


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_the_share_of_wrong_captions_is_as_asked(share):
    scenes = some("relation", 2000)
    read = flaws.wrong_captions(scenes, rng(), share)
    changed = np.mean([a != b for a, b in zip(scenes, read, strict=True)])
    assert changed == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 2000))


def attributes(scene: Scene) -> tuple:
    """Everything a prompt says, flat."""
    return (*scene.colours, *scene.shapes, scene.background, scene.size, scene.count, scene.relation)


@pytest.mark.parametrize("kind", KINDS)
def test_a_misread_caption_has_exactly_one_wrong_attribute(kind):
    generator, changed = rng(), set()
    for scene in some(kind, 300):
        read = flaws.misread(scene, generator)
        assert read.kind == kind
        assert parse(read.prompt) == read, "still a prompt of the grammar"
        differs = [i for i, (a, b) in enumerate(zip(attributes(scene), attributes(read), strict=True)) if a != b]
        assert len(differs) == 1
        changed |= set(differs)
    constant = {"one": {"count", "relation"}, "count": {"size", "relation"}, "relation": {"size", "count"}}[kind]
    assert len(changed) == len(attributes(scene)) - len(constant), "every attribute gets its turn"


# --- data source ------------------------------------------------------------------------------------------


def test_all_pairs_of_a_prompts_images():
    """2 prompts x 4 images: 4 * 3 / 2 pairs each; images of prompt p are rows 4p .. 4p + 3."""
    utility = np.arange(8).reshape(2, 4) / 10
    pairs = label_pairs(["p", "q"], utility, 0.05, rng())
    assert len(pairs) == 2 * 6
    assert {"prompt", "image_0", "image_1", "label_0"} <= set(pairs.columns)
    expected = {("p", i, j) for i in range(4) for j in range(i + 1, 4)}
    expected |= {("q", 4 + i, 4 + j) for i in range(4) for j in range(i + 1, 4)}
    assert set(zip(pairs.prompt, pairs.image_0, pairs.image_1, strict=True)) == expected
    assert np.array_equal(pairs.utility_0, utility.ravel()[pairs.image_0])
    assert np.array_equal(pairs.utility_1, utility.ravel()[pairs.image_1])
    assert pairs.label_0.isin([0.0, 1.0]).all()


@pytest.mark.parametrize(("difference", "temperature"), [(0.0, 0.05), (0.05, 0.05), (-0.1, 0.05), (0.05, 0.2)])
def test_choices_follow_bradley_terry(difference, temperature):
    """P(0 over 1) = 1 / (1 + exp(-(u_0 - u_1) / T)): 0.5, 0.731, 0.119 and 0.562 here."""
    n = 20_000
    utility = np.tile([0.5 + difference, 0.5], (n, 1))
    pairs = label_pairs(["p"] * n, utility, temperature, rng())
    p = {(0.0, 0.05): 0.5, (0.05, 0.05): 0.7310586, (-0.1, 0.05): 0.1192029, (0.05, 0.2): 0.5621765}
    p = p[difference, temperature]
    assert pairs.label_0.mean() == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / n))


@pytest.mark.parametrize("split", SPLITS)
def test_drawn_prompts_are_distinct_balanced_and_of_their_split(split):
    table = draw_prompts(split, 60, rng())
    kinds = [parse(prompt).kind for prompt in table.prompt]
    assert table.prompt.is_unique
    assert (table.split == split).all()
    assert {parse(prompt).split for prompt in table.prompt} == {split}
    for head in (3, 30, 60):
        assert {kind: kinds[:head].count(kind) for kind in KINDS} == dict.fromkeys(KINDS, head // 3)
    assert draw_prompts(split, 60, rng()).equals(table)
    assert not draw_prompts(split, 60, rng(1)).equals(table)


def test_a_split_can_be_drawn_whole_and_no_further():
    n = sum(scene.split == "validation" for scene in all_scenes())
    assert set(draw_prompts("validation", n, rng()).prompt) == {
        s.prompt for s in all_scenes() if s.split == "validation"
    }
    with pytest.raises(ValueError, match=rf"^data\.validation_prompts: {n + 1} wanted, the grammar has {n}$"):
        draw_prompts("validation", n + 1, rng())


def test_pairs_show_images_of_their_prompt():
    """The renderer generates for the source, so that what an image shows can be told from its pixels."""
    config = Config(
        train_prompts=12,
        validation_prompts=6,
        test_prompts=9,
        pair_prompts=5,
        images_per_prompt=3,
        temperature=0.05,
    )
    asked: list[tuple[str, int]] = []

    def generateer(words, ordinals, title):
        asked.extend(zip(words, ordinals, strict=True))
        images = [render([parse(w)], rng(o))[0] for w, o in zip(words, ordinals, strict=True)]
        noisy = [flaws.damage_one(image, "noise", 0.3 * o, rng(o)) for image, o in zip(images, ordinals, strict=True)]
        return (np.stack(noisy) * 255).round().astype(np.uint8)

    rows = list(read(config, 0, generateer, Quota()))
    prompts = [row for row in rows if isinstance(row, Prompt)]
    pairs = [row for row in rows if isinstance(row, Pair)]
    assert Counter(row.split for row in prompts) == {"train": 12, "validation": 6, "test": 9}
    assert len(set(asked)) == len(asked) == (5 + 6) * 3
    assert Counter(row.split for row in pairs) == {"train": 5 * 3, "validation": 6 * 3}
    assert set(Counter(row.prompt for row in pairs).values()) == {3}
    for pair in pairs:
        shown = np.stack([pair.image_0, pair.image_1]).astype(np.float32) / 255
        utility = [pair.extra["utility_0"], pair.extra["utility_1"]]
        assert oracle.scores(shown, [pair.prompt] * 2) == pytest.approx(utility)
        assert pair.split == parse(pair.prompt).split
        assert pair.label_0 + pair.label_1 == 1
