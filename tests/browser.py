"""A real browser, driven by its own debugging protocol over two pipes: Debian's Chromium, and no package."""
import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile

CHROMIUM = shutil.which("chromium")


class Browser:
    """`with Browser(url) as page:` one page of this size, open when the body begins."""

    def __init__(self, url, width=800, height=900):
        # Chromium reads commands from descriptor 3 and answers on 4; ours must not be these two.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (*os.pipe(), *os.pipe())]
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--hide-scrollbars", f"--user-data-dir={self.home.name}", "--remote-debugging-pipe",
             "about:blank"],
            preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[3], 4)), pass_fds=(3, 4),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(ends[0]), os.close(ends[3])
        self.commands, self.answers = os.fdopen(ends[1], "wb"), os.fdopen(ends[2], "rb")
        self.sent, self.rest, self.session = 0, b"", {}
        target = self.say("Target.createTarget", url="about:blank")["targetId"]
        attached = self.say("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.say("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 600)
        self.say("Page.enable")
        self.say("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def say(self, method, **params):
        self.sent += 1
        self.commands.write(json.dumps({"id": self.sent, "method": method, "params": params,
                                        **self.session}).encode() + b"\0")
        self.commands.flush()
        while True:                                         # events come in between; nobody needs them here
            while b"\0" not in self.rest:
                piece = os.read(self.answers.fileno(), 1 << 16)
                assert piece, "the browser has ended"
                self.rest += piece
            said, _, self.rest = self.rest.partition(b"\0")
            said = json.loads(said)
            if said.get("id") == self.sent:
                assert "error" not in said, said
                return said["result"]

    def run(self, script):
        """The value of a JavaScript expression; of a promise, what it becomes."""
        got = self.say("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def until(self, condition, seconds=30):
        """Waits until a JavaScript expression is true -> its value."""
        return self.run(f"""new Promise((done, fail) => {{
            const end = Date.now() + {seconds * 1000};
            const look = () => {{
                let value;
                try {{ value = {condition}; }} catch {{ }}
                if (value) done(value);
                else if (Date.now() > end) fail(new Error("not within {seconds} s"));
                else setTimeout(look, 30);
            }};
            look();
        }})""")

    def choose(self, selector, *files):
        """What a person does in the window that asks for files."""
        root = self.say("DOM.getDocument")["root"]["nodeId"]
        node = self.say("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.say("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.say("Page.captureScreenshot")["data"]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        self.home.cleanup()
