"""A page in headless Chromium: opened, clicked, asked, and photographed, over the DevTools protocol.

Chromium reads commands from file descriptor 3 and answers on 4, each a JSON text with a zero byte at
its end, so no other package is needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
PATIENCE = 60  # seconds for an answer


class Browser:
    """with Browser(tmp_path) as browser: browser.open(path, width=360) ..."""

    def __init__(self, folder):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()

        def connect():  # in the child; through high numbers, since one of them may be 3 or 4 itself
            os.dup2(os.dup2(commands, 103), 3)
            os.dup2(os.dup2(answers, 104), 4)

        words = [
            CHROMIUM,
            *FLAGS,
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}/chromium",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            words, preexec_fn=connect, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self.received = b""
        self.count = 0
        self.session = None
        self.errors = []  # what a page wrote to its console, or raised, or could not load
        self.requests = []  # the addresses of all that a page asked for

    def __enter__(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=PATIENCE)
        os.close(self.commands)
        os.close(self.answers)

    def call(self, method, **params):
        """One command; what it returns."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        """The next message; errors and requests are kept."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.answers], [], [], max(0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            self.received += os.read(self.answers, 1 << 20)
        text, self.received = self.received.split(b"\0", 1)
        message = json.loads(text)
        method = message.get("method")
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.errors.append(message["params"])
        if method == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def open(self, path, width, height=800, dark=False, mobile=False):
        """Show a file at a size of the window, by day or by night, and wait until it is loaded."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def ask(self, expression):
        """The value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def point_at(self, element):
        """Move the mouse to the middle of an element (a JavaScript expression) -> its x and y."""
        place = f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect()))({element})"
        x, y = self.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({place})")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, element):
        """A click of the left button, as a person's."""
        x, y = self.point_at(element)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def photograph(self, path, whole=True):
        """A PNG of the page, or of what the window shows of it."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
