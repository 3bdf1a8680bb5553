"""For all tests: no real Hugging Face hub, cores that are shared, Ray clusters that ask for no token, no deadlines."""

import os

from hypothesis import settings

# Before huggingface_hub is imported, which reads it once. What needs the hub fails at once, without its retries.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. With a pool of threads as wide as the machine in each process, each waits for the others'.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else the first local cluster turns Ray's tokens on in this process, which no cluster that it joins later asks for.
os.environ["RAY_AUTH_MODE"] = "disabled"
# How long a busy machine takes says nothing of the code.
settings.register_profile("personaspace", deadline=None)
settings.load_profile("personaspace")
