"""serve.py, desk.py, protocols.py: a real server in a process of its own, and real clients."""
import base64
import http.client
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from forked import forked
from helpers import talk
from PIL import Image
from test_convert import make_run
from transformers import AutoConfig

import checkpoint
import desk
import protocols
import serve
from actions import ActionTokens, end_of_actions
from config import BadExample, Config, UserError
from data import Conversations
from desk import Desk, open_picture
from generate import Assistant
from images import Pictures
from model import make_projector
from prompts import load_language
from toy import world

ROOT = Path(__file__).resolve().parent.parent
CHAT, ACT = "/v1/chat/completions", "/act"
UNITS = {"low": [-1.0, 0.0, 5.0], "high": [1.0, 50.0, 6.0]}
ARMS = {name: {"action": {"q01": [x * scale for x in UNITS["low"]], "q99": [x * scale for x in UNITS["high"]],
                          "mask": [True, True, False]}} for name, scale in (("left", 1), ("right", 2))}


# -- runs and servers ----------------------------------------------------------------------------------------

def toy_run(run, **settings):
    """The toy's backbones with a random projector: texts are answered well, pictures each in another way."""
    run.mkdir(parents=True)
    cfg = Config(**{"stage": "finetune", "ckpt": "x", "train_json": "none.json", "image_dir": ".",
                    "vision_backbone": str(ROOT / "toy/vit"), "llm_backbone": str(ROOT / "toy/llm"),
                    "max_length": 512, **settings})
    (run / "config.json").write_text(json.dumps(asdict(cfg)))
    widths = [AutoConfig.from_pretrained(name).hidden_size
              for name in (cfg.vision_backbone, cfg.llm_backbone)]
    torch.manual_seed(1)
    tensors = {f"projector.{name}": 3 * tensor
               for name, tensor in make_projector(cfg.projector, *widths).state_dict().items()}
    actions = {}
    if cfg.stage == "vla":
        end = end_of_actions(load_language(cfg.llm_backbone).tokenizer)
        actions = {"actions": ActionTokens(end, ARMS).saved()}
    state = {"parts": ["projector"], **actions}
    checkpoint.save(run, 1, tensors, {"random.0": torch.zeros(1)}, state, keep=1)
    return run


