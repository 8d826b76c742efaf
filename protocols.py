"""What clients of other servers send, and what they expect back: OpenAI's chat API, OpenVLA's and OFT's /act.

No address is fetched and no file is opened that a client names: pictures come as bytes, in base64.
"""
import base64
import json
import os
import re
import time

import numpy as np
from PIL import Image

from config import UserError
from prompts import TAG

# Fields of a chat request that are read, and those that change nothing in a greedy answer.
FIELDS = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "top_p",
          "seed", "user", "metadata", "store")


class Refused(UserError):
    """What a client is told, with HTTP's status for it. Any other UserError has status 400, too."""

    def __init__(self, sentence, status=400, headers={}):
        super().__init__(sentence)
        self.status, self.headers = status, headers


def loads(text):
    try:
        asked = json.loads(text)
    except (ValueError, TypeError, RecursionError) as e:
        raise Refused(f"the request is no JSON ({e})") from None
    if not isinstance(asked, dict):
        raise Refused("the request must be a JSON object")
    return asked


def file_bytes(text):
    """A picture file that was sent in base64, alone or as a data URI."""
    if not isinstance(text, str) or re.match(r"\w+://", text):
        raise Refused("send the picture itself, as data:image/png;base64,... No address is fetched")
    try:
        return base64.b64decode(re.sub("^data:[^,]{0,99};base64,", "", text), validate=True)
    except ValueError:
        raise Refused(f"a picture must be base64, found {text[:40]!r}") from None


# -- OpenAI's chat -------------------------------------------------------------------------------------------

def read_chat(asked, name):
    """A request to the model of this name -> what Desk.ask takes."""
    if asked.setdefault("model", name) != name:
        raise Refused(f"there is no model {asked['model']!r} here, only {name!r}", 404)
    for field, value in asked.items():
        if field not in FIELDS and value not in (None, 0, "", [], {}) and (field, value) != ("n", 1):
            raise Refused(f"{field!r} is not done here: there is one answer, and it is greedy. Leave it out")
    limits = [asked.get("max_completion_tokens"), asked.get("max_tokens"), 10 ** 9]
    limit = next(limit for limit in limits if limit is not None)
    if type(limit) is not int or limit < 1:
        raise Refused(f"'max_tokens' must be a whole number from 1, found {limit!r}")
    turns, pictures = conversation(asked.get("messages"))
    return {"question": turns[-1]["value"], "pictures": pictures, "earlier": turns[:-1], "limit": limit,
            "streams": asked.get("stream") is True}


def conversation(messages):
    """Messages -> turns, as in a file of examples, and the bytes of their pictures. Those of a message stand
    in front of its text, as in training, or at its <image> tags."""
    turns, pictures = [], []
    try:
        for message in messages:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            said = "\n".join(part["text"] for part in parts if part["type"] == "text")
            shown = [file_bytes(part["image_url"]["url"]) for part in parts if part["type"] != "text"]
            turns.append({"from": {"user": "human", "assistant": "gpt"}[message["role"]],
                          "value": (TAG + "\n") * (len(shown) - said.count(TAG)) + said})
            pictures += shown
        if turns[-1]["from"] == "human":
            return turns, pictures
    except (KeyError, TypeError, IndexError):
        pass
    raise Refused('\'messages\' must be a list of {"role": "user" | "assistant", "content": TEXT, or a list '
                  "of text and image_url parts}, the last from 'user'. A system text was learned, and stays")


def write_chat(asked, job, news, language):
    """-> the objects that are sent: the events of a stream, or the one answer. news: see Desk.news."""
    about = {"id": f"chatcmpl-{os.urandom(8).hex()}", "created": int(time.time()), "model": asked["model"],
             "object": "chat.completion.chunk" if job.streams else "chat.completion"}
    sent, delta = "", {"role": "assistant"}
    for ids in news:
        text = language.decode(ids)
        if text.startswith(sent) and not text.endswith("\ufffd"):           # that is half a character
            delta["content"] = text[len(sent):]
            yield about | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            sent, delta = text, {}
    text, read, wrote = language.decode(job.answer), len(job.example["input_ids"]), len(job.answer)
    usage = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
    choice = {"index": 0, "finish_reason": "stop" if job.answer[-1] == language.end_id else "length"}
    if not job.streams:
        message = {"role": "assistant", "content": text}
        yield about | {"choices": [choice | {"message": message}], "usage": usage}
    else:
        yield about | {"choices": [choice | {"delta": delta | {"content": text[len(sent):]}}]}
        options = asked.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            yield about | {"choices": [], "usage": usage}


# -- OpenVLA's and OFT's /act --------------------------------------------------------------------------------

def read_act(asked, policy):
    """-> what Desk.ask takes. OpenVLA's clients send one picture, as `image`. OFT's send `full_image`, and
    more under names that hold "wrist". Plain clients may send a list of them."""
    text, key = asked.get("instruction"), asked.get("unnorm_key") or ""
    if not isinstance(text, str) or not text.strip() or not isinstance(key, str):
        raise Refused("'instruction' must be a text, and 'unnorm_key' the name of a dataset, or left out")
    pictures = [numpy_picture(each) if isinstance(each, dict) else file_bytes(each) for each in shown(asked)]
    policy.check_pictures({len(pictures)})
    job = {"question": policy.question(text), "pictures": pictures, "key": policy.key(key)}
    return job | {"state": read_state(asked.get("state", []), policy)} if policy.state else job


def read_state(sent, policy):
    """Numbers, or what json_numpy makes of them -> a list of numbers. None: the client does not know it."""
    if sent is None:
        return None
    try:
        if isinstance(sent, dict):
            if np.dtype(sent["dtype"]).kind not in "fiu":
                raise ValueError
            data = base64.b64decode(sent["__numpy__"], validate=True)
            sent = np.frombuffer(data, sent["dtype"]).astype(float).ravel().tolist()
        return policy.checked_state(sent)
    except (KeyError, TypeError, ValueError) as e:          # a BadExample is a ValueError
        raise Refused("this policy was trained with --state: 'state' must be "
                      f"{policy.state_size} finite numbers, or an array of them; null = not known") from e


def shown(asked):
    names = [*(name for name in ("image", "full_image") if name in asked),
             *(name for name in asked if "wrist" in name)]
    return [each for name in names
            for each in (asked[name] if isinstance(asked[name], list) else [asked[name]])]


def write_act(asked, actions):
    """Actions (K, A) in the manner of the question: arrays for an array, plain numbers for base64. OFT's
    clients, who send `full_image`, get a list of all, in the order in which they are to be done; all others
    the first one."""
    form = as_numpy if isinstance(shown(asked)[0], dict) else np.ndarray.tolist
    return [form(each) for each in actions] if "full_image" in asked else form(actions[0])


def numpy_picture(sent):
    """What json_numpy makes of an (H, W, 3) array of uint8 -> PIL."""
    try:
        (height, width, channels), data = sent["shape"], base64.b64decode(sent["__numpy__"], validate=True)
        if sent["dtype"] in ("|u1", "uint8") and channels == 3 and len(data) == height * width * 3 > 0:
            return Image.frombytes("RGB", (width, height), data)
    except (KeyError, TypeError, ValueError):
        pass
    raise Refused("a picture that is an array must be (H, W, 3) of uint8, as json_numpy writes it")


def as_numpy(array):
    data = np.ascontiguousarray(array, "<f8")
    return {"__numpy__": base64.b64encode(data).decode(), "dtype": "<f8", "shape": list(data.shape)}
