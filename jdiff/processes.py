"""Many processes of one run: they find each other, agree, notice who is lost, and stop at one step.

Process 0 keeps a door at the coordinator's address, to which every process holds one connection for as long as it runs. The
door calls the roll before JAX is asked to connect, compares what the processes are started with, and judges who is lost; its
verdict is one line that all of them print before they end. JAX's own coordination service is no substitute: it ends every
process with a stack trace and SIGABRT, without naming who is missing at the start, after 100 seconds where one is killed, and
before Python can say a word where the coordinator is.
"""

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax

from jdiff.version import __version__

LOST = 75
"""Exit code where another process is lost, missing or has failed (EX_TEMPFAIL of sysexits.h): the same command goes on."""
BEAT = 1.0
"""Seconds between signs of life."""
GRACE = 5.0
"""Seconds in which a process may say itself what is wrong, before it ends for another one's failure."""

LEAST_THREADS = 32
"""Of XLA:CPU's pool, whose size it takes from NPROC."""
PROGRAM = Path(sys.argv[0]).name
Message = dict[str, Any]


class Peers:
    """This process among the run's. `Peers()` is a process by itself, for which all of this costs nothing."""

    def __init__(self, index: int = 0, count: int = 1, link: "Link | None" = None):
        self.index, self.count, self._link = index, count, link
        self._agreements = 0

    def agree(self, facts: Mapping[str, Any] | None = None, end: bool = False) -> None:
        """Waits until every process has come here, and ends them all (exit code 2) where their facts differ.

        facts: anything that JSON can hold. end: it is the last agreement, after which none is missed.
        """
        if self._link:
            self._agreements += 1
            number = self._agreements
            self._link.send(agree=number, facts=json.loads(json.dumps(facts or {})), end=end)
            self._link.wait_for(lambda link: link.agreed >= number)

    def compile(self, jitted: Any, *args: Any) -> None:
        """Compiles what is called next with these arguments, and waits until all processes have: collectives of CPUs give up on
        one that comes half a minute late. A process by itself compiles in the call."""
        if self._link:
            jitted.lower(*args).compile()
            self.agree()

    def stop(self, caught: int | None, step: int) -> int | None:
        """The signal by which the run ends after this step, which has been started: the same one on every process.

        caught: the signal that this process has got. The processes are not all at the same step when one of them gets it: each
        tells the last one that it has started and starts no other, until the door has named the largest.
        """
        if not self._link:
            return caught
        return self._link.stop(caught, step)

    def run(self, work: Callable[[], int]) -> int:
        """`work()`, the exit code, once all processes are through; what a user can mend is one line on stderr, and 2.

        Where this process fails, the others are told, and end too if they do not fail by themselves.
        """
        try:
            code = work()
            if self._link:
                self.agree(end=True)
                jax.distributed.shutdown()
            return code
        except (ValueError, OSError, FloatingPointError) as error:
            self._await_verdict()
            print(f"{PROGRAM}: {error}", file=sys.stderr)
            return self._fail(2, error)
        except BaseException as error:
            if not self._link:
                raise
            self._await_verdict()
            traceback.print_exc()
            return self._fail(1, error)

    def _await_verdict(self) -> None:
        """A lost peer shows as an error of JAX or Orbax first; the verdict, which is soon there, ends the process."""
        if self._link:
            self._link.wait_for(lambda _: False, 2 * BEAT)

    def _fail(self, code: int, error: BaseException) -> int:
        if self._link:
            self._link.send(ended=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            # the door is in process 0, and stays until the others have heard it
            self._link.wait_for(lambda link: link.all_ended, BEAT / 4 if self.index else GRACE + 4 * BEAT)
            sys.stdout.flush()
            os._exit(code)  # past JAX's own end, which would wait for the others
        return code


def join(options: argparse.Namespace) -> Peers:
    """Meets the other processes, if there are any, and connects JAX. options: those of `command.add_process_options`.

    To be called before JAX is used for anything. Where an option is missing it is asked of SLURM, Open MPI or the TPU's
    metadata. ValueError for options that do not go together; ends the process (exit code LOST), with a line that names who
    is missing, when not all are there within `start_limit` seconds.
    """
    found = find_numbers(options)
    if found is None:
        return Peers()
    address, count, index, local_devices = found
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 <= index < count:
        raise ValueError(
            f"--coordinator={address} --processes={count} --process={index}: give HOST:PORT, and a number below the count"
        )
    if index == 0:
        Door(int(port), count, options.start_limit, options.lost_after).start()
    link = Link("127.0.0.1" if index == 0 else host.strip("[]"), int(port), index, count, options)
    link.wait_for(lambda link: link.jax_port is not None)
    assert link.jax_port is not None
    # XLA:CPU's collectives between processes block threads of a pool of one a core, and with several devices a process those run
    # out, all waiting for each other; nor may two programs in flight meet another process's in the other order
    os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, LEAST_THREADS)))
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # JAX's own limits are further away than ours, so that they never come first
    patience = int(10 * max(options.start_limit, options.lost_after))
    jax.distributed.initialize(
        f"127.0.0.1:{link.jax_port if index == 0 else _relay(link.host, link.jax_port)}",
        count,
        index,
        local_device_ids=local_devices,
        initialization_timeout=patience,
        heartbeat_timeout_seconds=patience,
        coordinator_bind_address=f"[::]:{link.jax_port}",
    )
    peers = Peers(index, count, link)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "orbax-checkpoint")}
    peers.agree({**versions, "jdiff": __version__, "python": platform.python_version()})
    return peers