class Served:
    """A server in its own process, on any free port."""

    def __init__(self, run, folder, *flags):
        self.errors = folder / f"{run.name}.err"
        self.process = subprocess.Popen(
            forked([sys.executable, str(ROOT / "serve.py"), "--ckpt", str(run), "--port", "0", *flags]),
            stdout=subprocess.PIPE, stderr=self.errors.open("w"), text=True, cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"})

    def ready(self):
        self.said = self.process.stdout.readline()
        assert self.said, self.errors.read_text()
        self.host, self.port = re.search(r"http://([^/ ]+):(\d+)", self.said).groups()
        return self

    def connect(self):
        return http.client.HTTPConnection(self.host, int(self.port), timeout=60)

    def say(self, method, path, body=None, headers={}, on=None):
        """-> status, headers, what was answered: from JSON, where it is JSON."""
        connection = on or self.connect()
        body = json.dumps(body) if isinstance(body, (dict, list)) else body
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if not on:
            connection.close()
        return answer.status, answer.headers, (json.loads(content) if "json" in answer.headers["Content-Type"]
                                               else content)

    def ask(self, question, pictures=(), on=None, **more):
        status, _, answer = self.say("POST", CHAT, {"messages": [message(question, pictures)], **more}, on=on)
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"]

    def events(self, question, pictures=(), **more):
        """What a stream says -> the objects, without its [DONE]."""
        body = {"messages": [message(question, pictures)], "stream": True, **more}
        body["stream_options"] = {"include_usage": True}
        *events, done, nothing = self.say("POST", CHAT, body)[2].decode().split("\n\n")
        assert done == "data: [DONE]" and nothing == ""
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures, and a file of held-out examples."""
    folder, rng = tmp_path_factory.mktemp("serve"), random.Random(3)
    for i in range(5):
        world.draw(world.random_scene(rng), rng).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "conversations": talk("<image>\nDescribe the picture.", "A star.")}
            for i in range(5)]
    rows.append({"image": ["0.png", "1.png"], "conversations": talk("<image>\n<image>\nWhich?", "both")})
    (folder / "val.json").write_text(json.dumps(rows))
    (folder / "train.json").write_text(json.dumps([{"id": "e", "instruction": "Push it.", "steps": [
        {"image": f"{i}.png", "action": [0, 10, 5]} for i in range(5)]}]))
    return folder


@pytest.fixture(scope="module")
def servers(folder):
    about = {"image_dir": str(folder), "val_json": str(folder / "val.json")}
    chat = toy_run(folder / "runs/chatty", **about)
    Image.new("RGB", (30, 20), "green").save(chat / "curves.png")
    act = toy_run(folder / "runs/arm", stage="vla", image_dir=str(folder),
                  train_json=str(folder / "train.json"))
    (folder / "endless").mkdir()
    found = {"chat": Served(chat, folder), "act": Served(act, folder),
             # random weights: it never says that it has ended, so its answers take as long as they may
             "endless": Served(make_run(folder / "endless"), folder, "--batch_size", "1", "--waiting", "2",
                               "--max_new_tokens", "1000")}
    yield {name: server.ready() for name, server in found.items()}
    for server in found.values():
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def chat(servers):
    return servers["chat"]


@pytest.fixture(scope="module")
def policy(servers):
    return servers["act"]


@pytest.fixture(scope="module")
def assistant(folder, servers):
    return Assistant(folder / "runs/chatty", "cpu")


@pytest.fixture(scope="module")
def arm(folder, servers):
    return Assistant(folder / "runs/arm", "cpu")


def uri(path, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def message(text, pictures=(), role="user"):
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in pictures]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}] if parts else text}


# -- chat ----------------------------------------------------------------------------------------------------

def questions(folder):
    """-> [(text, pictures' files)]: text only, one picture, two; all answers are different."""
    words = ["red", "blue", "star", "heart", "circle"]
    texts = [(f"Reverse: {' '.join(three)}", []) for three in itertools.permutations(words, 3)]
    shown = [("Describe the picture.", [folder / f"{i}.png"]) for i in range(5)]
    return texts[:27] + shown + [("Which picture has more shapes?", [folder / "0.png", folder / "1.png"])]


def example(assistant, text, files):
    return assistant.example(text, [Image.open(file).convert("RGB") for file in files])


def expected(assistant, asked, most=40):
    return [assistant.answer([example(assistant, *each)], most)[0] for each in asked]


def test_an_answer_is_generates_answer(chat, assistant, folder):
    asked = questions(folder)[::4]
    want = expected(assistant, asked)
    assert [chat.ask(text, map(uri, files), max_tokens=40) for text, files in asked] == want
    assert len(set(want)) == len(want) and want[0] == "star blue red"


def test_64_clients_at_once_each_get_their_own_answer_and_share_batches(chat, assistant, folder):
    asked = questions(folder)
    want, before = dict(zip(map(str, asked), expected(assistant, asked))), chat.say("GET", "/health")[2]
    assert len(set(want.values())) == len(asked)            # or a mix-up could go unseen

    def client(i):
        connection, rng = chat.connect(), random.Random(i)
        mine = rng.sample(asked, 5)
        got = [chat.ask(text, map(uri, files), on=connection, max_tokens=40) for text, files in mine]
        return [(str(each), answer) for each, answer in zip(mine, got)]

    with ThreadPoolExecutor(64) as clients:
        answers = [each for client in clients.map(client, range(64)) for each in client]
    assert len(answers) == 320 and all(want[question] == answer for question, answer in answers)
    after = chat.say("GET", "/health")[2]
    assert after["answered"] - before["answered"] == 320 and after["waiting"] == 0
    assert after["batches"] - before["batches"] < 160


def test_streamed_pieces_are_the_answer(chat, assistant, folder):
    text = "Describe the picture."
    files = [folder / f"{i}.png" for i in range(5)]
    longest = max(files, key=lambda file: len(expected(assistant, [(text, [file])])[0]))
    shown = [uri(longest)]
    events = chat.events(text, shown, max_tokens=40)
    *pieces, last, usage = events
    whole = chat.say("POST", CHAT, {"messages": [message(text, shown)], "max_tokens": 40})[2]
    said = [piece["choices"][0]["delta"]["content"] for piece in (*pieces, last)]
    assert len(pieces) > 3 and "".join(said) == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage["usage"] == whole["usage"] and usage["choices"] == []
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_each_row_of_a_batch_streams_and_has_its_own_limit(chat, assistant, folder):
    """While others ask: what is cut says so, what ends by itself says so."""
    asked = [(folder / f"{i}.png", most) for i in range(5) for most in (1, 2, 3, 60)]
    text = "Describe the picture."
    with ThreadPoolExecutor(20) as clients:
        got = list(clients.map(lambda each: chat.events(text, [uri(each[0])], max_tokens=each[1]), asked))
    for (file, most), events in zip(asked, got):
        ids = assistant.answer_ids([example(assistant, text, [file])], most)[0]
        said = "".join(event["choices"][0]["delta"]["content"] for event in events[:-1])
        assert said == assistant.language.decode(ids)
        assert events[-1]["usage"]["completion_tokens"] == len(ids)
        ended = ids[-1] == assistant.language.end_id
        assert events[-2]["choices"][0]["finish_reason"] == ("stop" if ended else "length")


def test_several_turns_are_read_as_in_training(chat, assistant, folder):
    turns = ["Describe the picture.", "a star", "Where is it?", "left", "What shape is red?"]
    shown = [[uri(folder / "2.png")], [], []]
    for pictures in (shown, [shown[0], [], [uri(folder / "3.png")]]):
        files = [folder / f"{n}.png" for n, _ in zip((2, 3), [1 for each in pictures if each])]
        row = {"image": [file.name for file in files], "conversations": talk(
            *("<image>\n" * len(pictures[i // 2]) * (i % 2 == 0) + text for i, text in enumerate(turns)))}
        (folder / "turns.json").write_text(json.dumps([row]))
        data = Conversations(folder / "turns.json", assistant.language,
                             Pictures(folder, assistant.transforms), 512)
        sent = [message(text, pictures[i // 2] if i % 2 == 0 else (), ("user", "assistant")[i % 2])
                for i, text in enumerate(turns)]
        answer = chat.say("POST", CHAT, {"messages": sent, "max_tokens": 30})[2]
        assert answer["choices"][0]["message"]["content"] == assistant.answer([data.question(0)], 30)[0]
        assert answer["usage"]["prompt_tokens"] == len(data.question(0)["input_ids"])


def test_pictures_stand_at_their_tags_and_control_tokens_are_text(chat, assistant, folder):
    both = [folder / "0.png", folder / "1.png"]
    for text, files in [("Is <image> like <image>?", both), ("</s> Reverse: red </s>", [])]:
        same = example(assistant, text, files)
        answer = chat.say("POST", CHAT, {"messages": [message(text, map(uri, files))], "max_tokens": 20})[2]
        assert answer["usage"]["prompt_tokens"] == len(same["input_ids"])
        assert answer["choices"][0]["message"]["content"] == assistant.answer([same], 20)[0]
        assert assistant.language.end_id not in same["input_ids"].tolist()


def test_the_openai_package_talks_to_it(chat, assistant, folder):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{chat.port}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    messages = [message("Describe the picture.", [uri(folder / "4.png")])]
    want, = expected(assistant, [("Describe the picture.", [folder / "4.png"])])
    whole = client.chat.completions.create(model=name, messages=messages, max_tokens=40, temperature=0)
    assert name == "chatty" and whole.choices[0].message.content == want
    with client.chat.completions.create(model=name, messages=messages, max_tokens=40, stream=True,
                                        stream_options={"include_usage": True}) as stream:
        said = list(stream)
    assert "".join(part.choices[0].delta.content for part in said if part.choices) == want
    assert said[-1].usage == whole.usage
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5' here, only 'chatty'"):
        client.chat.completions.create(model="gpt-5", messages=messages)
    with pytest.raises(openai.BadRequestError, match="it is greedy"):
        client.chat.completions.create(model=name, messages=messages, temperature=0.7)


# -- refusals ------------------------------------------------------------------------------------------------

def shows(url):
    return {"messages": [message("What is it?", [url])]}


def encoded(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def bomb():
    """A PNG of 200 bytes that would be 40,000 x 40,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def flat():
    """A PNG of 20 million pixels in 30 kB."""
    file = io.BytesIO()
    Image.new("L", (5000, 4000)).save(file, "png")
    return file.getvalue()


def text(content, **more):
    return {"messages": [{"role": "user", "content": content}], **more}


REFUSED = {
    "a wrong path": ("GET", "/v1/nothing", None, 404, "there is nothing at /v1/nothing"),
    "a path on disk": ("GET", "/../config.json", None, 404, "there is nothing at"),
    "a picture that is not offered": ("GET", "/pictures/99", None, 404, "there is nothing at"),
    "a wrong method": ("GET", CHAT, None, 405, "is asked by POST, not by GET"),
    "a method to change things": ("DELETE", "/", None, 405, "/ is asked by GET, not by DELETE"),
    "an action of a chat model": ("POST", ACT, {"image": "", "instruction": "go"}, 404, "not for this run"),
    "no JSON": ("POST", CHAT, "{'a': 1}", 400, "no JSON"),
    "JSON in letters of nobody": ("POST", CHAT, b"\xff\xfe\xfa", 400, "no JSON"),
    "deep JSON": ("POST", CHAT, "[" * 200_000, 400, "no JSON"),
    "a list": ("POST", CHAT, [1], 400, "must be a JSON object"),
    "an unknown model": ("POST", CHAT, text("a", model="gpt-5"), 404, "there is no model 'gpt-5' here"),
    "no messages": ("POST", CHAT, {"model": "chatty"}, 400, "'messages' must be a list"),
    "messages of another form": ("POST", CHAT, {"messages": [1]}, 400, "'messages' must be a list"),
    "a system text": ("POST", CHAT, {"messages": [message("a", role="system")]}, 400, "was learned"),
    "a last word of its own": ("POST", CHAT, {"messages": [message("a"), message("b", role="assistant")]},
                               400, "the last from 'user'"),
    "two of the user": ("POST", CHAT, {"messages": [message("a"), message("b")]}, 400, "must be from 'gpt'"),
    "sampling": ("POST", CHAT, text("a", temperature=0.7), 400, "'temperature' is not done here"),
    "tools": ("POST", CHAT, text("a", tools=[{"type": "function"}]), 400, "'tools' is not done here"),
    "a limit that is none": ("POST", CHAT, text("a", max_tokens="many"), 400, "must be a whole number"),
    "a limit of nothing": ("POST", CHAT, text("a", max_tokens=0), 400, "must be a whole number"),
    "half a character": ("POST", CHAT, text("\ud83d"), 400, "half a character"),
    "a question that is too long": ("POST", CHAT, text("red " * 600), 400, "--max_length is 512"),
    "a tag without a picture": ("POST", CHAT, text("<image> what?"), 400, "0 pictures"),
    "an address": ("POST", CHAT, shows("http://127.0.0.1:1/a.png"), 400, "No address is fetched"),
    "a file": ("POST", CHAT, shows("file:///etc/passwd"), 400, "No address is fetched"),
    "no base64": ("POST", CHAT, shows("data:image/png;base64,%%%"), 400, "must be base64"),
    "no picture": ("POST", CHAT, shows(encoded(b"GIF89a, or so it says")), 400, "picture 1 can't be read"),
    "a program for Ghostscript": ("POST", CHAT, shows(encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n")), 400,
                                  "picture 1 can't be read"),
    "many large ones": ("POST", CHAT, {"messages": [message("?", [encoded(flat())] * 3)]}, 400,
                        "the pictures have more than 50,000,000 pixels"),
    "a bomb": ("POST", CHAT, shows(encoded(bomb())), 400, "exceeds limit of 50000000 pixels"),
    "more than 20 MB": ("POST", CHAT, b" " * 20_000_001, 413, "20,000,001 bytes, at most 20,000,000"),
    "a page of another site": ("POST", CHAT, text("a"), 403, "other sites", {"Origin": "http://evil.org"}),
    "a page without a site": ("POST", CHAT, text("a"), 403, "other sites", {"Origin": "null"}),
    "a name that means 127.0.0.1": ("GET", "/about", None, 403, "other sites", {"Host": "evil.example:8000"})}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_wrong_gets_its_status_and_one_sentence_and_the_server_lives_on(kind, chat):
    method, path, body, status, words, *headers = REFUSED[kind]
    connection = chat.connect()
    got, told, answer = chat.say(method, path, body, *headers, on=connection)
    sentence = answer["error"]["message"]
    assert got == status and words in sentence, (got, sentence)
    assert "\n" not in sentence and len(sentence) < 400 and "/tmp" not in sentence
    assert status != 405 or told["Allow"] in ("GET", "POST")
    assert chat.ask("Reverse: red star", on=connection) == "star red"       # the same connection goes on
    assert not chat.errors.read_text()


def test_a_body_of_unknown_length_is_refused_and_what_is_no_http_too(chat):
    end = b" HTTP/1.1\r\nHost: localhost\r\n"
    chunked = b"POST " + CHAT.encode() + end + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
    for said, status in ((chunked, 411), (b"GET /" + end + b"A: b\r\n" * 200 + b"\r\n", 431),
                         (b"FOO /" + end + b"\r\n", 501)):
        with socket.create_connection((chat.host, int(chat.port)), 10) as line:
            line.sendall(said)
            answer = line.makefile("rb").read()             # until the server closes
        assert f" {status} " in answer.decode().splitlines()[0] and b"Traceback" not in answer, answer
    assert chat.ask("Reverse: red star") == "star red"


def test_who_waits_to_be_told_to_go_on_is_told_at_once(chat):
    """curl does so before it sends a megabyte, as a picture of a camera is in json_numpy's form."""
    body = json.dumps(text("Reverse: red star")).encode()
    with socket.create_connection((chat.host, int(chat.port)), 5) as line:
        line.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                     + f"Content-Length: {len(body)}\r\n\r\n".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 100 ")  # nothing of the body was sent yet
        line.sendall(body)
        assert line.recv(100).startswith(b"HTTP/1.1 200 ")


# -- robots --------------------------------------------------------------------------------------------------

def packed(array):
    """As json_numpy writes an array."""
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str,
            "shape": list(array.shape)}


def unpacked(sent):
    return np.frombuffer(base64.b64decode(sent["__numpy__"]), sent["dtype"]).reshape(sent["shape"])


def test_act_answers_in_the_manner_of_the_question(policy, arm, folder):
    """OpenVLA's, OFT's, base64, and JSON inside of JSON: all equal Assistant.act, to the bit."""
    front, wrist = (Image.open(folder / f"{i}.png").convert("RGB") for i in (0, 1))
    one, two = (arm.act([pictures], ["Push it"], "left")[0, 0] for pictures in ([front], [front, wrist]))
    arrays = [packed(np.array(picture)) for picture in (front, wrist)]
    files = [base64.b64encode((folder / f"{i}.png").read_bytes()).decode() for i in (0, 1)]
    task = {"instruction": "Push it", "unnorm_key": "left"}
    assert not np.array_equal(one, two)

    def act(**asked):
        status, _, answer = policy.say("POST", ACT, asked)
        assert status == 200, answer
        return answer

    assert np.array_equal(unpacked(act(image=arrays[0], **task)), one)
    assert act(image=files[0], **task) == act(image=[uri(folder / "0.png")], **task) == one.tolist()
    assert act(image=files, **task) == two.tolist()
    chunk = act(full_image=arrays[0], wrist_image=arrays[1], state=packed(np.zeros(8)), **task)
    assert len(chunk) == 1 and np.array_equal(unpacked(chunk[0]), two)
    assert act(full_image=files[0], left_wrist_image=files[1], **task) == [two.tolist()]
    twice = act(encoded=json.dumps({"image": arrays[0], **task}))
    assert isinstance(twice, str) and np.array_equal(unpacked(json.loads(twice)), one)
    right = act(image=files[0], instruction="Push it", unnorm_key="right")
    assert right == arm.act([[front]], ["Push it"], "right")[0, 0].tolist() != one.tolist()


def test_of_a_chunk_oft_gets_all_and_everybody_else_the_first():
    chunk = np.arange(6.0).reshape(2, 3)
    array = packed(np.zeros((4, 4, 3), np.uint8))
    assert [unpacked(each).tolist() for each in protocols.write_act({"full_image": array}, chunk)] == [
        [0, 1, 2], [3, 4, 5]]
    assert unpacked(protocols.write_act({"image": array}, chunk)).tolist() == [0, 1, 2]
    assert protocols.write_act({"full_image": "iVBOR"}, chunk) == [[0, 1, 2], [3, 4, 5]]
    assert protocols.write_act({"image": "iVBOR"}, chunk) == [0, 1, 2]


@pytest.mark.parametrize("sent, read", [
    ([1, 2.5], [1, 2.5]), ("F4", [1, 2.5]), ("F8", [1, 2.5]), ([1], None), ([1, None], None), ((), None),
    ("x", None), ([1, float("inf")], None), ({"shape": [2]}, None),
    ({"__numpy__": "//", "dtype": "|O"}, None)])
def test_the_state_of_a_robot_is_read_in_the_forms_of_its_clients(sent, read):
    unit = {"q01": [-1.0, -1.0], "q99": [1.0, 1.0], "mask": [True, True]}
    policy = ActionTokens(1000, {"arm": {"action": unit, "state": unit}}, 1, state=True)
    if sent in ("F4", "F8"):
        array = np.array([1, 2.5], sent.lower())
        sent = {"__numpy__": base64.b64encode(array).decode(), "dtype": array.dtype.str, "shape": [2]}
    asked = {"instruction": "go", "image": packed(np.zeros((4, 4, 3), np.uint8)), "state": sent}
    if read is None:
        with pytest.raises(protocols.Refused, match="'state' must be 2 finite numbers"):
            protocols.read_act(asked, policy)
    else:
        assert protocols.read_act(asked, policy)["state"] == read
        assert "state" not in protocols.read_act(asked, ActionTokens(1000, {"arm": {"action": unit}}, 1))
    assert protocols.read_act(asked | {"state": None}, policy)["state"] is None         # it is not known
    with pytest.raises(protocols.Refused, match="'state' must be 2 finite numbers"):
        protocols.read_act({name: asked[name] for name in ("instruction", "image")}, policy)


def test_json_numpy_and_requests_talk_to_it_as_openvla_and_oft_do(policy, arm, folder):
    json_numpy, requests = pytest.importorskip("json_numpy"), pytest.importorskip("requests")
    pictures = [Image.open(folder / f"{i}.png").convert("RGB") for i in (2, 3)]
    front, wrist = map(np.array, pictures)
    task = {"instruction": "Push it", "unnorm_key": "right"}

    def post(payload):                                      # as requests does it after json_numpy.patch()
        answer = requests.post(f"http://127.0.0.1:{policy.port}/act", data=json_numpy.dumps(payload),
                               headers={"Content-Type": "application/json"}, timeout=60)
        assert answer.status_code == 200, answer.text
        return json_numpy.loads(answer.text)

    one, two = (arm.act([each], ["Push it"], "right")[0, 0] for each in (pictures[:1], pictures))
    action = post({"image": front, **task})
    assert action.dtype == np.float64 and np.array_equal(action, one)
    twice = post({"encoded": json_numpy.dumps({"image": front, **task})})
    assert np.array_equal(json_numpy.loads(twice), one)
    chunk = post({"full_image": front, "wrist_image": wrist, "state": np.zeros(8), **task})
    assert isinstance(chunk, list) and np.array_equal(chunk, [two])


def test_robots_that_ask_together_get_their_own_actions_in_their_own_units(policy, arm, folder):
    asked = [(i, key) for i in range(5) for key in ("left", "right")] * 3
    want = {(i, key): arm.act([[Image.open(folder / f"{i}.png").convert("RGB")]], ["go"], key)[0, 0].tolist()
            for i, key in asked}
    with ThreadPoolExecutor(30) as robots:
        got = list(robots.map(lambda each: policy.say("POST", ACT, {
            "image": uri(folder / f"{each[0]}.png"), "instruction": "go", "unnorm_key": each[1]})[2], asked))
    assert got == [want[each] for each in asked] and len({str(action) for action in got}) > 5


BLACK = packed(np.zeros((4, 4, 3), np.uint8))
WRONG = {
    "no units": ({"unnorm_key": None}, "knows the datasets left, right"),
    "units of nobody": ({"unnorm_key": "tail"}, "knows the datasets left, right"),
    "units that are a list": ({"unnorm_key": ["left"]}, "'unnorm_key'"),
    "no instruction": ({"instruction": " "}, "'instruction' must be a text"),
    "no picture": ({"image": []}, "a step has 0 pictures"),
    "an array of floats": ({"image": packed(np.zeros((4, 4, 3)))}, "of uint8"),
    "an array without colors": ({"image": packed(np.zeros((4, 4), np.uint8))}, "(H, W, 3)"),
    "an array that is too short": ({"image": BLACK | {"shape": [40, 40, 3]}}, "(H, W, 3)"),
    "a negative array": ({"image": BLACK | {"shape": [-4, -4, 3]}}, "(H, W, 3)"),
    "an object": ({"image": {"__numpy__": "gASVAAAA", "dtype": "|O", "shape": [1, 2, 3]}}, "of uint8"),
    "JSON inside that is none": ({"encoded": "{"}, "no JSON"),
    "JSON inside that is no text": ({"encoded": 3}, "no JSON")}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_request_for_an_action_gets_one_sentence(kind, policy, folder):
    more, words = WRONG[kind]
    asked = {"image": uri(folder / "0.png"), "instruction": "go", "unnorm_key": "left", **more}
    status, _, answer = policy.say("POST", ACT, asked)
    assert status == 400 and words in answer["error"]["message"], answer


def test_a_policy_does_not_chat(policy):
    status, _, answer = policy.say("POST", CHAT, text("hello"))
    assert status == 404 and "a policy acts" in answer["error"]["message"]


# -- the queue -----------------------------------------------------------------------------------------------

def test_what_fails_in_a_batch_is_tried_alone_and_only_the_culprit_is_told(folder, servers, monkeypatch):
    here = Desk(folder / "runs/chatty", 8, 40)
    whole, failed, go = here.assistant.answer_ids, [], threading.Event()

    def answer_ids(examples, *rest, **options):
        go.wait()
        if len(examples) > 1 or failed and examples[0] is failed[0]:
            raise torch.OutOfMemoryError("too much")
        return whole(examples, *rest, **options)

    monkeypatch.setattr(here.assistant, "answer_ids", answer_ids)
    jobs = [here.ask(f"Reverse: red {word}", []) for word in ("star", "heart", "blue", "circle")]
    failed.append(jobs[2].example)
    go.set()
    for job, word in zip(jobs, ("star", "heart", "blue", "circle")):
        if word == "blue":
            with pytest.raises(torch.OutOfMemoryError):
                list(here.news(job, lambda: False))
        else:
            list(here.news(job, lambda: False))
            assert here.assistant.language.decode(job.answer) == f"{word} red"


def test_nobody_is_cut_by_a_neighbor(folder, servers):
    """All rows are padded to the longest, and the model has learned 1,024 positions."""
    here = Desk(folder / "runs/chatty", 8, 800)
    assert here.longest == 224
    with pytest.raises(BadExample, match="there is room for 224. Shorten it"):
        here.ask("red " * 300, [])
    with pytest.raises(UserError, match="--max_new_tokens 1024: the language model knows 1024 positions"):
        Desk(folder / "runs/chatty", 8, 1024)


def test_a_picture_is_read_by_the_rules_of_training(folder, tmp_path):
    turned = Image.open(folder / "0.png").convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6
    for name, image, options in (("a.jpg", turned, {"exif": exif}), ("b.png", turned.convert("RGBA"), {}),
                                 ("c.tiff", turned, {}), ("d.gif", turned, {})):
        image.putalpha(60) if image.mode == "RGBA" else None
        image.save(tmp_path / name, **options)
        got = open_picture(1, (tmp_path / name).read_bytes())
        assert np.array_equal(got, desk.read_image(tmp_path / name)) and got.mode == "RGB"


def waits(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def open_line(server, most=1000):
    """Sends a request with a long answer, and does not wait."""
    connection = server.connect()
    connection.request("POST", CHAT, json.dumps(text("x", max_tokens=most)))
    return connection


def test_who_hangs_up_frees_the_place_and_the_model(servers):
    """Two places, batches of one, answers of 1,000 tokens: one is answered, one waits, a third must go."""
    server = servers["endless"]
    health = lambda: server.say("GET", "/health")[2]        # noqa: E731
    began = time.monotonic()
    list(server.events("x"))
    alone = time.monotonic() - began
    before = health()
    busy = open_line(server)
    waits(lambda: health()["batches"] > before["batches"])
    waiting = open_line(server)
    waits(lambda: health()["waiting"] == 1)
    status, headers, answer = server.say("POST", CHAT, text("x"))
    assert status == 503 and headers["Retry-After"] == "1" and "Come later" in answer["error"]["message"]
    waiting.close()
    busy.close()
    began = time.monotonic()
    waits(lambda: server.say("POST", CHAT, text("x", max_tokens=1))[0] == 200)
    assert time.monotonic() - began < alone / 2 + 1         # it did not wait for an answer that nobody hears
    assert health()["answered"] == before["answered"] + 1


def test_sigterm_ends_it_after_the_answers_under_way(servers):
    server = servers["endless"]
    batches = server.say("GET", "/health")[2]["batches"]
    lines = [open_line(server, 300), open_line(server, 300)]
    waits(lambda: server.say("GET", "/health")[2]["batches"] > batches
          and server.say("GET", "/health")[2]["waiting"] == 1)
    server.process.send_signal(signal.SIGTERM)
    for line in lines:
        answer = json.loads(line.getresponse().read())
        assert answer["usage"]["completion_tokens"] == 300
    assert server.process.wait(20) == 0
    with pytest.raises(ConnectionRefusedError):
        server.connect().connect()
    assert "Traceback" not in server.errors.read_text()


def test_it_is_reached_from_this_machine_only_and_says_that_there_is_no_password(chat):
    said = r"serves   chatty at http://127\.0\.0\.1:\d+, no password, to this machine only\n"
    assert re.fullmatch(said, chat.said)
    with pytest.raises(ConnectionRefusedError):             # another address of the same machine
        socket.create_connection(("127.0.0.2", int(chat.port)), 5)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(chat):
    with pytest.raises(UserError, match=f"nothing can listen at --host 127.0.0.1 --port {chat.port} "):
        serve.main(serve.ServeConfig(ckpt="not there", port=int(chat.port)))


# -- the page ------------------------------------------------------------------------------------------------

def test_the_page_asks_no_other_place_for_anything(chat):
    html = (ROOT / "serve.html").read_text()
    assert chat.say("GET", "/")[2].decode() == html
    assert not re.search(r"https?:|src=\"//|@import|url\(", html)
    policy = chat.say("GET", "/")[1]["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'")


def test_held_out_pictures_are_offered_byte_for_byte(chat, policy, folder):
    about = chat.say("GET", "/about")[2]
    assert [each["question"] for each in about["examples"]] == ["Describe the picture."] * 5 + ["Which?"]
    assert about["examples"][5]["pictures"] == ["/pictures/5", "/pictures/6"]
    assert chat.say("GET", "/pictures/3")[2] == (folder / "3.png").read_bytes()
    assert [each["question"] for each in policy.say("GET", "/about")[2]["examples"]] == ["Push it."] * 5


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_person_asks_on_the_page(chat, assistant, folder):
    with Browser(f"http://127.0.0.1:{chat.port}/") as page:
        page.until("document.querySelectorAll('#examples img').length == 7")
        page.run("document.querySelectorAll('#examples button')[1].click()")
        page.until("pictures.length == 1")
        page.run("at('ask').click()")
        page.until("!running && messages.length == 2")
        turns = "[...document.querySelectorAll('.turn')].map(turn => turn.innerText.trim())"
        want = expected(assistant, [("Describe the picture.", [folder / "1.png"])], 256)
        assert page.run(turns) == ["Describe the picture.", *want]
        page.run("at('text').value = 'What shape is red?'; at('ask').click()")
        page.until("!running && messages.length == 4")
        second = assistant.example("What shape is red?", [Image.open(folder / "1.png").convert("RGB")], talk(
            "<image>\nDescribe the picture.", *want))
        assert page.run(turns)[3] == assistant.answer([second])[0]
        page.run("at('anew').click()")
        page.choose("#file", folder / "4.png")
        page.until("pictures.length == 1")
        assert page.run("pictures[0]") == uri(folder / "4.png")
        page.run("at('text').value = 'red '.repeat(600); at('ask').click()")
        page.until("document.querySelector('.wrong')")
        assert "--max_length is 512" in page.run(turns)[1]
        asked = page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(each.startswith((f"http://127.0.0.1:{chat.port}/", "data:")) for each in asked)
        assert page.run("at('curves').naturalWidth") == 30


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_policy_acts_on_the_page_of_a_phone(policy, arm, folder):
    with Browser(f"http://127.0.0.1:{policy.port}/", 360, 700) as page:
        page.until("document.querySelectorAll('#examples img').length == 5")
        page.run("document.querySelectorAll('#examples button')[2].click()")
        page.until("pictures.length == 1")
        page.run("at('key').value = 'right'; at('ask').click()")
        page.until("document.querySelectorAll('.value').length == 3")
        want = arm.act([[Image.open(folder / "2.png").convert("RGB")]], ["Push it."], "right")[0, 0]
        assert page.run("[...document.querySelectorAll('.value')].map(value => value.textContent)") == [
            f"{value:.4f}" for value in want]
        assert page.run("document.documentElement.scrollWidth") <= 360


def test_help_is_there_without_torch():
    code = ("import sys; sys.argv = ['serve.py', '--help']; import runpy\n"
            "try: runpy.run_path('serve.py', run_name='__main__')\n"
            "except SystemExit: pass\nassert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--max_new_tokens" in done.stdout, done.stderr
