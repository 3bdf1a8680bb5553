"""For all tests: nobody talks to the real Hugging Face hub, and processes that share the tests share the cores."""

import os

# Before huggingface_hub is imported, which reads it once. What needs the hub fails at once, without its retries.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. With a pool of threads as wide as the machine in each process, each waits for the others'.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
