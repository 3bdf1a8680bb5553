"""For all tests: nobody talks to the real Hugging Face hub."""

import os

# Before huggingface_hub is imported, which reads it once. What needs the hub fails at once, without its retries.
os.environ["HF_HUB_OFFLINE"] = "1"
