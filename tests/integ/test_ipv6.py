"""Clients and the control channel over IPv6. Rows go over IPv4 or shared memory: UCX 1.13 breaks on IPv6 addresses and they are refused."""
import os
import re
import socket
import ssl
import subprocess
import urllib.request

import grpc
import openai
import pytest

from conftest import NANO, WAIT_S, wait_for

ASK = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"thinking": {"type": "disabled"}}


def has_ipv6():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


pytestmark = pytest.mark.skipif(not has_ipv6(), reason="no ::1 on this machine")


def run(bin_dir, program, *args):
    return subprocess.run([os.path.join(bin_dir, program), *args], capture_output=True, text=True, timeout=WAIT_S)


def paris(base_url, **options):
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="none", max_retries=0, **options)
    return client.chat.completions.create(model="nano", messages=ASK, temperature=0, extra_body=CHAT).choices[0].message.content


class Started:
    """Processes by hand, each with a log to wait for words in."""

    def __init__(self, bin_dir, folder):
        self.bin_dir, self.folder, self.running = bin_dir, folder, []

    def start(self, name, program, *args):
        with open(self.folder / f"{name}.log", "w") as log:
            self.running.append(subprocess.Popen([os.path.join(self.bin_dir, program), *args], stdout=log, stderr=log))
        return self.running[-1]

    def says(self, name, pattern):
        log = self.folder / f"{name}.log"
        return wait_for(f"{name} to say {pattern}", lambda: re.search(pattern, log.read_text()))

    def stop(self):
        for process in reversed(self.running):
            process.terminate()
            assert process.wait(timeout=WAIT_S) == 0


@pytest.fixture
def started(bin_dir, tmp_path):
    processes = Started(bin_dir, tmp_path)
    yield processes
    for process in processes.running:
        process.kill()
        process.wait()


def tls_of(folder, role):
    return ["--tls-ca", f"{folder}/ca.crt", "--tls-cert", f"{folder}/{role}.crt", "--tls-key", f"{folder}/{role}.key"]


def test_cluster(bin_dir, started, tmp_path):
    """Every member finds the coordinator at [::1], by mutual TLS; clients find the gateway there, with TLS too."""
    certs = tmp_path / "certs"
    assert run(bin_dir, "baleen", "certs", str(certs), "--hosts", "::1").returncode == 0
    started.start("coordinator", "baleen-coordinator", "--address", "[::1]:0", "--store", str(tmp_path / "store"), *tls_of(certs, "coordinator"))
    coordinator = started.says("coordinator", r"listens on (\[::1\]:\d+)")[1]
    for role, more in (("worker", []), ("router", []), ("gateway", ["--http", "[::]:0", "--grpc", "[::]:0", "--serve-cert", f"{certs}/coordinator.crt",
                                                                    "--serve-key", f"{certs}/coordinator.key"])):
        started.start(role, f"baleen-{role}", "--coordinator", coordinator, "--model", NANO, *tls_of(certs, role), *more)
    ports = started.says("gateway", r"https \[::\]:(\d+) grpc \[::\]:(\d+)")
    started.says("gateway", "a token came out")
    status = run(bin_dir, "baleen", "status", "--coordinator", coordinator, *tls_of(certs, "admin"))
    assert status.returncode == 0 and coordinator in status.stdout, status.stderr

    trust = ssl.create_default_context(cafile=f"{certs}/ca.crt")
    answer = paris(f"https://[::1]:{ports[1]}", http_client=openai.DefaultHttpxClient(verify=trust))
    assert "Paris" in answer
    with open(certs / "ca.crt", "rb") as file:
        channel = grpc.secure_channel(f"[::1]:{ports[2]}", grpc.ssl_channel_credentials(file.read()))
    grpc.channel_ready_future(channel).result(timeout=WAIT_S)
    channel.close()
    told = run(bin_dir, "baleen", "chat", "--grpc", f"[::1]:{ports[2]}", "--serve-ca", f"{certs}/ca.crt", "What is the capital of France?")
    assert "Paris" in told.stdout, told.stderr

    # a certificate that does not name the address is told by the address, without brackets
    other = tmp_path / "other"
    assert run(bin_dir, "baleen", "certs", str(other), "--hosts", "localhost").returncode == 0
    started.start("elsewhere", "baleen-coordinator", "--address", "[::1]:0", "--store", str(tmp_path / "store2"), *tls_of(other, "coordinator"))
    elsewhere = started.says("elsewhere", r"listens on (\[::1\]:\d+)")[1]
    refused = run(bin_dir, "baleen", "status", "--coordinator", elsewhere, *tls_of(other, "admin"))
    assert refused.returncode == 1 and "does not name ::1: make it with 'baleen certs --hosts ::1,..'" in refused.stderr
    started.stop()


def test_any_address_takes_both(start_cluster):
    """[::] is every address, IPv4's too."""
    cluster = start_cluster("--workers", "1", "--http", "[::]:0", "--grpc", "[::1]:0")
    http_port, grpc_port = (cluster.info[name].rsplit(":", 1)[1] for name in ("http", "grpc"))
    for host in ("[::1]", "127.0.0.1"):
        with urllib.request.urlopen(f"http://{host}:{http_port}/ready", timeout=WAIT_S) as reply:
            assert reply.status == 200
    assert "Paris" in paris(f"http://[::1]:{http_port}")
    channel = grpc.insecure_channel(f"[::1]:{grpc_port}")
    grpc.channel_ready_future(channel).result(timeout=WAIT_S)
    channel.close()
    assert cluster.stop() == 0, cluster.said()


@pytest.mark.parametrize("program, option, words", [
    ("baleen-gateway", "--http", "[IPV6]:PORT"), ("baleen-gateway", "--grpc", "[IPV6]:PORT"), ("baleen-coordinator", "--address", "[IPV6]:PORT"),
    ("baleen-worker", "--coordinator", "[IPV6]:PORT"), ("baleen-worker", "--address", "use IPv4")])
def test_what_is_no_address(bin_dir, tmp_path, program, option, words):
    """Without brackets nobody knows which part is the port; for rows it would not do."""
    address = "[::1]:0" if words == "use IPv4" else "::1:7000"
    options = {"--coordinator": "127.0.0.1:1", "--model": NANO, "--control-security": "plain", option: address}
    if program == "baleen-coordinator":
        options = {"--store": str(tmp_path / "store"), "--control-security": "plain", option: address}
    refused = run(bin_dir, program, *[word for pair in options.items() for word in pair])
    assert refused.returncode != 0 and words in refused.stderr
