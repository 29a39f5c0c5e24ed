"""Several hosts on one machine: network namespaces on a switch, with Ray, an S3 server, and faults.

Needs root and iproute2 (`ip`); `missing()` says in one line what is not there. Everything has
names of this process's own and is gone when the block of `hosts` ends.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import free_ports

ROOT = Path(__file__).parents[2]
_RAY, _WEED = (str(Path(sys.executable).with_name(name)) for name in ("ray", "weed"))
_NETWORK = "10.77.0"
_GATEWAY = f"{_NETWORK}.254"  # the switch's own address, where nothing answers
_GCS_PORT = 6379

# A tenth of the driver's calls are lost on the way there, while under way, or on the way back.
LOST_RPCS = {
    "RAY_testing_rpc_failure": json.dumps(
        {
            "CoreWorkerService.grpc_client.PushTask": {
                "num_failures": -1,
                "req_failure_prob": 4,
                "in_flight_failure_prob": 3,
                "resp_failure_prob": 3,
            }
        }
    )
}


def missing() -> str | None:
    """Say what this machine lacks, None for nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (the package iproute2)"
    name = f"gm{os.getpid()}probe"
    if _try("ip", "netns", "add", name):
        return f"`ip netns add` failed: {_try('ip', 'netns', 'add', name)}"
    try:
        for kind in (("veth", "peer", "name", "b"), ("bridge",)):
            if why := _try("ip", "-n", name, "link", "add", kind[0], "type", *kind):
                return f"no {kind[0]} links: {why}"
    finally:
        _ip("netns", "delete", name)
    return None


def _try(*command: str) -> str:
    """Run a command; return what it said if it failed, else nothing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join(done.stderr.split()) or "no reason given" if done.returncode else ""


def _ip(*arguments: object) -> None:
    command = ["ip", *map(str, arguments)]
    if why := _try(*command):
        raise RuntimeError(f"{' '.join(command)}: {why}")


@dataclass
class Host:
    """A namespace with one network card: its number makes its addresses and its port's name."""

    name: str
    namespace: str
    number: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def ip(self) -> str:
        return f"{_NETWORK}.{self.number}"

    @property
    def mac(self) -> str:
        return f"02:00:00:00:00:{self.number:02x}"

    @property
    def port(self) -> str:
        return f"port{self.number}"

    def pids(self) -> list[int]:
        """Return the processes that run on the host."""
        command = ["ip", "netns", "pids", self.namespace]
        return [int(pid) for pid in subprocess.check_output(command, text=True).split()]

    def kill(self) -> None:
        """Kill all that runs on the host, at once (SIGKILL)."""
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.processes:
                process.poll()
            time.sleep(0.02)


class Network:
    """Hosts on one switch, which is a namespace too: this machine's own network has no part."""

    def __init__(self) -> None:
        self._prefix = f"gm{os.getpid()}{secrets.token_hex(1)}"
        self._switch = f"{self._prefix}-switch"
        self.hosts: list[Host] = []
        _ip("netns", "add", self._switch)
        try:
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "address", "add", f"{_GATEWAY}/24", "dev", "br0")
            _ip("-n", self._switch, "link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise

    def add(self, name: str) -> Host:
        """Plug a new host into the switch."""
        host = Host(name, f"{self._prefix}-{name}", len(self.hosts) + 1)
        _ip("netns", "add", host.namespace)
        self.hosts.append(host)
        switch, inside = self._switch, ("-n", host.namespace)
        veth = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _ip("-n", switch, "link", "add", host.port, *veth)
        _ip("-n", switch, "link", "set", host.port, "master", "br0", "up")
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "link", "set", "eth0", "address", host.mac, "up")
        _ip(*inside, "address", "add", f"{host.ip}/24", "dev", "eth0")
        # Ray asks which of its addresses would lead to the internet.
        _ip(*inside, "route", "add", "default", "via", _GATEWAY)
        for other in self.hosts[:-1]:
            _know(host, other)
            _know(other, host)
        return host

    def partition(self, host: Host) -> None:
        """Cut a host off: what it sends and what is sent to it vanishes without a word."""
        _ip("-n", self._switch, "link", "set", host.port, "nomaster")

    def heal(self, host: Host) -> None:
        """Plug a host in again."""
        _ip("-n", self._switch, "link", "set", host.port, "master", "br0")

    def limit(self, host: Host, rate: str) -> None:
        """Let the host receive and the others receive from it at `rate` (20mbit) at most."""
        for namespace, device in ((self._switch, host.port), (host.namespace, "eth0")):
            shape = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
            if why := _try("tc", "-n", namespace, "qdisc", "replace", "dev", device, *shape):
                raise RuntimeError(f"tc: {why}")

    def close(self) -> None:
        """End all that runs on the hosts, and remove them."""
        for host in self.hosts:
            host.kill()
            for process in host.processes:
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
            _try("ip", "netns", "delete", host.namespace)
        _try("ip", "netns", "delete", self._switch)


