"""Our fit against the reference project's formulas, on its own extraction of 84 rollouts of SmolLM2 (or on made ones).

    python benchmarks/parity.py --data ../shared/reference/parity --json out.json
    python benchmarks/parity.py --quick

The activations and a made score file are written as the reference project writes them, imported by
`personaspace store import` and fitted. Beside it, its steps 4 and 5 and its `pca.py`, written out here: role vectors
are means over the rollouts with score 3, `default` over all, the axis is the mean default vector less the mean role
vector, and scikit-learn's PCA takes the mean-centred role vectors, those of score 2 among them (paper, section 2). The
formulas run in float32, and once more in bfloat16, as its files have it. Prints the smallest cosine of the axes and the
largest difference of the explained variance ratios over the layers.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import fit
from personaspace.store.exchange.import_run import import_assistant_axis
from personaspace.store.local import LocalFolder

DEFAULT = "default"
FULLY, SOMEWHAT = 3, 2
NEEDED = 3
"""Rollouts that a role vector must have."""
Activations = Mapping[str, Mapping[str, torch.Tensor]]
"""Role -> key of a rollout -> ``(layers, hidden)``, bfloat16."""
Scores = Mapping[str, Mapping[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with responses/ and reference_pipeline_bf16.npz")
    parser.add_argument("--quick", action="store_true", help="made activations, which need no data")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.quick == (options.data is not None):
        parser.error("give either --data or --quick")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        activations = write_made(source) if options.quick else write_stored(source, options.data)
        figures = compare(source, activations, Path(scratch) / "run")
    for name, value in figures.items():
        print(f"{name:42s} {value:.9g}")
    if options.json:
        options.json.write_text(json.dumps({"machine": describe_machine(Path.cwd()), **figures}, indent=1))


def compare(source: Path, activations: Activations, run: Path) -> dict[str, float]:
    """Score, import and fit; and how far the axes and the variance ratios of all layers are from the formulas'."""
    scores = made_scores(activations)
    (source / "scores").mkdir()
    for role, entry in scores.items():
        (source / "scores" / f"{role}.json").write_text(json.dumps(entry))
    folder = LocalFolder(run)
    import_assistant_axis(source, folder, model="SmolLM2-135M-Instruct", say=lambda _: None)
    space = fit(folder, AnalysisConfig(min_count=NEEDED, components=10, permutations=20, bootstrap=20))
    figures = {"rollouts": float(sum(map(len, activations.values()))), "layers": float(space.sizes["layer"])}
    for dtype in (torch.float32, torch.bfloat16):
        axis_LD, ratio_LK = formulas(activations, scores, dtype)
        ours_LD = space["axis"].values.astype(np.float64)
        cosine_L = (axis_LD * ours_LD).sum(1) / np.linalg.norm(axis_LD, axis=1) / np.linalg.norm(ours_LD, axis=1)
        difference_LK = space["explained_variance_ratio"].values - ratio_LK[:, : space.sizes["component"]]
        name = str(dtype).removeprefix("torch.")
        figures[f"min_axis_cosine_{name}"] = float(cosine_L.min())
        figures[f"max_variance_ratio_difference_{name}"] = float(np.abs(difference_LK).max())
    return figures


def formulas(activations: Activations, scores: Scores, dtype: torch.dtype) -> tuple[NDArray[np.float64], ...]:
    """The reference's axis ``(L, D)`` and explained variance ratios ``(L, K)``, with its means in this dtype."""
    means: dict[int, list[torch.Tensor]] = {FULLY: [], SOMEWHAT: []}
    for role, tensors in activations.items():
        if role == DEFAULT:
            default_LD = torch.stack(list(tensors.values())).to(dtype).mean(dim=0)
            continue
        for score, vectors in means.items():
            chosen = [act_LD for key, act_LD in tensors.items() if scores[role][key] == score]
            if len(chosen) >= NEEDED:
                vectors.append(torch.stack(chosen).to(dtype).mean(dim=0))
    axis_LD = (default_LD - torch.stack(means[FULLY]).mean(dim=0)).to(torch.float64).numpy()
    role_LRD = torch.stack(means[FULLY] + means[SOMEWHAT]).double().numpy().swapaxes(0, 1)
    return axis_LD, np.array([PCA().fit(role_RD).explained_variance_ratio_ for role_RD in role_LRD])


def made_scores(activations: Activations) -> Scores:
    """Scores 0 to 3 from a fixed seed, half of them 3."""
    generator = np.random.default_rng(0)
    return {
        role: {key: int(generator.choice([0, 1, 2, 3], p=[0.1, 0.1, 0.3, 0.5])) for key in tensors}
        for role, tensors in activations.items()
    }


def write_stored(source: Path, data: Path) -> Activations:
    """The responses and activations of ``data`` as the reference project's own output folder."""
    stored = np.load(data / "reference_pipeline_bf16.npz")
    activations: dict[str, dict[str, torch.Tensor]] = {}
    for name, values_LD in zip(stored["keys"], stored["activations"], strict=True):
        role, key = str(name).split("/")
        activations.setdefault(role, {})[key] = torch.from_numpy(values_LD).to(torch.bfloat16)
    (source / "responses").mkdir(parents=True)
    for role in activations:
        (source / "responses" / f"{role}.jsonl").write_bytes((data / "responses" / f"{role}.jsonl").read_bytes())
    return write_activations(source, activations)


def write_made(source: Path) -> Activations:
    """Roles along a direction, in noise, with questions that matter."""
    noise = torch.Generator().manual_seed(0)
    roles = (DEFAULT, "ghost", "poet", "pirate", "teacher", "doctor")
    prompts, questions, layers, hidden = 2, 6, 4, 32
    direction_LD = torch.randn(layers, hidden, generator=noise)
    question_QLD = torch.randn(questions, layers, hidden, generator=noise)
    activations: dict[str, dict[str, torch.Tensor]] = {}
    (source / "responses").mkdir(parents=True)
    for place, role in enumerate(roles):
        lines = []
        for prompt in range(prompts):
            for question in range(questions):
                act_LD = (1 - place) * direction_LD + question_QLD[question]
                act_LD = act_LD + torch.randn(layers, hidden, generator=noise)
                activations.setdefault(role, {})[f"pos_p{prompt}_q{question}"] = act_LD.to(torch.bfloat16)
                lines.append(json.dumps(made_response(role, prompt, question)))
        (source / "responses" / f"{role}.jsonl").write_text("\n".join(lines) + "\n")
    return write_activations(source, activations)


def made_response(role: str, prompt: int, question: int) -> dict[str, object]:
    """A line of a response file."""
    system, asked = f"You are {role}, {prompt}.", f"Question {question}?"
    return {
        "system_prompt": system,
        "prompt_index": prompt,
        "question_index": question,
        "question": asked,
        "conversation": [
            {"role": "system", "content": system},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": f"{role} says {question}."},
        ],
        "label": "pos",
    }


def write_activations(source: Path, activations: Activations) -> Activations:
    (source / "activations").mkdir()
    for role, tensors in activations.items():
        torch.save(dict(tensors), source / "activations" / f"{role}.pt")
    return activations


if __name__ == "__main__":
    main()
