"""How far extraction is from a plain forward pass, family by family; makes docs/models.md.

    python benchmarks/families.py                                    # prints the tables; under two minutes
    python benchmarks/families.py --write docs/models.md --json out.json
    python benchmarks/families.py --quick                            # three families

Runs the tests that measure it (tests/extract/, which need `pip install .[test]`), and collects what they recorded, so
that the page can't say anything that a test does not hold. Fails if one of them does.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "test_stage.py::test_means_equal_a_plain_forward_pass",
    "test_stage.py::test_bfloat16",
    "test_stage.py::test_what_can_be_read_of_others",
    "test_selfcheck.py::test_refused",
    "test_selfcheck.py::test_mamba_is_causal_but_does_not_pack",
    "test_sites.py::test_models_whose_sublayers_cannot_be_read",
)
QUICK = ("llama", "gemma2", "gpt_oss")
PACKAGES = ("torch", "transformers", "numpy")
NAMES = {
    "t5": "T5 (`t5`), an encoder-decoder",
    "bert": "BERT (`bert`), bidirectional",
    "modernbert": "ModernBERT (`modernbert`), bidirectional",
    "gemma3n_text": "Gemma 3n (`gemma3n_text`), several residual streams",
}
INTRO = """# Models

<!-- Written by `python benchmarks/families.py --write docs/models.md`. -->

Decoder-only language models are read as transformers loads them, with no list of supported names: parts are found by
structure, and what was found is checked on the model itself. A model that fails a check is refused with the reason.

- **Before anything is loaded**: encoder-decoders are refused, and models without exactly one list of as many blocks as
  there are layers. Of a model of several modalities the text side is read, and nothing else is loaded.
- **When a stage is loaded** it runs a few random rollouts of different lengths together and one by one. Where
  neighbours change a rollout (bidirectional attention, for example) the model is refused.
- **Padding** is to the right, without a mask: what is causal can't see it, and the check above shows that it does not.
- **Packing** (`extract.packing: packed`, or `auto` with flash attention) puts rollouts one after another into one
  sequence, told apart by their positions alone. It is used only where the same check passes with packed rollouts.
- **`attn_out` and `mlp_out`** are found by watching one forward pass, and given only where
  `resid_post = resid_pre + attn_out + mlp_out` holds in every block.
"""
TESTED = """
## Tested families

Tiny random models (6 layers, 32 dimensions), five rollouts of 9 to 40 tokens, more than twice the sliding windows.
Compared with: the unmodified transformers model, one rollout at a time, plain hooks on modules named by hand for each
family, means in float64. **float32**: norm of the difference over the norm, the largest of all rollouts, layers, sites
(`resid_post`, `resid_pre`, `attn_out`, `mlp_out`), reductions (`mean`, `last_prompt`, `first_4`, `turns`, `parts`) and
of 1, 2 and 3 stages, which agree bit for bit; at most 1e-5 is allowed. **bfloat16**: cosine between bfloat16 and
float32 with the same weights, the smallest of all rollouts and layers of `resid_post_mean`, padded and packed; at least
0.9999 is required. For this column the blocks' weights are drawn smaller and the embedding larger: with the others each
block multiplies the rounding of those before it, routers choose other experts, and a plain bfloat16 pass is as far off.
"""
PARTLY = """
## Read in part

Measured as above, at the sites that can be read.
"""
REFUSED = """
## Refused

| model | message |
|---|---|
"""


def measure(quick: bool) -> dict[str, Any]:
    """Figures of each family, and the messages of what is refused."""
    machine = describe_machine(ROOT)
    with tempfile.TemporaryDirectory(prefix="personaspace-benchmark-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # Only this flavour of the report holds what tests record.
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}", f"--basetemp={folder}/tests"]
        # A family is the first part of a test's id; other tests are about other models.
        command += ["-k", " or ".join(f"[{family}-" for family in QUICK)] if quick else []
        command += [f"tests/extract/{test}" for test in (TESTS[:2] if quick else TESTS)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-4000:] + done.stderr[-2000:])
        figures = collect(report)
    return {**figures, "machine": machine}


def collect(report: Path) -> dict[str, Any]:
    """What the tests recorded, by family."""
    families: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {prop.attrib["name"]: prop.attrib["value"] for prop in case.iter("property")}
        if "refused" in found:
            refused[found["refused"]] = found["message"]
            continue
        family = families.setdefault(found.pop("family", ""), {})
        for name, value in found.items():
            if name.endswith("_error"):
                family[name] = max(family.get(name, 0.0), float(value))
            elif name.endswith("_cosine"):
                family[name] = min(family.get(name, 1.0), float(value))
            else:
                family[name] = value
    families.pop("", None)
    return {"families": families, "refused": refused}


def row(name: str, family: Mapping[str, Any]) -> str:
    packed = f"refused: {family['packed_refused']}" if "packed_refused" in family else "yes"
    figures = [f"{family[key]:.1e}" if key in family else "-" for key in ("padded_error", "packed_error")]
    cosine = f"{family['bfloat16_cosine']:.6f}" if "bfloat16_cosine" in family else "-"
    return " | ".join(
        ["", f"`{name}`", family["class"], family["attention"], *figures, cosine, packed, family["note"], ""]
    ).strip()


def page(figures: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    heading = (
        "\n| family | class | attention | float32, padded | float32, packed | bfloat16 | packed | notes |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    families, machine = figures["families"], figures["machine"]
    partly = {name: family for name, family in families.items() if "bfloat16_cosine" not in family}
    text = INTRO + TESTED + heading
    text += "".join(row(name, family) + "\n" for name, family in families.items() if name not in partly)
    if partly:
        text += PARTLY + heading + "".join(row(name, family) + "\n" for name, family in partly.items())
    if figures["refused"]:
        text += REFUSED
        text += "".join(f"| {NAMES[name]} | {message} |\n" for name, message in figures["refused"].items())
        for name, family in families.items():
            if "packed_message" in family:
                text += f"| `{name}`, packed | {family['packed_message']} |\n"
            if "sites_message" in family:
                text += f"| `{name}`, `attn_out` or `mlp_out` | {family['sites_message']} |\n"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name in PACKAGES)
    text += (
        f"\nMeasured {machine['date']} by `{machine['command']}`: Python {machine['python']}, {versions}, on one of "
    )
    text += f"{machine['cores']} cores of {machine['cpu']}.\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="replace this file by the tables and what they mean")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = measure(arguments.quick)
    text = page(figures)
    print(text, end="")
    if arguments.write:
        arguments.write.write_text(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