def _know(host: Host, other: Host) -> None:
    # Else a host notices within seconds that nobody answers at an address that is cut off.
    fixed = ("lladdr", other.mac, "dev", "eth0", "nud", "permanent")
    _ip("-n", host.namespace, "neighbour", "replace", other.ip, *fixed)


class Hosts:
    """A Ray head without CPUs, workers, and an S3 server, each a host; drivers run at the head.

    `folder` holds logs, the server's data and Ray's files.
    """

    def __init__(self, network: Network, folder: Path, *, cpus: int, extra: Mapping[str, str]):
        self.network, self.folder = network, folder
        self._cpus, self._extra = cpus, dict(extra)
        self._secret = secrets.token_hex(8)
        # Each its own, though in namespaces: the server's sockets in /tmp are named after them.
        self._s3_ports = free_ports(5)
        self.s3, self.head = network.add("s3"), network.add("head")
        self.workers: list[Host] = []
        self._drainer: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{self.head.ip}:{_GCS_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of all processes on the hosts: no secrets of this machine's."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        aws = {
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_ENDPOINT_URL": f"http://{self.s3.ip}:{self._s3_ports[0]}",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        ray = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        return kept | aws | ray | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | self._extra

    def start(
        self, host: Host, command: Sequence[str], log: str, extra: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host; its output goes to the file `log` of the folder."""
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", host.namespace, *command],
                env=self.environment | dict(extra or {}),
                cwd=self.folder,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        host.processes.append(process)
        return process

    def python(self, code: str, *arguments: str, timeout: float = 120) -> str:
        """Run Python code at the head, and return what it prints."""
        command = ["ip", "netns", "exec", self.head.namespace, sys.executable, "-c", code]
        done = subprocess.run(
            [*command, *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{code.strip().splitlines()[-1]}: {done.stderr[-2000:]}")
        return done.stdout.strip()

    # --- S3

    def start_s3(self) -> None:
        """Start the server, on the data that are there, and wait until it has its bucket."""
        data, ip = self.folder / "s3", self.s3.ip
        s3, master, filer, volume, admin = self._s3_ports
        data.mkdir(exist_ok=True)
        options = {
            "dir": data,
            "ip": ip,
            "ip.bind": ip,
            "s3.port": s3,
            "master.port": master,
            "filer.port": filer,
            "volume.port": volume,
            "admin.port": admin,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": data / "s3.sock",
            "filer.localSocket": data / "filer.sock",
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
            "bucket": "lake",
        }
        for socket in data.glob("*.sock"):
            socket.unlink()
        arguments = [f"-{name}={value}" for name, value in options.items()]
        self.start(self.s3, [_WEED, "mini", *arguments], "s3.log")
        self.python(_WAIT_FOR_BUCKET)

    def stop_s3(self) -> None:
        """Kill the server (SIGKILL); its data stay."""
        self.s3.kill()

    # --- Ray

    def start_head(self) -> None:
        """Start Ray's head and wait until it listens."""
        head = ["--head", f"--port={_GCS_PORT}", "--num-cpus=0", "--include-dashboard=false"]
        self._start_ray(self.head, [*head, f"--temp-dir={self._ray_files}"])
        self.wait_for_hosts(0)
        # Ready to drain: to start Python and Ray's client first takes longer than some phases.
        command = ["ip", "netns", "exec", self.head.namespace, sys.executable, "-c", _DRAIN]
        self._drainer = subprocess.Popen(
            [*command, self.address],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.head.processes.append(self._drainer)

    def add_worker(self) -> Host:
        """Add a host with `cpus` CPUs to the cluster; it joins some seconds later."""
        host = self.network.add(f"w{len(self.workers) + 1}")
        self.workers.append(host)
        self.join(host)
        return host

    def join(self, host: Host) -> None:
        """Have a host that is up, or was killed, join the cluster."""
        self._start_ray(host, [f"--address={self.address}", f"--num-cpus={self._cpus}"])

    def _start_ray(self, host: Host, options: list[str]) -> None:
        fixed = ["--block", f"--node-ip-address={host.ip}", "--object-store-memory=100000000"]
        fixed += ["--disable-usage-stats", "--memory=4000000000"]
        # Ray's files have the same names on each host, and disks of their own.
        disk = self.folder / f"{host.name}-ray"
        for folder in (disk, self._ray_files):
            folder.mkdir(exist_ok=True)
        mount = f'mount --bind {disk} {self._ray_files} && exec "$@"'
        own = ["sh", "-c", mount, "sh"] if host is not self.head else []
        self.start(host, [*own, _RAY, "start", *fixed, *options], f"{host.name}.log")

    @property
    def _ray_files(self) -> Path:
        return self.folder / "ray"

    def wait_for_hosts(self, count: int, seconds: float = 120) -> None:
        """Wait until the cluster has `count` workers' hosts alive, and no dead one among them."""
        self.python(
            _WAIT_FOR_NODES, self.address, str(count + 1), str(seconds), timeout=seconds + 60
        )

    def make_whole(self) -> None:
        """Mend what faults have broken: hosts on the network, in the cluster, the server up."""
        if not self.s3.pids():
            self.start_s3()
        for host in self.workers:
            self.network.heal(host)
        # Ray may give up a host that was cut off just after it is back: look again, then.
        for last in (False, False, True):
            self._rejoin_dead()
            try:
                self.wait_for_hosts(len(self.workers), seconds=120 if last else 45)
                break
            except RuntimeError:
                if last:
                    raise

    def _rejoin_dead(self) -> None:
        alive = self.python(_ALIVE, self.address).split()
        dead = [host for host in self.workers if host.ip not in alive or not host.pids()]
        for host in dead:
            host.kill()
        # A host that has just died is in the cluster for some seconds more, and would be taken
        # for the one that joins.
        self.wait_for_hosts(len(self.workers) - len(dead))
        for host in dead:
            self.join(host)

    # --- faults

    def kill_actor(self, host: Host, name: str = "ShardActor") -> int:
        """Kill one actor's process on the host (SIGKILL), and return its pid."""
        for pid in host.pids():
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                    os.kill(pid, signal.SIGKILL)
                    return pid
        raise LookupError(f"no {name} runs on {host.name}")

    def spot_drain(self, host: Host, seconds: int = 5) -> threading.Timer:
        """Tell Ray that the host is to be preempted, and kill it `seconds` later."""
        assert self._drainer is not None
        assert self._drainer.stdin is not None
        assert self._drainer.stdout is not None
        self._drainer.stdin.write(f"{host.ip} {seconds}\n".encode())
        self._drainer.stdin.flush()
        answer = self._drainer.stdout.readline().decode()
        if not answer.startswith("True"):
            raise RuntimeError(f"{host.name} was not drained: {answer}")
        timer = threading.Timer(seconds, host.kill)
        timer.start()
        return timer


_WAIT_FOR_BUCKET = """
import time, fsspec
deadline = time.monotonic() + 60
while True:
    try:
        fs = fsspec.filesystem("s3", use_listings_cache=False)
        if "lake" in fs.ls("", refresh=True):
            fs.pipe_file("lake/.up", b"1")
            fs.rm_file("lake/.up")
            break
    except Exception:
        if time.monotonic() > deadline:
            raise
    time.sleep(0.2)
"""

_NODES = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2, gcs_pb2
address = sys.argv[1]
def alive(gcs):
    nodes = gcs.get_all_node_info().values()
    return [n for n in nodes if n.state == gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE]
"""

_ALIVE = f"""{_NODES}
print(*(node.node_manager_address for node in alive(GcsClient(address=address))))
"""

_WAIT_FOR_NODES = f"""{_NODES}
count, deadline = int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
while True:
    try:
        found = [n.node_manager_address for n in alive(GcsClient(address=address))]
        if len(found) == len(set(found)) == count:
            break
    except Exception as error:
        found = error
    if time.monotonic() > deadline:
        raise SystemExit(f"{{count}} nodes wanted, there are {{found}}")
    time.sleep(0.2)
"""

_DRAIN = f"""{_NODES}
gcs = GcsClient(address=address)
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
for line in sys.stdin:
    ip, seconds = line.split()
    (node,) = [n for n in alive(gcs) if n.node_manager_address == ip]
    deadline = time.time_ns() // 10**6 + 1000 * int(seconds)
    print(*gcs.drain_node(node.node_id.hex(), reason, "spot", deadline), flush=True)
"""


@contextmanager
def hosts(
    n_workers: int = 2,
    *,
    cpus: int = 2,
    s3_rate: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> Iterator[Hosts]:
    """Run a head, `n_workers` hosts of `cpus` CPUs and an S3 server while the block lasts.

    `s3_rate` limits what the server sends and receives; `extra` is added to the environment of
    all processes, e.g. RAY_health_check_period_ms.
    """
    with ExitStack() as stack:
        # Short: Unix sockets have names of at most 108 bytes.
        folder = Path(tempfile.mkdtemp(prefix="gm", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        network = Network()
        stack.callback(network.close)
        all_ = Hosts(network, folder, cpus=cpus, extra=extra or {})
        if s3_rate is not None:
            network.limit(all_.s3, s3_rate)
        all_.start_s3()
        all_.start_head()
        for _ in range(n_workers):
            all_.add_worker()
        all_.wait_for_hosts(n_workers)
        yield all_
