"""Read a chat model without a cluster: two answers, their activations, and what a change of the residual stream does.

python examples/read_activations.py                      # SmolLM2-135M, as `make demo` fetched it
python examples/read_activations.py --model Qwen/Qwen3-0.6B
"""

import argparse

import numpy as np
import torch
import xarray as xr

from personaspace.extract.demo_model import DEFAULT_FOLDER
from personaspace.extract.engine import Extractor
from personaspace.extract.hooks import LayerHook

QUESTION = {"role": "user", "content": "Who are you, and what do you spend your time on?"}
ANSWERS = (
    "I am an AI assistant. I answer questions and help people with their work.",
    "I am a ghost. I drift through the old house and whisper to those who sleep.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_FOLDER), help="checkpoint folder or Hugging Face id")
    arguments = parser.parse_args()

    extractor = Extractor(arguments.model)
    conversations = [[QUESTION, {"role": "assistant", "content": answer}] for answer in ANSWERS]

    # Every layer's mean over the answer, and the state of the last prompt token, in one pass.
    activations = extractor.extract(conversations, reductions=["mean", "last_prompt"])
    print(activations)
    print("the prompts are the same, so their last tokens are, too:", same(activations["resid_post_last_prompt"]))
    assistant, ghost = activations["resid_post_mean"]
    distance = np.sqrt(((assistant - ghost) ** 2).sum("hidden"))
    print(f"the answers are farthest apart after block {int(distance.idxmax('layer'))}")

    # A direction, added to the residual stream after a block, is seen by all blocks behind it.
    middle = activations.sizes["layer"] // 2
    towards_ghost = torch.tensor((ghost - assistant).sel(layer=middle).values)
    steer = LayerHook(layer=middle, change=lambda h_BTD: h_BTD + towards_ghost.to(h_BTD))
    steered = extractor.extract(conversations[:1], hooks=[steer])["resid_post_mean"][0]
    moved = float(((steered - assistant) * (ghost - assistant)).sel(layer=middle).sum("hidden"))
    print("steered, the assistant's answer lies", "nearer to" if moved > 0 else "no nearer to", "the ghost's")


def same(states: xr.DataArray) -> bool:
    return bool(np.allclose(states[0], states[1], rtol=0.05, atol=0.05))


if __name__ == "__main__":
    main()
