"""A trained model behind HTTP: a page to try it out, OpenAI's chat API, OpenVLA's /act. There is no password.

    python serve.py --ckpt runs/toy-finetune-x7             # then open http://127.0.0.1:8000

    GET  /                      the page, serve.html; it asks for /about, /pictures/0 and /curves.png
    POST /v1/chat/completions   several turns, pictures as data URIs, streamed or not; GET /v1/models
    POST /act                   stage vla: an action, for clients of OpenVLA and OFT, or with plain base64
    GET  /health                what waits, what was answered

Each connection has a thread: it reads a request (protocols.py), asks at the desk, which has the model
(desk.py), and waits. An error is one sentence, in the form that OpenAI's clients know.
"""
import ipaddress
import json
import re
import select
import socket
import socketserver
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from config import UserError, check_limits, knob, parse


@dataclass(frozen=True)
class ServeConfig:
    ckpt: str = knob("", "run folder or step folder")
    host: str = knob("127.0.0.1", "address to listen on; this one is reached from this machine only")
    port: int = knob(8000, "port to listen on; 0 = any free one")
    batch_size: int = knob(16, "requests answered at once; fewer where memory runs out", "requests")
    waiting: int = knob(128, "requests taken in at a time; one more is told to come later", "requests")
    max_new_tokens: int = knob(256, "longest answer; a request may ask for less", "tokens")

    def __post_init__(self):
        if not self.ckpt:
            raise UserError("--ckpt RUN is missing")
        check_limits(self, {"port": (0, 65535), "batch_size": (1, 10 ** 4), "waiting": (1, 10 ** 4),
                            "max_new_tokens": (1, 10 ** 5)})


if __name__ == "__main__":
    cfg = parse(ServeConfig, description=__doc__.partition("\n")[0])

import checkpoint
import protocols
import ranks
from desk import Desk, about
from errors import explain
from protocols import Refused

BYTES = 20_000_000                                          # of the largest request
POSTS = ("/v1/chat/completions", "/act")                    # all other paths are asked by GET


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size, timeout = 128, 0.5                  # handle_request looks up after so many seconds
    handle_error = lambda *_: None                          # a connection was lost: there is nobody to tell


class Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 60              # no byte for a minute: the connection is closed
    wbufsize, disable_nagle_algorithm = -1, True            # head and body in one packet: 40 ms less
    error_content_type, error_message_format = "text/plain", "%(message)s\n"    # of what is no HTTP
    log_message = lambda *_: None                           # the screen is for what goes wrong
    left, began = 0, False                                  # bytes to be read; has a stream begun?

    def handle_expect_100(self):
        """curl asks before it sends a megabyte, and waits a second for what the buffer would keep back."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def do_GET(self):
        """Of every method."""
        place = self.command == "POST" and self.server.places.acquire(blocking=False)
        try:
            length = self.headers.get("Content-Length", "")
            self.left = int(length) if re.fullmatch("[0-9]{1,15}", length) else 0
            self.respond(place)
        except UserError as e:
            self.refuse(str(e), getattr(e, "status", 400), getattr(e, "headers", {}))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as e:
            print(explain(e)[0], file=sys.stderr, flush=True)
            self.refuse(f"this server failed ({type(e).__name__}); its screen says why", 500)
        finally:
            if place:                                       # when all places are free, the server may end
                self.server.places.release()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def respond(self, place):
        path, server, desk = self.path.partition("?")[0], self.server, self.server.desk
        self.check_sender(self.headers.get("Host", ""), self.headers.get("Origin"))
        method = "POST" if path in POSTS else "GET"
        if path not in (*POSTS, *server.files, "/health"):
            raise Refused(f"there is nothing at {path}. GET / is a page; POST {' or '.join(POSTS)}", 404)
        if self.command != method:
            raise Refused(f"{path} is asked by {method}, not by {self.command}", 405, {"Allow": method})
        if path in server.files:
            self.reply(*server.files[path])
        elif path == "/health":
            self.reply({"status": "ok", "model": server.name, "answered": desk.answered,
                        "batches": desk.batches, "waiting": sum(not job.gone for job in desk.jobs)})
        elif not place:
            raise Refused(f"{server.cfg.waiting} requests wait. Come later", 503, {"Retry-After": "1"})
        elif (path == "/act") != (desk.assistant.policy is not None):
            raise Refused(f"{path} is not for this run: a policy acts, any other one chats", 404)
        else:
            (self.act if path == "/act" else self.chat)(self.asked(), desk)

    def check_sender(self, host, origin):
        """A page of another site must not ask in the user's name, nor one whose name means 127.0.0.1."""
        ours = ("127.0.0.1", "localhost", "[::1]", self.server.cfg.host)
        if (origin and origin.partition("://")[2] != host
                or self.server.loopback and re.sub(r":\d*$", "", host).lower() not in ours):
            raise Refused("other sites' pages are not answered. Open the address that this server shows", 403)

    def asked(self):
        """The JSON object that was sent."""
        if not self.left:
            self.close_connection = True                    # nobody knows how much follows
            raise Refused("Content-Length must say how many bytes of JSON follow", 411)
        if self.left > BYTES:
            raise Refused(f"the request has {self.left:,} bytes, at most {BYTES:,} are read", 413)
        return protocols.loads(b"".join(self.rest()))

    def rest(self):
        """What is left to be read of the request."""
        until = time.monotonic() + self.timeout
        while self.left:
            piece = self.rfile.read1(min(self.left, 65536))
            if not piece or time.monotonic() > until:
                raise ConnectionAbortedError
            self.left -= len(piece)
            yield piece

    def hung_up(self):
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)      # what came is the end

    def chat(self, asked, desk):
        job = desk.ask(**protocols.read_chat(asked, self.server.name))
        for said in protocols.write_chat(asked, job, desk.news(job, self.hung_up), desk.assistant.language):
            self.event(json.dumps(said)) if job.streams else self.reply(said)
        if job.streams:
            self.event("[DONE]")

    def act(self, asked, desk):
        twice = "encoded" in asked                          # without json_numpy: JSON in a text, both ways
        asked = protocols.loads(asked["encoded"]) if twice else asked
        job = desk.ask(**protocols.read_act(asked, desk.assistant.policy))
        list(desk.news(job, self.hung_up))
        answer = protocols.write_act(asked, job.answer)
        self.reply(json.dumps(answer) if twice else answer)

    def event(self, data):
        if not self.began:
            self.began = self.close_connection = True
            self.head(200, "text/event-stream", {})
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def refuse(self, sentence, status, headers={}):
        error = {"error": {"message": sentence, "code": None, "param": None,
                           "type": "invalid_request_error" if status < 500 else "server_error"}}
        if self.began:
            return self.event(json.dumps(error))
        if self.left < 10 * BYTES:                          # on unread bytes the sentence would be lost
            list(self.rest())
        self.reply(error, status=status, headers=headers)

    def reply(self, content, kind="application/json", status=200, headers={}):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.head(status, kind, headers | {"Content-Length": len(content)})
        self.wfile.write(content)
        self.wfile.flush()

    def head(self, status, kind, headers):
        self.close_connection |= self.left > 0
        self.send_response(status)
        headers = {"Content-Type": kind, "X-Content-Type-Options": "nosniff", **headers,
                   "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:",
                   "Connection": "close" if self.close_connection else "keep-alive"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def main(cfg):
    Server.address_family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    server = Server((cfg.host, cfg.port), Handler, bind_and_activate=False)
    try:
        server.server_bind()                                # now, not after minutes of loading
    except (OSError, OverflowError) as e:
        raise UserError(f"nothing can listen at --host {cfg.host} --port {cfg.port} ({e})") from e
    (host, port, *_), folder = server.server_address, checkpoint.find(cfg.ckpt)
    server.cfg, server.name, server.places = cfg, folder.parent.name, threading.Semaphore(cfg.waiting)
    server.loopback = ipaddress.ip_address(host).is_loopback
    server.desk = Desk(cfg.ckpt, cfg.batch_size, cfg.max_new_tokens)
    told, pictures = about(server.desk.assistant, folder)
    model = {"id": server.name, "object": "model", "created": 0, "owned_by": ""}
    server.files = {"/": (Path(__file__).with_name("serve.html").read_bytes(), "text/html; charset=utf-8"),
                    "/about": (told,), "/v1/models": ({"object": "list", "data": [model]},),
                    **{path: (picture, "image/png") for path, picture in pictures.items()}}
    stop = ranks.Stop()
    server.server_activate()
    print(f"serves   {server.name} at http://{f'[{host}]' if ':' in host else host}:{port}, no password, to",
          "this machine only" if server.loopback else "everybody who reaches it", flush=True)
    while not stop.asked:
        server.handle_request()
    server.server_close()
    stop.restore()                                          # a second signal does not wait
    for _ in range(cfg.waiting):                            # for the answers under way
        server.places.acquire()


if __name__ == "__main__":
    ranks.run(main, cfg)
