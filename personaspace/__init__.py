"""personaspace: persona rollouts, pooled activations of every layer, and the Assistant Axis.

The code lives in the root folders; this package holds the face (``cli``, ``config``) and one symlink per folder:

- ``personaspace.store``     run folders: layout, commits, lease, ``open_run``
- ``personaspace.extract``   one process: chat, spans, packing, a slice of the model, generation
- ``personaspace.analysis``  role vectors, persona space, Assistant Axis, evidence, report
- ``personaspace.cluster``   Ray actors that run ``extract`` at scale
"""

__version__ = "0.1.0"
