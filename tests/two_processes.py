"""Run by test_distill.py under torchrun: the same training, half of each batch in each process."""
import sys
from pathlib import Path

import tiny
from safetensors.torch import save_file
from test_distill import arguments, trained

weights = trained(arguments(24, ddp_backend="gloo"), teacher_model=tiny.classifier().model)
save_file({"weights": weights}, Path(sys.argv[1]) / "weights.safetensors")
