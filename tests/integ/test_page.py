"""The page of GET / in a real browser: headless Chromium (Debian: apt-get install chromium), driven over its DevTools protocol."""
import base64
import json
import os
import shutil
import socket
import subprocess
import threading
import urllib.request

import pytest
import websocket

from conftest import WAIT_S, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to look at the page with: apt-get install chromium")

SHOTS = os.environ.get("BALEEN_TEST_SHOTS")  # a folder: screenshots for a person's eye


class Page:
    """One tab. What it asked for, logged and threw is kept."""

    def __init__(self, port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=WAIT_S) as reply:
            target = next(each for each in json.load(reply) if each["type"] == "page")
        self.socket = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=WAIT_S, suppress_origin=True)
        self.last_id = 0
        self.requests, self.errors = [], []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def hear(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(params["entry"]))

    def call(self, method, **params):
        self.last_id += 1
        self.socket.send(json.dumps({"id": self.last_id, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.last_id:
                assert "error" not in message, message
                return message["result"]
            self.hear(message)

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression):
        return wait_for(expression, lambda: self.value(expression))

    def open(self, url, width=1400, height=900, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url="about:blank")  # the same address with another # would load nothing
        self.wait("location.href === 'about:blank'")
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.querySelector('#server')?.textContent !== '…'")

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      **({"text": "\r"} if key == "Enter" and kind == "keyDown" else {}))

    def say(self, text):
        self.value("document.querySelector('#prompt').focus()")
        self.call("Input.insertText", text=text)
        self.press("Enter", 13)

    def answered(self, n):
        self.wait(f"document.querySelectorAll('.answer').length >= {n} && !document.querySelector('.answer.waiting')")

    def text(self, selector):
        return self.value(f"document.querySelector({json.dumps(selector)}).textContent")

    def no_overflow(self):
        """Nothing is wider than the window but what scrolls in itself."""
        assert self.value("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than its window"

    def shot(self, name):
        if SHOTS:
            picture = self.call("Page.captureScreenshot", format="png")["data"]
            with open(os.path.join(SHOTS, name + ".png"), "wb") as file:
                file.write(base64.b64decode(picture))

    def check_clean(self, origin):
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith((origin + "/", "data:", "about:blank"))] == []


@pytest.fixture
def page(tmp_path):
    folder = tmp_path / "chromium"
    flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb",
             "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # its sandbox refuses root
    with open(tmp_path / "chromium.log", "w") as log:
        browser = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=log, stderr=log)
    port_file = folder / "DevToolsActivePort"
    try:
        wait_for("chromium", lambda: port_file.exists() and "\n" in port_file.read_text())
        opened = Page(port_file.read_text().splitlines()[0])
        yield opened
        opened.socket.close()
    finally:
        browser.terminate()
        browser.wait(timeout=WAIT_S)


class CuttingProxy:
    """Between browser and gateway; closes the connection of a chat once, after so many of its events."""

    def __init__(self, address, events):
        host, port = address.rsplit(":", 1)
        self.to = (host, int(port))
        self.events = events
        self.n_cuts = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.origin = "http://127.0.0.1:%d" % self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            gateway = socket.create_connection(self.to)
            state = {"chat": False, "events": 0}
            threading.Thread(target=self.carry, args=(client, gateway, state, True), daemon=True).start()
            threading.Thread(target=self.carry, args=(gateway, client, state, False), daemon=True).start()

    def carry(self, source, sink, state, up):
        try:
            while data := source.recv(1 << 16):
                if up and b"POST /v1/chat/completions" in data:
                    state["chat"] = True
                if not up and state["chat"] and self.n_cuts == 0:
                    state["events"] += data.count(b"\ndata: ")
                    if state["events"] > self.events:
                        self.n_cuts = 1
                        break
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self.server.close()


CAPITAL = "What is the capital of France?"


def test_negotiation(cluster):
    def get(accept, method="GET"):
        request = urllib.request.Request(cluster.http + "/", headers={"Accept": accept} if accept else {}, method=method)
        with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
            return reply.headers, reply.read().decode()

    headers, text = get("text/html,application/xhtml+xml,*/*;q=0.8")
    assert headers["Content-Type"].startswith("text/html") and "unsafe" not in headers["Content-Security-Policy"]
    assert text.startswith("<!doctype html>") and "@S" not in text
    assert "Accept" in headers["Vary"]
    length = headers["Content-Length"]
    headers, nothing = get("text/html", "HEAD")
    assert nothing == "" and headers["Content-Length"] == length
    for accept in (None, "*/*"):
        headers, text = get(accept)
        assert headers["Content-Type"].startswith("text/plain") and text.startswith("Baleen ")


