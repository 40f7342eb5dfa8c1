"""How fast is generation, next to transformers and llama.cpp on the same machine, in the same run?

    python benchmarks/generate.py [--repeats 5] [--json FILE]

Each number is the best of some rounds; the programs take turns within a round, so that a slow moment
of the machine hits them alike. llama.cpp takes part where `xllamacpp` is installed.
"""

import gc
import json as jsonlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import LlamaCpp, Transformers  # noqa: E402
from decoding import Generation, GenerationConfig  # noqa: E402
from models.llama.hub import DEFAULT_MODEL, resolve  # noqa: E402
from models.llama.load import load_checkpoint  # noqa: E402
from models.llama.model import LLaMa, for_decoding  # noqa: E402

NEW = 48
DTYPES = ("float32", "bfloat16")
