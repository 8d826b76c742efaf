import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config  # noqa: E402, F401  (before torch: it sets what torch reads when it is imported)
import torch  # noqa: E402

torch.set_num_threads(1)                                # tiny tensors: threads would only wait for each other


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often test_faults.py kills a run (default: 3)")
    parser.addoption("--fuzz", type=int, default=200, help="tries for each reader of test_fuzz.py: 200")


def pytest_xdist_auto_num_workers(config):
    """The whole suite runs in up to four processes; files that are named, in this one, as for a debugger."""
    return 0 if any(".py" in name for name in config.args) else min(4, os.cpu_count())


# What starts train.py again and again, or servers.
# All others are `quick`: under a minute, for between two edits.
SLOW = ("test_actions", "test_babyai", "test_convert", "test_evaluate", "test_faults", "test_forked",
        "test_generate", "test_lerobot_episodes", "test_lora", "test_metaworld", "test_model",
        "test_owner", "test_parallel", "test_parquet", "test_plan", "test_serve", "test_shard", "test_tour",
        "test_trackers", "test_train", "test_validation", "test_vla_eval_server")


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: what one runs between two edits")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem not in SLOW:
            item.add_marker("quick")
