"""Parameter files that are wrong or odd: every answer of the plan is short, names the key or the line, and is quick.

`python benchmarks/params_fuzz.py` runs `attune.stages.plan --show` on each variant in one process, and ends with 1 if
one of them ends otherwise than with its table or its own message. Nothing is written and no network is asked.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from attune.config.resolve import read_yaml
from attune.stages import plan

ROOT = Path(__file__).parents[1]
PROFILE = Path("params/tiny.yaml")
ANSWER = 1000  # characters
SEED, NAME = 0, "x"
# What may stand in the place of any value.
VALUES: dict[str, str] = {
    "huge": "1" + "0" * 400,
    "longer than Python reads": "1" * 5000,
    "huge in hex": "0x" + "f" * 5000,
    "below": "-" + "9" * 401,
    "2**63": str(2**63),
    "1e300": "1.0e+300",
    "nan": ".nan",
    "inf": "-.inf",
    "billion": "1000000000000",
    "negative": "-1",
    "empty": '""',
    "blank": '"  "',
    "null": "",
    "yes": "yes",
    "true": "true",
    "octal": "0o17",
    "sexagesimal": "1:30:00",
    "date": "2026-01-31",
    "no date": "2026-13-45",
    "time": "2026-01-31T10:00:00Z",
    "list": "[1, [2, 3]]",
    "block": "{a: {b: 1}}",
    "number as key": "{1: 2}",
    "null as key": "{null: 2}",
    "list as key": "{? [a, b] : 2}",
    "nul": '"a\\0b"',
    "escape": '"a\\eb"',
    "half a pair": '"\\ud800"',
    "right to left": '"a\\u202Eb"',
    "line": '"a\\nb"',
    "long": '"' + "a" * 1_000_000 + '"',
    "a long name": '"' + "a" * 3000 + '"',
    "python": "!!python/object/apply:os.system [echo]",
    "unknown tag": "!x 1",
    "int of text": "!!int abc",
    "binary": "!!binary '?'",
    "set": "!!set {a, b}",
    "password": "http://user:S3CRET@host:1/x?token=S3CRET",
    "password in a block": "{uri: 'http://user:S3CRET@host'}",
    "unknown scheme": "foo://user:S3CRET@x",
    "no scheme": "user:S3CRET@host",
    "brackets": "[" * 5000,
    "list levels": "[" * 2000 + "]" * 2000,
    "mappings": "{a: " * 500 + "1" + "}" * 500,
    "some levels": "[" * 30 + "]" * 30,
}
# Where: every kind of block once, by dotted key. `runs` and `tracking` are params.yaml's, the rest the profile's.
KEYS = (
    "tracking", "profile", "runs", "runs.dpo", "runs.dpo.method", "runs.dpo.after", "runs.base.from", "seed", "threads",
    "model", "model.path", "model.backbone", "sampling.eta", "data", "data.source", "data.train_prompts",
    "data.score_with", "data.temperature", "preference", "preference.clip", "preference.lr", "methods", "methods.dpo",
    "methods.dpo.beta", "methods.dpo.lr", "methods.dpo.batch_size", "methods.dpo.lora", "methods.dpo.lora.rank",
    "methods.dpo.lora.targets", "methods.alignprop.rewards", "methods.alignprop.truncation_range", "methods.dpo.start",
    "methods.dpo.validation", "generate.prompts", "generate.sampling", "search.dpo", "search.dpo.space",
    "search.dpo.space.beta", "search.dpo.space.beta.high", "search.dpo.space.beta.choices", "search.dpo.objectives",
    "search.dpo.fixed", "search.dpo.storage", "search.dpo.trials", "scorers", "scorers.hpsv2", "scorers.hpsv2.path",
    "scorers.hpsv2.version", "scorers.oracle.scorer", "scorers.oracle.expected_range", "zzz",
)  # fmt: skip
# An unknown key in every kind of block.
BLOCKS = (
    "", "runs.dpo", "runs.base", "model", "sampling", "data", "preference", "preference.ai_feedback", "methods.dpo",
    "methods.dpo.lora", "methods.dpo.validation", "methods.dpo.validation.sampling", "methods.alignprop",
    "methods.dpo.ai_feedback", "generate", "generate.sampling", "search.dpo", "search.dpo.space.beta",
    "search.dpo.fixed", "scorers.oracle", "scorers.hpsv2",
)  # fmt: skip
# Whole files.
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- a\n",
    "a word": b"tiny\n",
    "two documents": b"--- {profile: tiny}\n--- {profile: tiny}\n",
    "merge markers": b"<<<<<<< HEAD\nprofile: tiny\n=======\nprofile: short\n>>>>>>> x\n",
    "twice": b"profile: tiny\nprofile: http://user:S3CRET@host\n",
    "tab": b"profile:\n\ttiny\n",
    "no utf-8": b"profile: \xff\xfe\xfa\n",
    "nul": b"profile: ti\0ny\n",
    "unknown alias": b"profile: *x\n",
    "merge of a number": b"profile: tiny\n<<: 3\n",
    "itself": b"profile: tiny\nruns: &x\n  a: *x\n",
    "billion laughs": b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)),
    "many keys": b"".join(b"k%d: 1\n" % i for i in range(3000)),
    "a key of 1 MB": b'"' + b"k" * 1_000_000 + b'": 1\n',
    "large": b"# " + b"x" * 3_000_000,
}


def variants() -> Iterator[tuple[str, Path, bytes]]:
    """Name, file and content of every variant; all other files are as shipped."""
    shipped = {Path("params.yaml"): read_yaml(ROOT / "params.yaml"), PROFILE: read_yaml(ROOT / PROFILE)}
    shipped[Path("params.yaml")]["profile"] = "tiny"
    for i, key in enumerate(KEYS):
        file = Path("params.yaml") if key.split(".")[0] in ("tracking", "profile", "runs") else PROFILE
        for j, (name, text) in enumerate(VALUES.items()):
            if (len(text) > 10_000 and i % 10) or (i + j) % 3:  # a third of the pairs, every value and every key often
                continue
            yield f"{key}: {name}", file, _with(shipped[file], key, text)
    for block in BLOCKS:
        file = Path("params.yaml") if block.startswith("runs") else PROFILE
        for key in ("zzz", "a\u202eb", "a.b", "beta ", "k" * 3000):
            yield f"{block}: unknown key {key[:10]!r}", file, _with(shipped[file], f"{block}.{NAME}", "1", key)
    for name, text in TEXTS.items():
        for file in (Path("params.yaml"), PROFILE, Path("params.local.yaml")):
            yield f"{file}: {name}", file, text
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        yield f"{PROFILE}: {encoding}", PROFILE, (ROOT / PROFILE).read_text().encode(encoding)
    yield f"{PROFILE}: CRLF", PROFILE, (ROOT / PROFILE).read_bytes().replace(b"\n", b"\r\n")


def _with(values: dict[str, Any], dotted: str, text: str, last: str | None = None) -> bytes:
    """The file with YAML text as the value of a key, whose blocks are made where they are missing."""
    changed: Any = copy.deepcopy(values)
    *blocks, key = dotted.strip(".").split(".")
    place = changed
    for name in blocks:
        if not isinstance(place.get(name), dict):
            place[name] = {}
        place = place[name]
    place[last or key] = "PUT-IT-HERE"
    written = io.StringIO()
    YAML(typ="safe").dump(changed, written)
    return written.getvalue().replace("PUT-IT-HERE", text).encode()


def answer(folder: Path) -> tuple[str, str]:
    """What the plan says in a folder, and the traceback it ends with, if it does."""
    said, there = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            plan.main()
    except SystemExit as end:
        return said.getvalue() + str(end.code or ""), ""
    except BaseException:
        return said.getvalue(), traceback.format_exc()
    finally:
        os.chdir(there)
    return said.getvalue(), ""


def faults(said: str, trace: str) -> Iterator[str]:
    """What is wrong with an answer."""
    if trace:
        yield f"traceback: {trace.strip().splitlines()[-1][:200]}"
    if len(said) > ANSWER:
        yield f"{len(said)} characters"
    if "S3CRET" in said:
        yield "shows a password"
    if any(not sign.isprintable() and sign != "\n" for sign in said):
        yield "holds control characters"


def run(folder: Path) -> tuple[int, list[str], float, str]:
    """All variants in a folder: how many, what is wrong, the seconds of the slowest, and its name."""
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "params").mkdir()
    shipped = {Path("params.yaml"): (ROOT / "params.yaml").read_bytes(), PROFILE: (ROOT / PROFILE).read_bytes()}
    sys.argv = ["plan", "--show"]
    n, wrong, slowest = 0, [], (0.0, "")
    for name, file, content in variants():
        for path, text in {**shipped, file: content}.items():
            (folder / path).write_bytes(text)
        start = time.perf_counter()
        said, trace = answer(folder)
        slowest = max(slowest, (time.perf_counter() - start, name))
        wrong += [f"{name}: {fault}" for fault in faults(said, trace)]
        n += 1
        (folder / "params.local.yaml").unlink(missing_ok=True)
    return n, wrong, *slowest


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        n, wrong, seconds, name = run(Path(folder))
    sys.stdout.write(
        "\n".join([*wrong, f"{n} variants, {len(wrong)} wrong answers, slowest {seconds:.1f} s ({name})\n"])
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