def test_chat(cluster, page):
    page.open(cluster.http + "/")
    page.wait("document.querySelector('#server').className === 'pill good'")
    page.shot("empty")
    page.value("document.querySelector('#temperature').value = '0'")
    page.value("document.querySelector('#seed').value = '1'")
    page.say(CAPITAL)
    page.answered(1)
    assert page.text(".said") == CAPITAL
    assert "Paris" in page.text(".answer .content")
    assert page.text(".answer .thinking .text") != "" and "Thought for" in page.text(".answer .thinking summary")
    assert page.text(".answer .thinking .text") not in page.text(".answer .content")
    assert page.value("document.querySelector('.thinking').open") is False
    assert "21 tokens" in page.text(".answer .meta") and "first after" in page.text(".answer .meta")
    speed = page.value("""(() => {
      const view = new AnswerView();
      Object.assign(view, {first: 1000, last: 3000, usage: {completion_tokens: 101, prompt_tokens: 5}}).end('');
      return view.meta.textContent;
    })()""")
    assert "50.0 tok/s" in speed
    # Without thinking, and the conversation goes along.
    page.value("document.querySelector('#thinking').value = 'off'")
    page.say("Count from 1 to 10.")
    page.answered(2)
    assert page.value("document.querySelectorAll('.answer')[1].querySelector('.thinking').hidden") is True
    assert "10" in page.value("document.querySelectorAll('.answer')[1].querySelector('.content').textContent")
    page.no_overflow()
    page.shot("chat")
    page.check_clean(cluster.http)


def test_text_stays_text(cluster, page):
    """What the model or the user writes is never markup; fenced code is shown as code."""
    page.open(cluster.http + "/")
    shown = page.value("""(() => {
      const view = new AnswerView();
      document.querySelector('#log').append(view.element);
      view.take({choices: [{delta: {content: '<img src=x onerror=alert(1)>\\n```c\\nint <b>x</b>;\\n```\\nand `a<i>b`'}}]});
      view.end('');
      return [view.element.querySelectorAll('img, b, i').length, view.element.querySelector('pre code').textContent,
              view.element.querySelector('.content .text').textContent, view.element.querySelector('.text code').textContent];
    })()""")
    assert shown == [0, "int <b>x</b>;\n", "<img src=x onerror=alert(1)>", "a<i>b"]
    page.check_clean(cluster.http)


SCRIPTED = """(() => {
  const chunk = (delta, finish) => ({id: 'chatcmpl-1', choices: [{index: 0, delta, finish_reason: finish ?? null}]});
  const call = (index, value) => chunk({tool_calls: [{index, ...value}]});
  const answers = [
    [chunk({reasoning_content: 'Two cities.'}),
     call(0, {id: 'call_a', function: {name: 'get_weather', arguments: ''}}), call(0, {function: {arguments: '{"city": '}}),
     call(0, {function: {arguments: '"Paris"}'}}), call(1, {id: 'call_b', function: {name: 'get_weather', arguments: '{"city": "Rome"}'}}),
     chunk({}, 'tool_calls')],
    [chunk({content: 'Both are fine.'}), chunk({}, 'stop')]];
  window.bodies = [];
  window.fetch = async (path, options) => {
    bodies.push(JSON.parse(options.body));
    return new Response(answers.shift().map((each, i) => `id: chatcmpl-1:${i}\\ndata: ${JSON.stringify(each)}\\n\\n`).join('') + 'data: [DONE]\\n\\n');
  };
})()"""