def find_numbers(options: argparse.Namespace) -> tuple[str, int, int, Any] | None:
    """(coordinator, processes, this one's number, local device ids or None); None for a process by itself."""
    given = (options.coordinator, options.processes, options.process)
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    several |= "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if given == (None, None, None) and not several:
        return None
    if options.processes not in (None, "auto") and not options.processes.isdecimal():
        raise ValueError(f"--processes={options.processes}: give a number, or auto")
    count = None if options.processes in (None, "auto") else int(options.processes)
    # not public, but the one place that knows SLURM, Open MPI, TPUs and Kubernetes
    from jax._src.clusters import ClusterEnv

    address, index, local = options.coordinator, options.process, None
    if None in (address, count, index):
        address, count, index, local = ClusterEnv.auto_detect_unset_distributed_params(
            address, count, index, None, None, 300
        )
    for name, value in (("coordinator HOST:PORT", address), ("processes N", count), ("process I", index)):
        if value is None:
            raise ValueError(
                f"--{name} is missing, and neither SLURM, Open MPI nor a TPU's metadata is here to ask: give "
                "--coordinator, --processes and --process"
            )
    assert address is not None and count is not None and index is not None
    return address, count, index, local


class Link:
    """A process's connection to the door, with a thread that listens and one that gives signs of life."""

    def __init__(self, host: str, port: int, index: int, count: int, options: argparse.Namespace):
        self.host, self.index, self.lost_after = host, index, options.lost_after
        self.changed = threading.Condition()
        self.agreed = 0
        self.jax_port: int | None = None
        self.all_ended = self.ended = False
        self.started: int | None = None
        self.signal: int | None = None
        self.held = False
        self.last_step: int | None = None
        self._sending = threading.Lock()
        self._heard = time.monotonic()
        self._socket = self._connect(host, port, options.start_limit)
        self.send(hello=index, of=count, host=socket.gethostname(), pid=os.getpid())
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name="jdiff-peers", daemon=True).start()

    def _connect(self, host: str, port: int, limit: float) -> socket.socket:
        end = time.monotonic() + limit
        while True:
            try:
                connection = socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic()))
            except OSError as error:
                if time.monotonic() + BEAT > end:
                    _end(
                        f"process 0 is missing: nobody answers at --coordinator={host}:{port} after {limit:g} s ({error})"
                    )
                time.sleep(BEAT / 4)
            else:
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection

    def send(self, **message: Any) -> None:
        """One message to the door. Where it is gone the listening thread says so."""
        if "ended" in message:
            self.ended = True
        _send(self._socket, self._sending, message)

    def wait_for(self, condition: "Callable[[Link], bool]", timeout: float | None = None) -> None:
        """Waits until `condition(self)`, or the time is over; the process ends where there is a verdict meanwhile."""
        with self.changed:
            self.changed.wait_for(lambda: condition(self), timeout)

    def stop(self, caught: int | None, step: int) -> int | None:
        """See `Peers.stop`."""
        with self.changed:
            if caught is not None and self.signal is None:
                self.signal = caught
                self.send(stop=caught)
            if self.held and self.started is None:
                self.send(at=step)
            self.started = step
            self.changed.wait_for(lambda: not self.held or self.last_step is not None)
            if self.last_step is not None and step >= self.last_step:
                return self.signal
            self.started = step + 1
            return None

    def _beat(self) -> None:
        while not self.ended:
            self.send(beat=1)
            if time.monotonic() - self._heard > self.lost_after and not self.ended:
                _end(f"process 0 ({self.host}) is lost: no sign of life for {self.lost_after:g} s")
            time.sleep(BEAT)

    def _listen(self) -> None:
        for message in _messages(self._socket):
            self._heard = time.monotonic()
            if "verdict" in message:
                time.sleep(0.0 if self.index else BEAT / 4)  # the door is in process 0: the others hear it first
                _end(message["verdict"], message["code"])
            if "failed" in message and not self.ended:
                threading.Thread(target=self._follow, args=(message["failed"],), daemon=True).start()
            with self.changed:
                self.jax_port = message.get("jax_port", self.jax_port)
                self.all_ended |= "all_ended" in message
                self.agreed = message.get("agreed", self.agreed)
                self.ended |= message.get("end", False)
                if "hold" in message:
                    self.held, self.signal = True, message["hold"]
                    if self.started is not None:
                        self.send(at=self.started)
                self.last_step = message.get("last_step", self.last_step)
                self.changed.notify_all()
        if not self.ended:
            _end(f"process 0 ({self.host}) is lost: its connection is closed")

    def _follow(self, failure: str) -> None:
        """Ends with another process's failure, if this one does not end by itself: the same may be wrong with all."""
        time.sleep(GRACE)
        if not self.ended:
            self.send(ended=failure)
            _end(failure)


