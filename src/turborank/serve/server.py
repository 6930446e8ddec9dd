"""The server process: uvicorn with TLS, timeouts for slow clients and graceful shutdown."""

from __future__ import annotations

import asyncio
import functools
import math
import signal
import ssl
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from turborank.errors import InputError
from turborank.serve import telemetry
from turborank.serve.config import Settings
from turborank.serve.service import Service


def check_open_door(settings: Settings, service: Service) -> str:
    """The log text about API keys. Raises InputError when other machines can connect and no key is required."""
    if service.ring.required:
        return "API keys are required"
    if settings.loopback:
        return f"no API keys: only this machine can connect, and all its users may send requests ({settings.host})"
    raise InputError(
        f"expected API keys for a server that others can reach, got none for host {settings.host}",
        hint="make one with `turborank keys new NAME` and pass --keys FILE, or listen on 127.0.0.1",
    )


class _Connection(asyncio.Protocol):
    """A connection to one client: uvicorn's HTTP protocol, called through asyncio's interface, and two timers."""

    def __init__(self, guard: SlowClients, **uvicorns: Any) -> None:
        self._guard = guard
        self._http = H11Protocol(**uvicorns)
        self._loop = asyncio.get_running_loop()
        self._headers: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=1, low=0)  # pause_writing whenever the client leaves something unread
        self._client = tuple((transport.get_extra_info("peername") or ())[:2])  # none: the client has left
        self._guard.connections[self._client] = self
        self._http.connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._headers is None and not self._answering:
            self._expect_headers()  # the first bytes of another request on a kept connection
        self._http.data_received(data)

    def eof_received(self) -> None:
        self._http.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()
        self._watch(None)

    def resume_writing(self) -> None:
        _cancel(self._reading)
        self._http.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        _cancel(self._headers)
        _cancel(self._reading)
        self._guard.connections.pop(self._client, None)
        self._http.connection_lost(error)

    def begin(self) -> None:
        """A request's headers are complete."""
        self._answering = True
        _cancel(self._headers)
        self._headers = None

    def end(self) -> None:
        """A response is complete; the client may still have to read it."""
        self._answering = False

    def _expect_headers(self) -> None:
        self._headers = self._loop.call_later(self._guard.header_timeout, self._transport.close)

    def _watch(self, before: int | None) -> None:
        """Abort the connection if the write buffer has not shrunk since ``answer_timeout`` seconds."""
        unread = self._transport.get_write_buffer_size()
        if before is not None and unread >= before:
            self._transport.abort()  # close() would wait until the client has read the buffer
        else:
            self._reading = self._loop.call_later(self._guard.answer_timeout, self._watch, unread)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class SlowClients:
    """The ASGI application with two timeouts, in seconds, against slow clients.

    The connection is closed when a request's headers are not complete after ``header_timeout``, and when the client
    reads nothing of a response for ``answer_timeout``. Clients that read slowly are not disconnected. ``connect`` is
    the connection class for uvicorn's ``http``. Nothing but the interfaces of asyncio and ASGI is used: headers are
    complete when the application is called, and asyncio calls ``pause_writing`` while a response is unread.
    """

    def __init__(self, application: ASGIApp, header_timeout: float, answer_timeout: float) -> None:
        self._application = application
        self.header_timeout, self.answer_timeout = header_timeout, answer_timeout
        self.connections: dict[tuple[str, int], _Connection] = {}  # by the client's address
        self.connect: Any = functools.partial(_Connection, self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; the address in its scope tells the connection."""
        connection = self.connections.get(tuple(scope["client"])) if scope.get("client") else None
        if connection is None:  # start-up and shutdown
            return await self._application(scope, receive, send)
        connection.begin()

        async def forward(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                connection.end()

        await self._application(scope, receive, forward)


def check_certificate(settings: Settings) -> None:
    """Raise InputError unless the certificate and its key can be read and match."""
    if settings.tls_certificate:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")  # "": never prompts
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"expected a PEM certificate at {settings.tls_certificate} and its key at {settings.tls_key}, "
                f"got: {error}",
                hint="tls_certificate and tls_key name the files; the key must have no passphrase",
            ) from None


class Server(uvicorn.Server):
    """uvicorn with graceful shutdown: on SIGTERM /ready answers 503, and after ``drain`` seconds the socket closes.

    Requests in progress are answered. A second signal stops the server at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._close_at: float | None = None
        self.failure: BaseException | None = None
        self.interrupted = False  # by Ctrl-C

    def fail(self, error: BaseException) -> None:
        """Stop the server because the default model cannot be loaded."""
        self.failure = error
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler: start draining; stop at once on the second signal."""
        self.interrupted |= sig == signal.SIGINT
        if self._close_at is not None:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._close_at = time.monotonic() + self._service.settings.drain
        telemetry.event("draining", {"signal": signal.Signals(sig).name, "seconds": self._service.settings.drain})

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; stops the server when draining ends."""
        if self._close_at is not None and time.monotonic() >= self._close_at:
            self._service.closing = self.should_exit = True
        return await super().on_tick(counter)


def make(settings: Settings, build: Callable[..., ASGIApp]) -> Server:
    """A server ready to run. ``build`` is :func:`turborank.serve.app.build`.

    Raises InputError for invalid settings before a model is loaded.
    """
    service = Service(settings)
    try:
        doors = check_open_door(settings, service)
        check_certificate(settings)
        server = Server(uvicorn.Config(lambda scope: None, log_config=None), service)
        guarded = SlowClients(build(service, on_failure=server.fail), settings.header_timeout, settings.answer_timeout)
        server.config = uvicorn.Config(
            guarded,
            host=settings.host,
            port=settings.port,
            http=guarded.connect,
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            root_path=settings.prefix,
            timeout_keep_alive=settings.keep_alive,
            timeout_graceful_shutdown=math.ceil(settings.timeout),
            limit_concurrency=settings.max_connections + 1,  # uvicorn refuses the connection that reaches this number
            ssl_certfile=settings.tls_certificate or None,
            ssl_keyfile=settings.tls_key or None,
        )
    except BaseException:
        service.close()
        raise
    names = [model.name for model in service.models.all]
    telemetry.event("starting", {"models": names, "host": settings.host, "port": settings.port, "keys": doors})
    return server


def run(settings: Settings, build: Callable[..., ASGIApp]) -> None:
    """Serve until a signal; see :func:`make`.

    Raises the error when the default model cannot be loaded, and KeyboardInterrupt on SIGINT.
    """
    telemetry.set_up(settings.log_level)
    server = make(settings, build)
    server.run()
    if server.failure is not None:
        raise server.failure
    if server.interrupted:
        raise KeyboardInterrupt
