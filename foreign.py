"""Model folders that somebody else made: what they may ask for, and how they are loaded.

A folder gives weights, shapes and tokens. It can also ask for programs: code of its own (auto_map), attention
kernels from the hub, quantization packages, adapters. None of that is run, whoever asks.
"""
import functools
import json
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from config import UserError, printable

ATTENTION = (None, "eager", "sdpa")                         # those that torch brings


def loading_options(name):
    """How transformers may load `name`, a folder or a hub id: without running its code, and with the network
    only for a hub id, if the hub can be reached. Raises UserError where it asks for more."""
    folder = Path(name)
    if folder.is_dir():
        check_files(folder)
    options = {"trust_remote_code": False, "local_files_only": folder.exists() or not hub_is_there()}
    try:
        settings, _ = PretrainedConfig.get_config_dict(name, **options)
    except OSError as e:
        if folder.exists():
            raise
        raise OSError(f"there is no such folder in {Path.cwd()}; as a hub id: {e}") from e
    check_settings(name, settings)
    return options


def check_files(folder):
    for path in folder.rglob("*"):
        if not path.is_file() and not path.is_dir():        # opening a named pipe would wait for ever
            raise UserError(f"{path} is neither a file nor a folder")
    for index in folder.glob("*.index.json"):
        names = json.loads(index.read_text()).get("weight_map", {}).values()
        if not all(re.fullmatch(r"[\w.+-]+", name) for name in names):
            raise UserError(f"{index} names files outside of its folder")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter, no whole model. Merge it into its model first")


def check_settings(name, settings):
    for key, value in settings.items():
        if isinstance(value, dict) and not key.startswith("auto_map"):
            check_settings(name, value)
        if key.endswith("attn_implementation") and value not in ATTENTION:
            raise UserError(f"{name}: its config.json asks for the program {printable(str(value), 400)} "
                            f"({key}), which is not run. Remove this line")
    if settings.get("quantization_config"):
        raise UserError(f"{name} is quantized; give the model as it was before")


def without_weights(cls, settings, dtype, **changed):
    """The model that `cls` would load, from its config.json alone. On the device "meta" it takes no room."""
    auto = AutoModelForCausalLM if cls is AutoModelForCausalLM else AutoModel
    if auto is AutoModel:                                   # of CLIP and SigLIP only the half that sees
        settings = getattr(settings, "vision_config", settings)
    for name, value in changed.items():
        setattr(settings, name, value)
    return auto.from_config(settings, dtype=dtype)


@functools.cache
def hub_is_there():
    """transformers would try for a minute to find this out. Behind a proxy only it can."""
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        getproxies().get("https") or socket.create_connection((host, 443), timeout=5).close()
        return True
    except OSError:
        return False
