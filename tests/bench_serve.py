"""How fast serve.py answers, and whether each client gets its own answer.

    python tests/bench_serve.py --ckpt runs/toy-finetune-x7     # 64 clients at once, 1,000 requests

The questions are those of the run's held-out file, with their pictures. Each answer is compared with the one
that the model gives in this process, one question at a time. A policy is asked for actions.
"""
import argparse
import http.client
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from base64 import b64encode
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config  # noqa: E402, F401  (before torch)
from generate import Assistant  # noqa: E402
from images import read_image  # noqa: E402
from prompts import images_of, turns_of  # noqa: E402


def questions(assistant, count):
    """-> [(path, request, answer)], all different."""
    cfg, asked = assistant.cfg, []
    data = assistant.dataset(cfg.val_json or cfg.train_json.split(",")[0], cfg.image_dir)
    for i in random.Random(0).sample(range(len(data)), count):
        files = [data.pictures.path(name) for name in images_of(data.row(i))]
        sent, opened = [b64encode(file.read_bytes()).decode() for file in files], list(map(read_image, files))
        if assistant.policy:
            text = data.stored(i)[0]["instruction"]
            asked.append(("/act", {"image": sent, "instruction": text},
                          assistant.act([opened], [text])[0, 0].tolist()))
        else:
            text = turns_of(data.row(i))[0]["value"]
            parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{each}"}}
                     for each in sent]
            messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
            asked.append(("/v1/chat/completions", {"messages": messages},
                          assistant.answer([assistant.example(text, opened)])[0]))
    return asked


def client(port, asked, times, wrong):
    """Asks until nothing is left to be asked."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    while asked:
        try:
            path, request, want = asked.pop()
        except IndexError:
            return
        began = time.perf_counter()
        connection.request("POST", path, json.dumps(request))
        answer = json.loads(connection.getresponse().read())
        times.append(time.perf_counter() - began)
        got = answer if path == "/act" else answer["choices"][0]["message"]["content"]
        if got != want:
            wrong.append((request, want, got))


def cpu_seconds(process):
    """Of the server so far. On busy cores the clock says little."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(args):
    server = subprocess.Popen([sys.executable, str(ROOT / "serve.py"), "--ckpt", args.ckpt, "--port", "0",
                               "--batch_size", str(args.batch_size)], stdout=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r":(\d+),", server.stdout.readline())[1])
        asked = questions(Assistant(args.ckpt), min(args.different, args.requests))
        asked = [asked[i % len(asked)] for i in range(args.requests)]
        for clients in [int(number) for number in args.clients.split(",")]:
            times, wrong, left = [], [], list(asked)
            threads = [threading.Thread(target=client, args=(port, left, times, wrong))
                       for _ in range(clients)]
            began, busy = time.perf_counter(), cpu_seconds(server)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds, busy = time.perf_counter() - began, cpu_seconds(server) - busy
            middle, late, last = np.quantile(times, [0.5, 0.95, 1])
            print(f"{clients} clients, batches up to {args.batch_size}: {len(times)} of {args.requests} "
                  f"answered, {len(wrong)} wrong; {len(times) / seconds:.0f} a second, "
                  f"{busy / len(times) * 1e3:.0f} ms of CPU each; latency: middle {middle * 1e3:.0f} ms, "
                  f"95 % {late * 1e3:.0f} ms, longest {last * 1e3:.0f} ms", flush=True)
            for each in wrong[:3]:
                print("wrong:", str(each[0])[-200:], each[1:])
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--clients", default="1,64", help="one round for each number (%(default)s)")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--different", type=int, default=200, help="different questions (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=16)
    main(parser.parse_args())