def test_tool_calls(cluster, page):
    """Calls are shown in boxes, run, and their results go back; what the model says is scripted."""
    page.open(cluster.http + "/")
    page.value(SCRIPTED)
    page.value("document.querySelector('#tools').checked = true")
    page.say("What is the weather in Paris and Rome?")
    page.answered(2)  # the calls, and the answer to their results
    assert page.value("[...document.querySelectorAll('.call b')].map(each => each.textContent)") == ["get_weather"] * 2
    assert [json.loads(each) for each in page.value("[...document.querySelectorAll('.call pre:not(.result)')].map(each => each.textContent)")
            ] == [{"city": "Paris"}, {"city": "Rome"}]
    assert json.loads(page.text(".call .result"))["city"] == "Paris"
    first, second = page.value("bodies")
    assert [tool["function"]["name"] for tool in first["tools"]] == ["get_weather", "get_time"]
    user, said, paris, rome = second["messages"]
    assert said["reasoning_content"] == "Two cities." and [call["id"] for call in said["tool_calls"]] == ["call_a", "call_b"]
    assert (paris["role"], paris["tool_call_id"], rome["tool_call_id"]) == ("tool", "call_a", "call_b")
    assert page.value("document.querySelectorAll('.answer')[1].querySelector('.content').textContent") == "Both are fine."
    page.no_overflow()
    page.shot("tools")
    page.check_clean(cluster.http)


