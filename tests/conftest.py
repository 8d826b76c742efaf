import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config  # noqa: E402, F401  (before torch: it sets what torch reads when it is imported)
import torch  # noqa: E402

torch.set_num_threads(1)                                # tiny tensors: threads would only wait for each other


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often test_faults.py kills a run (default: 3)")
