import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)                                # tiny tensors: threads would only wait for each other


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often test_faults.py kills a run (default: 3)")