def test_connection_breaks(cluster, page):
    """The stream goes on where it was, and nothing comes twice."""
    body = {"model": "nano", "temperature": 0, "messages": [{"role": "user", "content": "Count from 1 to 10."}]}
    request = urllib.request.Request(cluster.http + "/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
        whole = json.load(reply)["choices"][0]["message"]
    proxy = CuttingProxy(cluster.info["http"], 10)
    page.open(proxy.origin + "/")
    page.value("document.querySelector('#temperature').value = '0'")
    page.say("Count from 1 to 10.")
    page.answered(1)
    assert proxy.n_cuts == 1
    assert page.text(".answer .content") == whole["content"]
    assert page.text(".answer .thinking .text") == whole["reasoning_content"]
    assert "failed" not in page.text(".answer .meta")
    assert any("/v1/streams/" in url for url in page.requests)
    proxy.close()


def test_stop(start_cluster, page):
    """Frees the sequence at once, though the stream could have been resumed."""
    cluster = start_cluster("--workers", "1", env={"BALEEN_GATEWAY_GRACE_MS": "600000"})
    page.open(cluster.http + "/")
    # Without an end of its own: the test decides when.
    page.value("window.fetch = (ask => (path, options) => ask(path, options?.method !== 'POST' ? options : {...options,"
               " body: JSON.stringify({...JSON.parse(options.body), ignore_eos: true, max_tokens: 10000})}))(window.fetch)")
    page.say("Count from 1 to 100.")
    page.wait("document.querySelector('.answer .thinking .text')?.textContent.length > 10")
    before = cluster.cancelled()
    page.press("Escape", 27)
    page.answered(1)
    assert "stopped" in page.text(".answer .meta")
    cluster.wait_until_freed(before)
    page.check_clean(cluster.http)


def test_stop_before_the_first_event(start_cluster, page):
    """While it waits for its turn nothing has come, no id either: it ends all the same."""
    cluster = start_cluster("--scripted-model", "scripted", "--failpoints", "router_step_slow:10000",
                            env={"BALEEN_RUNNING_MAX": "1", "BALEEN_GATEWAY_GRACE_MS": "600000"})
    streams = lambda: sum(cluster.metrics()["baleen_streams"].values())
    body = {"model": "scripted", "stream": True, "thinking": {"type": "disabled"}, "messages": [{"role": "user", "content": "on and on " * 1000}]}
    request = urllib.request.Request(cluster.http + "/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=WAIT_S) as first:
        first.readline()
        page.open(cluster.http + "/")
        page.say("my turn?")
        wait_for("it to wait", lambda: streams() == 2)
        page.press("Escape", 27)
        page.answered(1)
        assert "stopped" in page.text(".answer .meta")
        wait_for("it to be gone", lambda: streams() == 1)
    page.say("and now?")  # the page goes on
    page.answered(2)
    wait_for("the ledger to be zero", cluster.ledger_is_zero)


def test_clear_while_answering(cluster, page):
    """What is still said of a conversation that was cleared is no part of the next one."""
    page.open(cluster.http + "/")
    page.value("""(() => {
      const chunk = content => `id: chatcmpl-1:1\\ndata: ${JSON.stringify({id: 'chatcmpl-1', choices: [{index: 0, delta: {content}}]})}\\n\\n`;
      window.bodies = [];
      window.fetch = async (path, options) => {
        if (options.method === 'DELETE') return new Response('{}');
        bodies.push(JSON.parse(options.body));
        if (bodies.length > 1) return new Response(chunk('new') + 'data: [DONE]\\n\\n');
        return new Response(new ReadableStream({start(stream) {
          stream.enqueue(new TextEncoder().encode(chunk('old')));
          options.signal.addEventListener('abort', () => stream.error(options.signal.reason));
        }}));
      };
    })()""")
    page.say("old question")
    page.wait("document.querySelector('.answer .content')?.textContent === 'old'")
    page.value("document.querySelector('#clear').click()")
    page.wait("running === null")
    page.say("new question")
    page.answered(1)
    assert page.value("bodies[1].messages") == [{"role": "user", "content": "new question"}]
    page.check_clean(cluster.http)


def painted(page):
    """How many different colours the heat map has."""
    return page.value("""(() => {
      const canvas = document.querySelector('#heat');
      if (!canvas.width || !canvas.height) return 0;
      const data = new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer);
      return new Set(data).size;
    })()""")


def test_cluster_view(cluster, page):
    page.open(cluster.http + "/")
    page.say(CAPITAL)
    page.answered(1)
    page.value("document.querySelector('#tab-chat').focus()")
    page.press("ArrowRight", 39)
    page.wait("document.querySelectorAll('#members tr').length === 5")
    names = page.value("[...document.querySelectorAll('#members tr')].map(row => row.cells[0].textContent + ' ' + row.cells[1].textContent)")
    roles = [name.split("-")[0] for name in names]
    assert roles == ["gateway", "router", "worker", "worker", "worker"] and all(name.endswith("ready") for name in names)
    page.wait("heat.rows !== null")  # routers count what they have sent every two seconds
    assert painted(page) > 10
    assert page.value("heat.layers * heat.experts === heat.rows.length && [...heat.shares.values()].length === 3")
    shares = page.value("[...heat.shares.values()]")
    assert abs(sum(shares) - 1) < 1e-9 and min(shares) > 0
    page.value("document.querySelector('#heat').focus()")
    assert "Layer 0, expert 0:" in page.text("#heat-text")
    page.press("ArrowRight", 39)
    assert "Layer 0, expert 1:" in page.text("#heat-text") and "worker-" in page.text("#heat-text")
    page.no_overflow()
    page.shot("cluster")
    page.value("document.querySelector('#colour').value = 'owner'; drawHeat()")
    assert page.value("document.querySelector('#legend').textContent.match(/worker-/g).length") == 3
    page.check_clean(cluster.http)


def test_nobody_looks(cluster, page):
    """Off the screen the page asks for nothing and sets itself no alarm to do so."""
    page.open(cluster.http + "/#cluster")
    page.wait("document.querySelectorAll('#members tr').length === 5")
    page.value("window.alarms = []; window.asked = []; window.setTimeout = (fn, ms) => window.alarms.push(ms);"
               "window.fetch = (ask => (path, options) => { window.asked.push(path); return ask(path, options); })(window.fetch)")
    page.value("watch()")
    assert page.value("[window.asked.length, window.alarms.includes(POLL_MS)]") == [2, True]
    page.value("window.alarms.length = window.asked.length = 0; document.querySelector('#tab-chat').click(); watch()")
    assert page.value("[window.asked.length, window.alarms.includes(POLL_MS)]") == [0, False]
    page.check_clean(cluster.http)


@pytest.mark.parametrize("width,dark", [(380, False), (380, True), (1400, True)])
def test_widths(cluster, page, width, dark):
    page.open(cluster.http + "/", width=width, height=800, dark=dark)
    page.value("document.querySelector('#temperature').value = '0'")
    page.say(CAPITAL)
    page.answered(1)
    page.no_overflow()
    page.value("document.querySelector('#settings-button').click()")
    page.no_overflow()
    page.shot(f"chat-{width}{'-dark' if dark else ''}")
    page.value("document.querySelector('#tab-cluster').click()")
    page.wait("heat.rows !== null")
    page.no_overflow()
    page.shot(f"cluster-{width}{'-dark' if dark else ''}")
    page.check_clean(cluster.http)