class Door:
    """Process 0's side: a thread for each connection, and one that looks at the clock."""

    def __init__(self, port: int, count: int, start_limit: float, lost_after: float):
        self.count, self.start_limit, self.lost_after = count, start_limit, lost_after
        self.lock = threading.RLock()
        self.verdict: Message = {}
        self.sockets: dict[int, tuple[socket.socket, threading.Lock]] = {}
        self.names: dict[int, str] = {}
        self.heard: dict[int, float] = {}
        self.ended: set[int] = set()
        self.facts: dict[int, dict[int, Message]] = collections.defaultdict(dict)
        self.at: dict[int, int] = {}
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            self.server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=count)
        except OSError as error:
            raise ValueError(f"--coordinator: port {port} of this machine cannot be had ({error.strerror})") from error

    def start(self) -> None:
        """Lets the processes in."""
        for work in (self._accept, self._clock):
            threading.Thread(target=work, name="jdiff-door", daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self.server.accept()
            threading.Thread(target=self._serve, args=(connection,), name="jdiff-door", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        messages = _messages(connection)
        hello = next(messages, {})
        if not hello.keys() >= {"hello", "of", "host", "pid"} or not isinstance(index := hello["hello"], int):
            return connection.close()  # not one of ours
        with self.lock:
            name = f"process {index} ({hello['host']}, pid {hello['pid']})"
            if hello["of"] != self.count or not 0 <= index < self.count:
                self._judge(f"{name} was started as one of {hello['of']}, and process 0 as one of {self.count}", 2)
            elif index in self.sockets:
                self._judge(f"{self.names[index]} and {name} have the same number", 2)
            self.sockets[index], self.names[index] = (connection, threading.Lock()), name
            if self.verdict:
                return self._tell(**self.verdict)
            self.heard[index] = time.monotonic()
            if len(self.sockets) == self.count:
                with socket.create_server(("", 0)) as free:
                    jax_port = free.getsockname()[1]
                self._tell(jax_port=jax_port)
        for message in messages:
            with self.lock:
                self.heard[index] = time.monotonic()
                self._take(index, message)
        with self.lock:
            if index not in self.ended:
                self._judge(f"{self.names[index]} is lost: its connection is closed", LOST)
            self._gone(index)

    def _take(self, index: int, message: Message) -> None:
        if "agree" in message:
            number = message["agree"]
            self.facts[number][index] = message["facts"]
            if len(self.facts[number]) == self.count:
                votes = self.facts.pop(number)
                if line := difference(votes, self.names):
                    self._judge(line, 2)
                if message["end"]:
                    self.ended = set(votes)
                self._tell(agreed=number, end=message["end"])
        if "stop" in message:
            self._tell(hold=message["stop"])
        if "at" in message:
            self.at[index] = message["at"]
            if len(self.at) == self.count:
                self._tell(last_step=max(self.at.values()))
        if "ended" in message:
            if not self.ended:
                self._tell(failed=f"{self.names[index]} has failed: {message['ended']}")
            self._gone(index)

    def _gone(self, index: int) -> None:
        self.ended.add(index)
        if len(self.ended) == self.count:
            self._tell(all_ended=1)

    def _clock(self) -> None:
        opened = time.monotonic()
        while True:
            time.sleep(BEAT)
            with self.lock:
                now = time.monotonic()
                if len(self.sockets) < self.count and now - opened > self.start_limit:
                    missing = sorted(set(range(self.count)) - self.sockets.keys())
                    listed = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
                    which = f"process {listed} is" if len(missing) == 1 else f"processes {listed} are"
                    self._judge(f"{which} missing: not started within {self.start_limit:g} s", LOST)
                for index, heard in self.heard.items():
                    if now - heard > self.lost_after and index not in self.ended:
                        self._judge(f"{self.names[index]} is lost: no sign of life for {self.lost_after:g} s", LOST)
                self._tell(tick=1)

    def _tell(self, **message: Any) -> None:
        for index in sorted(self.sockets, reverse=True):  # process 0, which may end of it, last
            _send(*self.sockets[index], message)

    def _judge(self, verdict: str, code: int) -> None:
        """The first verdict counts: what follows is its consequence. This process is told as the others are."""
        if not self.verdict:
            self.verdict = {"verdict": verdict, "code": code}
            self._tell(**self.verdict)


def difference(votes: Mapping[int, Mapping[str, Any]], names: Mapping[int, str]) -> str | None:
    """One line that names a process whose facts are not most others' (process 0's where it is one against one), or None."""
    for key in dict.fromkeys(key for facts in votes.values() for key in facts):
        texts = {index: json.dumps(votes[index].get(key), sort_keys=True) for index in sorted(votes)}
        usual, _ = collections.Counter(texts.values()).most_common(1)[0]  # the first seen of equals
        odd = [index for index, text in texts.items() if text != usual]
        if odd:
            more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            other = next(index for index, text in texts.items() if text == usual)
            return (
                f"{names[odd[0]]}{more} differs from {names[other]}: {key} is {texts[odd[0]][:200]}, not {usual[:200]}; "
                "start all processes with the same command, packages and files"
            )
    return None


def _relay(host: str, port: int) -> int:
    """A port of this machine that leads to JAX's coordination service.

    It stays open where the service dies with process 0: told so, JAX's client would abort this process before it has said who
    is lost.
    """
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, closes: bool) -> None:
        try:
            while data := source.recv(2**16):
                sink.sendall(data)
            if closes:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def accept() -> None:
        while True:
            near, _ = server.accept()
            try:
                far = socket.create_connection((host, port))
            except OSError:
                near.close()
                continue
            for ends in ((near, far, True), (far, near, False)):
                threading.Thread(target=pump, args=ends, name="jdiff-relay", daemon=True).start()

    threading.Thread(target=accept, name="jdiff-relay", daemon=True).start()
    return server.getsockname()[1]


def _messages(connection: socket.socket) -> Iterator[Message]:
    """One JSON object a line, until the other side is gone or sends anything else."""
    try:
        for line in connection.makefile("r", encoding="utf-8"):
            message = json.loads(line)
            if not isinstance(message, dict):
                return
            yield message
    except (OSError, ValueError):
        return


def _send(connection: socket.socket, lock: threading.Lock, message: Message) -> None:
    with lock:
        try:
            connection.sendall((json.dumps(message) + "\n").encode())
        except OSError:
            return  # whoever listens to this connection sees its end


def _end(line: str, code: int = LOST) -> NoReturn:
    """From any thread, past everything that would wait for a peer."""
    sys.stdout.flush()
    print(f"\n{PROGRAM}: {line}", file=sys.stderr, flush=True)  # not at the end of a progress bar
    os._exit(code)
