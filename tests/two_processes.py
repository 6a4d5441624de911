"""Run by test_distill.py under torchrun: the same training, a part of each batch in each process."""
import os
import sys
from pathlib import Path

import tiny
from safetensors.torch import save_file
from test_distill import arguments, trained

folder, kind = sys.argv[1:]
several = {"ddp_backend": "gloo"} if os.environ["WORLD_SIZE"] != "1" else {}
matching = {"hidden": 1.0} if kind == "narrow" else {}
teacher = tiny.classifier(hidden=96 if kind == "narrow" else 64).model
weights = trained(arguments(24, **several), teacher_model=teacher, **matching)
save_file({"weights": weights}, Path(folder) / "weights.safetensors")
